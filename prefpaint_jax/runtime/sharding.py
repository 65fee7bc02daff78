"""The device mesh, and which array lives where on it.

The mesh has two axes: "data" replicates parameters, "fsdp" splits them; batches are split over
both. A layout is an ordered list of (regular expression, rule): the first expression found in an
array's "/"-joined path decides. A rule is a `PartitionSpec`, or `LARGEST`.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefpaint_jax.runtime.compilation import apart

# Split the largest dimension that divides over "fsdp" (of equals the last, a kernel's output
# features); replicate the array when there is none or when it is small.
LARGEST: Literal["largest"] = "largest"

# Below this many elements, gathering an array costs more than holding a copy of it.
SMALL = 2**14
Rule = P | Literal["largest"]
Rules = Sequence[tuple[str, Rule]]

# The train state: parameters, optimiser moments, behaviour policy and moving average split alike,
# so that an update needs no resharding; counters and keys have nothing to split.
DEFAULT_RULES: Rules = ((r"", LARGEST),)


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Mesh of all `devices` (default: every device of every process); -1 takes what is left."""
  devices = jax.devices() if devices is None else list(devices)
  sizes, count = {"data": data, "fsdp": fsdp}, len(devices)
  asked = f"mesh data={data}, fsdp={fsdp} on {count} devices"
  if any(size < 1 and size != -1 for size in sizes.values()) or data == fsdp == -1:
    raise ValueError(f"{asked}: give positive sizes, at most one of them -1 (what is left)")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if count % fixed or (-1 not in sizes.values() and fixed != count):
    raise ValueError(f"{asked}: {fixed} does not fill {count}; set one size to -1 (what is left)")
  shape = tuple(count // fixed if size == -1 else size for size in sizes.values())
  # Linen layers need axes whose sharding the compiler propagates, not explicit ones.
  return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * 2, devices=devices)


def specs(tree: Any, rules: Rules, mesh: Mesh) -> Any:
  """A NamedSharding for every array (or shape) of `tree`, by the first rule that matches its path.

  Raises ValueError when no rule matches, or when a dimension does not divide over its mesh axes.
  """

  def sharding(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    path = jax.tree_util.keystr(key_path, simple=True, separator="/")
    shape = leaf.shape
    for pattern, rule in rules:
      if re.search(pattern, path):
        spec = _largest(shape, mesh) if rule == LARGEST else rule
        _check_divides(path, shape, spec, mesh)
        return NamedSharding(mesh, spec)
    raise ValueError(f"no sharding rule matches {path!r} of shape {shape}: add one for it")

  return jax.tree_util.tree_map_with_path(sharding, tree)


def _largest(shape: tuple[int, ...], mesh: Mesh) -> P:
  parts = mesh.shape["fsdp"]
  fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
  if parts == 1 or math.prod(shape) < SMALL or not fitting:
    return P()
  chosen = max(fitting, key=lambda axis: (shape[axis], axis))
  return P(*(None,) * chosen, "fsdp")


def _check_divides(path: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
  if len(spec) > len(shape):
    raise ValueError(f"{path!r} of shape {shape} has fewer dimensions than its rule {spec}")
  for axis, (size, names) in enumerate(zip(shape, spec, strict=False)):
    names = (names,) if isinstance(names, str) else names or ()
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts:
      raise ValueError(
        f"{path!r} of shape {shape}: dimension {axis} does not divide over mesh axis "
        f"{'x'.join(names)} of {parts}; change its rule or the mesh"
      )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading dimension over all devices, the rest whole."""
  return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, P())


@apart()
def place(layout: Any, tree: Any) -> Any:
  """Global arrays of host arrays that every process holds whole; each copies what is its own.

  `layout` is a sharding for all of them, or a tree with one for each.

  `device_put` would first gather the arrays of all processes on every device, to compare them.
  """

  def place_one(array: Any, sharding: NamedSharding) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  if isinstance(layout, NamedSharding):
    layout = jax.tree.map(lambda _: layout, tree)
  return jax.tree.map(place_one, tree, layout)


def with_shardings(tree: Any, layout: Any) -> Any:
  """The shapes of `tree` with a sharding for all of them, or with a tree of shardings."""
  if isinstance(layout, NamedSharding):
    layout = jax.tree.map(lambda _: layout, tree)
  put = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(put, tree, layout)


def to_global(mesh: Mesh, local_tree: Any) -> Any:
  """Joins each process's part of a batch [B / processes, ...] into global arrays [B, ...]."""
  sharding = batch_sharding(mesh)
  tree = jax.tree.map(
    lambda array: jax.make_array_from_process_local_data(sharding, array), local_tree
  )
  # On a CPU what is called before they are there runs in another thread, in memory of its own.
  return jax.block_until_ready(tree) if mesh.devices.flat[0].platform == "cpu" else tree


def check_batch(batch: int, mesh: Mesh, field: str = "batch_size") -> None:
  """Raises ValueError unless `batch` examples divide over the devices of `mesh`."""
  if batch < 1 or batch % mesh.size:
    raise ValueError(
      f"{field} {batch} does not divide over {mesh.size} devices: "
      f"give a positive multiple of {mesh.size}"
    )
