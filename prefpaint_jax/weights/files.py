"""Files of tensors: safetensors, and torch files read without running pickled code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prefpaint_jax.runtime.text import first_line

# Types of safetensors that are read: others are of quantised weights.
_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def load_file(path: str | Path) -> dict[str, np.ndarray]:
  """Reads the tensors of a `.safetensors` or torch file (`.bin`, `.pt`); floats as float32.

  Raises:
    ValueError: the file is missing, damaged, quantised, or not a dict of tensors.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: not found; download the folder again")
  if path.suffix == ".safetensors":
    return _load_safetensors(path)
  torch, tensors = load_torch(path)
  if not isinstance(tensors, dict) or not all(
    isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in tensors.items()
  ):
    raise ValueError(f"{path}: not a dict of tensors; give a file that contains only a state_dict")
  plain = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool)
  plain += (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
  arrays = {}
  for name, tensor in tensors.items():
    if tensor.dtype not in plain or tensor.layout != torch.strided:
      raise _quantised(path, name, str(tensor.dtype))
    tensor = tensor.detach()
    arrays[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
  return arrays


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
  tensors = {}
  try:
    with safe_open(path, framework="numpy") as file:
      for name in file.keys():  # noqa: SIM118
        kind = str(file.get_slice(name).get_dtype())
        if kind not in _TYPES:
          raise _quantised(path, name, kind)
        tensor = file.get_tensor(name)
        is_float = tensor.dtype.kind not in "iub"
        tensors[name] = tensor.astype(np.float32, copy=False) if is_float else tensor
  except (SafetensorError, OSError) as error:
    raise _unreadable(path, error) from error
  return tensors


def load_torch(path: str | Path) -> tuple[Any, Any]:
  """Reads a torch file without running pickled code; returns (the torch module, the content).

  Raises ValueError if torch is not installed or the file is damaged.
  """
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f"{path}: a torch file; install torch to read it, or give a safetensors file"
    ) from error
  try:
    return torch, torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises many types of errors for a damaged file
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
