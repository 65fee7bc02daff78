"""Prints the memory traffic of an attention layer on TPUs, in GB, from its compiled programs.

  python tests/benchmarks/attention.py --topology=v5e:2x2 --topology=v5p:2x2x1 --topology=v6e:2x2

The table compares the plain formula, attention over blocks of queries, and Pallas's flash kernel,
for four images of Stable Diffusion 1.5 at 512 pixels in bfloat16. No TPU is needed.
"""

import functools

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import SingleDeviceSharding

from prefpaint_jax.kernels.attention import flash
from prefpaint_jax.kernels.chunked_attention import chunked_attention
from prefpaint_jax.planning import cost, stages
from prefpaint_jax.planning.chips import topology_devices

SHAPES = ((4, 4096, 8, 40), (4, 1024, 8, 80))
IMPLEMENTATIONS = {
  "plain": jax.nn.dot_product_attention,
  "blocks": chunked_attention,
  "kernel": flash,
}
_TOPOLOGY = flags.DEFINE_multi_string("topology", ["v5e:2x2"], "TPUs to compile for.")


def traffic(function, device: jax.Device, shape: tuple[int, ...]) -> float:
  """Returns the memory traffic in GB of a function of query, key and value of this shape."""
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))
  _, text = stages.compile_and_print(jax.jit(function).lower(x, x, x), device)
  return cost.memory_traffic(text) / 1e9


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  jax.config.update("jax_platforms", "cpu")
  print("| chip, tokens x features of a head |", " | ".join(IMPLEMENTATIONS), "|")
  print("| --- |", " | ".join(["---:"] * len(IMPLEMENTATIONS)), "|")
  for name in _TOPOLOGY.value:
    device = topology_devices(name)[0]
    for shape in SHAPES:
      for kind in ("forward", "and backward"):
        cells = []
        for attend in IMPLEMENTATIONS.values():
          function = attend
          if kind != "forward":
            loss = lambda attend, *xs: attend(*xs).astype(jnp.float32).sum()
            function = jax.grad(functools.partial(loss, attend), argnums=(0, 1, 2))
          cells.append(f"{traffic(function, device, shape):.2f}")
        print(f"| {name}, {shape[1]} x {shape[3]}, {kind} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
  app.run(main)
