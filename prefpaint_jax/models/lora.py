"""LoRA (Hu et al. 2021, arXiv 2106.09685): adapters A B on chosen kernels W of a frozen base.

The merged kernel is W + A B. A tree of adapters has {"down": A, "up": B} at the path of each chosen
kernel of the base, and no other leaves.
"""
# Shapes: I inputs (all dimensions of a kernel but the last, flattened), O outputs, r rank.

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from prefpaint_jax.weights import adapters as files
from prefpaint_jax.weights.names import Params, first_names


def init(key: jax.Array, base: Params, rank: int, targets: str) -> Params:
  """Initialises adapters down [I, r] and up [r, O] for the chosen kernels of `base`.

  `down` is normal with variance 1/I; `up` is zero, so that the merged policy starts at `base`.

  Args:
    key: `jax.random.key`.
    base: parameters of the frozen network.
    rank: r.
    targets: regular expression; chooses the kernels whose "/"-joined path it is found in.

  Raises:
    ValueError: `rank` is below 1, or no kernel matches.
  """
  if rank < 1:
    raise ValueError(f"lora.rank is {rank}; give 1 or more")
  found = 0

  def adapters(tree: Params, path: str, key: jax.Array) -> Params:
    nonlocal found
    chosen = {}
    for index, (name, value) in enumerate(sorted(tree.items())):
      entry_key = jax.random.fold_in(key, index)
      entry_path = f"{path}/{name}" if path else name
      if isinstance(value, dict):
        if inner := adapters(value, entry_path, entry_key):
          chosen[name] = inner
      elif name == "kernel" and re.search(targets, entry_path):
        found += 1
        *inputs, outputs = value.shape
        size = math.prod(inputs)
        down = jax.random.normal(entry_key, (size, rank)) / size**0.5
        chosen[name] = {"down": down, "up": jnp.zeros((rank, outputs))}
    return chosen

  chosen = adapters(base, "", key)
  if not found:
    raise ValueError(
      f"lora.targets is {targets!r}, which matches no kernel of the policy; give a regular "
      "expression that is found in the paths of kernels"
    )
  return chosen


def merge(base: Params, adapters: Params) -> Params:
  """Adds A B to every kernel of `base` that has adapters; the other leaves are those of `base`."""
  merged = dict(base)
  for name, value in adapters.items():
    if isinstance(base[name], dict):
      merged[name] = merge(base[name], value)
    else:
      kernel = base[name]
      change = (value["down"] @ value["up"]).reshape(kernel.shape)
      merged[name] = (kernel + change).astype(kernel.dtype)
  return merged


def add(base: Params, name: str | Path) -> Params:
  """Merges the adapters of a file, "FILE" or "FILE:SCALE", into the kernels of `base`.

  Raises:
    ValueError: the file cannot be read, or is not for this network.
  """
  file, scale = files.parse(name)
  return merge(base, files.load(file, base, scale))


def read(file: str, base: Params, rank: int, chosen: Params) -> Params:
  """Reads the adapters that a run begins with; `up` includes alpha/r of the file.

  Args:
    file: a file of adapters, or a folder with one.
    base: arrays or shapes of the frozen network's parameters.
    rank: r of the run.
    chosen: adapters of the kernels that the run trains, as `init` makes them.

  Raises:
    ValueError: the file cannot be read, or has another rank or adapters of other kernels.
  """
  path, scale = files.parse(file)
  adapters = files.load(path, base, scale)
  found, expected = flatten_dict(adapters), flatten_dict(chosen)
  if differing := sorted({len(x) for name, x in found.items() if name[-1] == "up"} - {rank}):
    raise ValueError(
      f"lora.init: {path} has adapters of rank {differing[0]}, lora.rank is {rank}; give the same "
      "rank"
    )
  paths = lambda names: ["/".join(name[:-1]) for name in sorted(names) if name[-1] == "up"]
  missing, others = paths(expected.keys() - found), paths(found.keys() - expected)
  if missing or others:
    lacks = f" has no adapters of {len(missing)} kernels that lora.targets chooses"
    has = f" has adapters of {len(others)} kernels that lora.targets does not choose"
    raise ValueError(
      f"lora.init: {path}{lacks if missing else has}: {first_names(missing or others, 2)}; give "
      "a lora.targets that chooses the kernels of the file"
    )
  return adapters
