"""The set-up of a run: networks, frozen trees, optimiser and stages, from its config.

`train` makes it of arrays; `plan` and `benchmark` make it of shapes, so that nothing is read.
"""
# Shapes: D features.

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from prefpaint_jax.align.optimizer import optimizer_from
from prefpaint_jax.align.settings import Settings, measures_novelty, settings_from
from prefpaint_jax.align.stages import Stages, make_stages
from prefpaint_jax.align.state import Frozen, Sampler, TrainState
from prefpaint_jax.align.texts import Texts
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.models import lora
from prefpaint_jax.models.architectures import read_architecture
from prefpaint_jax.models.assembly import make_modules
from prefpaint_jax.models.conditioning import Context
from prefpaint_jax.models.pipeline import Modules
from prefpaint_jax.rewards.objective import Objective, open_judges, outline_objective
from prefpaint_jax.runtime import sharding
from prefpaint_jax.weights.names import Params

NO_JUDGES = Objective((), ())


class Run(NamedTuple):
  """The fixed part of a run: arrays, or shapes with their shardings."""

  settings: Settings
  objective: Objective
  stages: Stages
  begin: Params  # the trained parameters of the base policy
  frozen: Frozen
  has_texts: bool = False  # the rollout takes the contexts of the prompts' texts
  judges: Objective = NO_JUDGES
  judge_params: tuple[Params, ...] = ()
  texts: Texts | None = None  # which `train` sets

  @property
  def parameters(self) -> dict[str, int]:
    """The number of parameters of each network."""
    trees = {"unet": self.begin, "vae": self.frozen.vae, "reward": self.frozen.reward}
    if self.settings.lora:
      trees |= {"unet": self.frozen.base, "adapters": self.begin}
    return {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in trees.items()}

  @property
  def state_shapes(self) -> TrainState:
    """The train state as shapes with their shardings."""
    return sharding.with_shardings(self.stages.shapes, self.stages.layout)

  def first_params(self, config: ConfigDict) -> Params:
    """Returns the parameters that a new run trains first: those of `lora.init`, or `begin`.

    The adapters of `begin` change nothing, so that a run is compared with its base policy.
    """
    if not config.lora.init:
      return self.begin
    adapters = lora.read(config.lora.init, self.frozen.base, config.lora.rank, self.begin)
    return sharding.place(jax.tree.map(lambda x: x.sharding, self.begin), adapters)


def make_run(
  config: ConfigDict,
  mesh: Mesh,
  modules: Modules,
  objective: Objective,
  base: Params,
  frozen: Frozen,
  *,
  has_texts: bool = False,
  judges: Objective = NO_JUDGES,
  abstract: bool = False,
) -> Run:
  """Places the trees of a run on the mesh and makes its stages.

  Args:
    base: the UNet's parameters.
    frozen: the other trees; its `base` is filled in here.
    has_texts: prompts have texts, whose contexts the rollout takes.
    judges: rewards that are never optimised.
    abstract: the trees are shapes, and so are those of the result.
  """
  settings = settings_from(config)
  if settings.trust.norm == "ensemble" and len(objective.rewards) < 2:
    raise ValueError(
      f"trust.norm is 'ensemble' with one reward, {config.reward}; expected several, whose "
      "disagreement is measured; give --config.reward=A,B"
    )
  check_dtype(config.dtype, mesh.devices.flat[0])
  modules = dataclasses.replace(modules, mask_latents=config.mask_latents)
  modules.latent_shape(1, config.size, config.size)  # raises ValueError for a size that cannot be
  steps = ddim.ddim_steps(modules.schedule, settings.num_steps, settings.eta)
  begin = base
  if settings.lora:
    adapters = lambda key: lora.init(key, base, config.lora.rank, config.lora.targets)
    key = jax.random.key(config.seed)
    begin = jax.eval_shape(adapters, key) if abstract else adapters(key)
    # The networks round the sum of base and adapters anyway. An export adds the adapters to the
    # unrounded base, so its kernels differ from these by at most one rounding.
    round_params = modules.round_params
    rounded = jax.eval_shape(round_params, base) if abstract else round_params(base)
    frozen = frozen._replace(base=rounded)

  put = sharding.with_shardings if abstract else lambda tree, layout: sharding.place(layout, tree)
  place = lambda tree, rules: put(tree, sharding.specs(tree, rules, mesh))
  split, whole = sharding.DEFAULT_RULES, ((r"", P()),)
  begin = place(begin, split)
  rules = split if config.mesh.split_frozen else whole
  frozen, judge_params = place((frozen, judges.params), rules)
  if settings.kl_weight and not settings.lora:
    frozen = frozen._replace(base=begin)
  sampler = Sampler(modules, settings, steps)
  stages = make_stages(sampler, objective, optimizer_from(config), mesh, begin, has_texts)
  return Run(settings, objective, stages, begin, frozen, has_texts, judges, judge_params)


