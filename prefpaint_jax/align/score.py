"""Rewards, trust weights and advantages of samples (PrefPaint, arXiv 2410.21966, sec. 4)."""
# Shapes: P prompts, S samples of each, B = P S samples, H W pixels, D features.

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from prefpaint_jax.align import ppo
from prefpaint_jax.align.rollout import in_chunks
from prefpaint_jax.align.settings import Settings, Trust
from prefpaint_jax.align.state import Frozen, Scores
from prefpaint_jax.models import reward
from prefpaint_jax.models.conditioning import Prompts
from prefpaint_jax.models.reward import RewardNetwork
from prefpaint_jax.preference import bound
from prefpaint_jax.weights.names import Params


def trust_weights(
  trust: Trust,
  whitening: Float[Array | np.ndarray, "D D"] | None,
  features: Float[Array | np.ndarray, "B D"],
) -> Float[Array, " B"]:
  """Computes the trust weight γ of each sample from the reward model's features.

  Args:
    whitening: L⁻¹ of the reward's bound, V = L Lᵀ; unused where `trust.norm` needs no bound.
  """
  if trust.norm == "none":
    return jnp.ones(features.shape[0])
  if trust.norm == "constant":
    return jnp.full(features.shape[0], trust.constant)
  norm = bound.mahalanobis_norm if trust.norm == "mahalanobis" else bound.released_norm
  return bound.trust_weight(
    norm(whitening, features), trust.k, trust.b, trust.minimum, trust.maximum
  )


def score(
  network: RewardNetwork,
  settings: Settings,
  frozen: Frozen,
  prompts: Prompts,
  samples: Float[Array, "B H W 3"],
  mesh: Mesh | None = None,
) -> tuple[Scores, dict[str, jax.Array]]:
  """Computes rewards, trust weights and advantages of samples in [0, 1], and their metrics."""
  S = settings.samples_per_prompt
  # Chunks hold whole prompts, so that the masked image of a prompt is embedded once.
  grouped = samples.reshape(-1, S, *samples.shape[1:])

  def evaluate(params: Params, images: jax.Array, masked_images: jax.Array):
    flat = images.reshape(-1, *images.shape[2:])
    rewards, features = reward.apply(network, params, flat, masked_images)
    return rewards.reshape(-1, S), features.reshape(-1, S, features.shape[-1])

  chunk = -(-settings.decode_batch // S)
  masked_images = prompts.masked_image.reshape(-1, S, *samples.shape[1:])[:, 0]
  rewards, features = in_chunks(evaluate, chunk, mesh, frozen.reward, grouped, masked_images)
  rewards, features = rewards.reshape(-1), features.reshape(-1, features.shape[-1])
  valid = ppo.usable(rewards) & jnp.isfinite(features).all(-1)
  features = jnp.where(valid[:, None], features, 0.0)
  rewards = jnp.where(valid, rewards, 0.0)
  weigh = functools.partial(trust_weights, settings.trust)
  trust = in_chunks(weigh, 0, mesh, frozen.whitening, features)
  valid &= jnp.isfinite(trust)
  advantages = ppo.standardise(rewards, valid, S, settings.advantage_std, settings.advantage_clip)
  scores = Scores(rewards, valid, trust, advantages)
  return scores, _metrics(scores, S)


def _metrics(scores: Scores, S: int) -> dict[str, jax.Array]:
  """Computes statistics of the valid samples."""
  rewards, valid, trust, _ = scores
  mean = lambda x: ppo.masked_mean(x, valid)
  std = lambda x: jnp.sqrt(mean((x - mean(x)) ** 2))
  lowest = lambda x: jnp.min(x, where=valid, initial=jnp.inf)
  highest = lambda x: jnp.max(x, where=valid, initial=-jnp.inf)
  metrics = {
    "reward/mean": mean(rewards),
    "reward/std": std(rewards),
    "reward/min": lowest(rewards),
    "reward/max": highest(rewards),
    "reward/nan_fraction": 1.0 - jnp.mean(valid),
    "trust/mean": mean(trust),
    "trust/std": std(trust),
    "trust/min": lowest(trust),
    "trust/max": highest(trust),
  }
  if S > 1:
    groups = valid.reshape(-1, S)
    within = jnp.std(rewards.reshape(-1, S), axis=1, ddof=1, where=groups)
    metrics["reward/within_prompt_std"] = ppo.masked_mean(within, groups.sum(1) > 1)
  return metrics
