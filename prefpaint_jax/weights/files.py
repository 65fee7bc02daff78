"""Files of tensors: safetensors, and torch files, which need no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prefpaint_jax.runtime.text import first_line
from prefpaint_jax.weights import torch_files

# Types of safetensors that are read: others are of quantised weights.
_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def load_file(path: str | Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a `.safetensors` or torch file (`.bin`, `.pt`); floats as float32.

  Of a `.ckpt` it reads "state_dict", if there is one; the rest belongs to the training.

  Raises:
    ValueError: the file is missing, damaged, quantised, or not a dict of tensors.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: not found; download the folder again")
  if path.suffix == ".safetensors":
    return _load_safetensors(path)
  tensors = load_torch(path)
  while path.suffix == ".ckpt" and isinstance(tensors, dict) and "state_dict" in tensors:
    tensors = tensors["state_dict"]
  if not isinstance(tensors, dict) or not all(
    isinstance(name, str) and isinstance(x, np.ndarray) for name, x in tensors.items()
  ):
    raise ValueError(f"{path}: not a dict of tensors; give a file that contains only a state_dict")
  return {name: _floats_as_float32(x) for name, x in tensors.items()}


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
  tensors = {}
  try:
    with safe_open(path, framework="numpy") as file:
      for name in file.keys():  # noqa: SIM118
        kind = str(file.get_slice(name).get_dtype())
        if kind not in _TYPES:
          raise _quantised(path, name, kind)
        tensors[name] = _floats_as_float32(file.get_tensor(name))
  except (SafetensorError, OSError) as error:
    raise _unreadable(path, error) from error
  return tensors


def _floats_as_float32(x: np.ndarray) -> np.ndarray:
  return x if x.dtype.kind in "iub" else x.astype(np.float32, copy=False)


def load_torch(path: str | Path) -> Any:
  """Reads a torch file; its content has an array in place of each tensor or parameter.

  Raises ValueError if the file is damaged, or contains something other than tensors.
  """
  try:
    return torch_files.load(Path(path))
  except torch_files.ForbiddenError as error:
    raise ValueError(
      f"{path}: holds {first_line(error)}; expected tensors alone, neither code nor quantised "
      "weights; give a file that contains only a state_dict"
    ) from error
  except Exception as error:  # pickle and zipfile raise many types of errors for a damaged file
    raise _unreadable(Path(path), error) from error


def save_tensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a safetensors file that diffusers and transformers open; creates its folder.

  Raises OSError if the file cannot be written, on a full disk for example.
  """
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  try:
    save_file(dict(tensors), path, metadata={"format": "pt"})
  except SafetensorError as error:  # safetensors wraps the errors of the file system
    raise OSError(f"{path}: cannot be written ({first_line(error)}); make room") from error


def _quantised(path: Path, name: str, kind: str) -> ValueError:
  return ValueError(
    f"{path}: {name} is {kind}; expected float32, float16 or bfloat16; quantised weights are not "
    "supported, download the full-precision files"
  )


def _unreadable(path: Path, error: Exception) -> ValueError:
  return ValueError(
    f"{path}: cannot be read at {path.stat().st_size} bytes ({first_line(error)});"
    " it is truncated or not a weights file: download it again"
  )
