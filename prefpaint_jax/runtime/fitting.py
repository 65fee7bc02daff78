"""Supervised training of one network, which `pretrain`, `train_reward` and `train_dpo` share."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prefpaint_jax.runtime import interrupts, sharding
from prefpaint_jax.runtime.checkpoint import Checkpoints
from prefpaint_jax.runtime.finite import check_metrics, check_state
from prefpaint_jax.runtime.metrics import MetricsWriter, progress
from prefpaint_jax.runtime.signals import agreed_stop_requests
from prefpaint_jax.runtime.waiting import waiting

Params = Any  # a tree of arrays


class State(NamedTuple):
  """The train state, as the checkpoints hold it."""

  iteration: jax.Array  # int32 []
  params: Params
  opt_state: optax.OptState
  average: Params | None  # moving average of the parameters
  best: Params | None  # the parameters with the highest score so far
  best_score: jax.Array  # float32 []


def warmup_cosine(
  learning_rate: float, warmup: int, iterations: int, weight_decay: float
) -> optax.GradientTransformation:
  """Makes AdamW with linear warm-up, cosine decay to 0, and gradients clipped to norm 1.

  Args:
    learning_rate: the rate after the warm-up.
    warmup: number of warm-up iterations; at most half of `iterations`.
    iterations: number of iterations until the rate is 0.
    weight_decay: AdamW's decoupled weight decay.
  """
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
  keep_best: bool = True,
  restored: Callable[[], None] = lambda: None,
) -> Params | None:
  """Minimises a loss; writes metrics and checkpoints to the workdir, and resumes exactly from it.

  SIGTERM and Ctrl-C end it after the current iteration, with a checkpoint.

  Args:
    loss: computes (loss, metrics) from `(*frozen, params, batch, key)`.
    frozen: trees of arrays that are not trained.
    loader: iterator of this process's part of each batch, with `get_state` and `set_state`.
    key: PRNG key; each iteration folds its number into it.
    ema_decay: decay of the moving average of the parameters, which is scored and returned; 0: none.
    checkpoint_every: iterations between checkpoints; 0: none.
    log_every: iterations between lines of metrics; 0: none.
    judge: computes (score, metrics) from parameters; see Returns.
    judge_every: iterations between calls of `judge`, which also runs after the last update.
    keep_best: give `judge` host arrays and keep those with the highest score; False: give it the
      arrays on the devices and keep none.
    restored: called before the first iteration, when the state is restored or made.

  Returns:
    The parameters with the highest score, as host arrays; the last parameters if none are kept or
    the scores are NaN. None if the process was asked to stop.
  """
  is_writer = jax.process_index() == 0
  init = functools.partial(_init, optimizer, ema_decay, bool(judge and keep_best))
  checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
  state, layout = _begin(init, params, checkpoints, loader, mesh)
  step = _make_step(loss, optimizer, ema_decay, layout)
  gather = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
  current = lambda state: state.average if ema_decay else state.params
  start = done = int(state.iteration)
  stopping, size = False, sum(x.size for x in jax.tree.leaves(params))
  writer = MetricsWriter(workdir, is_writer)
  writer.truncate(done)
  restored()
  frozen = jax.device_put(frozen, sharding.replicated(mesh))
  bar = progress(iterations, done, visible=is_writer)
  with agreed_stop_requests(mesh) as asked_to_stop:
    while done < iterations and not stopping:
      stopping, done = asked_to_stop(), done + 1
      arrays = {name: x for name, x in next(loader).items() if x.dtype.kind != "U"}  # no IDs
      with waiting("compiling the update", size, done == start + 1):
        state, metrics = step(state, frozen, sharding.to_global(mesh, arrays), key)
      is_due = lambda every, done=done: bool(every) and (done % every == 0 or done == iterations)
      line = _show(metrics, bar) if is_due(log_every) else {}
      if judge and (is_due(judge_every) or done == iterations):
        state, judge_metrics = _judge(judge, state, current(state), gather)
        line |= judge_metrics
      if line:
        writer.write(done, line)
        check_metrics(done, line, metrics)
      if is_due(checkpoint_every) or (stopping and done < iterations):
        check_state(done, state.params)
        checkpoints.save(done, state, loader.get_state(), {})
      bar.update()
  check_state(done, state.params)
  for part in (bar, checkpoints, writer):
    part.close()
  if done < iterations:
    return _end_early(workdir, done, is_writer)
  return jax.device_get(gather(current(state) if state.best is None else state.best))


def _end_early(workdir: Path, done: int, is_writer: bool) -> None:
  """Says how a stopped run goes on, and sets the exit status of the command."""
  interrupts.end_early()
  if is_writer:
    print(f"{workdir}: stopped after iteration {done} and saved; the same command goes on")


def _show(metrics: dict[str, jax.Array], bar: Any) -> dict[str, float]:
  """Returns the metrics of an update as numbers, and shows them on the progress bar."""
  line = {name: float(value) for name, value in metrics.items()}
  bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in line.items()))
  return line


def _begin(
  init: Callable[[Params], State],
  params: Params,
  checkpoints: Checkpoints,
  loader: Any,
  mesh: jax.sharding.Mesh,
) -> tuple[State, Any]:
  """Returns the state that an earlier start saved, or a new one, and its shardings."""
  shapes = jax.eval_shape(init, params)
  layout = sharding.specs(shapes, sharding.DEFAULT_RULES, mesh)
  if checkpoints.latest() is None:
    return jax.jit(init, out_shardings=layout)(params), layout
  state, position, _ = checkpoints.restore(sharding.with_shardings(shapes, layout))
  loader.set_state(position)
  return state, layout


def _init(
  optimizer: optax.GradientTransformation, ema_decay: float, keep_best: bool, params: Params
) -> State:
  """Makes the state before the first update."""
  copy = lambda: jax.tree.map(jnp.copy, params)  # no buffer may be donated twice
  return State(
    iteration=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    average=copy() if ema_decay else None,
    best=copy() if keep_best else None,
    best_score=jnp.array(-jnp.inf),
  )


def _judge(
  judge: Callable[[Params], tuple[float, dict[str, float]]],
  state: State,
  params: Params,
  gather: Callable[[Params], Params],
) -> tuple[State, dict[str, float]]:
  """Judges `params`; keeps them as the best parameters, if it keeps some and this score is higher.

  Returns:
    The state and the metrics of `judge`.
  """
  if state.best is None:
    return state, judge(params)[1]
  score, metrics = judge(jax.device_get(gather(params)))
  # NaN is not <= any number: the latest parameters then become the best.
  if score <= float(state.best_score):
    return state, metrics
  copy = jax.tree.map(jnp.copy, params)
  return state._replace(best=copy, best_score=jnp.array(score, jnp.float32)), metrics


def _make_step(
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  optimizer: optax.GradientTransformation,
  ema_decay: float,
  layout: Any,
) -> Callable:
  """Makes the jitted update (state, frozen, batch, key) -> (state, metrics); donates `state`."""

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, None))
  def step(state: State, frozen, batch, key):
    key = jax.random.fold_in(key, state.iteration)
    gradients, metrics = jax.grad(lambda params: loss(*frozen, params, batch, key), has_aux=True)(
      state.params
    )
    changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params, average = optax.apply_updates(state.params, changes), state.average
    if ema_decay:
      # The decay grows from 0.1, so that the average of a short run forgets its initial parameters.
      decay = jnp.minimum(ema_decay, (1.0 + state.iteration) / (10.0 + state.iteration))
      average = optax.incremental_update(params, average, 1.0 - decay)
    state = state._replace(params=params, opt_state=opt_state, average=average)
    return state._replace(iteration=state.iteration + 1), metrics

  return step
