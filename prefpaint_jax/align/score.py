"""Rewards, trust weights and advantages of samples (PrefPaint, arXiv 2410.21966, sec. 4)."""
# Shapes: P prompts, S samples of each, B = P S samples, H W pixels, D features.

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from prefpaint_jax.align import ppo
from prefpaint_jax.align.rollout import in_chunks
from prefpaint_jax.align.settings import Settings, Trust
from prefpaint_jax.align.state import Frozen, Scores
from prefpaint_jax.models.conditioning import Prompts
from prefpaint_jax.preference import bound
from prefpaint_jax.rewards.objective import Objective, combined
from prefpaint_jax.runtime import sharding
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
  if trust.norm == "ensemble":
    raise ValueError("trust.norm is 'ensemble', which reads scores; expected a norm of features")
  if trust.norm in ("none", "constant"):
    return _weigh(trust, jnp.zeros(features.shape[0]))
  return _weigh(trust, feature_norm(trust, whitening, features))


def feature_norm(
  trust: Trust,
  whitening: Float[Array | np.ndarray, "D D"],
  features: Float[Array | np.ndarray, "B D"],
) -> Float[Array, " B"]:
  """Computes the norm of each sample's features: the released one, or else ‖z‖_{V⁻¹}."""
  norm = bound.released_norm if trust.norm == "released" else bound.mahalanobis_norm
  return norm(whitening, features)


def _weigh(trust: Trust, norm: Float[Array, " B"]) -> Float[Array, " B"]:
  """Computes γ of a norm; "none" and "constant" do not read it."""
  if trust.norm in ("none", "constant"):
    return jnp.full(norm.shape, 1.0 if trust.norm == "none" else trust.constant)
  return bound.trust_weight(norm, trust.k, trust.b, trust.minimum, trust.maximum)


def disagreement(
  scores: Sequence[Float[Array, " B"]], valid: Bool[Array, " B"]
) -> Float[Array, " B"]:
  """Computes the standard deviation of a sample's scores by K rewards, K ≥ 2.

  Each reward is standardised over the valid samples first, so that all have one scale.
  """
  standard = [ppo.standardise(one, valid, 1, "batch", np.inf) for one in scores]
  return jnp.std(jnp.stack(standard), axis=0, ddof=1)


def reward_scores(
  objective: Objective,
  chunk: int,
  params: tuple[Params, ...],
  samples: Float[Array, "B H W 3"],
  masked_images: Float[Array, "P H W 3"],
  masks: Float[Array, "P H W 1"],
  texts: tuple[Any, ...] | None = None,
  on_host: tuple[Float[Array, " B"] | None, ...] | None = None,
  mesh: Mesh | None = None,
) -> tuple[list[Float[Array, " B"]], Float[Array, "B D"]]:
  """Computes the scores of each reward, and the features of the one that gives the trust weight.

  Args:
    chunk: prompts that a device scores at a time, each with its S = B / P samples; 0: all.
    params: of the rewards.
    texts: what each reward reads of the P texts; None: no reward reads texts.
    on_host: scores of the rewards that run on the host; None: there is none.
  """
  S = len(samples) // len(masks)
  # Chunks hold whole prompts, so that the masked image of a prompt is embedded once.
  grouped = samples.reshape(-1, S, *samples.shape[1:])
  rewards, trusted = objective.rewards, objective.trusted
  texts = texts or (None,) * len(rewards)

  def evaluate(params: tuple[Params, ...], images: jax.Array, known: jax.Array, masks, texts):
    flat = images.reshape(-1, *images.shape[2:])
    scores, features = [], jnp.zeros((len(flat), 0))
    for reward, own, read in zip(rewards, params, texts, strict=True):
      if not reward.on_host:
        found, z = reward.function(own, flat, known, masks, read)
        scores.append(found.astype(jnp.float32).reshape(-1, S))
        features = z if reward is trusted else features
    return scores, features.reshape(*images.shape[:2], features.shape[-1])

  found, features = in_chunks(evaluate, chunk, mesh, params, grouped, masked_images, masks, texts)
  found = iter(found)
  scores = [on_host[i] if one.on_host else next(found).reshape(-1) for i, one in enumerate(rewards)]
  return scores, features.reshape(len(samples), features.shape[-1])


