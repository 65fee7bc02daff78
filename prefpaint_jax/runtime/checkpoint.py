"""Checkpoints, from which a killed run resumes exactly. The only user of Orbax.

A checkpoint is a folder named by its step. `state/` holds every array of the state under its
"/"-joined path ("params/conv_in/kernel"); the types of the tree's containers are not stored. `run/`
holds, as JSON, the position in the data, the statistics of the run, and a checksum of every array,
which restored arrays are compared with. `metrics/`, if present, holds the metric by which the best
checkpoint is chosen.
"""

import functools
import json
import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl.logging import get_absl_logger
from etils import epath, epy

from prefpaint_jax.runtime.checkpoint_content import (
  DataState,
  check_same,
  check_undamaged,
  decode,
  encode,
  flatten,
  raw,
  readable,
  typed,
  writable,
)
from prefpaint_jax.runtime.checksum import checksums

with epy.lazy_imports():
  import orbax.checkpoint as ocp

BEST = "best"  # given instead of a step: the checkpoint with the highest metric

# Replicated arrays of at least this size are written in parts, one part per device; one device
# writes the whole of a smaller array.
SPLIT_FROM = 2**20  # bytes


def silence_orbax() -> None:
  """Removes Orbax's messages from a command's log. It changes logging in the whole process.

  Orbax logs every phase of every save. On a full disk the first failing write raises the error that
  the command prints; without this filter, threads would print tracebacks of later writes after it.
  """
  get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)

  def is_relevant(record: logging.LogRecord) -> bool:
    error = record.exc_info and record.exc_info[1]
    return "orbax" not in record.getMessage() and not isinstance(error, OSError)

  logging.getLogger("asyncio").addFilter(is_relevant)
  report = sys.unraisablehook

  def unraisable(raised: "sys.UnraisableHookArgs") -> None:
    if str(raised.exc_value) != "Event loop is closed":
      report(raised)

  sys.unraisablehook = unraisable


