"""Noise schedule, DDIM step and its log-probability, rollout: pure functions around a `predict`.

The chain is the DDIM sampler of Song et al. 2021 (eq. 12 and 16) on the discrete schedules that
diffusers writes down. One function, `step`, both samples a transition and scores it, so the
log-probability of a rollout and that of a later update cannot drift apart. Everything here is
computed in float32, whatever the dtype of the network's output.
"""
# Shapes: B samples, T rollout steps, N training timesteps, h w latent pixels, c latent channels.

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# (latents [B, h, w, c], timestep []) -> model output [B, h, w, c].
Predict = Callable[[jax.Array, jax.Array], jax.Array]

_CHOICES = {
  "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
  "prediction_type": ("epsilon", "v_prediction", "sample"),
  "timestep_spacing": ("leading", "trailing", "linspace"),
}
# Classes whose missing betas mean diffusers' default betas; others may have no betas at all.
_BETA_CLASSES = (
  *("DDIM", "DDPMScheduler", "PNDM", "LMS", "Euler", "Heun"),
  *("DPMSolver", "KDPM2", "DEIS", "UniPC"),
)
_BETA_FIELDS = {"beta_start", "beta_end", "beta_schedule", "trained_betas"}


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What a scheduler_config.json says about noise; hashable, so it can be a static argument.

  Field names and defaults are those of diffusers' DDIMScheduler.
  """

  num_train_timesteps: int = 1000
  beta_start: float = 0.0001
  beta_end: float = 0.02
  beta_schedule: str = "linear"
  trained_betas: tuple[float, ...] | None = None
  prediction_type: str = "epsilon"
  steps_offset: int = 0
  set_alpha_to_one: bool = True
  timestep_spacing: str = "leading"
  clip_sample: bool = True
  clip_sample_range: float = 1.0
  rescale_betas_zero_snr: bool = False

  def __post_init__(self):
    for field, choices in _CHOICES.items():
      value = getattr(self, field)
      if value not in choices:
        raise ValueError(f"scheduler {field} is {value!r}: use one of {', '.join(choices)}")
    for field, least in (("num_train_timesteps", 1), ("steps_offset", 0)):
      if getattr(self, field) < least:
        raise ValueError(f"scheduler {field} is {getattr(self, field)}: use {least} or more")
    if self.trained_betas is None:
      for field in ("beta_start", "beta_end"):
        if not 0 < getattr(self, field) < 1:
          raise ValueError(f"scheduler {field} is {getattr(self, field)}: betas lie in (0, 1)")
    else:
      if len(self.trained_betas) != self.num_train_timesteps:
        raise ValueError(
          f"scheduler trained_betas has {len(self.trained_betas)} entries and num_train_timesteps "
          f"is {self.num_train_timesteps}: give one beta per timestep"
        )
      if not all(0 < beta <= 1 for beta in self.trained_betas):
        raise ValueError("scheduler trained_betas has a value outside (0, 1]: give betas in (0, 1]")

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
    """The schedule of any diffusers scheduler that is built on betas; the sampler is always DDIM.

    Fields that belong to another sampler are ignored; what would change the result and is not
    done here is an error. The one departure from `DDIMScheduler.from_config`: a missing
    `clip_sample` or `set_alpha_to_one` gets the default of the class that wrote the file, not
    DDIM's, because clipping the latents of a PNDM config to ±1 would ruin them.
    """
    given = {field: value for field, value in config.items() if value is not None}
    class_name = given.get("_class_name", "DDIMScheduler").removeprefix("Flax")
    if not class_name.startswith(_BETA_CLASSES) and not _BETA_FIELDS & given.keys():
      raise ValueError(
        f"scheduler _class_name is {class_name}, without beta_schedule: use a checkpoint whose "
        "scheduler is defined by betas (DDIM, PNDM, DDPM, Euler, ...)"
      )
    if given.get("thresholding"):
      raise ValueError("scheduler thresholding is true: not done here, set it to false")
    if given.get("use_flow_sigmas"):
      raise ValueError("scheduler use_flow_sigmas is true: flow matching is not done here")
    if str(given.get("variance_type", "")).startswith("learned"):
      raise ValueError(
        f"scheduler variance_type is {given['variance_type']!r}: a network that also predicts the "
        "variance is not done here, use one with a fixed variance"
      )
    values = {
      "set_alpha_to_one": class_name != "PNDMScheduler",
      "clip_sample": class_name.startswith(("DDIM", "DDPM")),
    }
    values |= {f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given}
    if "trained_betas" in values:
      values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
    return cls(**values)

  def to_config(self) -> dict[str, Any]:
    """scheduler_config.json of the same schedule for stock diffusers (a DDIMScheduler)."""
    config = {"_class_name": "DDIMScheduler", **dataclasses.asdict(self), "thresholding": False}
    if self.trained_betas is not None:
      config["trained_betas"] = list(self.trained_betas)
    return config

  @functools.cached_property
  def alphas_cumprod(self) -> np.ndarray:
    """ᾱ [N] float32, the product of 1 − β up to each timestep.

    Equal to diffusers' to the bit; with `rescale_betas_zero_snr` to the rounding of float32.
    """
    alphas_cumprod = np.cumprod(np.float32(1) - self._betas(), dtype=np.float64)
    if self.rescale_betas_zero_snr:
      alphas_cumprod = _rescale_to_zero_snr(alphas_cumprod)
    alphas_cumprod = alphas_cumprod.astype(np.float32)
    alphas_cumprod.setflags(write=False)  # One array is shared by all callers.
    return alphas_cumprod

  def _betas(self) -> np.ndarray:
    if self.trained_betas is not None:
      return np.asarray(self.trained_betas, np.float32)
    if self.beta_schedule == "linear":
      return _linspace(self.beta_start, self.beta_end, self.num_train_timesteps)
    if self.beta_schedule == "scaled_linear":
      return _linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
    # squaredcos_cap_v2: ᾱ follows a squared cosine (Nichol and Dhariwal 2021), β capped at 0.999.
    cosine = [
      math.cos((i / self.num_train_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
      for i in range(self.num_train_timesteps + 1)
    ]
    ratios = zip(cosine[1:], cosine[:-1], strict=True)
    return np.asarray([min(1 - after / before, 0.999) for after, before in ratios], np.float32)


def _linspace(start: float, stop: float, num: int) -> np.ndarray:
  """Float32 linspace with torch's rounding: each half is counted from its own end, rounded once.

  A last-bit difference in β is worth having right: 1 − ᾱ of the last steps is small.
  """
  start, stop = np.float32(start), np.float32(stop)
  width = np.float64((stop - start) / np.float32(max(num - 1, 1)))
  index = np.arange(num)
  from_start = np.float64(start) + width * index
  from_stop = np.float64(stop) - width * (num - 1 - index)
  return np.where(index < (num + 1) // 2, from_start, from_stop).astype(np.float32)


def _rescale_to_zero_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
  """Shift and scale sqrt(ᾱ) so that it keeps its start and ends at 0 (Lin et al. 2024, alg. 1)."""
  root = np.sqrt(alphas_cumprod)
  return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


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
