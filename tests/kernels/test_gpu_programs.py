"""What XLA makes of programs for GPUs that are not there."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

from prefpaint_jax.align import update
from prefpaint_jax.kernels import attention as module
from prefpaint_jax.kernels.attention import attention
from prefpaint_jax.planning import cost, stages
from prefpaint_jax.planning.chips import topology_devices
from prefpaint_jax.runtime.compilation import fast_jit

pytestmark = pytest.mark.skipif(
  not module.has_cudnn(), reason="compiling for a GPU needs JAX's plugin: pip install jax[cuda13]"
)


def compiled(function, *shapes, **options) -> str:
  """The program's text for an H100, of arrays in bfloat16 or of (shape, dtype)."""
  device = topology_devices("h100:1")[0]
  array = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    shape, dtype, sharding=SingleDeviceSharding(device)
  )
  arrays = [array(*shape) if isinstance(shape[0], tuple) else array(shape) for shape in shapes]
  lowered = fast_jit(Mesh([device], "gpu"))(function, **options).lower(*arrays)
  return stages.compile_and_print(lowered, device)[1]


def gradients(query, key, value):
  loss = lambda *xs: attention(*xs).astype(jnp.float32).sum()
  return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)


# Self-attention, to one text for all pictures, to a text for each.
@pytest.mark.parametrize("keys", [(2, 1024), (1, 77), (2, 77)])
@pytest.mark.parametrize("features", [40, 80])
def test_attention_and_its_gradients_are_kernels_of_cudnn(keys, features):
  query, key = (2, 1024, 8, features), (*keys, 8, features)
  text = compiled(gradients, query, key, key)
  assert set(re.findall(r"__cudnn\$\w+", text)) == {
    "__cudnn$fmhaSoftmax",
    "__cudnn$fmhaSoftmaxBackward",
  }
  results = " ".join(one.result for one in cost.instructions(text))
  M = keys[1] + keys[1] % 2
  assert f"1024,8,{features}]" in results and f"{M},8,{features}]" in results
  assert not re.search(rf"\[[\d,]*\b1024,({M}|{keys[1]})\]", results)  # scores


@pytest.mark.parametrize("shape, loops", [((2, 256, 8, 160), False), ((4, 4096, 4, 512), True)])
def test_what_cudnn_does_not_have_is_left_to_xla_in_few_steps(shape, loops):
  text = compiled(gradients, *[shape] * 3)
  assert "fmha" not in text and "cublas" in text
  assert (" while(" in text) == loops
  steps = {one.times for one in cost.instructions(text)}
  assert max(steps) <= 4


def test_a_step_is_made_in_place_where_a_gradient_is_turned_around():
  layout = ("NHWC", "HWIO", "NHWC")
  convolve = lambda x, kernel: jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=layout
  )

  def step(lay_out):
    def run(kernel, moment, x):
      loss = lambda kernel: convolve(x, kernel).astype(jnp.float32).sum()
      gradient = lay_out(jax.grad(loss)(kernel.astype(jnp.bfloat16))).astype(jnp.float32)
      moment = 0.9 * moment + gradient
      return kernel - moment, moment, jnp.sum(gradient**2)

    kernel = (3, 3, 256, 256), jnp.float32
    return compiled(run, kernel, kernel, (4, 32, 32, 256), donate_argnums=(0, 1))

  def copied(text: str) -> int:
    return sum(
      cost._bytes(one.result)
      for one in cost.instructions(text)
      if one.opcode == "copy" and not one.fused
    )

  assert copied(step(lambda x: x)) >= 2 * 4 * 3 * 3 * 256 * 256
  assert copied(step(update._row_major)) == 0


@pytest.mark.parametrize(
  "name", ["h100", "h100:", "h100:0", "h100:2x", "h100:2x2x2", "h100:banana"]
)
def test_unknown_shapes_are_refused_in_one_line(name):
  with pytest.raises(ValueError, match=f"--topology={name}: give GPUs as h100:8") as error:
    topology_devices(name)
  assert "\n" not in str(error.value)
