"""The algorithms: the part of a rollout that each trains on, and its loss.

"ppo" trains the transitions of the DDIM chain by their importance ratio (`align.ppo`). "nft" and
"awm" need no chain: they noise the final latents and train the network's prediction there, "nft" by
regression (`align.nft`), "awm" by an importance ratio whose log-probability is minus the squared
error of the prediction (Advantage Weighted Matching, Xue et al. 2025, arXiv 2509.25050).
"""
# Shapes: B samples, k steps of an update, n = B k examples, h w latents, c channels.

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
from prefpaint_jax.align.state import Endpoint, Examples, Sampler
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.diffusion.ddim import Steps, Trajectory, Weight, mean_over_elements
from prefpaint_jax.diffusion.schedule import Schedule


class Terms(NamedTuple):
  """The inputs of a loss besides the examples, with one row for each of them."""

  step: Steps
  output: Float[Array, "n h w c"]  # of the trained policy's network
  old_output: Float[Array, "n h w c"] | None  # of the behaviour policy's; None for "ppo"
  weight: Weight | None  # of each latent
  advantages: Float[Array, " n"]
  trust: Float[Array, " n"]  # γ


Loss = tuple[Float[Array, " n"], dict[str, Float[Array, " n"]]]  # and metrics


class Algorithm(NamedTuple):
  """An algorithm as pure functions."""

  # (sampler, record, indices) -> examples with leaves [k, B, ...].
  examples: Callable[[Sampler, Trajectory | Endpoint, Int[Array, " k"]], Examples]
  loss: Callable[[Sampler, Examples, Terms], Loss]
  # (sampler, step, x_t, output, the base policy's output, weight) -> divergence from the base [n].
  divergence: Callable[..., Float[Array, " n"]]


def _noise(key: jax.Array, indices: Int[Array, " k"], like: jax.Array) -> jax.Array:
  """Draws the noise [k, B, h, w, c] of some steps as a rollout does, from fold_in(key, step)."""
  # Not under vmap, where some implementations of PRNGs draw other numbers than the rollout.
  draw = lambda index: jax.random.normal(jax.random.fold_in(key, index), like.shape)
  return jnp.stack([draw(index) for index in indices])


# --------------------------------------------------------------------------- transitions of a chain
def _transitions(sampler: Sampler, record: Trajectory, indices: jax.Array) -> Examples:
  latents, noise = record.latents, None
  if sampler.settings.ratio_normalisation:
    noise = _noise(record.key, indices, latents[0])
  return Examples(latents[indices], latents[indices + 1], noise, record.log_probs[indices])


def _ppo(sampler: Sampler, examples: Examples, terms: Terms) -> Loss:
  settings, schedule = sampler.settings, sampler.modules.schedule
  step, weight = terms.step, terms.weight
  mean = ddim.predict_mean(schedule, step, examples.latents, terms.output)
  if settings.ratio_normalisation:
    log_ratio = noise_log_ratio(examples.target, mean, step.sigma, examples.noise, weight)
    trust = terms.trust * _balance(sampler, step)
    loss, metrics = ppo_loss(
      log_ratio, jnp.zeros_like(log_ratio), terms.advantages, trust, settings.clip_range
    )
  else:
    log_prob = ddim.log_prob(examples.target, mean, step.sigma, weight)
    loss, metrics = ppo_loss(
      log_prob, examples.old_log_prob, terms.advantages, terms.trust, settings.clip_range
    )
  return loss, _ratio_metrics(metrics)


def _balance(sampler: Sampler, step: Steps) -> jax.Array:
  """Computes the weight of each step with `ratio_normalisation`, of mean 1 over trained steps.

  The gradient of log ρ with respect to the network's output is noise times ∂μ/∂output, which falls
  along the chain as the steps get smaller. The weight is 1 / |∂μ/∂output|, in the place of
  GRPO-Guard's 1 / dt, but at most twice the median: the last step of a chain with an offset of 1 is
  from t = 1 to 0, and would have ten times the weight of the others.
  """
  first, last = sampler.settings.skip_steps
  trained = Steps(*(x[first : len(x) - last] for x in sampler.steps))
  inverse = lambda step: 1 / _slope(ddim.predict_mean, sampler.modules.schedule, step)
  highest = 2 * jnp.median(inverse(trained))
  weight = lambda step: jnp.minimum(inverse(step), highest)
  return weight(step) / jnp.mean(weight(trained))


def _slope(function: Callable, schedule: Schedule, step: Steps) -> jax.Array:
  """Computes |∂function/∂output| [n] of steps for a `function` of DDIM, linear in the output."""
  zeros = jnp.zeros((len(step.timestep), 1, 1, 1))
  return jnp.abs(function(_unclipped(schedule), step, zeros, zeros + 1)).reshape(-1)


def _kl(sampler: Sampler, step: Steps, latents, output, base_output, weight) -> jax.Array:
  mean = functools.partial(ddim.predict_mean, sampler.modules.schedule, step, latents)
  return ddim.gaussian_kl(mean(output), mean(base_output), step.sigma, weight)


# ------------------------------------------------------------------------------- forward process
def _noised(sampler: Sampler, record: Endpoint, indices: jax.Array) -> Examples:
  noise = _noise(record.key, indices, record.latents)
  noise_to = functools.partial(ddim.add_noise, sampler.modules.schedule, record.latents)
  timesteps = jnp.asarray(sampler.steps.timestep)[indices]
  latents = jnp.stack([noise_to(*one) for one in zip(noise, timesteps, strict=True)])
  return Examples(latents, jnp.broadcast_to(record.latents, noise.shape), noise, None)


def _nft(sampler: Sampler, examples: Examples, terms: Terms) -> Loss:
  settings, schedule = sampler.settings, _unclipped(sampler.modules.schedule)
  clean = functools.partial(ddim.original_sample, schedule, terms.step, examples.latents)
  original, old = clean(terms.output), clean(terms.old_output)
  clip, beta, weight = settings.advantage_clip, settings.nft.beta, terms.weight
  loss = nft_loss(original, old, examples.target, terms.advantages, clip, beta, weight)
  metrics = {
    "change": mean_over_elements((original - old) ** 2, weight),
    "error": mean_over_elements((original - examples.target) ** 2, weight),
  }
  return terms.trust * _velocity_scale(schedule, terms.step) * loss, metrics


def _velocity_scale(schedule: Schedule, step: Steps) -> jax.Array:
  """Computes √(1−ᾱ) / |∂x̂0/∂output| [n]: 1 for v-prediction, √ᾱ for ε and √(1−ᾱ) for x̂0.

  With it the gradient of NFT with respect to the output has one scale for all prediction types,
  that of the published velocities. Without it the noisiest steps of ε-networks outweigh all others.
  """
  return jnp.sqrt(1 - step.alpha) / _slope(ddim.original_sample, schedule, step)


def _awm(sampler: Sampler, examples: Examples, terms: Terms) -> Loss:
  schedule, t = sampler.modules.schedule, terms.step.timestep
  target = ddim.training_target(schedule, examples.target, examples.noise, t)
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
