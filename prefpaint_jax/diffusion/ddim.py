"""Noise schedule, DDIM step and its log-probability, rollout: pure functions around a `predict`.

The chain is the DDIM sampler of Song et al. 2021 (eq. 12 and 16) on the discrete schedules that
diffusers writes down. One function, `step`, both samples a transition and scores it, so the
log-probability of a rollout and that of a later update cannot drift apart. Everything here is
computed in float32, whatever the dtype of the network's output.
"""
# Shapes: B samples, T rollout steps, N training timesteps, h w latent pixels, c latent channels.

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax.diffusion.schedule import Schedule

# (latents [B, h, w, c], timestep []) -> model output [B, h, w, c].
Predict = Callable[[jax.Array, jax.Array], jax.Array]


class Steps(NamedTuple):
  """Coefficients of the DDIM transitions x_t → x_t', in sampling order; each field is [T].

  `at` gives one step (scalars) or one per sample ([B], broadcast over the trailing axes).
  """

  timestep: np.ndarray | jax.Array  # int32, t
  alpha: np.ndarray | jax.Array  # float32, ᾱ_t
  alpha_prev: np.ndarray | jax.Array  # float32, ᾱ_t'
  sigma: np.ndarray | jax.Array  # float32, standard deviation of x_t' given x_t

  def at(self, index: int | jax.Array) -> "Steps":
    """The steps at `index`, which may be traced and may be an array."""
    return Steps(*(jnp.asarray(field)[index] for field in self))


class Trajectory(NamedTuple):
  """What a rollout leaves behind."""

  latents: jax.Array  # [T+1, B, h, w, c]; latents[0] is the initial noise, latents[T] the result
  log_probs: jax.Array  # [T, B]
  timesteps: jax.Array  # [T] int32


