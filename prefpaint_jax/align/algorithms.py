"""The algorithms: what each reads of a rollout, and its loss for pairs of a sample and a step.

"ppo" trains the transitions of the DDIM chain by their importance ratio (`align.ppo`). "nft" and
"awm" need no chain: they noise the final latents and train the network's prediction there, "nft" by
regression (`align.nft`), "awm" by an importance ratio whose log-probability is minus the squared
error of the prediction (Advantage Weighted Matching, Xue et al. 2025, arXiv 2509.25050).
"""
# Shapes: B samples, k steps of an update, n = B k pairs, h w latents, c channels.

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prefpaint_jax.align.nft import nft_loss
from prefpaint_jax.align.ppo import noise_log_ratio, ppo_loss
from prefpaint_jax.align.settings import Settings
from prefpaint_jax.align.state import Endpoint, Pairs, Sampler
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.diffusion.ddim import Steps, Trajectory, Weight, mean_over_elements
from prefpaint_jax.diffusion.schedule import Schedule


class Terms(NamedTuple):
  """What a loss is computed from, beside the pairs: one row for each pair."""

  step: Steps
  output: Float[Array, "n h w c"]  # of the trained policy's network
  old_output: Float[Array, "n h w c"] | None  # of the behaviour policy's; None for "ppo"
  weight: Weight | None  # of each latent
  advantages: Float[Array, " n"]
  trust: Float[Array, " n"]  # γ


Loss = tuple[Float[Array, " n"], dict[str, Float[Array, " n"]]]  # and metrics


class Algorithm(NamedTuple):
  """An algorithm as pure functions."""

  pairs: Callable[[Sampler, Trajectory | Endpoint, Int[Array, " k"]], Pairs]  # leaves [k, B, ...]
  loss: Callable[[Sampler, Pairs, Terms], Loss]
  # (sampler, step, x_t, output, the base policy's output, weight) -> divergence from the base [n].
  divergence: Callable[..., Float[Array, " n"]]


def _noise(key: jax.Array, indices: Int[Array, " k"], like: jax.Array) -> jax.Array:
  """Draws the noise [k, B, h, w, c] of some steps as a rollout does, from fold_in(key, step)."""
  keys = (jax.random.fold_in(key, index) for index in indices)
  return jnp.stack([jax.random.normal(key, like.shape) for key in keys])


# --------------------------------------------------------------------------- transitions of a chain
def _transitions(sampler: Sampler, record: Trajectory, indices: jax.Array) -> Pairs:
  latents, noise = record.latents, None
  if sampler.settings.ratio_normalisation:
    noise = _noise(record.key, indices, latents[0])
  return Pairs(latents[indices], latents[indices + 1], noise, record.log_probs[indices])


def _ppo(sampler: Sampler, pairs: Pairs, terms: Terms) -> Loss:
  settings, schedule = sampler.settings, sampler.modules.schedule
  step, weight = terms.step, terms.weight
  mean = ddim.predict_mean(schedule, step, pairs.latents, terms.output)
  if settings.ratio_normalisation:
    log_ratio = noise_log_ratio(pairs.target, mean, step.sigma, pairs.noise, weight)
    trust = terms.trust * _balance(sampler, step)
    loss, metrics = ppo_loss(
      log_ratio, jnp.zeros_like(log_ratio), terms.advantages, trust, settings.clip_range
    )
  else:
    log_prob = ddim.log_prob(pairs.target, mean, step.sigma, weight)
    loss, metrics = ppo_loss(
      log_prob, pairs.old_log_prob, terms.advantages, terms.trust, settings.clip_range
    )
  return loss, _ratio_metrics(metrics)


def _balance(sampler: Sampler, step: Steps) -> jax.Array:
  """Computes GRPO-Guard's weight of each step: 1 / |∂μ/∂output|, of mean 1 over trained steps.

  The gradient of log ρ with respect to the network's output is noise times ∂μ/∂output, which falls
  along the chain as the steps get smaller. With flow matching it is the step in time, dt.
  """
  first, last = sampler.settings.skip_steps
  trained = Steps(*(x[first : len(x) - last] for x in sampler.steps))
  schedule = sampler.modules.schedule
  return 1 / (_gain(schedule, step) * jnp.mean(1 / _gain(schedule, trained)))