class Checkpoints:
  """Saves, selects and restores the checkpoints of a run.

  In a run of several processes, all processes call every method. Methods that read change nothing
  in `folder`, so another program can read the checkpoints of a run in progress.
  """

  def __init__(self, folder: epath.PathLike, keep: int = 3, best: str = ""):
    """Opens a folder of checkpoints; the first save creates it.

    Args:
      folder: holds one subfolder per checkpoint.
      keep: number of latest checkpoints to keep; a save deletes older ones.
      best: name of a metric; the checkpoint with its highest value is kept too. "": none.
    """
    self.folder = epath.Path(folder).expanduser().absolute()
    self._keep, self._best = keep, best

  @functools.cached_property
  def _manager(self) -> "ocp.CheckpointManager":
    """The Orbax manager. The first save makes it, which removes incomplete checkpoints."""
    value = lambda metrics: metrics.get(self._best, -math.inf)
    highest = ocp.checkpoint_managers.BestN(
      get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False
    )
    last = ocp.checkpoint_managers.LatestN(self._keep)
    kept = [last, highest] if self._best else [last]
    options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(kept),
      best_fn=value if self._best else None,  # without it Orbax does not write the metrics
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
    """Starts to write checkpoint `step`; returns when the arrays are copied to the host.

    The caller may then donate `state`. A thread writes to a temporary folder and renames it to
    `step` when the checkpoint is complete; older checkpoints are deleted after that. If an earlier
    save is still running, this method waits for it first.

    Args:
      step: number of iterations done; the checkpoint's name.
      state: tree of arrays on any mesh; typed PRNG keys are allowed.
      data_state: state of the data iterator, equal on all processes; process 0 writes it.
      extra: statistics of the run; must be serialisable as JSON.
      metrics: metrics of this state. If the metric `best` is missing or not finite, this checkpoint
        cannot become the best one.

    Raises:
      OSError: this save or the previous one could not be written (the disk is full).
    """
    arrays = {path: raw(leaf) for path, leaf in flatten(state).items()}
    run = {"data_state": encode(data_state), "extra": dict(extra), "checksums": checksums(arrays)}
    # Serialise now: the caller may change its dictionary while the thread writes.
    run = json.loads(json.dumps(run))
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), run=ocp.args.JsonSave(run))
    value = (metrics or {}).get(self._best, math.nan)
    known = {self._best: float(value)} if math.isfinite(value) else None
    with writable(self.folder):
      self._manager.save(step, args=args, metrics=known, force=True)

  def wait(self) -> None:
    """Waits until the save in progress, if any, is complete.

    Raises:
      OSError: the checkpoint could not be written.
    """
    if "_manager" in vars(self):
      with writable(self.folder):
        self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save in progress and closes the Orbax manager."""
    self.wait()
    if manager := vars(self).pop("_manager", None):
      manager.close()

  def latest(self) -> int | None:
    """Returns the step of the latest complete checkpoint, or None if there is none."""
    return max(ocp.utils.checkpoint_steps(self.folder), default=None)

  def best(self) -> int | None:
    """Returns the step with the highest metric, or None if no checkpoint has the metric.

    Of several checkpoints with the highest value, it returns the latest.
    """
    steps = sorted(ocp.utils.checkpoint_steps(self.folder))
    values = {step: self._metrics(step).get(self._best) for step in steps}
    known = [(value, step) for step, value in values.items() if value is not None]
    return max(known)[1] if known else None

  def restore(
    self, abstract_state: Any, step: int | str | None = None
  ) -> tuple[Any, DataState, dict[str, Any]]:
    """Restores (state, data_state, extra) of a checkpoint, bit for bit.

    The mesh and the number of processes may differ from those of the run that saved. Later results
    then vary slightly, because floating-point reductions run in a different order.

    Args:
      abstract_state: tree of arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and
        shardings of the restored state.
      step: the checkpoint; None: the latest; `BEST`: the one with the highest metric.

    Raises:
      ValueError: the checkpoint does not exist, cannot be read, has other arrays than
        `abstract_state`, or an array differs from its checksum.
    """
    folder = self._folder_of(step)
    leaves = flatten(abstract_state)
    wanted = {path: jax.eval_shape(raw, leaf) for path, leaf in leaves.items()}
    check_same(_saved_arrays(folder), wanted, folder)
    restore_args = {
      path: ocp.ArrayRestoreArgs(sharding=leaves[path].sharding, strict=True) for path in wanted
    }
    arrays, run = _read_arrays(folder, restore_args), _read_run(folder)
    with readable(folder):
      data_state, extra = decode(run["data_state"]), run["extra"]
    check_undamaged(arrays, run, folder)
    restored = [typed(arrays[path], leaf.dtype) for path, leaf in leaves.items()]
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), restored)
    return state, data_state, extra

  def load(self, name: str, step: int | str | None = None) -> dict[str, Any]:
    """Reads only the arrays under `name` ("params"), as nested dictionaries of numpy arrays.

    Raises:
      ValueError: the checkpoint does not exist, cannot be read, has no such arrays, or an array
        differs from its checksum.
    """
    folder = self._folder_of(step)
    saved = _saved_arrays(folder)
    paths = [path for path in saved if path.startswith(name + "/")]
    if not paths:
      present = ", ".join(sorted({path.partition("/")[0] for path in saved}))
      raise ValueError(f"checkpoint {folder}: has no arrays under {name!r}; it has {present}")
    on_host = ocp.RestoreArgs(restore_type=np.ndarray)
    arrays = _read_arrays(folder, dict.fromkeys(paths, on_host))
    check_undamaged(arrays, _read_run(folder), folder)
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
      *parents, leaf = path.removeprefix(name + "/").split("/")
      node = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)
      node[leaf] = array
    return tree

  def _metrics(self, step: int) -> dict[str, float]:
    folder = self.folder / str(step)
    if not (folder / "metrics" / "metrics").exists():  # never written, or deleted when killed
      return {}
    with readable(folder):
      return ocp.JsonCheckpointHandler(filename="metrics").restore(folder / "metrics")

  def resolve(self, step: int | str | None) -> int:
    """Returns the step of a complete checkpoint: `step` itself, the best, or (None) the latest.

    Raises:
      ValueError: there is no such checkpoint.
    """
    step = int(step) if isinstance(step, str) and step.isdecimal() else step
    steps = sorted(ocp.utils.checkpoint_steps(self.folder))
    chosen = {None: self.latest, BEST: self.best}.get(step, lambda: step)()
    if chosen not in steps:
      which = {None: "", BEST: f" with {self._best or 'any metric: keep_best is empty'}"}
      raise ValueError(
        f"{self.folder}: no checkpoint{which.get(step, f' of step {step}')}; complete ones: "
        f"{steps or 'none'}"
      )
    return chosen

  def _folder_of(self, step: int | str | None) -> epath.Path:
    return self.folder / str(self.resolve(step))


def _state_handler() -> "ocp.PyTreeCheckpointHandler":
  """Makes the writer of `state/`, which splits replicated arrays from SPLIT_FROM bytes on."""
  arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SPLIT_FROM)
  registry = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _saved_arrays(folder: epath.Path) -> dict[str, Any]:
  """Reads the shape and dtype of every array in the checkpoint, by path."""
  with readable(folder):
    return dict(ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree)


def _read_run(folder: epath.Path) -> dict[str, Any]:
  with readable(folder):
    return ocp.JsonCheckpointHandler().restore(folder / "run")


def _read_arrays(folder: epath.Path, restore_args: dict[str, Any]) -> dict[str, Any]:
  args = ocp.args.PyTreeRestore(item=restore_args, restore_args=restore_args, partial_restore=True)
  with readable(folder):
    return ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)
