"""Torch files (`.pt`, `.bin`), read without torch.

A torch file is a pickle that refers to storages, which are raw arrays beside it: in a zip archive,
or before torch 1.6 in the same file. The unpickler admits tensors, parameters and plain containers.
It refuses every other name before anything of the file runs.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_STORAGES = {
  "torch.DoubleStorage": np.dtype(np.float64),
  "torch.FloatStorage": np.dtype(np.float32),
  "torch.HalfStorage": np.dtype(np.float16),
  "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "torch.LongStorage": np.dtype(np.int64),
  "torch.IntStorage": np.dtype(np.int32),
  "torch.ShortStorage": np.dtype(np.int16),
  "torch.CharStorage": np.dtype(np.int8),
  "torch.ByteStorage": np.dtype(np.uint8),
  "torch.BoolStorage": np.dtype(np.bool_),
  "torch.storage.UntypedStorage": np.dtype(np.uint8),
}
_MAGIC_NUMBERS = (0x1950A86A20F9469CFC6C, 1001)  # torch's MAGIC_NUMBER and PROTOCOL_VERSION


class ForbiddenError(Exception):
  """The pickle refers to something other than tensors; the message is its name."""


def load(path: Path) -> Any:
  """Reads a torch file; returns its content with an array in place of each tensor or parameter.

  As in torch, tensors that share a storage are views of it, with the strides of the file.

  Raises:
    ForbiddenError: the file contains something other than tensors and plain containers.
    Exception: of any type, if the file is damaged.
  """
  with path.open("rb") as file:
    if file.read(4) == b"PK\x03\x04":
      return _load_zip(file)
    file.seek(0)
    return _load_legacy(file, path.stat().st_size)


class _Dict(dict):
  """Replaces an OrderedDict; ignores its attributes, such as the `_metadata` of a state_dict."""

  def __setstate__(self, state: Any) -> None:
    pass


class _Storage:
  """A raw array in the file."""

  def __init__(self, dtype: np.dtype, memory: np.ndarray):
    self.dtype, self.memory = dtype, memory

  def __setstate__(self, state: Any) -> None:
    raise ForbiddenError("a state of a storage")


class _Unpickler(pickle.Unpickler):
  """Unpickles tensors; `storage` finds the storage of a key, a dtype and a number of elements."""

  def __init__(self, file: BinaryIO, storage: Callable[[str, np.dtype, int], _Storage]):
    super().__init__(file, encoding="utf-8")
    self.storage = storage

  def find_class(self, module: str, name: str) -> Any:
    # Made for each call, because a pickle can set attributes of a function.
    def tensor(
      storage: _Storage, offset: int, size: tuple, strides: tuple, *flags: Any
    ) -> np.ndarray:
      # Flags: requires_grad, backward hooks, and of lazily negated or conjugated tensors a dict.
      if flags[2:] and flags[2]:
        raise ForbiddenError(f"a tensor with {flags[2]}")
      width = storage.dtype.itemsize
      strides = tuple(width * stride for stride in strides)
      # NumPy checks that the view lies within the memory.
      return np.ndarray(size, storage.dtype, storage.memory, width * offset, strides)

    def parameter(data: np.ndarray, requires_grad: bool, hooks: Any) -> np.ndarray:
      return data

    full = f"{module}.{name}"
    if full in _STORAGES:
      return full
    allowed = {
      "collections.OrderedDict": _Dict,
      "torch._utils._rebuild_tensor": tensor,
      "torch._utils._rebuild_tensor_v2": tensor,
      # Of an untyped storage and a dtype, such as torch.float8_e4m3fn; its dtype is refused.
      "torch._utils._rebuild_tensor_v3": tensor,
      "torch._utils._rebuild_parameter": parameter,
    }
    if full not in allowed:
      raise ForbiddenError(full)
    return allowed[full]

  def persistent_load(self, pid: tuple) -> _Storage:
    kind, name, key, _, numel, *view = pid
    if kind != "storage" or any(view):
      raise ForbiddenError(f"a {kind}" if kind != "storage" else "a view of a storage")
    return self.storage(key, _STORAGES[name], numel)


def _load_zip(file: BinaryIO) -> Any:
  storages: dict[str, _Storage] = {}
  with zipfile.ZipFile(file) as archive:
    names = archive.namelist()
    folder = names[0].split("/")[0]

    def read(name: str) -> bytes:
      entry = archive.getinfo(f"{folder}/{name}")
      if entry.CRC == 0:  # torch was told to write no checksums
        del entry.CRC
      return archive.read(entry)

    def storage(key: str, dtype: np.dtype, numel: int) -> _Storage:
      if key not in storages:
        memory = np.frombuffer(read(f"data/{key}"), np.uint8)
        if memory.size != numel * dtype.itemsize:
          raise ValueError(f"storage {key} has {memory.size} bytes, not {numel} numbers")
        storages[key] = _Storage(dtype, memory)
      return storages[key]

    if f"{folder}/byteorder" in names and read("byteorder") != b"little":
      raise ForbiddenError("numbers of a big-endian machine")
    return _Unpickler(io.BytesIO(read("data.pkl")), storage).load()


def _load_legacy(file: BinaryIO, size: int) -> Any:
  """Reads a file of torch before 1.6: five pickles and then the storages of the fourth."""
  storages: dict[str, _Storage] = {}

  def storage(key: str, dtype: np.dtype, numel: int) -> _Storage:
    if key not in storages:
      if numel * dtype.itemsize > size:
        raise ValueError(f"storage {key} is larger than the file")
      storages[key] = _Storage(dtype, np.empty(numel * dtype.itemsize, np.uint8))
    return storages[key]

  magic, protocol, _, content, keys = (_Unpickler(file, storage).load() for _ in range(5))
  if (magic, protocol) != _MAGIC_NUMBERS:
    raise ValueError("no magic number of torch")
  for key in keys:
    (numel,) = struct.unpack("<q", file.read(8))
    dtype, memory = storages[key].dtype, storages[key].memory
    if numel * dtype.itemsize != memory.size or file.readinto(memory.data) != memory.size:
      raise ValueError(f"storage {key} does not have {memory.size} bytes")
  return content
