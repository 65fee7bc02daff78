#!/usr/bin/env bash
# Rebuilds the embedded mini world from its photos: VAE and UNet, prompts, reward model and bound.
# Run it in the repository's root. The same command resumes an interrupted build.
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

echo "== prompts: crops of the photos with masks; train and test from different parts, unseen from other photos"
rm -rf "$mini/prompts" "$workdir/prompts"
python - "$workdir" "$mini" <<'PYTHON'
import shutil, sys
from prefpaint_jax.data.prompts import build_prompts

workdir, mini = sys.argv[1:]
folder = build_prompts(
  workdir, f"{mini}/photos", 1200, 512, unseen=f"{mini}/photos_unseen", num_unseen=256
)
shutil.copytree(folder, f"{mini}/prompts/{folder.name}")
PYTHON

# Makes candidates, simulated scores, a preference dataset and a reward model, in $workdir/NAME.
reward() {  # NAME, COLLECT_FLAG..., --, FIT_FLAG...
  local folder=$workdir/$1 collect=()
  shift
  while [[ $1 != -- ]]; do collect+=("$1"); shift; done
  shift
  python -m prefpaint_jax.collect --config=configs/collect.py:mini --workdir="$folder/candidates" "${collect[@]}"
  python -m prefpaint_jax.annotate --candidates="$folder/candidates"
  rm -rf "$folder/preferences"
  python -m prefpaint_jax.data.preferences --config=configs/preferences.py --workdir="$folder/preferences" \
    --config.source="$folder/candidates"
  python -m prefpaint_jax.train_reward --config=configs/reward.py:mini --workdir="$folder" \
    --config.preferences="$folder/preferences" "$@"
}

echo "== first reward model, from samples of the base policy"
reward first --config.num_prompts=1200 --config.num_test_prompts=64 --config.samples_per_prompt=2 \
  --config.perturbed=3 -- --config.iterations=800

# A policy aligned with the first reward model makes samples that this model overrates. They are
# candidates for the second reward model.
echo "== second reward model, from samples of the base policy and of an aligned policy"
python -m prefpaint_jax.train --config=configs/rl.py:mini --workdir="$workdir/aligned" \
  --config.reward="$workdir/first/reward" --config.kl_weight=0 --config.num_iterations=30 --config.sample_every=0 --config.final_prompts=0
reward second --config.policies="('mini','$workdir/aligned')" --config.num_prompts=5000 --config.perturbed=3 --
rm -rf "$mini/reward"
python - "$workdir/second/reward" "$mini/reward" <<'PYTHON'
import sys
from prefpaint_jax.reward import RewardModel

RewardModel.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], dtype="float16")
PYTHON
du -sh "$mini"
