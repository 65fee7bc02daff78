#!/usr/bin/env bash
# Measures whether the trust weight helps. Aligns the mini model without a weight, with a constant
# weight, and with the trust weight γ of equal mean; each with AdamW, which is invariant to a
# constant weight, and with SGD, from three seeds. Then draws the curves and prints the iterations
# that each variant needed. The same command resumes an interrupted ablation.
#
#   launch/ablation.sh [WORKDIR]      # default runs/ablation
set -euo pipefail
workdir=${1:-runs/ablation}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/compiled}

align() {  # OPTIMIZER, NORM, SEED
  local run=$workdir/$1/$2/seed$3 rate=1e-4
  # With SGD a rate of 0.1 destroys the policy, even without a weight.
  if [[ $1 == sgd ]]; then rate=0.02; fi
  runs+=(--workdir="$run")
  # With these k and b, γ of the base policy's samples has mean 1.4, the constant weight, and a
  # standard deviation of half of that.
  python -m prefpaint_jax.train --config=configs/rl.py:mini --workdir="$run" --config.seed="$3" \
    --config.optimizer="$1" --config.learning_rate=$rate \
    --config.trust.norm="$2" --config.trust.k=150 --config.trust.b=2.99 --config.trust.constant=1.4 \
    --config.kl_weight=0 --config.num_iterations=25 --config.eval_every=5 --config.eval_prompts=256 \
    --config.final_prompts=0 --config.sample_every=0
}

for optimizer in adamw sgd; do
  runs=()
  for seed in 0 1 2; do
    for norm in none constant mahalanobis; do
      align $optimizer $norm $seed
    done
  done
  echo "== $optimizer"
  python -m prefpaint_jax.plot "${runs[@]}" --mean --output="$workdir/$optimizer.png" \
    --only='^(reward/mean|trust/mean|held_out/(reward|true_preference)_(gain_in_sd|winrate))$' \
    --reach=held_out/reward_gain_in_sd=0.5 --reach=held_out/true_preference_gain_in_sd=0.5 \
    --last=held_out/reward_gain_in_sd --last=held_out/true_preference_gain_in_sd \
    --last=held_out/reward_winrate --last=held_out/true_preference_winrate
done
