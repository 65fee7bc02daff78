"""Checkpoints: everything a killed run needs to go on exactly. The only user of Orbax.

A checkpoint is a folder named by its step. `state/` holds every array of the state under its
"/"-joined path ("params/conv_in/kernel"), whatever containers the tree is made of; `run/` holds,
as JSON, the position in the data and the statistics of the run; `metrics/`, where there are any,
what the best checkpoint is chosen by.
"""

import base64
import contextlib
import functools
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.logging import get_absl_logger
from etils import epath, epy

from prefpaint_jax.runtime.text import first_line

with epy.lazy_imports():
  import orbax.checkpoint as ocp


DataState = Mapping[str, Any] | bytes | str | None
BEST = "best"  # in place of a step: the checkpoint of the highest metric

# From this size on, devices that all hold an array write a part of it each; below, one writes all.
SPLIT_FROM = 2**20  # bytes


def silence_orbax() -> None:
  """Keeps Orbax's reports out of a command's log. It changes logging of the whole process.

  Orbax logs every phase of every save. On a full disk the first failing write raises the error that
  a run reports; the writes that follow would print tracebacks from threads across that line.
  """
  get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)

  def is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info and record.exc_info[1]
    return "orbax" not in record.getMessage() and not isinstance(error, OSError)

  logging.getLogger("asyncio").addFilter(is_news)
  report = sys.unraisablehook

  def unraisable(raised: "sys.UnraisableHookArgs") -> None:
    if str(raised.exc_value) != "Event loop is closed":
      report(raised)

  sys.unraisablehook = unraisable


class Checkpoints:
  """The last `keep` checkpoints of a run, and the one of the highest metric `best`, if named.

  In a run of several processes, all call every method. Reading changes nothing in `folder`, so a
  run in progress can be read by another program.
  """

  def __init__(self, folder: epath.PathLike, keep: int = 3, best: str = ""):
    self.folder = epath.Path(folder).expanduser().absolute()
    self._keep, self._best = keep, best

  @functools.cached_property
  def _manager(self) -> "ocp.CheckpointManager":
    """The writer: made by the first save, which also removes what a killed save left behind."""
    value = lambda metrics: metrics.get(self._best, -math.inf)
    highest = ocp.checkpoint_managers.BestN(
      get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False
    )
    last = ocp.checkpoint_managers.LatestN(self._keep)
    kept = [last, highest] if self._best else [last]
    options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(kept),
      best_fn=value if self._best else None,  # has Orbax write the metrics
      cleanup_tmp_directories=True,
    )
    handlers = {"state": _state_handler(), "run": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

  def save(
    self,
    step: int,
    state: Any,
    data_state: DataState,
    extra: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts writing checkpoint `step`, and returns once the arrays are copied off the devices.

    The caller may then donate `state`. Under its own name the checkpoint appears only when
    complete, and only then older ones go. An earlier save still running is waited for.

    Args:
      step: iterations done; the checkpoint's name.
      state: tree of arrays on any mesh; typed PRNG keys welcome.
      data_state: the state of the data iterator: a position in one order for all processes, of
        which the first one's is kept.
      extra: statistics of the run, as JSON takes them.
      metrics: what is known of this state; where `best` is missing or not finite, it is never the
        best one.

    Raises:
      OSError: this save, or the one before it, could not be written (the disk is full).
    """
    # Serialised here and now: the caller may go on changing its dictionary while we write.
    run = json.loads(json.dumps({"data_state": _encode(data_state), "extra": dict(extra)}))
    arrays = {path: _raw(leaf) for path, leaf in _flatten(state).items()}
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), run=ocp.args.JsonSave(run))
    value = (metrics or {}).get(self._best, math.nan)
    known = {self._best: float(value)} if math.isfinite(value) else None
    with _writable(self.folder):
      self._manager.save(step, args=args, metrics=known, force=True)

  def wait(self) -> None:
    """Returns when the save in progress, if any, is complete.

    Raises:
      OSError: it could not be written.
    """
    if "_manager" in vars(self):
      with _writable(self.folder):
        self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save in progress and lets go of the folder."""
    self.wait()
    if manager := vars(self).pop("_manager", None):
      manager.close()

  def latest(self) -> int | None:
    """The last complete checkpoint's step, None when there is none."""
    return max(ocp.utils.checkpoint_steps(self.folder), default=None)

  def best(self) -> int | None:
    """The step of the highest metric, the last one of equals; None where none has the metric."""
    steps = sorted(ocp.utils.checkpoint_steps(self.folder))
    values = {step: self._metrics(step).get(self._best) for step in steps}
    known = [(value, step) for step, value in values.items() if value is not None]
    return max(known)[1] if known else None

  def restore(
    self, abstract_state: Any, step: int | str | None = None
  ) -> tuple[Any, DataState, dict[str, Any]]:
    """(state, data_state, extra) of checkpoint `step` (default: the latest), bit for bit.

    The mesh and the number of processes may differ from those that saved. The numbers restored are
    the same; what is computed from them elsewhere may differ in the last bits, as sums are taken
    in another order.

    Args:
      abstract_state: tree of arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and
        shardings wanted.
      step: which checkpoint; `BEST`: the one of the highest metric.

    Raises:
      ValueError: there is no such checkpoint, it cannot be read, or it holds another tree.
    """
    folder = self._folder_of(step)
    leaves = _flatten(abstract_state)
    wanted = {path: jax.eval_shape(_raw, leaf) for path, leaf in leaves.items()}
    _check_same(_saved_arrays(folder), wanted, folder)
    restore_args = {
      path: ocp.ArrayRestoreArgs(sharding=leaves[path].sharding, strict=True) for path in wanted
    }
    arrays = _read_arrays(folder, restore_args)
    with _readable(folder):
      run = ocp.JsonCheckpointHandler().restore(folder / "run")
      data_state, extra = _decode(run["data_state"]), run["extra"]
    restored = [_typed(arrays[path], leaf.dtype) for path, leaf in leaves.items()]
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), restored)
    return state, data_state, extra

  def load(self, name: str, step: int | str | None = None) -> dict[str, Any]:
    """The arrays under `name` ("params") as nested dictionaries of numpy arrays, read alone."""
    folder = self._folder_of(step)
    paths = [path for path in _saved_arrays(folder) if path.startswith(name + "/")]
    if not paths:
      raise ValueError(f"checkpoint {folder}: holds nothing under {name!r}")
    on_host = ocp.RestoreArgs(restore_type=np.ndarray)
    arrays = _read_arrays(folder, dict.fromkeys(paths, on_host))
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
      *parents, leaf = path.removeprefix(name + "/").split("/")
      node = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)
      node[leaf] = array
    return tree

  def _metrics(self, step: int) -> dict[str, float]:
    folder = self.folder / str(step)
    if not (folder / "metrics").exists():
      return {}
    with _readable(folder):
      return ocp.JsonCheckpointHandler(filename="metrics").restore(folder / "metrics")

  def _folder_of(self, step: int | str | None) -> epath.Path:
    steps = sorted(ocp.utils.checkpoint_steps(self.folder))
    chosen = {None: self.latest, BEST: self.best}.get(step, lambda: step)()
    if chosen not in steps:
      which = {None: "", BEST: f" with {self._best or 'any metric: keep_best is empty'}"}
      raise ValueError(
        f"{self.folder}: no checkpoint{which.get(step, f' of step {step}')}; complete ones: "
        f"{steps or 'none'}"
      )
    return self.folder / str(chosen)


