"""The stages of an iteration as compiled programs on a mesh.

`train` runs them, `plan` compiles them for devices that need not be present, `benchmark` times
them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefpaint_jax.align import ppo
from prefpaint_jax.align import rollout as rollout_lib
from prefpaint_jax.align import score as score_lib
from prefpaint_jax.align import update as update_lib
from prefpaint_jax.align.state import (
  Endpoint,
  Experience,
  Frozen,
  Sampler,
  TrainState,
  behaviour_params,
  init_state,
)
from prefpaint_jax.diffusion.ddim import Trajectory
from prefpaint_jax.models.conditioning import Context, Prompts
from prefpaint_jax.rewards.objective import Objective
from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.compilation import Program, fast_jit
from prefpaint_jax.runtime.waiting import waiting
from prefpaint_jax.weights.names import Params


class Stages(NamedTuple):
  """Programs; each takes the arrays that the function of its name takes."""

  init: Program  # parameters -> state
  rollout: Program
  inpaint: Program
  kl_to_base: Program
  score: Program
  window: Callable[[int], np.int32 | None]  # iteration -> the first step with noise, if it slides
  draw_timesteps: Callable[..., list[jax.Array]]  # (key, window) -> step indices of each update
  update: Program  # donates its state
  end_iteration: Program  # donates its state
  shapes: TrainState  # of jax.ShapeDtypeStruct
  layout: TrainState  # of NamedSharding


def make_stages(
  sampler: Sampler,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  params: Params,
  has_texts: bool = False,
) -> Stages:
  """Makes the stages.

  Args:
    params: arrays or shapes of the trained parameters.
    has_texts: each prompt has its own context; otherwise all share the context of the empty text.
  """
  settings = sampler.settings
  init = functools.partial(init_state, sampler, optimizer)
  shapes = jax.eval_shape(init, params)
  layout = sharding.specs(shapes, sharding.DEFAULT_RULES, mesh)
  batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  along_time = NamedSharding(mesh, P(None, *batch.spec))
  prompts = Prompts(*(batch,) * 4, context=batch if has_texts else whole, guidance=whole)
  key = whole if settings.ratio_normalisation else None
  record = Trajectory(latents=along_time, log_probs=along_time, timesteps=whole, key=key)
  if not settings.keeps_chain:
    record = Endpoint(latents=batch, key=whole)
  first, last = settings.skip_steps

  def window(iteration: int) -> np.int32 | None:
    positions = settings.num_steps - first - last - settings.window + 1
    moved = iteration // settings.window_iterations
    return np.int32(first + moved % positions) if settings.window else None

  @jax.jit
  def draw_timesteps(key: jax.Array, window: jax.Array | None = None) -> list[jax.Array]:
    K = settings.train_timesteps
    if window is None:
      drawn = ppo.draw_timesteps(key, settings.num_steps, K, first, settings.num_steps - last)
    else:
      drawn = window + ppo.draw_timesteps(key, settings.window, K)
    return jnp.split(drawn, settings.updates_per_iteration)

  single = sampler._replace(settings=dataclasses.replace(settings, samples_per_prompt=1))
  jit = fast_jit(mesh)
  program = lambda function, **options: Program(jit(function, **options))
  return Stages(
    init=program(init, out_shardings=layout),
    rollout=program(
      functools.partial(rollout_lib.rollout, sampler, mesh=mesh),
      out_shardings=(prompts, record, batch),
    ),
    inpaint=program(functools.partial(rollout_lib.inpaint, single, mesh=mesh)),
    kl_to_base=program(functools.partial(rollout_lib.kl_to_base, single, mesh=mesh)),
    score=program(functools.partial(score_lib.score, objective, settings, mesh=mesh)),
    window=window,
    draw_timesteps=draw_timesteps,
    update=program(
      functools.partial(update_lib.update, sampler, optimizer, mesh=mesh),
      donate_argnums=0,
      out_shardings=(layout, None),
    ),
    end_iteration=program(
      functools.partial(update_lib.end_iteration, settings),
      donate_argnums=0,
      out_shardings=layout,
    ),
    shapes=shapes,
    layout=layout,
  )


def compile_iteration(
  stages: Stages,
  state: TrainState,
  frozen: Frozen,
  images: Any,
  masks: Any,
  context: Context | None = None,
  texts: Any = None,
  on_host: Any = None,
) -> None:
  """Compiles all programs of an iteration before the first of them runs.

  On a CPU their buffers then share one part of the heap; otherwise leftovers of the compiler would
  separate them. Every argument may be a shape with its sharding.
  """
  key, behaviour = jax.random.key(0), behaviour_params(state)
  size = *images.shape, sum(x.size for x in jax.tree.leaves(behaviour))
  window = stages.window(0)
  with waiting("compiling the rollout", size):
    prompts, record, samples = stages.rollout.compile(
      behaviour, frozen, images, masks, key, context, window
    )
  with waiting("compiling the score", size):
    scores, _ = stages.score.compile(frozen, prompts, samples, texts, on_host)
  indices = stages.draw_timesteps(key, window)[0]
  experience = Experience(prompts, record, scores)
  with waiting("compiling the update", size):
    state, _ = stages.update.compile(state, frozen, experience, indices)
    stages.end_iteration.compile(state)
