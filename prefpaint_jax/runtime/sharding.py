"""The device mesh and the shardings of arrays on it.

The mesh has two axes. Parameters are replicated over "data" and sharded over "fsdp"; batches are
sharded over both. Rules are an ordered list of (regular expression, rule); the first expression
that matches an array's "/"-joined path decides. A rule is a `PartitionSpec`, or `LARGEST`. A layout
is a tree of `NamedSharding`s.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Shard the largest dimension that divides over "fsdp". Of equally large dimensions, shard the last,
# a kernel's output features. If no dimension divides, or if the array is small, replicate it.
LARGEST: Literal["largest"] = "largest"

# Number of elements below which gathering an array costs more than keeping a copy on each device.
SMALL = 2**14
Rule = P | Literal["largest"]
Rules = Sequence[tuple[str, Rule]]

# For the train state. Parameters, optimiser moments, behaviour policy and moving average get equal
# shardings, so that an update needs no resharding; counters and keys are small, so replicated.
DEFAULT_RULES: Rules = ((r"", LARGEST),)


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Makes the mesh of all devices.

  Args:
    data: size of the axis "data"; -1: all devices that the other axis leaves.
    fsdp: size of the axis "fsdp"; -1: all devices that the other axis leaves.
    devices: the devices; default: every device of every process.

  Raises:
    ValueError: the sizes do not use each device exactly once.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes, count = {"data": data, "fsdp": fsdp}, len(devices)
  asked = f"mesh data={data}, fsdp={fsdp} on {count} devices"
  if any(size < 1 and size != -1 for size in sizes.values()) or data == fsdp == -1:
    raise ValueError(f"{asked}: give positive sizes, at most one of them -1 (all devices left)")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if count % fixed or (-1 not in sizes.values() and fixed != count):
    raise ValueError(
      f"{asked}: the sizes multiply to {fixed}, not {count}; set one size to -1 (all devices left) "
      f"and the other to a divisor of {count}"
    )
  shape = tuple(count // fixed if size == -1 else size for size in sizes.values())
  # Linen layers need Auto axes, whose shardings the compiler propagates, not Explicit ones.
  return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * 2, devices=devices)


def specs(tree: Any, rules: Rules, mesh: Mesh) -> Any:
  """Computes the layout of a tree: a NamedSharding per leaf, by the first rule for its path.

  Args:
    tree: tree of arrays or `jax.ShapeDtypeStruct`s.
    rules: ordered list of (regular expression, rule).
    mesh: the mesh of the shardings.

  Raises:
    ValueError: no rule matches a path, or a dimension does not divide over its mesh axes.
  """

  def sharding(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    path = jax.tree_util.keystr(key_path, simple=True, separator="/")
    shape = leaf.shape
    for pattern, rule in rules:
      if re.search(pattern, path):
        spec = _largest(shape, mesh) if rule == LARGEST else rule
        _check_divides(path, shape, spec, mesh)
        return NamedSharding(mesh, spec)
    raise ValueError(f"no sharding rule matches {path!r} of shape {shape}; add a rule for it")

  return jax.tree_util.tree_map_with_path(sharding, tree)


def _largest(shape: tuple[int, ...], mesh: Mesh) -> P:
  """Returns the PartitionSpec of the rule LARGEST."""
  parts = mesh.shape["fsdp"]
  fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
  if parts == 1 or math.prod(shape) < SMALL or not fitting:
    return P()
  chosen = max(fitting, key=lambda axis: (shape[axis], axis))
  return P(*(None,) * chosen, "fsdp")


def _check_divides(path: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
  """Raises ValueError unless each dimension of `shape` divides over its mesh axes."""
  if len(spec) > len(shape):
    raise ValueError(
      f"{path!r} of shape {shape} has fewer dimensions than its rule {spec}; change the rule"
    )
  for axis, (size, names) in enumerate(zip(shape, spec, strict=False)):
    names = (names,) if isinstance(names, str) else names or ()
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts:
      raise ValueError(
        f"{path!r} of shape {shape}: dimension {axis} does not divide over mesh axis "
        f"{'x'.join(names)} of {parts}; change its rule or the mesh"
      )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of batches: the leading dimension over all devices."""
  return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, P())


def place(layout: Any, tree: Any) -> Any:
  """Makes global arrays from host arrays that are equal on all processes.

  Each process copies only the shards of its devices. `jax.device_put` would first gather the arrays
  of all processes on every device to compare them.

  Args:
    layout: one sharding for all arrays, or a tree with one per array.
    tree: tree of host arrays.
  """

  def place_one(array: Any, sharding: NamedSharding) -> jax.Array:
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  if isinstance(layout, NamedSharding):
    layout = jax.tree.map(lambda _: layout, tree)
  return jax.tree.map(place_one, tree, layout)


def with_shardings(tree: Any, layout: Any) -> Any:
  """Makes `jax.ShapeDtypeStruct`s from the shapes of `tree` and the shardings of `layout`.

  Args:
    tree: tree of arrays or shapes.
    layout: one sharding for all leaves, or a tree with one per leaf.
  """
  if isinstance(layout, NamedSharding):
    layout = jax.tree.map(lambda _: layout, tree)
  put = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(put, tree, layout)


def to_global(mesh: Mesh, local_tree: Any) -> Any:
  """Joins the processes' parts of a batch [B / processes, ...] into global arrays [B, ...]."""
  sharding = batch_sharding(mesh)
  tree = jax.tree.map(
    lambda array: jax.make_array_from_process_local_data(sharding, array), local_tree
  )
  # XLA:CPU runs a program in another thread, whose heap holds no freed memory, if its inputs are
  # not ready at the call.
  return jax.block_until_ready(tree) if mesh.devices.flat[0].platform == "cpu" else tree


def local_shards(mesh: Mesh, batch: int) -> list[tuple[jax.Device, slice]]:
  """Returns this process's devices and their rows of a batch [B, ...], in order of the rows."""
  parts = batch_sharding(mesh).addressable_devices_indices_map((batch,))
  shards = [(device, part) for device, (part,) in parts.items()]
  return sorted(shards, key=lambda shard: shard[1].start or 0)


def local_rows(mesh: Mesh, batch: int) -> np.ndarray:
  """Returns the indices of this process's rows of a batch of `batch` rows."""
  rows = np.arange(batch)
  return np.concatenate([rows[part] for _, part in local_shards(mesh, batch)])


def to_local(mesh: Mesh, array: jax.Array) -> np.ndarray:
  """Copies this process's rows of a sharded batch [B, ...] to the host; `to_global` inverts it."""
  parts = {shard.device: shard.data for shard in array.addressable_shards}
  local = [parts[device] for device, _ in local_shards(mesh, array.shape[0])]
  return np.concatenate(jax.device_get(local))


def check_batch(batch: int, mesh: Mesh, field: str = "batch_size") -> None:
  """Raises ValueError unless `batch` examples divide over the devices of `mesh`."""
  if batch < 1 or batch % mesh.size:
    raise ValueError(
      f"{field} {batch} does not divide over {mesh.size} devices; "
      f"give a positive multiple of {mesh.size}"
    )
