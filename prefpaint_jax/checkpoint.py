"""Checkpoints: everything a killed run needs to go on exactly. The only user of Orbax.

A checkpoint is a folder named by its step. `state/` holds every array of the state under its
"/"-joined path ("params/conv_in/kernel"), whatever containers the tree is made of; `run/` holds,
as JSON, the position of each process in its data and the statistics of the run.
"""

import base64
import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

DataState = Mapping[str, Any] | bytes | str | None

# Orbax reports every phase of every save; a run's log is for the run.
logging.getLogger("absl").addFilter(
  lambda record: record.levelno > logging.INFO or "orbax" not in record.pathname
)


class Checkpoints:
  """The last `keep` checkpoints of a run. In a run of several processes, all call every method.

  Reading changes nothing in `folder`, so a run in progress can be read by another program.
  """

  def __init__(self, folder: epath.PathLike, keep: int = 3):
    self.folder = epath.Path(folder).expanduser().absolute()
    self._keep = keep

  @functools.cached_property
  def _manager(self) -> ocp.CheckpointManager:
    """The writer: made by the first save, which also removes what a killed save left behind."""
    options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(self.folder, options=options)

  def save(self, step: int, state: Any, data_state: DataState, extra: Mapping[str, Any]) -> None:
    """Starts writing checkpoint `step`, and returns once the arrays are copied off the devices.

    The caller may then donate `state`. Under its own name the checkpoint appears only when
    complete. An earlier save still running is waited for, and its error, if any, raised.

    Args:
      step: iterations done; the checkpoint's name.
      state: tree of arrays on any mesh; typed PRNG keys welcome.
      data_state: what this process's data iterator gives as its state.
      extra: statistics of the run, as JSON takes them.
    """
    data_states = _gather(_encode(data_state))
    # Serialised here and now: the caller may go on changing its dictionary while we write.
    run = json.loads(json.dumps({"data_states": data_states, "extra": dict(extra)}))
    arrays = {path: _raw(leaf) for path, leaf in _flatten(state).items()}
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), run=ocp.args.JsonSave(run))
    self._manager.save(step, args=args, force=True)

  def wait(self) -> None:
    """Returns when the save in progress, if any, is complete; raises what went wrong with it."""
    if "_manager" in vars(self):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save in progress and lets go of the folder."""
    self.wait()
    if manager := vars(self).pop("_manager", None):
      manager.close()

  def latest(self) -> int | None:
    """The last complete checkpoint's step, None when there is none."""
    return max(ocp.utils.checkpoint_steps(self.folder), default=None)

  def restore(
    self, abstract_state: Any, step: int | None = None
  ) -> tuple[Any, DataState, dict[str, Any]]:
    """(state, data_state, extra) of checkpoint `step` (default: the latest), bit for bit.

    Args:
      abstract_state: tree of arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and
        shardings wanted; the mesh may differ from the one that saved.
      step: which checkpoint.

    Raises:
      ValueError: there is no such checkpoint, it cannot be read, it holds another tree, or its
        data positions are of another number of processes.
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
      data_states, extra = run["data_states"], run["extra"]
    restored = [_typed(arrays[path], leaf.dtype) for path, leaf in leaves.items()]
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), restored)
    return state, _decode(_own(data_states, folder)), extra

  def load(self, name: str, step: int | None = None) -> dict[str, Any]:
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

  def _folder_of(self, step: int | None) -> epath.Path:
    steps = sorted(ocp.utils.checkpoint_steps(self.folder))
    if not steps or step not in (None, *steps):
      asked = "no checkpoint" if step is None else f"no checkpoint of step {step}"
      raise ValueError(f"{self.folder}: {asked}; complete ones: {steps or 'none'}")
    return self.folder / str(steps[-1] if step is None else step)


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
    cause = error
    while cause.__cause__ is not None:
      cause = cause.__cause__
    reason = (str(cause) or type(cause).__name__).splitlines()[0][:160]
    raise ValueError(
      f"checkpoint {folder}: cannot be read ({reason}); remove it to go on from an earlier one"
    ) from error


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


def _encode(data_state: DataState) -> str:
  if isinstance(data_state, bytes):
    return json.dumps({"base64": base64.b64encode(data_state).decode()})
  return json.dumps({"json": data_state})


def _decode(text: str) -> DataState:
  entry = json.loads(text)
  return base64.b64decode(entry["base64"]) if "base64" in entry else entry["json"]


def _gather(text: str) -> list[str]:
  """The text of every process, in order of process; Orbax writes JSON from the first one only."""
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  padded = multihost_utils.process_allgather(np.pad(data, (0, int(max(sizes)) - data.size)))
  return [row[:size].tobytes().decode() for row, size in zip(padded, sizes, strict=True)]


def _own(data_states: list[str], folder: epath.Path) -> str:
  """This process's data position; each one counts its own share of the examples."""
  if len(data_states) != jax.process_count():
    raise ValueError(
      f"checkpoint {folder}: holds the data positions of {len(data_states)} processes, this run "
      f"has {jax.process_count()}; start as many"
    )
  return data_states[jax.process_index()]
