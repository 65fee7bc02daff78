"""The programs that an iteration consists of, on a mesh: each is compiled once.

`train` runs them, `plan` compiles them for machines that are elsewhere, `benchmark` times them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefpaint_jax import alignment, rl, sharding
from prefpaint_jax.alignment import TrainState
from prefpaint_jax.compilation import fast_jit
from prefpaint_jax.diffusion import Steps, Trajectory
from prefpaint_jax.inpainter import Modules, Params, Prompts
from prefpaint_jax.models.reward import RewardNetwork
from prefpaint_jax.settings import Settings


class Programs(NamedTuple):
  """Arguments are those of the functions of `alignment` of the same name, from the first array."""

  init: Callable[..., TrainState]  # parameters -> state; only with shapes until compiled
  rollout: Callable
  paint: Callable
  score: Callable
  draw_timesteps: Callable[[jax.Array], list[jax.Array]]  # key -> the steps of each update
  update: Callable  # gives away its state
  end_iteration: Callable  # gives away its state
  shapes: TrainState  # of jax.ShapeDtypeStruct
  layout: TrainState  # of NamedSharding


def make_programs(
  modules: Modules,
  network: RewardNetwork,
  settings: Settings,
  steps: Steps,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  policy: Params,
) -> Programs:
  """The programs for a policy of these parameters, or of shapes in their place."""
  init = functools.partial(alignment.init_state, settings, optimizer)
  shapes = jax.eval_shape(init, policy)
  layout = sharding.specs(shapes, sharding.DEFAULT_RULES, mesh)
  batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  along_time = NamedSharding(mesh, P(None, *batch.spec))
  prompts = Prompts(*(batch,) * 4, context=whole)
  trajectory = Trajectory(latents=along_time, log_probs=along_time, timesteps=whole)

  @jax.jit
  def draw_timesteps(key: jax.Array) -> list[jax.Array]:
    first, last = settings.skip_steps
    drawn = rl.draw_timesteps(
      key, settings.num_steps, settings.train_timesteps, first, settings.num_steps - last
    )
    return jnp.split(drawn, settings.updates_per_iteration)

  jit = fast_jit(mesh)
  return Programs(
    init=jax.jit(init, out_shardings=layout),
    rollout=jit(
      functools.partial(alignment.rollout, modules, settings, steps, mesh=mesh),
      out_shardings=(prompts, trajectory, batch),
    ),
    paint=jit(functools.partial(alignment.paint, modules, settings, steps, mesh=mesh)),
    score=jit(functools.partial(alignment.score, network, settings, mesh=mesh)),
    draw_timesteps=draw_timesteps,
    update=jit(
      functools.partial(alignment.update, modules, settings, steps, optimizer, mesh=mesh),
      donate_argnums=0,
      out_shardings=(layout, None),
    ),
    end_iteration=jax.jit(
      functools.partial(alignment.end_iteration, settings), donate_argnums=0, out_shardings=layout
    ),
    shapes=shapes,
    layout=layout,
  )
