"""Convolution with half of the multiplications is the convolution, with its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax.kernels import winograd
from prefpaint_jax.kernels.convolution import convolve

PADS = ((1, 1), (1, 1))
LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def plain(x, kernel):
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), PADS, **LAYOUT)


def ours(x, kernel):
  return convolve(x, kernel, (1, 1), PADS, **LAYOUT)


def arrays(size, features=(32, 16), count=2, dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = (count, *size, features[0]), (3, 3, *features), (count, *size, features[1])
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(function, x, kernel, dy):
  y, back = jax.vjp(function, x, kernel)
  return y, *back(dy)


def is_winograd(x, kernel) -> bool:
  lowered = jax.jit(ours).trace(x, kernel).lower(lowering_platforms=("cpu",))
  return lowered.as_text().count("stablehlo.convolution") == 6


def test_transforms_are_exact():
  """F(4, 3) of Lavin and Gray (2016), as an identity between rationals."""
  # How every output takes every pair of a pixel and an entry of the kernel.
  found = np.einsum("ym,mk,mx->ykx", winograd.BACK, winograd.KERNEL, winograd.PIXELS)
  expected = [[[x == y + k for x in range(6)] for k in range(3)] for y in range(4)]
  np.testing.assert_allclose(found, expected, atol=1e-15)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (1, 8), (5, 12), (16, 16)])
def test_value_and_gradients_are_those_of_a_convolution_in_double(size, count):
  with jax.enable_x64(True):
    x, kernel, dy = arrays(size, count=count, dtype=np.float64)
    y, back = winograd.convolve(x, kernel), winograd.gradients(x, kernel, dy)
    expected = value_and_gradients(plain, x, kernel, dy)
  for got, want in zip((y, *back), expected, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def test_rounding_is_a_few_times_that_of_a_convolution():
  x, kernel, dy = arrays((32, 32), (64, 64))
  assert is_winograd(x, kernel)
  with jax.enable_x64(True):
    wide = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    exact = list(map(np.asarray, value_and_gradients(plain, *map(jnp.asarray, wide))))
  of = lambda function: jax.jit(lambda *xs: value_and_gradients(function, *xs))(x, kernel, dy)
  for got, theirs, want in zip(of(ours), of(plain), exact, strict=True):
    error = lambda a, want=want: np.sqrt(np.mean(np.square(np.asarray(a, np.float64) - want)))
    assert error(got) < 2e-6 * np.std(want)
    assert error(got) < 8 * error(theirs)


@pytest.mark.parametrize(
  "size, features, dtype",
  [
    ((16, 18), (32, 32), np.float32),  # half a tile
    ((8, 8), (32, 32), np.float32),  # few pixels, and few features: transforms cost what they save
    ((16, 16), (8, 32), np.float32),
    ((16, 16), (32, 4), np.float32),
    ((16, 16), (32, 32), jnp.bfloat16),  # whose rounding it would make worse
    ((16, 16), (512, 512), np.float32),  # a kernel larger than the picture has its own program
  ],
)
def test_others_are_left_alone(size, features, dtype):
  x, kernel, _ = arrays(size, features, dtype=dtype)
  assert not is_winograd(x, kernel)
