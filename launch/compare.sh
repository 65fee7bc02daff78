#!/usr/bin/env bash
# Compares the algorithms on the mini model: PPO, PPO with GRPO-Guard's ratio, NFT, Diffusion-DPO and
# CaPO, each from three seeds, with one reward. Every run scores 7,680 samples: 60 iterations of 128,
# or 960 prompts with 8 candidates each, some 70 of them for validation. PPO takes 322,560 forward
# passes of the UNet (a backward pass counts as two), NFT 307,200, DPO and CaPO 199,680. Then judges
# all policies on the same prompts, draws the curves and prints the table. The same command resumes
# an interrupted comparison.
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

for seed in $seeds; do
  online ppo "$seed"
  online guard "$seed" --config.ratio_normalisation=True --config.clip_range=1e-4
  # 6 of the steps, so that the old policy's and the base's passes cost no more than PPO's.
  online nft "$seed" --config.algorithm=nft --config.advantage_clip=5 --config.kl_weight=1 \
    --config.learning_rate=2e-4 --config.clip_norm=1.0 --config.train_timesteps=6
  offline dpo "$seed" --config.num_iterations=480
  offline capo "$seed" --config.num_iterations=480 --config.beta=100
  python -m prefpaint_jax.evaluate --config=configs/eval.py:mini --workdir="$workdir/eval/seed$seed" \
    --config.policy="$workdir/ppo/seed$seed" --config.samples_per_prompt=4 \
    --config.rivals="('$workdir/guard/seed$seed','$workdir/nft/seed$seed','$workdir/dpo/seed$seed','$workdir/capo/seed$seed')"
done

for unit in images unet_passes; do
  python -m prefpaint_jax.plot --workdir="$(echo "$workdir"/{ppo,guard,nft}/seed* | tr ' ' ,)" --mean \
    --x=$unit --output="$workdir/$unit.png" \
    --only='^held_out/(true_preference_gain_in_sd|reward_gain_in_sd|drift/distance)$' \
    --reach=held_out/true_preference_gain_in_sd=0.5 --reach=held_out/reward_gain_in_sd=0.8
done

python - "$workdir" <<'PYTHON'
import json, pathlib, sys
import numpy as np

workdir = pathlib.Path(sys.argv[1])
files = [json.loads((file / "eval.json").read_text()) for file in sorted((workdir / "eval").iterdir())]
policies = {"PPO": lambda found: found}
rivals = {"guard": "PPO, normalised ratio", "nft": "NFT", "dpo": "Diffusion-DPO", "capo": "CaPO"}
for name, title in rivals.items():
  policies[title] = lambda found, name=name: next(
    policy for folder, policy in found["rivals"].items() if f"/{name}/" in folder
  )


def row(select):
  figures = []
  for found in map(select, files):
    true, learned = (found["judges"][judge]["all"] for judge in ("true preference", "mini"))
    diversity = found["drift"]["measures"]["diversity"]
    flagged = [name for name, x in found["drift"]["measures"].items() if x["flagged"]]
    values = [x[key]["value"] for x in (true, learned) for key in ("winrate/s1", "gain_in_sd")]
    figures.append([*values, diversity["policy"] / diversity["baseline"], len(flagged)])
  columns = np.array(figures).T
  return [f"{x.mean():.2f} [{x.min():.2f}, {x.max():.2f}]" for x in columns]


titles = ["", "true WinRate", "true gain, SD", "learned WinRate", "learned gain, SD"]
print("|", " | ".join([*titles, "diversity", "drifts flagged"]), "|")
print("|", " | ".join(["---"] * 7), "|")
for name, select in policies.items():
  print("|", " | ".join([name, *row(select)]), "|")
PYTHON
