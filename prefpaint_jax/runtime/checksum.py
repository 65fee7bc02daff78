"""Checksums of arrays, which tell a damaged checkpoint from the state that was saved."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Bytes. NumPy sums arrays up to this size, because XLA compiles 0.1 s for every shape.
SMALL = 2**20


def checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
  """Computes the checksum of each array, an integer below 2**32.

  A checksum is the sum modulo 2**32 of a hash of every element's bits and row-major index. It
  depends neither on the sharding nor on the order of the reduction. A change of one element always
  changes it; any other change does with probability 1 - 2**-32. On several processes, all of them
  call this function with the same arrays.
  """
  # Starts the work on all devices before it waits for the first sum.
  sums = {path: _partial_sums(array) for path, array in arrays.items()}
  return {path: int(np.sum(_fetch(parts), dtype=np.uint32)) for path, parts in sums.items()}


def _partial_sums(array: Any) -> Any:
  """Starts to compute the checksum as uint32 summands, at most one a device."""
  sharding = getattr(array, "sharding", None)
  is_local = sharding is None or sharding.is_fully_replicated or array.is_fully_addressable
  if is_local and array.nbytes <= SMALL:
    words = np.ascontiguousarray(array).reshape(-1).view(_word(array.dtype)).astype(np.uint32)
    return _hash(words, np.arange(words.size, dtype=np.uint32))
  if not isinstance(sharding, NamedSharding):
    sharding = NamedSharding(Mesh(jax.local_devices()[:1], "device"), P())
    array = jax.device_put(array, sharding)
  return _sum_on_devices(array, sharding)


def _fetch(parts: Any) -> np.ndarray:
  if isinstance(parts, np.ndarray) or parts.is_fully_addressable:
    return np.asarray(parts)
  return multihost_utils.process_allgather(parts, tiled=True)


@functools.partial(jax.jit, static_argnames="sharding")
def _sum_on_devices(array: jax.Array, sharding: NamedSharding) -> jax.Array:
  """Returns the sum of each device's elements; of copies, all but one have the sum 0.

  It has no collective operation: XLA:CPU can deadlock with many programs of several devices.
  """
  mesh, spec = sharding.mesh, sharding.spec
  used = [() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in spec]
  unused = tuple(set(mesh.axis_names) - set(itertools.chain(*used)))

  def sum_block(block: jax.Array) -> jax.Array:
    block = block.astype(jnp.uint8) if block.dtype == jnp.bool_ else block
    words = lax.bitcast_convert_type(block, _word(block.dtype)).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
      axes = used[axis] if axis < len(used) else ()
      first = lax.axis_index(axes).astype(jnp.uint32) * size if axes else 0
      whole = size * int(np.prod([mesh.shape[name] for name in axes], dtype=int))
      index = index * whole + first + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    total = jnp.sum(_hash(words, index), dtype=jnp.uint32)
    return jnp.where(lax.axis_index(unused) == 0, total, 0)[None] if unused else total[None]

  blocks = P(mesh.axis_names)
  return jax.shard_map(sum_block, mesh=mesh, in_specs=spec, out_specs=blocks)(array)


def _word(dtype: Any) -> np.dtype:
  """Returns the unsigned integer that holds the bits of an element, or a half of 8 bytes."""
  return np.dtype(f"uint{8 * min(4, np.dtype(dtype).itemsize)}")


def _hash(words: Any, index: Any) -> Any:
  """Hashes uint32 words with their indices; for each index it is a bijection of the words.

  It is the finaliser of MurmurHash3 (public domain). A sum of weighted words would miss, for
  example, two changed signs.
  """
  mixed = words ^ (index * np.uint32(0x9E3779B1))
  mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
  return mixed ^ (mixed >> 16)
