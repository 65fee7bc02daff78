"""Noise schedules, as defined by scheduler_config.json of diffusers."""
# Shapes: N training timesteps.

import ast
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from prefpaint_jax.weights import fields

_CHOICES = {
  "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
  "prediction_type": ("epsilon", "v_prediction", "sample"),
  "timestep_spacing": ("leading", "trailing", "linspace"),
}

_MOST_TIMESTEPS = 1_000_000  # a schedule is an array of that length

# The classes of diffusers that sample from a network that any of the others may sample from.
CLASSES = (
  *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
  *("PNDMScheduler", "LMSDiscreteScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
  *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
  *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler"),
  *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
)
TABLE = fields.Table(
  "scheduler",
  # These change the latents, the network's output, or the noise levels that the network was
  # trained with. Learned variances need a network with twice the channels.
  fixed={
    "thresholding": (False, None),
    "use_flow_sigmas": (False, None),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "timestep_type": ("discrete", None),
    "use_dynamic_shifting": (False, None),
    "shift_terminal": (None,),
    "snr_shift_scale": (None,),
  },
  # Options of other solvers, and of fields that are refused. DDIM has the noise levels of its
  # timesteps, so the Karras, exponential and beta spacings of other samplers are not used.
  harmless=frozenset(
    {
      *("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"),
      *("skip_prk_steps", "solver_order", "solver_type", "algorithm_type", "lower_order_final"),
      *("euler_at_final", "lambda_min_clipped", "interpolation_type", "predict_x0", "solver_p"),
      *("disable_corrector", "predictor_order", "corrector_order", "tau_func"),
      *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
      *("sigma_min", "sigma_max", "noise_sampler_seed"),
    }
  ),
)
# Read by `Schedule.from_config` beside the fields of `Schedule`.
READ = frozenset({"final_sigmas_type"})


@functools.cache
def class_defaults(class_name: str) -> Mapping[str, Any]:
  """Returns the defaults of a scheduler class, from the signature in diffusers' source.

  The source is parsed and not imported: its modules need torch.
  """
  spec = importlib.util.find_spec("diffusers")
  folder = Path(spec.submodule_search_locations[0]) / "schedulers"
  for path in sorted(folder.glob("scheduling_*.py")):
    source = path.read_text(encoding="utf-8")
    if f"class {class_name}(" not in source:
      continue
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.ClassDef) and node.name == class_name:
        init = next(x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__")
        named = init.args.args[len(init.args.args) - len(init.args.defaults) :]
        pairs = zip(named, init.args.defaults, strict=True)
        return {a.arg: _literal(default) for a, default in pairs}
  raise ValueError(
    f"scheduler _class_name is {class_name}, which the installed diffusers does not have; install "
    "diffusers>=0.42.1"
  )


def _literal(default: ast.expr) -> Any:
  """Evaluates a default of a signature; None for an expression such as -float("inf")."""
  try:
    return ast.literal_eval(default)
  except ValueError:
    return None


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
  # A step ends at the timestep where the next one begins. False: at t − N // T, as in diffusers'
  # DDIMScheduler. That is another timestep with "linspace" spacing, and with "trailing" where T
  # does not divide N (diffusers' issues 11347 and 12633); with "leading" both are the same.
  steps_meet: bool = True

  def __post_init__(self):
    for field, choices in _CHOICES.items():
      value = getattr(self, field)
      if value not in choices:
        raise ValueError(f"scheduler {field} is {value!r}; expected one of {', '.join(choices)}")
    for field, least in (("num_train_timesteps", 1), ("steps_offset", 0)):
      if not least <= getattr(self, field) <= _MOST_TIMESTEPS:
        raise ValueError(
          f"scheduler {field} is {getattr(self, field)}; expected {least} to {_MOST_TIMESTEPS}"
        )
    if not self.clip_sample_range > 0:
      raise ValueError(f"scheduler clip_sample_range is {self.clip_sample_range}; expected above 0")
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
    `DDIMScheduler.from_config`, a missing field gets the default of the class that wrote the file,
    from diffusers' signature of it: DDIM's default would clip the latents of a PNDM config to ±1.

    Raises:
      ValueError: the class is not in CLASSES, or a field that changes the result is not supported.
    """
    class_name = config.get("_class_name") or "DDIMScheduler"
    if str(class_name).removeprefix("Flax") not in CLASSES:
      raise ValueError(
        f"scheduler _class_name is {class_name}, which is not supported; expected one of "
        f"{', '.join(CLASSES)}; use a checkpoint whose scheduler is defined by betas"
      )
    given = {field: value for field, value in config.items() if value is not None}
    defaults = class_defaults(class_name.removeprefix("Flax"))
    # A solver in sigmas ends at the noise level 0, or at that of the first training timestep.
    final = given.get("final_sigmas_type", defaults.get("final_sigmas_type", "zero"))
    if final not in ("zero", "sigma_min"):
      raise ValueError(f"scheduler final_sigmas_type is {final!r}; expected zero or sigma_min")
    # A class without these fields neither clips nor ends at another level.
    values = {"set_alpha_to_one": final == "zero", "clip_sample": False}
    values |= {name: value for name, value in defaults.items() if value is not None}
    return fields.read(cls, values | given, TABLE)

  def to_config(self) -> dict[str, Any]:
    """Returns scheduler_config.json of this schedule, as a DDIMScheduler of diffusers."""
    config = {"_class_name": "DDIMScheduler", **dataclasses.asdict(self), "thresholding": False}
    if self.trained_betas is not None:
      config["trained_betas"] = list(self.trained_betas)
    if self.steps_meet:
      del config["steps_meet"]  # diffusers does not know it
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
