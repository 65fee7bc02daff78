"""Noise schedules, as defined by scheduler_config.json of diffusers."""
# Shapes: N training timesteps.

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

_CHOICES = {
  "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
  "prediction_type": ("epsilon", "v_prediction", "sample"),
  "timestep_spacing": ("leading", "trailing", "linspace"),
}

# Configs of these classes may omit the betas; diffusers' defaults then apply.
_BETA_CLASSES = (
  *("DDIM", "DDPMScheduler", "PNDM", "LMS", "Euler", "Heun"),
  *("DPMSolver", "KDPM2", "DEIS", "UniPC"),
)
_BETA_FIELDS = {"beta_start", "beta_end", "beta_schedule", "trained_betas"}


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A noise schedule with the field names and defaults of diffusers' DDIMScheduler.

  It is hashable, so it can be a static argument of a jitted function.
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
        raise ValueError(f"scheduler {field} is {value!r}; expected one of {', '.join(choices)}")
    for field, least in (("num_train_timesteps", 1), ("steps_offset", 0)):
      if getattr(self, field) < least:
        raise ValueError(f"scheduler {field} is {getattr(self, field)}; expected {least} or more")
    if self.trained_betas is None:
      for field in ("beta_start", "beta_end"):
        if not 0 < getattr(self, field) < 1:
          raise ValueError(
            f"scheduler {field} is {getattr(self, field)}; expected a value in (0, 1)"
          )
    else:
      if len(self.trained_betas) != self.num_train_timesteps:
        raise ValueError(
          f"scheduler trained_betas has {len(self.trained_betas)} entries; expected "
          f"{self.num_train_timesteps}, one per timestep (num_train_timesteps)"
        )
      if not all(0 < beta <= 1 for beta in self.trained_betas):
        raise ValueError("scheduler trained_betas has a value outside (0, 1]; give betas in (0, 1]")

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
    """Reads the config of any diffusers scheduler that is defined by betas.

    Fields of other samplers are ignored, because this package always samples with DDIM. Unlike
    `DDIMScheduler.from_config`, a missing `clip_sample` or `set_alpha_to_one` gets the default of
    the class that wrote the file: DDIM's default would clip the latents of a PNDM config to ±1.

    Raises:
      ValueError: the config has no betas, or a field that changes the result is not supported.
    """
    given = {field: value for field, value in config.items() if value is not None}
    class_name = given.get("_class_name", "DDIMScheduler").removeprefix("Flax")
    if not class_name.startswith(_BETA_CLASSES) and not _BETA_FIELDS & given.keys():
      raise ValueError(
        f"scheduler _class_name is {class_name}, without beta_schedule; use a checkpoint whose "
        "scheduler is defined by betas (DDIM, PNDM, DDPM, Euler, ...)"
      )
    if given.get("thresholding"):
      raise ValueError("scheduler thresholding is true, which is not supported; set it to false")
    if given.get("use_flow_sigmas"):
      raise ValueError(
        "scheduler use_flow_sigmas is true, and flow matching is not supported; use a checkpoint "
        "that predicts noise"
      )
    if str(given.get("variance_type", "")).startswith("learned"):
      raise ValueError(
        f"scheduler variance_type is {given['variance_type']!r}; a network that also predicts the "
        "variance is not supported; use one with a fixed variance"
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
    """Returns scheduler_config.json of this schedule, as a DDIMScheduler of diffusers."""
    config = {"_class_name": "DDIMScheduler", **dataclasses.asdict(self), "thresholding": False}
    if self.trained_betas is not None:
      config["trained_betas"] = list(self.trained_betas)
    return config

  @functools.cached_property
  def alphas_cumprod(self) -> Float[np.ndarray, " N"]:
    """Computes ᾱ, the product of 1 − β up to each timestep, in float32.

    It equals diffusers' bit for bit; with `rescale_betas_zero_snr`, to float32 rounding.
    """
    alphas_cumprod = np.cumprod(np.float32(1) - self._betas(), dtype=np.float64)
    if self.rescale_betas_zero_snr:
      alphas_cumprod = _rescale_to_zero_snr(alphas_cumprod)
    alphas_cumprod = alphas_cumprod.astype(np.float32)
    alphas_cumprod.setflags(write=False)  # all callers share this array
    return alphas_cumprod

  def _betas(self) -> np.ndarray:
    """Computes β [N] in float32."""
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
  """Computes linspace in float32 with the rounding of torch.

  torch computes the first half from `start` and the second half from `stop`, rounding once. A
  difference in the last bit of β would matter, because 1 − ᾱ of the first timesteps is small.
  """
  start, stop = np.float32(start), np.float32(stop)
  width = np.float64((stop - start) / np.float32(max(num - 1, 1)))
  index = np.arange(num)
  from_start = np.float64(start) + width * index
  from_stop = np.float64(stop) - width * (num - 1 - index)
  return np.where(index < (num + 1) // 2, from_start, from_stop).astype(np.float32)


def _rescale_to_zero_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
  """Shifts and scales sqrt(ᾱ) to end at 0 and keep its start (Lin et al. 2024, alg. 1)."""
  root = np.sqrt(alphas_cumprod)
  return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
