"""What an iteration of alignment does, checked."""

import dataclasses

from ml_collections import ConfigDict

KEEP_BEST = ("held_out/reward", "held_out/reward_winrate", "reward/mean")  # metrics to choose by
TRUST_NORMS = ("mahalanobis", "released", "constant", "none")


@dataclasses.dataclass(frozen=True)
class Trust:
  """γ = clip(exp(b − k·norm), minimum, maximum), or a constant, or 1."""

  norm: str = "mahalanobis"
  k: float = 0.05
  b: float = 0.7
  minimum: float | None = None
  maximum: float | None = None
  constant: float = 1.4

  def __post_init__(self):
    if self.norm not in TRUST_NORMS:
      raise ValueError(f"trust.norm is {self.norm!r}; give one of {', '.join(TRUST_NORMS)}")

  @property
  def needs_bound(self) -> bool:
    return self.norm in ("mahalanobis", "released")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What an iteration does. The fields are those of `configs/rl.py`, which explains them."""

  samples_per_prompt: int
  num_steps: int
  train_timesteps: int
  skip_steps: tuple[int, int]
  updates_per_iteration: int
  timesteps_per_pass: int
  gradient_accumulation: int
  eta: float
  clip_range: float
  advantage_clip: float
  advantage_std: str
  log_prob_region: str
  loss_reduction: str
  kl_weight: float
  ema_decay: float
  behaviour_refresh: int
  decode_batch: int
  behaviour_dtype: str
  lora: bool  # what is trained are adapters of the base
  trust: Trust

  def __post_init__(self):
    def check(condition: bool, message: str) -> None:
      if not condition:
        raise ValueError(message)

    first, last = self.skip_steps
    trainable = self.num_steps - first - last
    check(
      1 <= self.train_timesteps <= trainable,
      f"train_timesteps is {self.train_timesteps}: of num_steps={self.num_steps}, {trainable} are "
      f"left by skip_steps={self.skip_steps}",
    )
    each, rest = divmod(self.train_timesteps, self.updates_per_iteration)
    check(
      rest == 0,
      f"train_timesteps={self.train_timesteps} does not divide into updates_per_iteration="
      f"{self.updates_per_iteration}",
    )
    check(
      self.timesteps_per_pass == 0 or each % self.timesteps_per_pass == 0,
      f"an update of {each} timesteps does not divide into passes of timesteps_per_pass="
      f"{self.timesteps_per_pass}",
    )
    for name, choices in (
      ("advantage_std", ("batch", "group")),
      ("log_prob_region", ("all", "hole")),
      ("loss_reduction", ("mean", "sum")),
    ):
      value = getattr(self, name)
      check(value in choices, f"{name} is {value!r}; give {' or '.join(map(repr, choices))}")
    for name in ("samples_per_prompt", "gradient_accumulation", "behaviour_refresh"):
      check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; give 1 or more")
    check(
      self.behaviour_dtype in ("float32", "bfloat16"),
      f"behaviour_dtype is {self.behaviour_dtype!r}; give 'float32' or 'bfloat16'",
    )
    check(self.eta > 0, f"eta is {self.eta}: a deterministic chain has no policy gradient")


def settings_from(config: ConfigDict) -> Settings:
  """The settings of an alignment config."""
  names = [field.name for field in dataclasses.fields(Settings)]
  values = {name: config[name] for name in names if name not in ("trust", "lora")}
  values["skip_steps"] = tuple(config.skip_steps)
  return Settings(**values, lora=config.lora.rank > 0, trust=Trust(**config.trust))


def compares_with_base(config: ConfigDict) -> bool:
  """Whether a run samples with the base policy too, and so keeps its parameters."""
  return bool(config.sample_every or config.eval_every or config.final_prompts)


def check_config(config: ConfigDict) -> None:
  """Raises ValueError for fields of a run that cannot work together."""
  if not config.prompts:
    raise ValueError(
      "config.prompts is empty: give --config.prompts=FOLDER, or use the mini preset"
    )
  for field in ("eval_prompts", "final_prompts"):
    if config[field] % config.num_samples:
      raise ValueError(
        f"{field} {config[field]} does not divide by num_samples {config.num_samples}, the number "
        "of prompts that are sampled at a time"
      )
  name, every = config.keep_best, config.eval_every
  if name not in ("", *KEEP_BEST):
    raise ValueError(f"keep_best is {name!r}: give one of {', '.join(KEEP_BEST)}, or none")
  is_measured = bool(config.eval_prompts and every) and config.checkpoint_every % every == 0
  if name.startswith("held_out/") and not is_measured:
    raise ValueError(
      f"keep_best={name} is measured every eval_every={every} iterations on "
      f"eval_prompts={config.eval_prompts}, checkpoints are written every "
      f"{config.checkpoint_every}: make checkpoint_every a multiple of eval_every"
    )
