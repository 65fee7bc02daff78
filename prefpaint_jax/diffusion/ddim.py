"""DDIM sampling (Song et al. 2021, eq. 12 and 16) and the log-probabilities of its transitions.

All functions are pure and take the network as a function `predict`. `step` both samples a
transition and scores one, so a rollout and a later update compute the same log-probability.
Everything is computed in float32, whatever the dtype of the network's output.
"""
# Shapes: B samples, T rollout steps, N training timesteps, h w latents, c latent channels.

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from prefpaint_jax.diffusion.schedule import Schedule

# (latents [B, h, w, c], timestep []) -> model output [B, h, w, c].
Predict = Callable[[jax.Array, jax.Array], jax.Array]

Latents = Float[Array | np.ndarray, "B h w c"]
Sigma = float | Float[Array | np.ndarray, ""] | Float[Array | np.ndarray, " B"]
Weight = Shaped[Array | np.ndarray, "B h w 1"]  # float or bool
Timesteps = Int[Array | np.ndarray, ""] | Int[Array | np.ndarray, " B"]


class Steps(NamedTuple):
  """Coefficients of the DDIM transitions x_t → x_t', in sampling order.

  Fields are [T] for a whole chain, [] for one step, [B] for one step per sample (see `at`).
  """

  timestep: Int[Array | np.ndarray, "..."]  # t
  alpha: Float[Array | np.ndarray, "..."]  # ᾱ_t
  alpha_prev: Float[Array | np.ndarray, "..."]  # ᾱ_t'
  sigma: Float[Array | np.ndarray, "..."]  # standard deviation of x_t' given x_t

  def at(self, index: int | np.integer | Int[Array | np.ndarray, "..."]) -> "Steps":
    """Selects the steps at `index`, an integer or an array, traced or not."""
    return Steps(*(jnp.asarray(field)[index] for field in self))


class Trajectory(NamedTuple):
  """All states of a rollout and the log-probabilities of its transitions."""

  latents: Float[Array, "T+1 B h w c"]  # latents[0] is the initial noise, latents[T] the result
  log_probs: Float[Array, "T B"]
  timesteps: Int[Array, " T"]


def timesteps(schedule: Schedule, num_steps: int) -> Int[np.ndarray, " T"]:
  """Returns the timesteps of a chain, noisiest first, as diffusers spaces them.

  With "trailing" spacing a rounding error makes diffusers append −1 for some lengths (61 steps of
  1000, for example); this function leaves it out.

  Raises:
    ValueError: `num_steps` is not from 1 to N.
  """
  total = schedule.num_train_timesteps
  if not 1 <= num_steps <= total:
    raise ValueError(f"num_steps is {num_steps}; expected 1 to {total}, the training timesteps")
  if schedule.timestep_spacing == "leading":
    steps = np.arange(num_steps)[::-1] * (total // num_steps) + schedule.steps_offset
  elif schedule.timestep_spacing == "trailing":
    steps = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
  else:
    steps = np.linspace(0, total - 1, num_steps).round()[::-1]
  return steps.astype(np.int32)


def ddim_steps(schedule: Schedule, num_steps: int, eta: float) -> Steps:
  """Computes the coefficients of a chain of `num_steps` DDIM steps, on the host in float64.

  σ² = η² (1−ᾱ_t')/(1−ᾱ_t) (1 − ᾱ_t/ᾱ_t'): η = 0 is deterministic, η = 1 has the posterior variance
  of DDPM. t' is the next timestep of the chain (see `Schedule.steps_meet`); for the last step it is
  negative, and ᾱ_t' is 1 (`set_alpha_to_one`) or ᾱ_0.

  Returns:
    NumPy arrays [T], float32 and int32.

  Raises:
    ValueError: the schedule has no such chain, or `eta` is not in [0, 1].
  """
  if not 0 <= eta <= 1:
    raise ValueError(f"eta is {eta}; expected 0 (deterministic) to 1 (DDPM)")
  total = schedule.num_train_timesteps
  t = timesteps(schedule, num_steps)
  if t[0] >= total:
    raise ValueError(
      f"num_steps is {num_steps}, which with steps_offset {schedule.steps_offset} starts at "
      f"timestep {t[0]}; expected {total - 1} at most; use fewer steps"
    )
  alphas = schedule.alphas_cumprod.astype(np.float64)
  meets = schedule.steps_meet and schedule.timestep_spacing != "leading"
  t_prev = np.append(t[1:], -1) if meets else t - total // num_steps
  final = 1.0 if schedule.set_alpha_to_one else alphas[0]
  alpha, alpha_prev = alphas[t], np.where(t_prev >= 0, alphas[np.maximum(t_prev, 0)], final)
  if schedule.prediction_type == "epsilon" and alpha[0] == 0:
    raise ValueError(
      f"prediction_type is epsilon and timestep {t[0]} is pure noise (rescale_betas_zero_snr), "
      "which does not determine the image; use v_prediction or another timestep_spacing"
    )
  sigma = eta * np.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
  return Steps(t, *(field.astype(np.float32) for field in (alpha, alpha_prev, sigma)))


def _expand(values: Sigma, like: jax.Array | np.ndarray) -> jax.Array:
  """Reshapes [] or [B] to float32 that broadcasts against `like` [B, ...]."""
  values = jnp.asarray(values, jnp.float32)
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _original_and_noise(
  schedule: Schedule, step: Steps, latents: Latents, model_output: Latents
) -> tuple[jax.Array, jax.Array]:
  """Computes x̂0 and ε̂ of x_t = sqrt(ᾱ) x0 + sqrt(1−ᾱ) ε from the network's output.

  `clip_sample` clips only x̂0, as in diffusers.
  """
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
  schedule: Schedule, step: Steps, latents: Latents, model_output: Latents
) -> Float[Array, "B h w c"]:
  """Computes x̂0, the clean latents that the network's output implies at x_t = `latents`."""
  return _original_and_noise(schedule, step, latents, model_output)[0]


