#!/usr/bin/env bash
# Measures whether the trust weight helps. Aligns the mini model without a weight, with a constant
# weight, and with the trust weight γ of equal mean; each with AdamW, which is invariant to a
# constant weight, and with SGD, from three seeds. Then the same with NFT and a reward whose features
# are linear and whitened, with a constant weight and with γ. Draws the curves and prints the
# iterations that each variant needed. The same command resumes an interrupted ablation.
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

echo "== a reward with linear, whitened features"
data=$workdir/reward
python -m prefpaint_jax.collect --config=configs/collect.py:mini --workdir="$data/candidates" \
  --config.num_prompts=2500 --config.perturbed=3
if [[ ! -d $data/preferences/preferences ]]; then
  python -m prefpaint_jax.annotate --candidates="$data/candidates"
  python -m prefpaint_jax.data.preferences --config=configs/preferences.py \
    --workdir="$data/preferences" --config.source="$data/candidates"
fi
python -m prefpaint_jax.train_reward --config=configs/reward.py:mini --workdir="$data/run" \
  --config.preferences="$data/preferences" --config.network.activation=identity \
  --config.whiten=True --config.iterations=1000

echo "== NFT"
runs=()
for seed in 0 1 2; do
  for norm in constant mahalanobis; do
    runs+=(--workdir="$workdir/nft/$norm/seed$seed")
    # k and b again give γ the mean 1.4 and half of it as standard deviation.
    python -m prefpaint_jax.train --config=configs/rl.py:mini \
      --workdir="$workdir/nft/$norm/seed$seed" --config.seed="$seed" \
      --config.reward="$data/run/reward" --config.trust.norm=$norm \
      --config.trust.k=46.15 --config.trust.b=3.132 --config.trust.constant=1.4 \
      --config.algorithm=nft --config.advantage_clip=5 --config.kl_weight=1 \
      --config.learning_rate=2e-4 --config.clip_norm=1.0 --config.train_timesteps=6 \
      --config.num_iterations=25 --config.eval_every=5 --config.eval_prompts=256 \
      --config.final_prompts=0 --config.sample_every=0
  done
done
python -m prefpaint_jax.plot "${runs[@]}" --mean --output="$workdir/nft.png" \
  --only='^(reward/mean|trust/mean|held_out/(reward|true_preference)_(gain_in_sd|winrate))$' \
  --last=held_out/reward_gain_in_sd --last=held_out/true_preference_gain_in_sd \
  --last=held_out/reward_winrate --last=held_out/true_preference_winrate
