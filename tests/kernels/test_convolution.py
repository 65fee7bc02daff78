"""Every implementation of the convolution against the reference, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax.kernels.convolution import IMPLEMENTATIONS, conv2d
from prefpaint_jax.kernels.dispatch import traced_for

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
CASES = {  # side of the kernel, size of the image, strides, padding
  "same": (3, (8, 6), (1, 1), ((1, 1), (1, 1))),
  "one by one": (1, (4, 4), (1, 1), ((0, 0), (0, 0))),
  "wide kernel, small image": (5, (2, 2), (1, 1), ((2, 2), (2, 2))),
  "strides": (3, (8, 8), (2, 2), ((1, 1), (1, 1))),
  "strides, odd sides": (3, (7, 5), (2, 2), ((1, 1), (1, 1))),
  "padding behind": (3, (8, 7), (2, 2), ((0, 1), (0, 1))),
  "strides of single pixels": (1, (5, 5), (2, 2), "VALID"),
  "padding wider than the kernel": (1, (5, 4), (1, 1), ((1, 1), (1, 2))),
  "uneven padding": (3, (5, 4), (1, 1), ((0, 1), (0, 1))),
  "uneven strides": (5, (9, 8), (2, 1), "SAME"),
  "pixels left out": (3, (8, 8), (3, 3), "VALID"),
}


def xla(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)), **options):
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, **LAYOUT, **options)


def arrays(size, channels, side=3, dtype=np.float32, count=2):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(count, *size, channels)), rng.normal(size=(side, side, channels, 8))
  return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def value_and_gradients(function, *arguments):
  y, back = jax.vjp(function, *arguments)
  weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
  return y, back(weight.astype(y.dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("side, size, strides, padding", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementation_equals_xla(name, side, size, strides, padding, dtype):
  x, kernel = arrays(size, 4, side, dtype)
  ours = lambda x, kernel: conv2d(x, kernel, strides, padding, **LAYOUT)
  got = jax.jit(traced_for(name, lambda *xs: value_and_gradients(ours, *xs)))(x, kernel)
  assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
  wide = [a.astype(jnp.float32) for a in (x, kernel)]
  theirs = lambda *xs: xla(*xs, strides, padding)
  expected = jax.jit(lambda *xs: value_and_gradients(theirs, *xs))(*wide)
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    largest = float(jnp.abs(b).max())
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=tolerance * max(1.0, largest))


@pytest.mark.parametrize("options", [{"rhs_dilation": (2, 2)}, {"feature_group_count": 2}])
def test_other_options_are_left_to_xla(options):
  x, kernel = arrays((8, 8), 4)
  kernel = kernel[:, :, : 4 // options.get("feature_group_count", 1)]
  pads = ((1, 1), (1, 1))
  ours = conv2d(x, kernel, (1, 1), pads, **LAYOUT, **options)
  np.testing.assert_array_equal(ours, xla(x, kernel, **options))


@pytest.mark.parametrize("size, side", [((2, 2), 3), ((8, 8), 3), ((8, 8), 1)])
def test_accelerators_are_given_the_convolution_alone(size, side):
  x, kernel = arrays(size, 64, side)
  pads = ((side // 2,) * 2,) * 2

  def text(function) -> str:
    program = jax.jit(traced_for("tpu", lambda *xs: value_and_gradients(function, *xs)))
    return program.trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()

  ours = text(lambda *xs: conv2d(*xs, (1, 1), pads, **LAYOUT))
  expected = text(lambda *xs: xla(*xs, padding=pads))
  for operation in ("convolution", "dot_general", "transpose", "reverse"):
    assert ours.count(f"stablehlo.{operation}") == expected.count(f"stablehlo.{operation}")
