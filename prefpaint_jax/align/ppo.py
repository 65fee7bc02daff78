"""Advantages, PPO loss and choice of timesteps: reinforcement learning without a network.

Policy gradient over the denoising chain (DDPO, Black et al. 2024) with PPO's clipped importance
ratio (Schulman et al. 2017). Each sample's loss is multiplied by its trust weight (PrefPaint,
arXiv 2410.21966). Losses and metrics are per sample, so that the caller can take the true mean over
devices and microbatches.
"""
# Shapes: B samples (prompts × samples per prompt), S samples per group, k timesteps.

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from prefpaint_jax.diffusion.ddim import Latents, Sigma, Weight, mean_over_elements

LARGEST_REWARD = 1e9


def usable(rewards: Float[Array | np.ndarray, " B"]) -> Bool[Array, " B"]:
  """Returns whether each reward is finite and at most `LARGEST_REWARD` in absolute value.

  The square of a reward beyond 1e19 overflows float32; one reward of 1e19 would give all other
  samples the advantage 0.
  """
  return jnp.abs(rewards) <= LARGEST_REWARD  # false for NaN


def standardise(
  rewards: Float[Array | np.ndarray, " B"],
  valid: Bool[Array | np.ndarray, " B"],
  group_size: int = 1,
  std: str = "batch",
  clip: float = 10.0,
  eps: float = 1e-7,
) -> Float[Array, " B"]:
  """Computes advantages from rewards: (r − mean) / (std + eps), clipped to ±clip.

  Samples that are not valid, and samples whose reward is not `usable`, get advantage 0 and are left
  out of the mean and the standard deviation. A group with one valid sample, or with equal rewards,
  gets advantage 0.

  Args:
    rewards: of B samples; each S = `group_size` consecutive samples have the same prompt.
    valid: False for the samples to leave out.
    group_size: 1 computes mean and standard deviation over the whole batch; S > 1 computes the
      mean over each group.
    std: for S > 1, "group" computes one standard deviation per group; "batch" computes one for the
      whole batch, from rewards minus their group's mean. Both are unbiased variances: the divisor
      is the number of valid samples minus the number of means, one per group with a valid sample.
    clip: the largest absolute value of an advantage.
    eps: added to the standard deviation.

  Raises:
    ValueError: for an unknown `std`, or if B is not a multiple of `group_size`.
  """
  if std not in ("batch", "group"):
    raise ValueError(f"std is {std!r}; expected 'batch' or 'group'")
  batch = rewards.shape[0]
  group = batch if group_size == 1 else group_size
  if group_size < 1 or batch % group:
    raise ValueError(
      f"group_size is {group_size}; expected a divisor of the batch of {batch} rewards"
    )

  valid = (valid & usable(rewards)).reshape(-1, group)
  rewards = jnp.where(valid, rewards.astype(jnp.float32).reshape(-1, group), 0.0)
  # Subtract the lowest reward of the group first, so that equal rewards become exactly 0. Otherwise
  # the rounding error of their mean, divided by a deviation of about 0, would be an advantage.
  lowest = jnp.min(rewards, axis=1, keepdims=True, where=valid, initial=jnp.inf)
  rewards = jnp.where(valid, rewards - lowest, 0.0)
  count = jnp.sum(valid, axis=1, keepdims=True)
  mean = jnp.sum(rewards, axis=1, keepdims=True) / jnp.maximum(count, 1)
  centred = jnp.where(valid, rewards - mean, 0.0)

  axis = 1 if std == "group" else None
  squares = jnp.sum(centred**2, axis, keepdims=True)
  freedom = jnp.sum(jnp.maximum(count - 1, 0), axis, keepdims=True)
  deviation = jnp.sqrt(squares / jnp.maximum(freedom, 1))
  return jnp.clip(centred / (deviation + eps), -clip, clip).reshape(batch)


