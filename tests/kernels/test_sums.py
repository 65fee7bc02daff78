"""Sums over pixels, and the norm's multiply-add, are what numpy and autodiff say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax.kernels import sums

SHAPES = [(2, 1, 1, 3), (1, 7, 5, 4), (2, 16, 16, 8), (3, 1, 37, 2), (1, 34, 38, 1)]


def draw(*shapes):
  rng = np.random.default_rng(0)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("shape", SHAPES)
def test_pixel_sums(shape):
  a, b = draw(shape, shape)
  for got, of in zip(jax.jit(sums.pixel_sums)(a, b), (a, b), strict=True):
    np.testing.assert_allclose(got, of.astype(np.float64).sum((1, 2)), rtol=1e-5, atol=1e-4)


def test_a_large_sum_rounds_little():
  (a,) = draw((1, 256, 256, 4))
  (got, _), exact = sums.pixel_sums(a + 10, a), (a + 10).astype(np.float64).sum((1, 2))
  np.testing.assert_allclose(got, exact, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_autodiff(shape):
  B, _, _, C = shape
  x, gain, offset, dy, *of_sums = draw(shape, (B, C), (B, C), shape, (B, C), (B, C))
  wide = lambda a: a[:, None, None]
  cases = [
    (sums.moments, lambda x: (x.sum((1, 2)), jnp.square(x).sum((1, 2))), (x,), tuple(of_sums)),
    (sums.scale_and_shift, lambda x, g, o: x * wide(g) + wide(o), (x, gain, offset), dy),
  ]
  for ours, plain, arguments, gradient in cases:
    (y, back), (expected, expected_back) = jax.vjp(ours, *arguments), jax.vjp(plain, *arguments)
    got, want = (y, back(gradient)), (expected, expected_back(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, want)


def test_other_devices_add_as_ever():
  (a,) = draw((2, 16, 16, 8))
  text = lambda *platforms: (
    jax.jit(sums.pixel_sums).trace(a, a).lower(lowering_platforms=platforms).as_text()
  )
  assert text("tpu").count("stablehlo.reduce") == text("cuda").count("stablehlo.reduce") == 2
  assert "dimensions = [1, 2]" in text("tpu") and "dimensions = [1, 2]" not in text("cpu")


@pytest.mark.parametrize("shape", [(3, 3, 32, 40), (96, 96), (97, 101), (5000,), (2, 3), ()])
def test_norm(shape):
  (a,) = draw(shape)
  got = jax.jit(sums.norm)({"a": a, "b": [a, a]})
  np.testing.assert_allclose(got, np.sqrt(3.0 * np.sum(np.square(a, dtype=np.float64))), rtol=2e-6)