def score(
  objective: Objective,
  settings: Settings,
  frozen: Frozen,
  prompts: Prompts,
  samples: Float[Array, "B H W 3"],
  texts: tuple[Any, ...] | None = None,
  on_host: tuple[Float[Array, " B"] | None, ...] | None = None,
  mesh: Mesh | None = None,
) -> tuple[Scores, dict[str, jax.Array]]:
  """Computes rewards, trust weights and advantages of samples in [0, 1], and their metrics.

  Args:
    texts: what each reward reads of the P texts; None: no reward reads texts.
    on_host: scores of the rewards that run on the host; None: there is none.
  """
  S = settings.samples_per_prompt
  first = lambda x: x.reshape(-1, S, *x.shape[1:])[:, 0]
  known, masks = first(prompts.masked_image), first(prompts.mask)
  chunk = -(-settings.decode_batch // S)
  scores, features = reward_scores(
    objective, chunk, frozen.reward, samples, known, masks, texts, on_host, mesh
  )
  usable = [ppo.usable(one) for one in scores]
  valid = functools.reduce(jnp.logical_and, usable) & jnp.isfinite(features).all(-1)
  features = jnp.where(valid[:, None], features, 0.0)
  scores = [jnp.where(valid, one, 0.0) for one in scores]
  total = objective.weighted(scores)
  if settings.trust.norm == "ensemble":
    norm = disagreement(scores, valid)
  elif frozen.whitening is not None:
    norm_of = functools.partial(feature_norm, settings.trust)
    norm = in_chunks(norm_of, 0, mesh, frozen.whitening, features)
  else:
    norm = jnp.zeros(len(samples))
  trust = _weigh(settings.trust, norm)
  valid &= jnp.isfinite(trust)
  combination = combined(objective, scores, valid, S)
  advantages = ppo.standardise(
    combination, valid, S, settings.advantage_std, settings.advantage_clip
  )
  result = Scores(total, valid, trust, advantages)
  metrics = _metrics(result, S)
  if frozen.whitening is not None or settings.trust.norm == "ensemble":
    metrics["trust/norm"] = ppo.masked_mean(norm, valid)
  parts = zip(objective.rewards, scores, usable, strict=True)
  for reward, own, finite in parts if len(scores) > 1 else ():
    mean = ppo.masked_mean(own, valid)
    metrics[f"reward/{reward.name}/mean"] = mean
    metrics[f"reward/{reward.name}/std"] = jnp.sqrt(ppo.masked_mean((own - mean) ** 2, valid))
    metrics[f"reward/{reward.name}/nan_fraction"] = 1.0 - jnp.mean(finite)
  return result, metrics


def describe_unusable(metrics: Mapping[str, float]) -> str:
  """Says what share of the rewards is not finite and, of several, which reward has the most."""
  text = f"{metrics['reward/nan_fraction']:.0%} of the rewards are not finite"
  found = ((re.fullmatch("reward/(.+)/nan_fraction", name), x) for name, x in metrics.items())
  shares = {match[1]: share for match, share in found if match and share}
  if not shares:
    return text
  worst = max(shares, key=shares.get)
  return f"{text}, {worst} the most with {shares[worst]:.0%}"


def reward_inputs(
  objective: Objective,
  mesh: Mesh,
  batch: Mapping[str, np.ndarray],
  samples: Float[Array, "B H W 3"],
) -> tuple[tuple[Any, ...] | None, tuple[Any, ...] | None]:
  """Returns `texts` and `on_host` of `score`; waits for the samples only for rewards on the host.

  Args:
    batch: the prompts of this process, as `examples.stack` returns them.
    samples: of all processes.
  """
  texts = [str(text) for text in batch["text"]]
  tokens, on_host = objective.tokenize(texts), None
  if objective.has_host_rewards:
    masks, known = batch["mask"], batch["image"] * (1.0 - batch["mask"])
    local = sharding.to_local(mesh, samples)
    on_host = objective.host_scores(local, known, masks, texts)
  return sharding.to_global(mesh, (tokens, on_host))


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