def ppo_loss(
  log_prob: Float[Array | np.ndarray, " B"],
  old_log_prob: Float[Array | np.ndarray, " B"],
  advantages: Float[Array | np.ndarray, " B"],
  weights: Float[Array | np.ndarray, " B"],
  clip_range: float,
  valid: Bool[Array | np.ndarray, " B"] | None = None,
) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
  """Computes the PPO loss of each sample: γ·max(−Aρ, −A clip(ρ, 1 ± clip_range)).

  The importance ratio is ρ = exp(log_prob − old_log_prob).

  Args:
    log_prob: log-probabilities under the trained policy.
    old_log_prob: log-probabilities under the behaviour policy.
    advantages: A.
    weights: γ, the trust weights.
    clip_range: the largest difference of ρ from 1 before it is clipped.
    valid: False for samples that get loss 0, ρ = 1 and gradient 0, even where their
      log-probabilities, advantages or weights are NaN; None: all samples are valid.

  Returns:
    The loss, and the metrics `ratio` (ρ), `clipped` (1 where ρ is outside 1 ± clip_range) and
    `approx_kl` ((ρ − 1) − ln ρ, a low-variance estimate of KL(old ‖ new)).
  """
  if valid is not None:
    # Mask the inputs, not the loss: the derivative of where(valid, NaN, 0) is 0 · NaN = NaN.
    masked = (jnp.where(valid, x, 0.0) for x in (log_prob, old_log_prob, advantages, weights))
    log_prob, old_log_prob, advantages, weights = masked
  log_ratio = log_prob - old_log_prob
  ratio = jnp.exp(log_ratio)
  clipped_ratio = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
  loss = weights * jnp.maximum(-advantages * ratio, -advantages * clipped_ratio)
  metrics = {
    "ratio": ratio,
    "clipped": (ratio != clipped_ratio).astype(jnp.float32),
    # Near ρ = 1 the subtraction in ρ − 1 would lose most digits; expm1 keeps them.
    "approx_kl": jnp.expm1(log_ratio) - log_ratio,
  }
  return loss, metrics


def noise_log_ratio(
  x_prev: Latents,
  mean: Latents,
  sigma: Sigma,
  noise: Latents,
  weight: Weight | None = None,
) -> Float[Array, " B"]:
  """Computes GRPO-Guard's log-ratio, σ (log p − log p_old + KL), as mean(noise · (μ − μ_old)).

  A transition is x_t' = μ_old + σ · noise. Its log-ratio is that mean over σ, minus the KL
  divergence (μ − μ_old)² / 2σ². The log-ratio without the divergence and the factor 1/σ has no bias
  below 0, and one scale for all steps (`verl_omni/trainer/diffusion/diffusion_algos.py`). It is 0
  where σ = 0.

  Args:
    x_prev: x_t'.
    mean: μ of the trained policy.
    noise: that of the rollout.
    weight: that of `ddim.log_prob`.
  """
  sigma = jnp.reshape(jnp.asarray(sigma, jnp.float32), (-1, *(1,) * (mean.ndim - 1)))
  change = jnp.where(sigma > 0, mean - (x_prev - sigma * noise), 0.0)
  return mean_over_elements(noise * change, weight)


def draw_timesteps(
  key: jax.Array, num_steps: int, k: int, first: int = 0, last: int | None = None
) -> Int32[Array, " k"]:
  """Draws k different step indices at random.

  Args:
    num_steps: the number of steps of the rollout.
    first: the lowest index that can be drawn.
    last: one more than the highest index that can be drawn; None: `num_steps`.

  Raises:
    ValueError: if `first` and `last` are not within the rollout or leave fewer than k steps.
  """
  last = num_steps if last is None else last
  if not 0 <= first < last <= num_steps:
    raise ValueError(
      f"first is {first} and last is {last}; expected a range within a rollout of {num_steps} steps"
    )
  if not 1 <= k <= last - first:
    raise ValueError(f"k is {k}; expected 1 to {last - first}, the steps from {first} to {last}")
  return jax.random.permutation(key, jnp.arange(first, last, dtype=jnp.int32))[:k]


def masked_mean(
  values: Float[Array | np.ndarray, "..."], valid: Bool[Array | np.ndarray, "..."]
) -> Float[Array, ""]:
  """Computes the mean of the valid values; 0 if no value is valid.

  `valid` broadcasts to the shape of `values`.
  """
  valid = jnp.broadcast_to(valid, values.shape)
  return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