def _gain(schedule: Schedule, step: Steps) -> jax.Array:
  """Computes |∂μ/∂output| [n] of steps; μ is linear in the output."""
  zeros = jnp.zeros((len(step.timestep), 1, 1, 1))
  mean = ddim.predict_mean(_unclipped(schedule), step, zeros, zeros + 1)
  return jnp.abs(mean).reshape(-1)


def _kl(sampler: Sampler, step: Steps, latents, output, base_output, weight) -> jax.Array:
  mean = functools.partial(ddim.predict_mean, sampler.modules.schedule, step, latents)
  return ddim.gaussian_kl(mean(output), mean(base_output), step.sigma, weight)


# ------------------------------------------------------------------------------- forward process
def _noised(sampler: Sampler, record: Endpoint, indices: jax.Array) -> Pairs:
  noise = _noise(record.key, indices, record.latents)
  noise_to = functools.partial(ddim.add_noise, sampler.modules.schedule, record.latents)
  timesteps = jnp.asarray(sampler.steps.timestep)[indices]
  latents = jnp.stack([noise_to(*one) for one in zip(noise, timesteps, strict=True)])
  return Pairs(latents, jnp.broadcast_to(record.latents, noise.shape), noise, None)


def _nft(sampler: Sampler, pairs: Pairs, terms: Terms) -> Loss:
  settings, schedule = sampler.settings, _unclipped(sampler.modules.schedule)
  clean = functools.partial(ddim.original_sample, schedule, terms.step, pairs.latents)
  original, old = clean(terms.output), clean(terms.old_output)
  clip, beta, weight = settings.advantage_clip, settings.nft.beta, terms.weight
  loss = nft_loss(original, old, pairs.target, terms.advantages, clip, beta, weight)
  metrics = {
    "change": mean_over_elements((original - old) ** 2, weight),
    "error": mean_over_elements((original - pairs.target) ** 2, weight),
  }
  return terms.trust * _velocity_scale(schedule, terms.step) * loss, metrics


def _velocity_scale(schedule: Schedule, step: Steps) -> jax.Array:
  """Computes √(1−ᾱ) / |∂x̂0/∂output| [n]: 1 for v-prediction and √ᾱ for ε-prediction.

  With it the gradient of NFT with respect to the output has one scale for all prediction types,
  that of the published velocities. Without it the noisiest steps of ε-networks outweigh all others.
  """
  zeros = jnp.zeros((len(step.timestep), 1, 1, 1))
  slope = jnp.abs(ddim.original_sample(schedule, step, zeros, zeros + 1)).reshape(-1)
  return jnp.sqrt(1 - step.alpha) / slope


def _awm(sampler: Sampler, pairs: Pairs, terms: Terms) -> Loss:
  schedule, t = sampler.modules.schedule, terms.step.timestep
  target = ddim.training_target(schedule, pairs.target, pairs.noise, t)
  log_prob, old_log_prob = (
    -mean_over_elements((output - target) ** 2, terms.weight)
    for output in (terms.output, terms.old_output)
  )
  loss, metrics = ppo_loss(
    log_prob, old_log_prob, terms.advantages, terms.trust, sampler.settings.clip_range
  )
  return loss, _ratio_metrics(metrics)


def _output_difference(sampler, step, latents, output, base_output, weight) -> jax.Array:
  return mean_over_elements((output - base_output) ** 2, weight)


def _unclipped(schedule: Schedule) -> Schedule:
  """Returns the schedule without `clip_sample`, which would cut gradients."""
  return dataclasses.replace(schedule, clip_sample=False)


def _ratio_metrics(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {
    "clip_fraction": metrics["clipped"],
    "approx_kl": metrics["approx_kl"],
    "ratio_mean": metrics["ratio"],
  }


_TABLE = {
  "ppo": Algorithm(_transitions, _ppo, _kl),
  "nft": Algorithm(_noised, _nft, _output_difference),
  "awm": Algorithm(_noised, _awm, _output_difference),
}


def algorithm_of(settings: Settings) -> Algorithm:
  """Returns the algorithm that the settings name."""
  return _TABLE[settings.algorithm]
