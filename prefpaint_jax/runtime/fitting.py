"""Supervised fitting of one network: what `pretrain` and `train_reward` have in common."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.checkpoint import Checkpoints
from prefpaint_jax.runtime.metrics import MetricsWriter, progress

Params = Any  # a tree of arrays


class State(NamedTuple):
  iteration: jax.Array  # int32 []
  params: Params
  opt_state: optax.OptState
  average: Params | None  # moving average of the parameters
  best: Params | None  # what was best when it was judged
  best_score: jax.Array  # float32 []


def warmup_cosine(
  learning_rate: float, warmup: int, iterations: int, weight_decay: float
) -> optax.GradientTransformation:
  """AdamW with a linear warm-up and a cosine decay to 0, on gradients clipped to norm 1."""
  warmup = min(warmup, iterations // 2)
  rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, iterations)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=weight_decay))


def fit(
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  frozen: tuple,
  params: Params,
  optimizer: optax.GradientTransformation,
  loader: Any,
  workdir: Path,
  mesh: jax.sharding.Mesh,
  key: jax.Array,
  *,
  iterations: int,
  ema_decay: float,
  checkpoint_every: int,
  log_every: int,
  judge: Callable[[Params], tuple[float, dict[str, float]]] | None = None,
  judge_every: int = 0,
) -> Params:
  """Minimises `loss(*frozen, params, batch, key) -> (loss, metrics)`; returns host arrays.

  Metrics and checkpoints go to `workdir`; called again with the same arguments it resumes exactly.

  Args:
    loader: iterator of this process's part of each batch, with `get_state` and `set_state`.
    ema_decay: of the moving average, which is then what is judged and returned; 0: none.
    judge: parameters -> (score, metrics), every `judge_every` iterations and at the end; the
      parameters of the highest score are returned. None, or where scores are NaN: the last ones.
  """
  is_writer = jax.process_index() == 0

  def init(params: Params) -> State:
    copy = lambda: jax.tree.map(jnp.copy, params)  # a donated buffer may appear once
    return State(
      iteration=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      average=copy() if ema_decay else None,
      best=copy() if judge else None,
      best_score=jnp.array(-jnp.inf),
    )

  shapes = jax.eval_shape(init, params)
  layout = sharding.specs(shapes, sharding.DEFAULT_RULES, mesh)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, None))
  def step(state: State, frozen, batch, key):
    key = jax.random.fold_in(key, state.iteration)
    gradients, metrics = jax.grad(lambda params: loss(*frozen, params, batch, key), has_aux=True)(
      state.params
    )
    changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params, average = optax.apply_updates(state.params, changes), state.average
    if ema_decay:
      # Young averages follow closely, so that a short run is not held back by its start.
      decay = jnp.minimum(ema_decay, (1.0 + state.iteration) / (10.0 + state.iteration))
      average = optax.incremental_update(params, average, 1.0 - decay)
    state = state._replace(params=params, opt_state=opt_state, average=average)
    return state._replace(iteration=state.iteration + 1), metrics

  gather = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
  current = lambda state: state.average if ema_decay else state.params

  checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
  if checkpoints.latest() is None:
    state = jax.jit(init, out_shardings=layout)(params)
  else:
    abstract = jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, layout
    )
    state, position, _ = checkpoints.restore(abstract)
    loader.set_state(position)
  start = int(state.iteration)
  writer = MetricsWriter(workdir, is_writer)
  writer.truncate(start)
  frozen = jax.device_put(frozen, sharding.replicated(mesh))
  bar = progress(iterations, start, visible=is_writer)
  for done in range(start + 1, iterations + 1):
    # Names stay on the host.
    arrays = {name: x for name, x in next(loader).items() if x.dtype.kind != "U"}
    state, metrics = step(state, frozen, sharding.to_global(mesh, arrays), key)
    is_due = lambda every, done=done: bool(every) and (done % every == 0 or done == iterations)
    line = {}
    if is_due(log_every):
      line = {name: float(value) for name, value in metrics.items()}
      bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in line.items()))
    if judge and (is_due(judge_every) or done == iterations):
      score, judged = judge(jax.device_get(gather(current(state))))
      line |= judged
      # A score that is no number cannot choose: then the latest parameters are kept.
      if not score <= float(state.best_score):
        copy = jax.tree.map(jnp.copy, current(state))
        state = state._replace(best=copy, best_score=jnp.array(score, jnp.float32))
    if line:
      writer.write(done, line)
    if is_due(checkpoint_every):
      checkpoints.save(done, state, loader.get_state(), {})
    bar.update()
  bar.close()
  checkpoints.close()
  writer.close()
  return jax.device_get(gather(state.best if judge else current(state)))
