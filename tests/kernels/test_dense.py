"""Products and their gradients are those of numpy, and other devices' programs are XLA's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax.kernels.dense import Dense, product, product_of_rows


def draw(*shapes, dtype=np.float32):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("leading", [(), (5,), (3, 7), (2, 4, 3)])
def test_product_and_gradients(leading, dtype):
  x, kernel, dy = draw((*leading, 6), (6, 9), (*leading, 9), dtype=dtype)
  y, back = jax.vjp(product, x, kernel)
  got = y, *back(dy)
  assert {a.dtype for a in got} == {jnp.dtype(dtype)}
  x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
  dkernel = x.reshape(-1, 6).T @ dy.reshape(-1, 9)
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  for ours, expected in zip(got, (x @ kernel, dy @ kernel.T, dkernel), strict=True):
    ours = np.asarray(ours, np.float64)
    np.testing.assert_allclose(ours, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
  ("shape", "turned"),
  [((12, 6, 9), False), ((200, 6, 9), False), ((12, 9, 6), False), ((200, 9, 6), True)],
)
def test_product_of_rows_whichever_factor_is_turned(shape, turned):
  rows, features, out = shape
  x, dy = draw((rows, features), (rows, out))
  expected = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
  x, dy = x.reshape(2, -1, features), dy.reshape(2, -1, out)
  assert ("optimization_barrier" in jax.jit(product_of_rows).lower(x, dy).as_text()) == turned
  got = jax.jit(product_of_rows)(x, dy)
  np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_is_that_of_flax(use_bias):
  (x,) = draw((3, 4, 6))
  ours, theirs = Dense(5, use_bias=use_bias), nn.Dense(5, use_bias=use_bias)
  params = ours.init(jax.random.key(0), x)
  expected = theirs.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  np.testing.assert_array_equal(ours.apply(params, x), theirs.apply(params, x))


def test_other_devices_are_given_what_xla_makes_of_it():
  x, kernel = draw((3, 4, 6), (6, 9))

  def text(function, platform: str) -> str:
    gradient = jax.jit(jax.grad(lambda *xs: jnp.sin(function(*xs)).sum(), (0, 1)))
    return gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

  for platform in ("tpu", "cuda"):
    ours, expected = text(product, platform), text(jnp.dot, platform)
    for operation in ("dot_general", "transpose", "reshape"):
      assert ours.count(f"stablehlo.{operation}") == expected.count(f"stablehlo.{operation}")
