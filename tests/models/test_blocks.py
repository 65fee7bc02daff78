"""Activations and norms are their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from prefpaint_jax.kernels import activations, group_norm, sums
from prefpaint_jax.models import blocks

X = np.concatenate([np.linspace(-12, 12, 101), [-1e4, -100, 100, 1e4]])


@pytest.mark.parametrize(
  "function, value, derivative",
  [
    (
      activations.silu,
      X * special.expit(X),
      special.expit(X) * (1 + X * (1 - special.expit(X))),
    ),
    (activations.gelu, X * stats.norm.cdf(X), stats.norm.cdf(X) + X * stats.norm.pdf(X)),
  ],
  ids=["silu", "gelu"],
)
def test_activations_and_their_derivatives(function, value, derivative):
  y, back = jax.vjp(jax.jit(function), jnp.asarray(X, jnp.float32))
  np.testing.assert_allclose(y, value, rtol=2e-6, atol=2e-6)
  np.testing.assert_allclose(back(jnp.ones_like(y))[0], derivative, rtol=2e-6, atol=2e-6)
  low = jnp.asarray(X, jnp.bfloat16)
  assert function(low).dtype == jnp.bfloat16


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_gated_unit_and_its_gradients(platform, monkeypatch):
  monkeypatch.setattr(activations, "by_platform", lambda *xs, **functions: functions[platform](*xs))
  hidden, gate, dy = X[::-1] / 50, X, np.cos(X)
  gelu, slope = gate * stats.norm.cdf(gate), stats.norm.cdf(gate) + gate * stats.norm.pdf(gate)
  y, back = jax.vjp(activations.gated, *(jnp.asarray(x, jnp.float32) for x in (hidden, gate)))
  results = y, *back(jnp.asarray(dy, jnp.float32))
  for found, expected in zip(results, (hidden * gelu, dy * gelu, dy * hidden * slope), strict=True):
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-5)
  low = jnp.asarray(X, jnp.bfloat16)
  y, back = jax.vjp(activations.gated, low, low)
  assert {x.dtype for x in (y, *back(y))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("products", [True, False])
def test_norm_and_its_gradients_are_the_formula_by_products_and_by_sums(products, monkeypatch):
  B, H, W, C, G = 2, 4, 6, 12, 3
  rng = np.random.default_rng(0)
  x, dy = (jnp.asarray(rng.normal(size=(B, H, W, C)), jnp.float32) for _ in range(2))
  params = {name: jnp.asarray(rng.normal(size=C), jnp.float32) for name in ("scale", "bias")}

  def formula(params, x):
    grouped = x.reshape(B, H, W, G, C // G)
    mean, variance = (f((1, 2, 4), keepdims=True) for f in (grouped.mean, grouped.var))
    normal = ((grouped - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape)
    return normal * params["scale"] + params["bias"]

  def branch(*xs, default, cpu=None, cuda=None):
    return ((cpu if products else cuda) or default)(*xs)

  for module in (group_norm, sums):
    monkeypatch.setattr(module, "by_platform", branch)
  norm = lambda params, x: blocks.GroupNorm(G, 1e-5).apply({"params": params}, x)
  results = []
  for function in (norm, formula):
    y, back = jax.vjp(function, params, x)
    results.append((y, back(dy)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *results)
