"""The settings of an iteration of alignment, and the checks of a run's config."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from prefpaint_jax.rewards.objective import Objective, label_rewards
from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.config_check import check_values
from prefpaint_jax.runtime.config_fields import RL
from prefpaint_jax.runtime.config_fields import TRUST_NORMS as TRUST_NORMS


@dataclasses.dataclass(frozen=True)
class Trust:
  """The trust weight γ = clip(exp(b − k·norm), minimum, maximum), or a constant, or 1.

  `norm` "mahalanobis" is ‖z‖_{V⁻¹} of the reward's features z, as in the paper; "released" is the
  norm of zV⁻¹, as in the authors' code. "novelty" is ‖z‖_{V⁻¹} with V of the base policy's samples
  (`align.novelty`), "ensemble" the standard deviation between several rewards, each standardised
  over the batch. "constant" and "none" (γ = 1) read no features.
  """

  norm: str = "mahalanobis"
  k: float = 0.05
  b: float = 0.7
  minimum: float | None = None
  maximum: float | None = None
  constant: float = 1.4
  reference: int = 256

  def __post_init__(self):
    check_values(vars(self), RL, "trust.")
    if None not in (self.minimum, self.maximum) and self.minimum > self.maximum:
      raise ValueError(
        f"config.trust.minimum is {self.minimum}; expected at most trust.maximum={self.maximum}"
      )
    if self.norm == "novelty" and self.reference < 2:
      raise ValueError(
        f"config.trust.reference is {self.reference} with trust.norm='novelty'; expected the "
        "number of samples of the base policy to compare with; give 256"
      )

  @property
  def needs_bound(self) -> bool:
    """Whether the weight needs the reward's error bound, the matrix V."""
    return self.norm in ("mahalanobis", "released")


