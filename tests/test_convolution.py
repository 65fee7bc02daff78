"""Convolution by a product is the convolution, with its gradients, and only where it pays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax.models.convolution import convolve

LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def plain(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1))):
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, **LAYOUT)


def arrays(size, channels, side=3, dtype=np.float32):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, *size, channels)), rng.normal(size=(side, side, channels, 8))
  return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def value_and_gradients(function, *arguments):
  y, back = jax.vjp(function, *arguments)
  return y, back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


def products(function, *arguments) -> bool:
  return "platform_index" in str(jax.make_jaxpr(function)(*arguments))


@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("size", [(2, 2), (1, 3)])
def test_large_kernels_give_what_a_convolution_gives(size, side, monkeypatch):
  monkeypatch.setattr("prefpaint_jax.models.convolution.LARGE", 0)
  x, kernel = arrays(size, 64, side)
  pads = ((side // 2,) * 2,) * 2
  ours = lambda x, kernel: convolve(x, kernel, (1, 1), pads, **LAYOUT)
  assert products(ours, x, kernel)
  expected = value_and_gradients(lambda x, kernel: plain(x, kernel, padding=pads), x, kernel)
  got = jax.jit(lambda *xs: value_and_gradients(ours, *xs))(x, kernel)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_bfloat16_stays_bfloat16():
  x, kernel = arrays((2, 2), 64, dtype=jnp.bfloat16)
  ours = lambda x, kernel: convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), **LAYOUT)
  got = value_and_gradients(ours, x, kernel)
  assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
  wide = value_and_gradients(plain, x.astype(jnp.float32), kernel.astype(jnp.float32))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wide), strict=True):
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.02, atol=0.02 * jnp.abs(b).max())


PADS = ((1, 1), (1, 1))
OTHERS = {
  "large picture": ((16, 16), (1, 1), PADS),
  "strides": ((2, 2), (2, 2), PADS),
  "padding": ((2, 2), (1, 1), ((0, 1), (0, 1))),
}


@pytest.mark.parametrize("size, strides, padding", OTHERS.values(), ids=OTHERS)
def test_all_else_is_left_to_xla(size, strides, padding):
  x, kernel = arrays(size, 64)
  ours = lambda x, kernel: convolve(x, kernel, strides, padding, **LAYOUT)
  assert not products(ours, x, kernel)
  np.testing.assert_array_equal(ours(x, kernel), plain(x, kernel, strides, padding))


def test_other_devices_are_given_the_convolution_alone():
  x, kernel = arrays((2, 2), 64)
  ours = jax.jit(lambda x, kernel: convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), **LAYOUT))
  text = ours.trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
  assert "stablehlo.convolution" in text and "dot_general" not in text
