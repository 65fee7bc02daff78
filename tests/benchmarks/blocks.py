"""Cycles of Stable Diffusion's first blocks on a TPU, as its compiler estimates them.

  python tests/benchmarks/blocks.py --topology=v5e:1x1 --topology=v5p:1x1x1 --topology=v6e:1x1

Four pictures at 512 pixels in bfloat16, with XLA's usual options and with those of `fast_jit`:
millions of cycles, and those of them that are products and convolutions with what is fused to
them. Of kernels the compiler estimates nothing, so self-attention is left out. No TPU is needed.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh, SingleDeviceSharding

from prefpaint_jax.models import blocks
from prefpaint_jax.planning import cost, stages
from prefpaint_jax.planning.chips import topology_devices
from prefpaint_jax.runtime.compilation import fast_jit

SIDE, CHANNELS = 64, 320  # of the highest resolution, where most copies are made
BLOCKS = {
  "residual": blocks.ResnetBlock2D(CHANNELS, 32, 1e-5, jnp.bfloat16),
  "transformer": blocks.Transformer2DModel(8, 1, 32, False, jnp.bfloat16),
}
REPEATS = 10  # in a loop, so that what a block is given has the layout of what it gives
_TOPOLOGY = flags.DEFINE_multi_string("topology", ["v5e:1x1"], "TPUs to compile for.")


def program(block: nn.Module, backward: bool):
  def run(params, x, other):
    apply = jax.checkpoint(lambda x: block.apply(params, x, other))
    return jax.lax.scan(lambda x, _: (apply(x), None), x, length=REPEATS)[0]

  return jax.grad(lambda *xs: run(*xs).astype(jnp.float32).sum(), (0, 1)) if backward else run


def cycles(text: str) -> tuple[float, float]:
  """Millions of a block: all, and of fusions around a product or a convolution."""
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
  print("| chip, block | usual options | products in it | here | products in it |")
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
          lowered = jit(program(block, backward)).lower(params, x, other)
          _, text = stages.compile_and_print(lowered, device)
          cells += [f"{figure:.2f}" for figure in cycles(text)]
        what = kind + ", and backward" * backward
        print(f"| {name.split(':')[0]}, {what} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
  app.run(main)
