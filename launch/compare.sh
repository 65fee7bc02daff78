#!/usr/bin/env bash
# Compares the algorithms on the mini model: PPO, PPO with GRPO-Guard's ratio, NFT, Diffusion-DPO and
# CaPO, each from three seeds, with one reward. Every run has 7,680 images and 322,560 passes of the
# UNet (a backward pass counts as two): the online algorithms sample 60 iterations of 128 images, the
# offline ones train on pairs from 960 prompts with 8 candidates each. Then judges all policies on
# the same prompts, draws the curves and prints the tables. The same command resumes an interrupted
# comparison.
#
#   launch/compare.sh [WORKDIR]      # default runs/compare
set -euo pipefail
workdir=${1:-runs/compare}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/compiled}
seeds="0 1 2"

online() {  # NAME, SEED, FLAG...
  local name=$1 seed=$2
  shift 2
  python -m prefpaint_jax.train --config=configs/rl.py:mini --workdir="$workdir/$name/seed$seed" \
    --config.seed="$seed" --config.final_prompts=0 --config.sample_every=0 "$@"
}

offline() {  # LOSS, SEED, FLAG...: on pairs that one reward ranks
  local loss=$1 seed=$2 data=$workdir/data/seed$2
  shift 2
  python -m prefpaint_jax.collect --config=configs/collect.py:mini --workdir="$data/candidates" \
    --config.seed="$((seed + 2))" --config.num_prompts=960 --config.num_test_prompts=0 \
    --config.samples_per_prompt=8 --config.rewards="('mini',)"
  if [[ ! -d $data/preferences/preferences ]]; then
    python -m prefpaint_jax.data.preferences --config=configs/preferences.py \
      --workdir="$data/preferences" --config.source="$data/candidates" --config.rewards=mini
  fi
  python -m prefpaint_jax.train_dpo --config=configs/dpo.py:mini --workdir="$workdir/$loss/seed$seed" \
    --config.preferences="$data/preferences" --config.seed="$seed" --config.loss="$loss" "$@"
}