@dataclasses.dataclass(frozen=True)
class Nft:
  """The settings of DiffusionNFT; `align.nft` has their equations."""

  beta: float = 1.0
  decay_start: int = 0
  decay_rate: float = 0.001
  decay_maximum: float = 0.5

  def __post_init__(self):
    check_values(vars(self), RL, "nft.")


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of an iteration; `configs/rl.py` explains the fields.

  Raises:
    ValueError: for values out of their range, or that cannot work together.
  """

  samples_per_prompt: int
  num_steps: int
  train_timesteps: int
  skip_steps: tuple[int, int]
  updates_per_iteration: int
  samples_per_pass: int
  timesteps_per_pass: int
  gradient_accumulation: int
  eta: float
  guidance_scale: float
  text_dropout: float
  vae_posterior: str
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
  lora: bool  # train LoRA adapters of the base policy, not its parameters
  trust: Trust
  algorithm: str = "ppo"
  ratio_normalisation: bool = False
  window: int = 0
  window_iterations: int = 25
  nft: Nft = Nft()

  def __post_init__(self):
    def check(condition: bool, message: str) -> None:
      if not condition:
        raise ValueError(message)

    check_values(vars(self), RL)
    first, last = self.skip_steps
    trainable = self.num_steps - first - last
    check(
      trainable >= 1,
      f"skip_steps is {self.skip_steps}; expected a sum below num_steps={self.num_steps}, so that "
      "steps are left to train; lower one of them",
    )
    check(
      1 <= self.train_timesteps <= trainable,
      f"train_timesteps is {self.train_timesteps}; expected 1 to {trainable}, the steps that "
      f"skip_steps={self.skip_steps} leaves of num_steps={self.num_steps}",
    )
    each, rest = divmod(self.train_timesteps, self.updates_per_iteration)
    check(
      rest == 0,
      f"updates_per_iteration is {self.updates_per_iteration}; expected a divisor of "
      f"train_timesteps={self.train_timesteps}",
    )
    check(
      self.timesteps_per_pass == 0 or each % self.timesteps_per_pass == 0,
      f"timesteps_per_pass is {self.timesteps_per_pass}; expected 0 or a divisor of {each}, the "
      "timesteps of an update",
    )
    self._check_algorithm(check, trainable)

  def _check_algorithm(self, check: Callable[[bool, str], None], trainable: int) -> None:
    """Checks the fields that only some algorithms have."""
    name = self.algorithm
    check(
      self.eta > 0 or not self.keeps_chain,
      "eta is 0 with algorithm='ppo'; a chain without noise has no policy gradient; give eta above "
      "0, or --config.algorithm=nft",
    )
    for field in ("ratio_normalisation", "window"):
      check(
        self.keeps_chain or not getattr(self, field),
        f"{field} is {getattr(self, field)} with algorithm={name!r}; only ppo has it; leave it out",
      )
    check(
      name == "nft" or self.nft == Nft(),
      f"nft is {self.nft} with algorithm={name!r}; only nft has these fields; leave them out",
    )
    check(
      not self.window or self.train_timesteps <= self.window <= trainable,
      f"window is {self.window}; expected 0, or train_timesteps={self.train_timesteps} to "
      f"{trainable}, the steps that skip_steps={self.skip_steps} leaves",
    )
    check(
      name != "nft" or (self.behaviour_refresh == 1 and self.behaviour_dtype == "float32"),
      f"behaviour_refresh is {self.behaviour_refresh} and behaviour_dtype {self.behaviour_dtype!r} "
      "with algorithm='nft'; expected 1 and 'float32', because nft.decay_* moves its old policy",
    )

  @property
  def keeps_chain(self) -> bool:
    """Whether the update trains transitions of the chain, not noised final latents."""
    return self.algorithm == "ppo"

  @property
  def keeps_behaviour(self) -> bool:
    """Whether the state holds the behaviour policy beside the policy."""
    return self.behaviour_refresh > 1 or self.reads_behaviour

  @property
  def reads_behaviour(self) -> bool:
    """Whether the update evaluates the behaviour policy's network.

    "awm" with one update after each refresh compares the policy with itself.
    """
    is_policy = self.updates_per_iteration == self.behaviour_refresh == 1
    return self.algorithm == "nft" or (self.algorithm == "awm" and not is_policy)

  @property
  def passes_per_sample(self) -> int:
    """Forward passes of the UNet for a sample of an iteration; a backward pass counts as two."""
    update = 3 + (self.kl_weight > 0) + self.reads_behaviour
    guided = 2 if self.guidance_scale != 1 else 1
    return guided * (self.num_steps + self.train_timesteps * update)


def check_adapters(config: ConfigDict) -> None:
  """Raises ValueError if a config of a run names a file of adapters and has rank 0."""
  if config.lora.init and not config.lora.rank:
    raise ValueError(
      f"lora.init is {config.lora.init} with lora.rank=0; expected the rank of its adapters; set "
      "--config.lora.rank"
    )


def check_workdir(config: ConfigDict, workdir: Path) -> None:
  """Raises ValueError if the policy of a run is its own workdir."""
  if Path(config.policy).resolve() == workdir.resolve():
    raise ValueError(
      f"config.policy is {config.policy}, the run's own workdir; give another --workdir"
    )


def settings_from(config: ConfigDict) -> Settings:
  """Makes the settings of an alignment config."""
  names = [field.name for field in dataclasses.fields(Settings)]
  values = {name: config[name] for name in names if name not in ("trust", "lora", "nft")}
  values["skip_steps"] = tuple(config.skip_steps)
  if config.behaviour_dtype == "bfloat16" and (config.dtype != "bfloat16" or config.lora.rank > 0):
    # The update computes with these parameters in float32: the ratio would not be 1 at equal
    # weights.
    raise ValueError(
      f"behaviour_dtype is 'bfloat16' with dtype={config.dtype!r} and "
      f"lora.rank={config.lora.rank}; expected dtype 'bfloat16' and rank 0; "
      "set behaviour_dtype to 'float32'"
    )
  check_adapters(config)
  nested = {"trust": Trust(**config.trust), "nft": Nft(**config.nft)}
  return Settings(**values, **nested, lora=config.lora.rank > 0)


def measures_novelty(trust: Trust, objective: Objective) -> bool:
  """Returns whether V is of the base policy's samples, not of the reward's own training features.

  It is where the weight is "novelty", and, for a metric, where the features have no bound.
  """
  trusted = objective.trusted
  if trusted is None or not trust.reference:
    return False
  return trust.norm == "novelty" or trusted.bound is None


def compares_with_base(config: ConfigDict) -> bool:
  """Returns whether a run also samples with the base policy, and so keeps its parameters."""
  return bool(config.sample_every or config.eval_every or config.final_prompts)


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
  """Checks that devices can share the batch, and that passes cut each device's samples evenly.

  Raises:
    ValueError: `batch_size` or `samples_per_pass` does not divide.
  """
  sharding.check_batch(config.batch_size, mesh)
  size = config.samples_per_pass
  samples = config.batch_size // mesh.size * config.samples_per_prompt
  if 0 < size < samples and samples % size:
    raise ValueError(
      f"samples_per_pass is {size}; expected 0 or a divisor of {samples}, the samples of a device"
    )


def check_config(config: ConfigDict) -> None:
  """Checks fields of a run, each in its range, that `Settings` does not have.

  Raises:
    ValueError: for fields that cannot work together.
  """
  if not config.prompts:
    raise ValueError(
      "config.prompts is empty; give --config.prompts=FOLDER or use --config=configs/rl.py:mini"
    )
  for field in ("eval_prompts", "final_prompts"):
    if config[field] % config.num_samples:
      raise ValueError(
        f"{field} is {config[field]}; expected a multiple of num_samples={config.num_samples}, the "
        "number of prompts that the run samples at a time"
      )
  name, every = config.keep_best, config.eval_every
  kept = ["reward/mean", "held_out/reward", "held_out/reward_winrate"]
  for judge in label_rewards(config.judges):
    kept += [f"held_out/judge/{judge}{end}" for end in ("", "_winrate")]
  if name and name not in kept:
    raise ValueError(f"keep_best is {name!r}; expected '' or one of {', '.join(kept)}")
  if config.stop_on_hacking and not (
    name.startswith("held_out/judge/") and config.checkpoint_every == every
  ):
    raise ValueError(
      "stop_on_hacking needs judges, keep_best=held_out/judge/NAME and checkpoint_every equal to "
      "eval_every, so that a checkpoint from before the fall is kept; give them"
    )
  is_measured = bool(config.eval_prompts and every) and config.checkpoint_every % every == 0
  if name.startswith("held_out/") and not is_measured:
    raise ValueError(
      f"keep_best is {name}, which is measured every eval_every={every} iterations on "
      f"eval_prompts={config.eval_prompts} prompts; set both above 0 and make "
      f"checkpoint_every={config.checkpoint_every} a multiple of eval_every"
    )


def check_prompts(config: ConfigDict, numbers: Mapping[str, int]) -> None:
  """Checks that no comparison counts a prompt twice.

  Args:
    numbers: {"eval_prompts", "final_prompts": number of prompts that there are}.

  Raises:
    ValueError: a field is larger than its number. The message names it.
  """
  for field, number in numbers.items():
    if config[field] > number and (field == "final_prompts" or config.eval_every):
      most = number // config.num_samples * config.num_samples
      advice = f"give at most {most}, a multiple of num_samples={config.num_samples}"
      if not most:
        advice = f"lower num_samples={config.num_samples}, add prompts, or give 0 for no comparison"
      raise ValueError(
        f"{field} is {config[field]}, {config.prompts} has {number} prompts for it; {advice}"
      )