def check_dtype(dtype: str, device: Any) -> None:
  """Raises ValueError for bfloat16 on an NVIDIA GPU before Ampere, such as a T4 or a V100.

  XLA has no bfloat16 attention for them; it says so at the end of a compilation, in ten lines.
  """
  capability = str(getattr(device, "compute_capability", ""))  # AMD's is such as gfx90a
  if dtype == "bfloat16" and re.fullmatch(r"[1-7]\.\d", capability):
    raise ValueError(
      f"dtype is bfloat16, which a {device.device_kind} does not compute; expected float32 there; "
      "set --config.dtype=float32"
    )


def image_shapes(config: ConfigDict, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Returns the shapes of an iteration's images and masks, sharded over the mesh."""
  shape = lambda channels: jax.ShapeDtypeStruct(
    (config.batch_size, config.size, config.size, channels),
    jnp.float32,
    sharding=sharding.batch_sharding(mesh),
  )
  return shape(3), shape(1)


def context_shapes(config: ConfigDict, mesh: Mesh, frozen: Frozen) -> Context:
  """Returns the shapes of the contexts of an iteration's texts, sharded over the mesh."""
  array = lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
  shapes = jax.tree.map(array, frozen.context)
  return sharding.with_shardings(shapes, sharding.batch_sharding(mesh))


def reward_shapes(objective: Objective, config: ConfigDict, mesh: Mesh) -> tuple[Any, Any]:
  """Returns the shapes of `texts` and `on_host` of `score`, sharded over the mesh."""
  array = lambda x, rows: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
  shapes = lambda tree, rows: jax.tree.map(lambda x: array(np.asarray(x), rows), tree)
  tokens, on_host = shapes(objective.tokenize([""]), config.batch_size), None
  if objective.has_host_rewards:
    zeros = tuple(np.zeros(1, np.float32) if one.on_host else None for one in objective.rewards)
    on_host = shapes(zeros, config.batch_size * config.samples_per_prompt)
  return sharding.with_shardings((tokens, on_host), sharding.batch_sharding(mesh))


def outline(config: ConfigDict, mesh: Mesh) -> tuple[Run, Modules, str]:
  """Makes a run of shapes: no weights are read or made.

  It has texts if the config has guidance or text dropout, which change nothing without them.

  Returns:
    The run, its modules, and a phrase that says where the architecture comes from.
  """
  configs, source = read_architecture(config.policy)
  modules = make_modules(configs, config.dtype, config.remat, where=config.policy)
  objective = outline_objective(config.reward, config.combine, config.dtype)
  shapes = modules.shapes()
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  D = objective.trusted.feature_dim if objective.trusted else 0
  tokens = tuple(
    (jax.ShapeDtypeStruct((1, encoder.config.max_position_embeddings), jnp.int32), None)
    for encoder in modules.text_encoders.values()
  )
  context = jax.eval_shape(modules.encode_text, shapes, tokens)
  has_texts = config.guidance_scale != 1 or config.text_dropout > 0
  trust = settings_from(config).trust
  has_norm = trust.needs_bound or measures_novelty(trust, objective)
  frozen = Frozen(
    vae=shapes["vae"],
    reward=objective.params,
    whitening=array(D, D) if has_norm else None,
    context=context,
    base=None,
    negative=context if config.guidance_scale != 1 else None,
  )
  run = make_run(
    config,
    mesh,
    modules,
    objective,
    shapes["unet"],
    frozen,
    has_texts=has_texts,
    judges=open_judges(config.judges, config.dtype, abstract=True),
    abstract=True,
  )
  return run, modules, source
