"""Torch files read without torch: equal to torch.load, or refused in one line."""

import io
import os
import pickle
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from prefpaint_jax.weights.files import load_file, load_torch


# ------------------------------------------------------------------ files written without torch
def push(value) -> bytes:
  """Returns the opcodes that push a plain value to the unpickler's stack."""
  return pickle.dumps(value, protocol=2)[2:-1]


def tensor(storage, key, numel, offset, size, strides) -> bytes:
  """Returns the opcodes of a tensor, as torch writes them."""
  pid = push("storage") + f"ctorch\n{storage}\n".encode() + push(key) + push("cpu") + push(numel)
  fields = (
    push(offset) + push(size) + push(strides) + push(False) + b"ccollections\nOrderedDict\n)R"
  )
  return b"ctorch._utils\n_rebuild_tensor_v2\n((" + pid + b"tQ" + fields + b"tR"


def pickled(**values: bytes) -> bytes:
  """Returns the pickle of a dict of values given as opcodes."""
  return b"\x80\x02}(" + b"".join(push(name) + value for name, value in values.items()) + b"u."


def zipped(content: bytes, **storages: bytes) -> bytes:
  memory = io.BytesIO()
  with zipfile.ZipFile(memory, "w") as archive:
    archive.writestr("archive/data.pkl", content)
    archive.writestr("archive/byteorder", "little")
    for key, data in storages.items():
      archive.writestr(f"archive/data/{key[1:]}", data)
  return memory.getvalue()


def legacy(content: bytes, **storages: bytes) -> bytes:
  """Returns the file of torch before 1.6; storages have elements of 4 bytes."""
  head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})]
  keys = pickle.dumps([key[1:] for key in storages], 2)
  sized = [(len(data) // 4).to_bytes(8, "little") + data for data in storages.values()]
  return b"".join([*head, content, keys, *sized])


MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)
# A matrix, its transpose and its second column, all of one storage.
VIEWS = pickled(
  a=tensor("FloatStorage", "0", 6, 0, (2, 3), (3, 1)),
  b=tensor("FloatStorage", "0", 6, 0, (3, 2), (1, 3)),
  c=tensor("FloatStorage", "0", 6, 1, (2,), (3,)),
)


@pytest.mark.parametrize("write", [zipped, legacy])
def test_views_of_one_storage_are_read_without_torch(write, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "a.pt").write_bytes(write(VIEWS, _0=MATRIX.tobytes()))
  read = load_file(tmp_path / "a.pt")
  for name, expected in {"a": MATRIX, "b": MATRIX.T, "c": MATRIX[:, 1]}.items():
    np.testing.assert_array_equal(read[name], expected)
    assert np.shares_memory(read[name], read["a"])


def test_bfloat16_is_read_without_torch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  expected = np.array([1.5, -2.0, 3e38], ml_dtypes.bfloat16)
  content = pickled(a=tensor("BFloat16Storage", "0", 3, 0, (3,), (1,)))
  (tmp_path / "a.pt").write_bytes(zipped(content, _0=expected.tobytes()))
  read = load_file(tmp_path / "a.pt")["a"]
  assert read.dtype == np.float32
  np.testing.assert_array_equal(read, expected.astype(np.float32))


class Runs:
  """Calls a function when it is unpickled."""

  def __init__(self, function, argument):
    self.call = function, (argument,)

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("write", [zipped, legacy, lambda content: content])
@pytest.mark.parametrize("run", [os.mkdir, os.system, eval])
def test_code_is_refused_by_its_name_and_does_not_run(run, write, tmp_path):
  marker = tmp_path / "ran"
  argument = {os.mkdir: f"{marker}", os.system: f"touch {marker}", eval: f"open('{marker}', 'w')"}
  content = pickle.dumps({"a": Runs(run, argument[run])}, 2)
  (tmp_path / "a.pt").write_bytes(write(content))
  name = rf"\S+\.{run.__name__}"
  with pytest.raises(ValueError, match=rf"\A[^\n]*a\.pt: holds {name}; expected tensors[^\n]*\Z"):
    load_torch(tmp_path / "a.pt")
  assert not marker.exists()


# Opcodes that change what the unpickler gives: the state of a class, of a function, of a storage.
@pytest.mark.parametrize(
  "opcodes",
  [
    b"ccollections\nOrderedDict\n}(" + push("items") + push(1) + b"ub",
    b"ctorch._utils\n_rebuild_tensor_v2\nN}(" + push("__defaults__") + push((1,)) + b"u\x86b",
    b"ctorch\nFloatStorage\n}(" + push("a") + push(1) + b"ub",
    tensor("FloatStorage", "0", 6, 0, (2, 3), (3, 1))
    + push((1, (2,), 0, False, b"abcdefgh"))
    + b"b",
    b"ccollections\nOrderedDict\n(lR",
    b"ccopy_reg\n_reconstructor\n",
    b"\x82\x01",
  ],
)
def test_pickles_cannot_change_the_reader(opcodes, tmp_path):
  good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
  good.write_bytes(zipped(VIEWS, _0=MATRIX.tobytes()))
  bad.write_bytes(zipped(pickled(a=opcodes), _0=MATRIX.tobytes()))
  try:
    load_torch(bad)
  except ValueError as error:
    assert "\n" not in str(error)
  np.testing.assert_array_equal(load_file(good)["b"], MATRIX.T)


def of_one_tensor(**changes) -> bytes:
  fields = {"storage": "FloatStorage", "key": "0", "numel": 6, "offset": 0}
  return pickled(a=tensor(**fields | {"size": (6,), "strides": (1,)} | changes))


@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize(
  "change",
  [
    {"offset": 1},
    {"offset": -1},
    {"size": (7,)},
    {"size": (-6,)},
    {"strides": (2,)},
    {"strides": (-1,)},
    {"strides": (1, 1)},
    {"numel": 5},
    {"numel": 2**40},
    {"numel": -6},
    {"key": "1"},
    {"storage": "LongStorage"},
  ],
  ids=str,
)
def test_tensor_that_is_not_in_its_storage_is_refused_in_one_line(write, change, tmp_path):
  (tmp_path / "a.pt").write_bytes(write(of_one_tensor(**change), _0=MATRIX.tobytes()))
  with pytest.raises(ValueError, match=r"\A[^\n]*a\.pt: cannot be read at \d+ bytes[^\n]*\Z"):
    load_torch(tmp_path / "a.pt")


@pytest.mark.parametrize("write", [zipped, legacy])
def test_truncated_files_are_refused_in_one_line(write, tmp_path):
  whole = write(VIEWS, _0=MATRIX.tobytes())
  for length in range(0, len(whole), 11):
    (tmp_path / "a.pt").write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r"\A[^\n]*a\.pt: (cannot be read|holds)[^\n]*\Z"):
      load_torch(tmp_path / "a.pt")


