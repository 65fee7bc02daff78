"""Prints the cycles of Stable Diffusion's first blocks on TPUs, as the TPU compiler estimates them.

  python tests/benchmarks/blocks.py --topology=v5e:1x1 --topology=v5p:1x1x1 --topology=v6e:1x1

The table has millions of cycles for four images at 512 pixels in bfloat16, with XLA's default
options and with the options of `fast_jit`; and the part of these cycles in fusions around a product
or a convolution. Self-attention is left out, because the compiler has no estimate for Pallas
kernels. No TPU is needed.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh, SingleDeviceSharding

from prefpaint_jax.kernels.dispatch import traced_for
from prefpaint_jax.models import blocks
from prefpaint_jax.planning import cost, stages
from prefpaint_jax.planning.chips import topology_devices
from prefpaint_jax.runtime.compilation import fast_jit

SIDE, CHANNELS = 64, 320  # the highest resolution, where XLA makes most copies
BLOCKS = {
  "residual": blocks.ResnetBlock2D(CHANNELS, 32, 1e-5, jnp.bfloat16),
  "transformer": blocks.Transformer2DModel(8, 1, 32, False, jnp.bfloat16),
}
REPEATS = 10  # in a loop, so that the input of a block has the layout of its output
_TOPOLOGY = flags.DEFINE_multi_string("topology", ["v5e:1x1"], "TPUs to compile for.")


def program(block: nn.Module, backward: bool):
  """Returns a function that applies a block REPEATS times, or its gradient."""

  def run(params, x, other):
    apply = jax.checkpoint(lambda x: block.apply(params, x, other))
    return jax.lax.scan(lambda x, _: (apply(x), None), x, length=REPEATS)[0]

  return jax.grad(lambda *xs: run(*xs).astype(jnp.float32).sum(), (0, 1)) if backward else run


def cycles(text: str) -> tuple[float, float]:
  """Returns millions of cycles of a block: all, and in fusions around a product or convolution."""
  total = products = 0
  for one in cost.instructions(text):
    if (found := re.search(r'"estimated_cycles":"(\d+)"', one.rest)) and not one.fused:
      total += int(found[1]) * one.times
      products += int(found[1]) * one.times * ("kind=kOutput" in one.rest)
  return total / REPEATS / 1e6, products / REPEATS / 1e6


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  jax.config.update("jax_platforms", "cpu")
  print("| chip, block | default options | in products | fast_jit | in products |")
  print("| --- |" + " ---: |" * 4)
  for name in _TOPOLOGY.value:
    device = topology_devices(name)[0]
    place = SingleDeviceSharding(device)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=place)
    for kind, block in BLOCKS.items():
      x = array((4, SIDE, SIDE, CHANNELS))
      other = array((1, 1280) if kind == "residual" else (1, 77, 768))
      shapes = jax.eval_shape(block.init, jax.random.key(0), x, other)
      params = jax.tree.map(lambda p, array=array: array(p.shape), shapes)
      for backward in (False, True):
        cells = []
        for jit in (jax.jit, fast_jit(Mesh([device], "chips"))):
          lowered = jit(traced_for("tpu", program(block, backward))).lower(params, x, other)
          _, text = stages.compile_and_print(lowered, device)
          cells += [f"{figure:.2f}" for figure in cycles(text)]
        title = kind + ", and backward" * backward
        print(f"| {name.split(':')[0]}, {title} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
  app.run(main)