def predict_mean(
  schedule: Schedule, step: Steps, latents: Latents, model_output: Latents
) -> Float[Array, "B h w c"]:
  """Computes μ = sqrt(ᾱ_t') x̂0 + sqrt(1 − ᾱ_t' − σ²) ε̂, the mean of x_t' given x_t = `latents`."""
  original, noise = _original_and_noise(schedule, step, latents, model_output)
  alpha_prev, sigma = _expand(step.alpha_prev, original), _expand(step.sigma, original)
  # The exact difference is never negative, but its rounded value can be.
  direction = jnp.sqrt(jnp.maximum(1 - alpha_prev - sigma**2, 0.0))
  return jnp.sqrt(alpha_prev) * original + direction * noise


def mean_over_elements(values: jax.Array, weight: Weight | None) -> jax.Array:
  """Averages [B, ...] over all dimensions but B; gives 0 where a sample's weights sum to 0."""
  axes = tuple(range(1, values.ndim))
  if weight is None:
    return jnp.mean(values, axes)
  weight = jnp.broadcast_to(weight.astype(jnp.float32), values.shape)
  total = jnp.sum(weight, axes)
  return jnp.sum(values * weight, axes) / jnp.where(total > 0, total, 1.0)


def log_prob(
  x_prev: Latents, mean: Latents, sigma: Sigma, weight: Weight | None = None
) -> Float[Array, " B"]:
  """Computes the log-density of x_t' under N(μ, σ²), averaged (not summed) over h, w and c.

  A step with σ = 0 is deterministic and has no density; its value and gradient are 0.

  Args:
    x_prev: x_t'.
    mean: μ.
    sigma: σ, one for the batch or one per sample.
    weight: weights of the average, 1 for latents of the hole, for example; None: equal weights. A
      sample whose weights are all 0 gets 0.
  """
  sigma = _expand(sigma, mean)
  is_random = sigma > 0
  sigma = jnp.where(is_random, sigma, 1.0)
  deviation = (x_prev.astype(jnp.float32) - mean.astype(jnp.float32)) / sigma
  density = -0.5 * deviation**2 - jnp.log(sigma) - 0.5 * math.log(2 * math.pi)
  return mean_over_elements(jnp.where(is_random, density, 0.0), weight)


def gaussian_kl(
  mean: Latents, base_mean: Latents, sigma: Sigma, weight: Weight | None = None
) -> Float[Array, " B"]:
  """Computes KL(N(μ, σ²) ‖ N(μ_base, σ²)) = (μ − μ_base)² / 2σ², averaged over h, w and c.

  `sigma` and `weight` are those of `log_prob`. A step with σ = 0 has value and gradient 0.
  """
  sigma = _expand(sigma, mean)
  is_random = sigma > 0
  deviation = mean.astype(jnp.float32) - base_mean.astype(jnp.float32)
  deviation = jnp.where(is_random, deviation, 0.0) / jnp.where(is_random, sigma, 1.0)
  return mean_over_elements(0.5 * deviation**2, weight)