def _state_handler() -> "ocp.PyTreeCheckpointHandler":
  arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SPLIT_FROM)
  registry = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _flatten(tree: Any) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _is_key(dtype: Any) -> bool:
  return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
  return jax.random.key_data(leaf) if _is_key(leaf.dtype) else leaf


def _typed(array: jax.Array, dtype: Any) -> jax.Array:
  if not _is_key(dtype):
    return array
  return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty((), dtype)))


@contextlib.contextmanager
def _readable(folder: epath.Path) -> Iterator[None]:
  """Turns whatever a damaged file makes the reader raise into one line that names it."""
  try:
    yield
  except Exception as error:
    raise ValueError(
      f"checkpoint {folder}: cannot be read ({_reason(error)}); remove it to go on from an earlier "
      "one"
    ) from error


@contextlib.contextmanager
def _writable(folder: epath.Path) -> Iterator[None]:
  """Turns whatever a full disk makes the writer raise into one line that names the folder."""
  try:
    yield
  except Exception as error:
    raise OSError(
      f"checkpoints {folder}: cannot be written ({_reason(error)}); the complete ones are as they "
      "were: make room, and the same command goes on from the last of them"
    ) from error


def _reason(error: BaseException) -> str:
  """One short line; of a long one the end, where file systems say what is wrong."""
  while error.__cause__ is not None:
    error = error.__cause__
  line = first_line(error)
  return line if len(line) <= 160 else f"{line[:60]} ... {line[-95:]}"


def _saved_arrays(folder: epath.Path) -> dict[str, Any]:
  """Shape and dtype of every array in the checkpoint, by path."""
  with _readable(folder):
    return dict(ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree)


def _read_arrays(folder: epath.Path, restore_args: dict[str, Any]) -> dict[str, Any]:
  args = ocp.args.PyTreeRestore(item=restore_args, restore_args=restore_args, partial_restore=True)
  with _readable(folder):
    return ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)


def _check_same(saved: dict[str, Any], wanted: dict[str, Any], folder: epath.Path) -> None:
  def describe(arrays: dict[str, Any], path: str) -> str:
    return f"{arrays[path].dtype}{list(arrays[path].shape)}" if path in arrays else "nothing"

  paths = sorted({*saved, *wanted})
  differing = [path for path in paths if describe(saved, path) != describe(wanted, path)]
  if differing:
    listed = "; ".join(
      f"{path}: {describe(saved, path)} saved, {describe(wanted, path)} wanted"
      for path in differing[:3]
    )
    raise ValueError(
      f"checkpoint {folder}: of another model or optimiser, {len(differing)} of {len(paths)} "
      f"arrays differ ({listed}); restore it with the configuration that wrote it"
    )


def _encode(data_state: DataState) -> dict[str, Any]:
  if isinstance(data_state, bytes):
    return {"base64": base64.b64encode(data_state).decode()}
  return {"json": data_state}


def _decode(entry: dict[str, Any]) -> DataState:
  return base64.b64decode(entry["base64"]) if "base64" in entry else entry["json"]
