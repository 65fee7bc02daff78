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

# A reward that has only seen what the base paints is soon hacked. So a first one is fitted, the base
# is aligned with it until it is, and what it paints then is scored for the second one.
fit_reward() {  # NAME FLAG...
  python -m prefpaint_jax.train_reward --config=configs/reward.py --workdir="$workdir/$1" "${@:2}"
  rm -rf "$mini/reward"
  python - "$workdir/$1/reward" "$mini/reward" <<'PYTHON'
import sys
from prefpaint_jax.reward import RewardModel

RewardModel.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], dtype="float16")
PYTHON
}

echo "== first reward: candidates of the base, simulated annotators, network, bound"
fit_reward reward1 --config.painted=2 --config.perturbed=3 --config.iterations=1500

echo "== what gets past it"
python -m prefpaint_jax.train --config=configs/rl.py:mini --workdir="$workdir/align1" \
  --config.num_iterations=40 --config.checkpoint_every=8 --config.keep_checkpoints=5 \
  --config.sample_every=0
for step in 8 40; do
  rm -rf "$workdir/aligned$step"
  python -m prefpaint_jax.export --workdir="$workdir/align1" --output="$workdir/aligned$step" \
    --step="$step"
done

echo "== second reward: candidates of the base and of both"
fit_reward reward2 --config.policies="('mini','$workdir/aligned40','$workdir/aligned8')"
du -sh "$mini"
