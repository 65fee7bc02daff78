"""Every implementation of the group norm against a direct formula, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax.kernels.group_norm import IMPLEMENTATIONS, Norm

pytestmark = pytest.mark.usefixtures("quick_compilation")


def formula(norm: Norm, x, scale, bias):
  B, H, W, C = x.shape
  grouped = x.astype(jnp.float32).reshape(B, H, W, norm.groups, C // norm.groups)
  mean, variance = (f((1, 2, 4), keepdims=True) for f in (grouped.mean, grouped.var))
  y = ((grouped - mean) / jnp.sqrt(variance + norm.epsilon)).reshape(x.shape) * scale + bias
  return y * jax.nn.sigmoid(y) if norm.silu else y


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
  "shape, groups", [((2, 4, 6, 12), 3), ((1, 5, 7, 8), 8), ((3, 1, 1, 4), 1)]
)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementation_equals_the_formula(name, shape, groups, silu, dtype):
  rng = np.random.default_rng(0)
  norm = Norm(groups, 1e-5, silu)
  x, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
  scale, bias = (jnp.asarray(rng.normal(size=shape[-1]), jnp.float32) for _ in range(2))
  x = x.astype(dtype)
  results = []
  for function in (IMPLEMENTATIONS[name], formula):

    def both(*xs, f=function):
      y, back = jax.vjp(lambda *xs: f(norm, *xs), *xs)
      return y, *back(dy)

    results.append(jax.jit(both)(x, scale, bias))
  assert [a.dtype for a in results[0]] == [jnp.float32, dtype, jnp.float32, jnp.float32]
  tolerance = 2e-5 if dtype == jnp.float32 else 1e-2
  for ours, expected in zip(*results, strict=True):
    ours, expected = (np.asarray(a, np.float32) for a in (ours, expected))
    np.testing.assert_allclose(ours, expected, atol=tolerance * max(1, np.abs(expected).max()))
