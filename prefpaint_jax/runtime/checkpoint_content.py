"""Conversions between a run's state and the content of a checkpoint, and one-line errors."""

import base64
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from prefpaint_jax.runtime.checksum import checksums
from prefpaint_jax.runtime.text import first_line

DataState = Mapping[str, Any] | bytes | str | None


def flatten(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by "/"-joined path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _is_key(dtype: Any) -> bool:
  return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def raw(leaf: Any) -> Any:
  """Returns the integers of a typed PRNG key, which Orbax cannot write; other arrays unchanged."""
  return jax.random.key_data(leaf) if _is_key(leaf.dtype) else leaf


def typed(array: jax.Array, dtype: Any) -> jax.Array:
  """Inverts `raw`: makes a PRNG key again if `dtype` is the type of a key."""
  if not _is_key(dtype):
    return array
  return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty((), dtype)))


def check_same(saved: dict[str, Any], wanted: dict[str, Any], folder: epath.Path) -> None:
  """Raises ValueError unless both have the same paths, shapes and dtypes."""

  def describe(arrays: dict[str, Any], path: str) -> str:
    return f"{arrays[path].dtype}{list(arrays[path].shape)}" if path in arrays else "nothing"

  paths = sorted({*saved, *wanted})
  differing = [path for path in paths if describe(saved, path) != describe(wanted, path)]
  if differing:
    listed = "; ".join(
      f"{path}: saved {describe(saved, path)}, expected {describe(wanted, path)}"
      for path in differing[:3]
    )
    raise ValueError(
      f"checkpoint {folder}: {len(differing)} of {len(paths)} arrays differ ({listed}); it belongs "
      "to another model or optimiser: restore it with the config that wrote it"
    )


def check_undamaged(arrays: dict[str, Any], run: dict[str, Any], folder: epath.Path) -> None:
  """Raises ValueError unless arrays have the checksums of the checkpoint.

  Args:
    arrays: restored arrays by path.
    run: the checkpoint's JSON; checkpoints of earlier versions have no checksums.
    folder: the checkpoint.
  """
  saved = run.get("checksums", {})
  found = checksums({path: array for path, array in arrays.items() if path in saved})
  if damaged := [path for path in found if found[path] != saved[path]]:
    raise ValueError(
      f"checkpoint {folder}: {damaged[0]} is damaged ({len(damaged)} of {len(found)} arrays differ "
      f"from their checksums); {_way_on(folder)}"
    )


def encode(data_state: DataState) -> dict[str, Any]:
  """Wraps a data state so that JSON can hold it; `decode` is the inverse."""
  if isinstance(data_state, bytes):
    return {"base64": base64.b64encode(data_state).decode()}
  return {"json": data_state}


def decode(entry: dict[str, Any]) -> DataState:
  """Unwraps a data state that `encode` wrapped."""
  return base64.b64decode(entry["base64"]) if "base64" in entry else entry["json"]


@contextlib.contextmanager
def readable(folder: epath.Path) -> Iterator[None]:
  """Turns any error of the reader into a ValueError of one line that names the folder.

  Orbax and its libraries raise many types of errors for a damaged file.
  """
  try:
    yield
  except Exception as error:
    raise ValueError(
      f"checkpoint {folder}: cannot be read ({_reason(error)}); {_way_on(folder)}"
    ) from error


def _way_on(folder: epath.Path) -> str:
  """Says what to do without this checkpoint."""
  steps = [int(path.name) for path in folder.parent.glob("*") if path.name.isdecimal()]
  if earlier := [step for step in steps if step < int(folder.name)]:
    return f"remove this folder to resume from the earlier one, {max(earlier)}"
  return "there is no earlier one; give another --workdir to start again"


@contextlib.contextmanager
def writable(folder: epath.Path) -> Iterator[None]:
  """Turns any error of the writer into an OSError of one line that names the folder.

  Orbax and its libraries raise many types of errors when the disk is full.
  """
  try:
    yield
  except Exception as error:
    raise OSError(
      f"checkpoints {folder}: cannot be written ({_reason(error)}); complete checkpoints are "
      "unchanged: make room and run the same command to resume from the latest"
    ) from error


def _reason(error: BaseException) -> str:
  """Returns the first line of the error's root cause, shortened to 160 characters.

  It keeps the end of a long line, because messages of file systems end with the cause.
  """
  while error.__cause__ is not None:
    error = error.__cause__
  line = first_line(error)
  return line if len(line) <= 160 else f"{line[:60]} ... {line[-95:]}"
