"""Every implementation of the dense product against numpy, in value and gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax.kernels.dense import HALVES, IMPLEMENTATIONS, Dense, DenseHalves
from prefpaint_jax.kernels.dispatch import implementation


def draw(*shapes, dtype=np.float32):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("leading", [(), (5,), (3, 7), (2, 4, 3)])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementation_equals_numpy(name, leading, dtype):
  x, kernel, dy = draw((*leading, 6), (6, 9), (*leading, 9), dtype=dtype)
  y, back = jax.vjp(IMPLEMENTATIONS[name], x, kernel)
  got = y, *back(dy)
  assert {a.dtype for a in got} == {jnp.dtype(dtype)}
  x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
  dkernel = x.reshape(-1, 6).T @ dy.reshape(-1, 9)
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  for ours, expected in zip(got, (x @ kernel, dy @ kernel.T, dkernel), strict=True):
    ours = np.asarray(ours, np.float64)
    np.testing.assert_allclose(ours, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_layer_equals_flax(use_bias):
  (x,) = draw((3, 4, 6))
  ours, theirs = Dense(5, use_bias=use_bias), nn.Dense(5, use_bias=use_bias)
  params = ours.init(jax.random.key(0), x)
  expected = theirs.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  np.testing.assert_array_equal(ours.apply(params, x), theirs.apply(params, x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("leading", [(5,), (2, 4, 3)])
@pytest.mark.parametrize("name", HALVES)
def test_halves_equal_those_of_a_dense_layer_of_flax(name, leading, dtype):
  x, *dys = draw((*leading, 6), (*leading, 5), (*leading, 5))
  ours, theirs = DenseHalves(5, dtype), nn.Dense(10, dtype=dtype)
  params = ours.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(0), x))
  params = jax.tree.map(lambda p: p + 0.1, params)  # a bias that is not zero
  split = lambda params, x: jnp.split(theirs.apply(params, x), 2, -1)

  def value_and_gradients(function):
    halves, back = jax.vjp(function, params, x)
    return halves, back([dy.astype(dtype) for dy in dys])

  with implementation(name):
    got = value_and_gradients(ours.apply)
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2

  def close(a, b):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

  jax.tree.map(close, got, value_and_gradients(split))
