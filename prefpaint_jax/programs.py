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
from prefpaint_jax.alignment import Frozen, TrainState
from prefpaint_jax.compilation import Program, fast_jit
from prefpaint_jax.diffusion import Steps, Trajectory
from prefpaint_jax.inpainter import Modules, Params, Prompts
from prefpaint_jax.models.reward import RewardNetwork
from prefpaint_jax.settings import Settings


class Programs(NamedTuple):
  """Arguments are those of the functions of `alignment` of the same name, from the first array."""

  init: Program  # parameters -> state
  rollout: Program
  paint: Program
  score: Program
  draw_timesteps: Callable[[jax.Array], list[jax.Array]]  # key -> the steps of each update
  update: Program  # gives away its state
  end_iteration: Program  # gives away its state
  shapes: TrainState  # of jax.ShapeDtypeStruct
  layout: TrainState  # of NamedSharding


def compile_iteration(
  programs: Programs, state: TrainState, frozen: Frozen, images: jax.Array, masks: jax.Array
) -> None:
  """Compiles all that an iteration runs before it runs any of it.

  What a CPU's programs work in then lies in one piece; between parts of compilers that stay, each
  program would have its own. Shapes with their shardings do for arrays.
  """
  key = jax.random.key(0)
  behaviour = state.params if state.behaviour is None else state.behaviour
  prompts, trajectory, painted = programs.rollout.compile(behaviour, frozen, images, masks, key)
  scores, _ = programs.score.compile(frozen, prompts, painted)
  indices = programs.draw_timesteps(key)[0]
  state, _ = programs.update.compile(state, frozen, prompts, trajectory, scores, indices)
  programs.end_iteration.compile(state)


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
  program = lambda function, **options: Program(jit(function, **options))
  return Programs(
    init=program(init, out_shardings=layout),
    rollout=program(
      functools.partial(alignment.rollout, modules, settings, steps, mesh=mesh),
      out_shardings=(prompts, trajectory, batch),
    ),
    paint=program(functools.partial(alignment.paint, modules, settings, steps, mesh=mesh)),
    score=program(functools.partial(alignment.score, network, settings, mesh=mesh)),
    draw_timesteps=draw_timesteps,
    update=program(
      functools.partial(alignment.update, modules, settings, steps, optimizer, mesh=mesh),
      donate_argnums=0,
      out_shardings=(layout, None),
    ),
    end_iteration=program(
      functools.partial(alignment.end_iteration, settings), donate_argnums=0, out_shardings=layout
    ),
    shapes=shapes,
    layout=layout,
  )
