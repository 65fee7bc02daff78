"""Checksums: equal on every sharding and both paths, different for every kind of damage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefpaint_jax.runtime import checksum
from prefpaint_jax.runtime.checksum import checksums
from prefpaint_jax.runtime.sharding import make_mesh

SHAPE = (8, 16)


def checksum_of(array) -> int:
  return checksums({"": array})[""]


def murmur(word: int) -> int:
  """MurmurHash3's fmix32, with Python's integers."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    word = (word ^ (word >> shift)) * factor % 2**32
  return word ^ (word >> 16)


def expected(array: np.ndarray) -> int:
  size = min(4, array.dtype.itemsize)
  data = array.tobytes()
  words = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
  return sum(murmur(word ^ (i * 0x9E3779B1 % 2**32)) for i, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("small", [0, checksum.SMALL])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksum_is_the_sum_of_hashes_on_one_and_on_eight_devices(monkeypatch, dtype, small):
  monkeypatch.setattr(checksum, "SMALL", small)
  array = jax.random.bits(jax.random.key(0), SHAPE).astype(dtype)
  sum_of_hashes = expected(np.asarray(array))
  assert checksum_of(np.asarray(array)) == checksum_of(array) == sum_of_hashes
  mesh = make_mesh(data=4, fsdp=2)
  specs = (P("data", "fsdp"), P(), P(None, ("data", "fsdp")), P("fsdp"))
  for spec in specs if dtype == "float32" else specs[:1]:
    assert checksum_of(jax.device_put(array, NamedSharding(mesh, spec))) == sum_of_hashes


@pytest.mark.parametrize("shape", [(), (0,), (3,)])
@pytest.mark.parametrize("small", [-1, checksum.SMALL])
def test_checksum_of_an_array_of_any_rank(monkeypatch, shape, small):
  monkeypatch.setattr(checksum, "SMALL", small)
  array = jnp.full(shape, -2.5)
  assert checksum_of(array) == expected(np.asarray(array))


def test_every_flipped_bit_changes_the_checksum():
  array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
  before, bits = checksum_of(array), array.reshape(-1).view(np.uint8)
  for position in range(bits.size):
    for bit in range(8):
      bits[position] ^= 1 << bit
      assert checksum_of(array) != before
      bits[position] ^= 1 << bit


@pytest.mark.parametrize(
  "change",
  [
    lambda x: x[::-1],
    lambda x: np.roll(x, 1, axis=1),
    lambda x: np.roll(x, 8, axis=0),
    lambda x: x.T,
    lambda x: np.where(np.arange(16) < 2, -x, x),  # two signs of every row
    lambda x: x + 0.0,  # -0 becomes 0
  ],
)
def test_moved_and_negated_elements_change_the_checksum(change):
  array = np.zeros((16, 16), np.float32)
  array[:2, :2] = [[1, 2], [-1, -2]]
  array[5] = -0.0
  assert checksum_of(change(array).copy()) != checksum_of(array)