def test_other_archives_are_refused_in_one_line(tmp_path):
  empty, other, big_endian = io.BytesIO(), io.BytesIO(), io.BytesIO()
  zipfile.ZipFile(empty, "w").close()
  for memory, name in ((other, "word/document.xml"), (big_endian, "archive/byteorder")):
    with zipfile.ZipFile(memory, "w") as archive:
      archive.writestr(name, "big")
  for memory in (empty, other, big_endian):
    (tmp_path / "a.pt").write_bytes(memory.getvalue())
    with pytest.raises(ValueError, match=r"\A[^\n]*a\.pt: (cannot be read|holds)[^\n]*\Z"):
      load_torch(tmp_path / "a.pt")


# -------------------------------------------------------------------- files written with torch
@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch", reason="parity needs torch: pip install torch")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_tensors_equal_those_of_torch(torch, is_zip, tmp_path):
  matrix = torch.arange(24.0).reshape(4, 6)
  content = {
    "matrix": matrix,
    "view": matrix[1:3, ::2],
    "transposed": matrix.t(),
    "expanded": torch.tensor(3.5).expand(2, 3),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(7),
    "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "state_dict": torch.nn.BatchNorm1d(3).state_dict(),
    "others": [1, "a", None, {"b": torch.ones(2)}],
  }
  numbers = torch.tensor([0.0, 1.0, 100.0])
  for name in (
    "float64",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
  ):
    content[name] = numbers.to(getattr(torch, name))
  torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
  read, expected = load_torch(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt")
  for tensors in (read, expected):
    tensors |= tensors.pop("state_dict") | {"in a list": tensors.pop("others")[3]["b"]}
  assert list(read) == list(expected)
  for name, theirs in expected.items():
    ours = read[name]
    assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
    assert ours.shape == tuple(theirs.shape)
    assert tuple(stride // ours.itemsize for stride in ours.strides) == theirs.stride()
    theirs = theirs.detach().double().numpy()
    np.testing.assert_array_equal(ours.astype(np.float64), theirs)
  assert np.shares_memory(read["matrix"], read["transposed"])


def test_file_without_checksums_is_read_as_torch_reads_it(torch, tmp_path):
  before = torch.serialization.get_crc32_options()
  torch.serialization.set_crc32_options(False)
  try:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "a.pt")
  finally:
    torch.serialization.set_crc32_options(before)
  np.testing.assert_array_equal(load_file(tmp_path / "a.pt")["a"], [0, 1, 2])


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
  ("make", "name"),
  [
    (lambda torch: torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    (lambda torch: torch.eye(2).to_sparse(), r"torch\._utils\._rebuild_sparse_tensor"),
    (lambda torch: torch.zeros(2, dtype=torch.complex64), r"torch\.ComplexFloatStorage"),
    (lambda torch: torch.zeros(2).to(torch.float8_e4m3fn), r"torch\.float8_e4m3fn"),
    (lambda torch: torch.zeros(2, dtype=torch.complex64).conj().imag, "a tensor with .*neg.*"),
    (lambda torch: np.zeros(2), r"numpy\.\S+"),
  ],
)
def test_other_objects_of_torch_are_refused_by_name(torch, make, name, is_zip, tmp_path):
  path = tmp_path / "a.pt"
  torch.save({"a": make(torch)}, path, _use_new_zipfile_serialization=is_zip)
  with pytest.raises(ValueError, match=rf"\A[^\n]*a\.pt: holds {name}; expected tensors[^\n]*\Z"):
    load_torch(path)
