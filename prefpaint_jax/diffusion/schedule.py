"""Noise schedules, as scheduler_config.json of diffusers defines them."""
# Shapes: N training timesteps.

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

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
