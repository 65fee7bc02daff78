#!/usr/bin/env bash
# Rebuilds the embedded mini world from its photographs: VAE and UNet, prompts, reward and bound.
# Run from the repository's root. Interrupted, it goes on where it stopped.
#
#   launch/make_mini.sh [WORKDIR]      # default runs/make_mini
set -euo pipefail
workdir=${1:-runs/make_mini}
mini=prefpaint_jax/mini
mkdir -p "$workdir"

echo "== policy: a VAE, then a UNet of mixed quality"
python -m prefpaint_jax.pretrain --config=configs/pretrain.py:mini --workdir="$workdir/pretrain"
rm -rf "$mini/policy"
python - "$workdir/pretrain/pipeline" "$mini/policy" <<'PYTHON'
import sys
from prefpaint_jax.inpainter import Inpainter

Inpainter.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], dtype="float16")
PYTHON

echo "== prompts: crops of the photographs with masks, train and test from different parts"
rm -rf "$mini/prompts" "$workdir/prompts"
python - "$workdir" "$mini" <<'PYTHON'
import shutil, sys
from prefpaint_jax.data.prompts import build_prompts

workdir, mini = sys.argv[1:]
folder = build_prompts(workdir, f"{mini}/photos", num_train=1200, num_test=512)
shutil.copytree(folder, f"{mini}/prompts/{folder.name}")
PYTHON

echo "== reward: candidates, simulated annotators, network, bound"
python -m prefpaint_jax.train_reward --config=configs/reward.py --workdir="$workdir/reward"
rm -rf "$mini/reward"
python - "$workdir/reward/reward" "$mini/reward" <<'PYTHON'
import sys
from prefpaint_jax.reward import RewardModel

RewardModel.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], dtype="float16")
PYTHON
du -sh "$mini"