def timesteps(schedule: Schedule, num_steps: int) -> np.ndarray:
  """The num_steps timesteps [T] int32 of a chain, noisiest first, as diffusers spaces them.

  Where a spacing of "trailing" makes diffusers append a stray −1 (rounding, e.g. 61 steps of
  1000), the list ends before it.
  """
  total = schedule.num_train_timesteps
  if not 1 <= num_steps <= total:
    raise ValueError(f"num_steps is {num_steps}, of {total} training timesteps: use 1 to {total}")
  if schedule.timestep_spacing == "leading":
    steps = np.arange(num_steps)[::-1] * (total // num_steps) + schedule.steps_offset
  elif schedule.timestep_spacing == "trailing":
    steps = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
  else:
    steps = np.linspace(0, total - 1, num_steps).round()[::-1]
  return steps.astype(np.int32)


def ddim_steps(schedule: Schedule, num_steps: int, eta: float) -> Steps:
  """Coefficients of a chain of num_steps DDIM steps, computed on the host in float64.

  σ² = η² (1−ᾱ_t')/(1−ᾱ_t) (1 − ᾱ_t/ᾱ_t'), so η = 0 is deterministic and η = 1 is DDPM's
  posterior variance. The target t' of the last step lies before the schedule: ᾱ_t' is then 1 or
  ᾱ_0 (`set_alpha_to_one`).
  """
  if not 0 <= eta <= 1:
    raise ValueError(f"eta is {eta}: use a value from 0 (deterministic) to 1 (DDPM)")
  total = schedule.num_train_timesteps
  t = timesteps(schedule, num_steps)
  if t[0] >= total:
    raise ValueError(
      f"num_steps {num_steps} with steps_offset {schedule.steps_offset} starts at timestep {t[0]}, "
      f"the last is {total - 1}: use fewer steps"
    )
  alphas = schedule.alphas_cumprod.astype(np.float64)
  t_prev = t - total // num_steps
  final = 1.0 if schedule.set_alpha_to_one else alphas[0]
  alpha, alpha_prev = alphas[t], np.where(t_prev >= 0, alphas[np.maximum(t_prev, 0)], final)
  if schedule.prediction_type == "epsilon" and alpha[0] == 0:
    raise ValueError(
      f"prediction_type is epsilon and timestep {t[0]} is pure noise (rescale_betas_zero_snr), "
      "where noise does not tell the image: use v_prediction, or spacing that leaves it out"
    )
  sigma = eta * np.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
  return Steps(t, *(field.astype(np.float32) for field in (alpha, alpha_prev, sigma)))


def _expand(values: jax.Array | np.ndarray, like: jax.Array) -> jax.Array:
  """[] or [B] -> float32 that broadcasts against `like` [B, ...]."""
  values = jnp.asarray(values, jnp.float32)
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _original_and_noise(
  schedule: Schedule, step: Steps, latents: jax.Array, model_output: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(x̂0, ε̂) of x_t = sqrt(ᾱ) x0 + sqrt(1−ᾱ) ε; clipping touches x̂0 alone, as in diffusers."""
  latents, model_output = latents.astype(jnp.float32), model_output.astype(jnp.float32)
  alpha = _expand(step.alpha, latents)
  signal, spread = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
  if schedule.prediction_type == "epsilon":
    original, noise = (latents - spread * model_output) / signal, model_output
  elif schedule.prediction_type == "v_prediction":
    original = signal * latents - spread * model_output
    noise = signal * model_output + spread * latents
  else:
    original, noise = model_output, (latents - signal * model_output) / spread
  if schedule.clip_sample:
    original = jnp.clip(original, -schedule.clip_sample_range, schedule.clip_sample_range)
  return original, noise


def original_sample(
  schedule: Schedule, step: Steps, latents: jax.Array, model_output: jax.Array
) -> jax.Array:
  """x̂0 [B, h, w, c], the clean latents that the model output implies at `latents` x_t."""
  return _original_and_noise(schedule, step, latents, model_output)[0]


def predict_mean(
  schedule: Schedule, step: Steps, latents: jax.Array, model_output: jax.Array
) -> jax.Array:
  """μ = sqrt(ᾱ_t') x̂0 + sqrt(1 − ᾱ_t' − σ²) ε̂ [B, h, w, c], the mean of x_t' given x_t."""
  original, noise = _original_and_noise(schedule, step, latents, model_output)
  alpha_prev, sigma = _expand(step.alpha_prev, original), _expand(step.sigma, original)
  # The difference is never negative; its rounding may be.
  direction = jnp.sqrt(jnp.maximum(1 - alpha_prev - sigma**2, 0.0))
  return jnp.sqrt(alpha_prev) * original + direction * noise


def _mean_over_elements(values: jax.Array, weight: jax.Array | None) -> jax.Array:
  """Mean of [B, ...] over all but B; weighted, with 0 where the weight of a sample sums to 0."""
  axes = tuple(range(1, values.ndim))
  if weight is None:
    return jnp.mean(values, axes)
  weight = jnp.broadcast_to(weight.astype(jnp.float32), values.shape)
  total = jnp.sum(weight, axes)
  return jnp.sum(values * weight, axes) / jnp.where(total > 0, total, 1.0)


def log_prob(
  x_prev: jax.Array, mean: jax.Array, sigma: jax.Array, weight: jax.Array | None = None
) -> jax.Array:
  """Log-density of x_t' under N(μ, σ²), [B]: the mean, not the sum, over h, w and c.

  `weight` [B, h, w, 1] restricts the mean (say, to the latents of the hole); all zero gives 0.
  A step with σ = 0 is deterministic, has no density, and contributes 0 with gradient 0.
  """
  sigma = _expand(sigma, mean)
  random = sigma > 0
  sigma = jnp.where(random, sigma, 1.0)
  deviation = (x_prev.astype(jnp.float32) - mean.astype(jnp.float32)) / sigma
  density = -0.5 * deviation**2 - jnp.log(sigma) - 0.5 * math.log(2 * math.pi)
  return _mean_over_elements(jnp.where(random, density, 0.0), weight)


def gaussian_kl(
  mean: jax.Array, base_mean: jax.Array, sigma: jax.Array, weight: jax.Array | None = None
) -> jax.Array:
  """KL(N(μ, σ²) ‖ N(μ_base, σ²)) = (μ − μ_base)² / 2σ², [B]; mean over h, w and c as in `log_prob`.

  A step with σ = 0 contributes 0 with gradient 0.
  """
  sigma = _expand(sigma, mean)
  random = sigma > 0
  deviation = mean.astype(jnp.float32) - base_mean.astype(jnp.float32)
  deviation = jnp.where(random, deviation, 0.0) / jnp.where(random, sigma, 1.0)
  return _mean_over_elements(0.5 * deviation**2, weight)


def step(
  schedule: Schedule,
  step: Steps,
  latents: jax.Array,
  model_output: jax.Array,
  *,
  noise: jax.Array | None = None,
  x_prev: jax.Array | None = None,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One transition: (x_t' [B, h, w, c], its log-probability [B]).

  Give standard normal `noise` to sample x_t' = μ + σ·noise, or the `x_prev` of an earlier rollout
  to score it. At the same weights both give the same log-probability.
  """
  if (noise is None) == (x_prev is None):
    raise ValueError("give noise (to sample) or x_prev (to score), exactly one of the two")
  mean = predict_mean(schedule, step, latents, model_output)
  if x_prev is None:
    x_prev = mean + _expand(step.sigma, mean) * noise
  return x_prev, log_prob(x_prev, mean, step.sigma, weight)


def _transition(
  predict: Predict, schedule: Schedule, key: jax.Array, weight: jax.Array | None = None
):
  """Scan body (x_t, (i, step i)) -> (x_t', log-probability), with noise from fold_in(key, i)."""

  def transition(latents, numbered_step):
    index, one_step = numbered_step
    noise = jax.random.normal(jax.random.fold_in(key, index), latents.shape, jnp.float32)
    model_output = predict(latents, one_step.timestep)
    return step(schedule, one_step, latents, model_output, noise=noise, weight=weight)

  return transition


def _numbered(steps: Steps) -> tuple[jax.Array, Steps]:
  return jnp.arange(len(steps.timestep)), Steps(*map(jnp.asarray, steps))


def rollout(
  predict: Predict,
  schedule: Schedule,
  steps: Steps,
  latents: jax.Array,
  key: jax.Array,
  weight: jax.Array | None = None,
) -> Trajectory:
  """Run the whole chain from `latents` [B, h, w, c] (standard normal) and keep every state.

  `weight` [B, h, w, 1] is that of `log_prob`.
  """
  transition = _transition(predict, schedule, key, weight)

  def keep(latents, numbered_step):
    latents, score = transition(latents, numbered_step)
    return latents, (latents, score)

  latents = latents.astype(jnp.float32)
  _, (states, log_probs) = jax.lax.scan(keep, latents, _numbered(steps))
  states = jnp.concatenate([latents[None], states])
  return Trajectory(states, log_probs, jnp.asarray(steps.timestep))


def sample(
  predict: Predict, schedule: Schedule, steps: Steps, latents: jax.Array, key: jax.Array
) -> jax.Array:
  """The last state [B, h, w, c] of the same chain as `rollout`, without keeping the others."""
  transition = _transition(predict, schedule, key)

  def forget(latents, numbered_step):
    return transition(latents, numbered_step)[0], None

  return jax.lax.scan(forget, latents.astype(jnp.float32), _numbered(steps))[0]


def _signal_and_spread(schedule: Schedule, t: jax.Array, like: jax.Array):
  alpha = _expand(jnp.asarray(schedule.alphas_cumprod)[t], like)
  return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)


def add_noise(schedule: Schedule, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """Forward process x_t = sqrt(ᾱ_t) x0 + sqrt(1−ᾱ_t) ε, float32 [B, h, w, c]; t int [B] or []."""
  signal, spread = _signal_and_spread(schedule, t, x0)
  return signal * x0.astype(jnp.float32) + spread * noise.astype(jnp.float32)


def training_target(schedule: Schedule, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """What the network should output at x_t, float32 [B, h, w, c]: ε, v = sqrt(ᾱ) ε − sqrt(1−ᾱ) x0,
  or x0, by the schedule's prediction type."""
  x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
  if schedule.prediction_type == "epsilon":
    return noise
  if schedule.prediction_type == "sample":
    return x0
  signal, spread = _signal_and_spread(schedule, t, x0)
  return signal * noise - spread * x0
