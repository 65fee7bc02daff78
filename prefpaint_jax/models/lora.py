"""LoRA (Hu et al. 2021, arXiv 2106.09685): W + A B for chosen kernels W of a frozen base.

Adapters mirror the base's tree, with {"down": A, "up": B} where a chosen kernel is and nothing
elsewhere. Shapes: I inputs (of a convolution all but the last dimension), O outputs, r rank.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


def init(key: jax.Array, base: Params, rank: int, targets: str) -> Params:
  """Adapters down [I, r] and up [r, O] of the kernels whose "/"-joined path contains `targets`.

  `targets` is a regular expression. `up` is zero: the merged policy begins as the base, exactly.
  """
  if rank < 1:
    raise ValueError(f"lora.rank is {rank}; give 1 or more")
  found = 0

  def adapters(tree: Params, path: str, key: jax.Array) -> Params:
    nonlocal found
    chosen = {}
    for index, (name, value) in enumerate(sorted(tree.items())):
      own, here = jax.random.fold_in(key, index), f"{path}/{name}" if path else name
      if isinstance(value, dict):
        if below := adapters(value, here, own):
          chosen[name] = below
      elif name == "kernel" and re.search(targets, here):
        found += 1
        *inputs, outputs = value.shape
        size = math.prod(inputs)
        down = jax.random.normal(own, (size, rank)) / size**0.5
        chosen[name] = {"down": down, "up": jnp.zeros((rank, outputs))}
    return chosen

  chosen = adapters(base, "", key)
  if not found:
    raise ValueError(f"lora.targets {targets!r} matches no kernel of the policy")
  return chosen


def merge(base: Params, adapters: Params) -> Params:
  """The base with A B added to every kernel that has adapters."""
  merged = dict(base)
  for name, value in adapters.items():
    if isinstance(base[name], dict):
      merged[name] = merge(base[name], value)
    else:
      kernel = base[name]
      merged[name] = kernel + (value["down"] @ value["up"]).reshape(kernel.shape)
  return merged
