"""Activations are their closed forms, far from zero too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from prefpaint_jax.models import blocks

X = np.concatenate([np.linspace(-12, 12, 101), [-1e4, -100, 100, 1e4]])


@pytest.mark.parametrize(
  "function, value, derivative",
  [
    (
      blocks.silu,
      X * special.expit(X),
      special.expit(X) * (1 + X * (1 - special.expit(X))),
    ),
    (blocks.gelu, X * stats.norm.cdf(X), stats.norm.cdf(X) + X * stats.norm.pdf(X)),
  ],
  ids=["silu", "gelu"],
)
def test_activations_and_their_derivatives(function, value, derivative):
  y, back = jax.vjp(jax.jit(function), jnp.asarray(X, jnp.float32))
  np.testing.assert_allclose(y, value, rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(back(jnp.ones_like(y))[0], derivative, rtol=2e-6, atol=2e-6)
  low = jnp.asarray(X, jnp.bfloat16)
  assert function(low).dtype == jnp.bfloat16
