"""Advantages, PPO loss, choice of timesteps: the reinforcement learning, without any network.

Policy gradient over the denoising chain (DDPO, Black et al. 2024) with PPO's clipped importance
ratio (Schulman et al. 2017), each sample's loss multiplied by its trust weight (PrefPaint,
arXiv 2410.21966). Per-sample values stay per sample until `masked_mean`, so that a mean over
devices and microbatches is the true mean.
"""
# Shapes: B samples (prompts × samples per prompt), P groups, S samples per group, K timesteps.

import jax
import jax.numpy as jnp


def standardise(
  rewards: jax.Array,
  valid: jax.Array,
  group_size: int = 1,
  std: str = "batch",
  clip: float = 10.0,
  eps: float = 1e-7,
) -> jax.Array:
  """Advantages [B] of rewards [B]: (r − mean) / (std + eps), clipped to ±clip.

  group_size 1 takes mean and standard deviation over the whole batch. group_size S > 1 says that
  each S consecutive rewards belong to one prompt: the mean is the group's, and the deviation is
  the group's too (`std="group"`) or that of the centred batch (`std="batch"`). Every deviation is
  unbiased: its divisor is the number of valid samples it is taken over, minus 1.

  Samples that are not `valid` [B] (bool), or whose reward is not finite, get advantage 0 and enter
  no statistic. So do samples without a peer and samples that are all equal.
  """
  if std not in ("batch", "group"):
    raise ValueError(f"std is {std!r}: use batch or group")
  batch = rewards.shape[0]
  group = batch if group_size == 1 else group_size
  if group_size < 1 or batch % group:
    raise ValueError(f"{batch} rewards do not divide into groups of {group_size} samples")

  valid = (valid & jnp.isfinite(rewards)).reshape(-1, group)
  rewards = jnp.where(valid, rewards.astype(jnp.float32).reshape(-1, group), 0.0)
  # Measured from the lowest of the group, equal rewards are exactly 0 and stay so: the rounding of
  # their mean, divided by a deviation of about 0, would otherwise be an advantage.
  lowest = jnp.min(rewards, axis=1, keepdims=True, where=valid, initial=jnp.inf)
  rewards = jnp.where(valid, rewards - lowest, 0.0)
  count = jnp.sum(valid, axis=1, keepdims=True)
  mean = jnp.sum(rewards, axis=1, keepdims=True) / jnp.maximum(count, 1)
  centred = jnp.where(valid, rewards - mean, 0.0)

  axis = 1 if std == "group" else None
  squares = jnp.sum(centred**2, axis, keepdims=True)
  freedom = jnp.sum(valid, axis, keepdims=True) - 1
  deviation = jnp.sqrt(squares / jnp.maximum(freedom, 1))
  return jnp.clip(centred / (deviation + eps), -clip, clip).reshape(batch)


def ppo_loss(
  log_prob: jax.Array,
  old_log_prob: jax.Array,
  advantages: jax.Array,
  weights: jax.Array,
  clip_range: float,
  valid: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """γ·max(−Aρ, −A clip(ρ, 1 ± clip_range)) with ρ = exp(log_prob − old_log_prob), all [B].

  Returns the loss and, all [B] too, `ratio` (ρ), `clipped` (1 where ρ is outside 1 ± clip_range)
  and `approx_kl` ((ρ − 1) − ln ρ, the low-variance estimate of KL(old ‖ new)).

  Samples that are not `valid` [B] (bool) get loss 0 and ρ = 1, and send gradient 0 to log_prob even
  where their log-probabilities, advantages or weights are NaN.
  """
  if valid is not None:
    # Masking the inputs, not the loss: the derivative of where(valid, NaN, 0) is 0 · NaN = NaN.
    masked = (jnp.where(valid, x, 0.0) for x in (log_prob, old_log_prob, advantages, weights))
    log_prob, old_log_prob, advantages, weights = masked
  log_ratio = log_prob - old_log_prob
  ratio = jnp.exp(log_ratio)
  clipped_ratio = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
  loss = weights * jnp.maximum(-advantages * ratio, -advantages * clipped_ratio)
  metrics = {
    "ratio": ratio,
    "clipped": (ratio != clipped_ratio).astype(jnp.float32),
    "approx_kl": jnp.expm1(log_ratio) - log_ratio,  # expm1: ρ − 1 would cancel near 1.
  }
  return loss, metrics


def draw_timesteps(
  key: jax.Array, num_steps: int, k: int, first: int = 0, last: int | None = None
) -> jax.Array:
  """k different step indices [k] int32, drawn at random from first ≤ i < last (None: num_steps)."""
  last = num_steps if last is None else last
  if not 0 <= first < last <= num_steps:
    raise ValueError(f"steps {first} to {last} are not within a rollout of {num_steps} steps")
  if not 1 <= k <= last - first:
    raise ValueError(f"cannot draw {k} of the {last - first} steps from {first} to {last}")
  return jax.random.permutation(key, jnp.arange(first, last, dtype=jnp.int32))[:k]


def masked_mean(values: jax.Array, valid: jax.Array) -> jax.Array:
  """Mean [] of the values where `valid` (bool, broadcast to them); 0 where nothing is valid."""
  valid = jnp.broadcast_to(valid, values.shape)
  return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