def step(
  schedule: Schedule,
  step: Steps,
  latents: Latents,
  model_output: Latents,
  *,
  noise: Latents | None = None,
  x_prev: Latents | None = None,
  weight: Weight | None = None,
) -> tuple[Latents, Float[Array, " B"]]:
  """Samples a transition x_t → x_t', or scores one of an earlier rollout.

  Both give the same log-probability for the same transition and parameters.

  Args:
    latents: x_t.
    model_output: output of the network at x_t.
    noise: standard normal, to sample x_t' = μ + σ · noise.
    x_prev: x_t', to score it.
    weight: that of `log_prob`.

  Returns:
    x_t' and its log-probability.
  """
  if (noise is None) == (x_prev is None):
    given = "neither" if noise is None else "both"
    raise ValueError(
      f"noise and x_prev: {given} given; give exactly one, noise to sample or x_prev to score"
    )
  mean = predict_mean(schedule, step, latents, model_output)
  if x_prev is None:
    x_prev = mean + _expand(step.sigma, mean) * noise
  return x_prev, log_prob(x_prev, mean, step.sigma, weight)


def make_transition(
  predict: Predict, schedule: Schedule, key: jax.Array, weight: Weight | None = None
):
  """Makes the scan body (x_t, (i, step i)) -> (x_t', log p), with noise from fold_in(key, i)."""

  def transition(latents, numbered_step):
    index, one_step = numbered_step
    noise = jax.random.normal(jax.random.fold_in(key, index), latents.shape, jnp.float32)
    model_output = predict(latents, one_step.timestep)
    return step(schedule, one_step, latents, model_output, noise=noise, weight=weight)

  return transition


def _numbered(steps: Steps) -> tuple[jax.Array, Steps]:
  """Returns the indices [T] and the steps as JAX arrays, for `jax.lax.scan`."""
  return jnp.arange(len(steps.timestep)), Steps(*map(jnp.asarray, steps))


def rollout(
  predict: Predict,
  schedule: Schedule,
  steps: Steps,
  latents: Latents,
  key: Key[Array, ""],
  weight: Weight | None = None,
) -> Trajectory:
  """Runs the whole chain and keeps every state.

  Args:
    latents: initial noise, standard normal.
    key: of the noise of the transitions.
    weight: that of `log_prob`.
  """
  transition = make_transition(predict, schedule, key, weight)

  def keep(latents, numbered_step):
    latents, score = transition(latents, numbered_step)
    return latents, (latents, score)

  latents = latents.astype(jnp.float32)
  _, (states, log_probs) = jax.lax.scan(keep, latents, _numbered(steps))
  states = jnp.concatenate([latents[None], states])
  return Trajectory(states, log_probs, jnp.asarray(steps.timestep))


def sample(
  predict: Predict, schedule: Schedule, steps: Steps, latents: Latents, key: Key[Array, ""]
) -> Float[Array, "B h w c"]:
  """Runs the chain of `rollout` and returns only its last state."""
  transition = make_transition(predict, schedule, key)
  advance = lambda latents, numbered_step: (transition(latents, numbered_step)[0], None)
  return jax.lax.scan(advance, latents.astype(jnp.float32), _numbered(steps))[0]


def _signal_and_spread(schedule: Schedule, t: Timesteps, like: jax.Array | np.ndarray):
  """Returns sqrt(ᾱ_t) and sqrt(1−ᾱ_t), which broadcast against `like`."""
  alpha = _expand(jnp.asarray(schedule.alphas_cumprod)[t], like)
  return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)


def add_noise(
  schedule: Schedule, x0: Latents, noise: Latents, t: Timesteps
) -> Float[Array, "B h w c"]:
  """Computes the forward process x_t = sqrt(ᾱ_t) x0 + sqrt(1−ᾱ_t) ε in float32."""
  signal, spread = _signal_and_spread(schedule, t, x0)
  return signal * x0.astype(jnp.float32) + spread * noise.astype(jnp.float32)


def training_target(
  schedule: Schedule, x0: Latents, noise: Latents, t: Timesteps
) -> Float[Array, "B h w c"]:
  """Computes the regression target of the network at x_t in float32.

  By the schedule's prediction type it is ε, v = sqrt(ᾱ_t) ε − sqrt(1−ᾱ_t) x0, or x0.
  """
  x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
  if schedule.prediction_type == "epsilon":
    return noise
  if schedule.prediction_type == "sample":
    return x0
  signal, spread = _signal_and_spread(schedule, t, x0)
  return signal * noise - spread * x0
