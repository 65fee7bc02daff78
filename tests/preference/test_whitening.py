"""Tests of whitened features against scipy and numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial import distance

from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.models.reward import Head
from prefpaint_jax.preference.bound import mahalanobis_norm, refit
from prefpaint_jax.preference.moments import Moments
from prefpaint_jax.preference.whitening import whiten

N, INPUT = 800, 512
HEADS = {"released": RewardConfig(), "small": RewardConfig(hidden_dim=32, feature_dim=8)}


@functools.partial(jax.jit, static_argnums=0)
def _apply(head, params, inputs):
  return head.apply({"params": params["mlp"]}, inputs, True)[1]


def scored(name="small", dtype=jnp.float32, constant=None):
  """Returns `features(params)` of N samples, parameters, and noisy nonlinear targets of mean 0.

  The variances of the features differ by orders of magnitude. Feature `constant` has none.
  """
  rng, config = np.random.default_rng(0), HEADS[name]
  inputs = (2.0 + rng.normal(size=(N, INPUT)) * np.geomspace(1, 0.03, INPUT)).astype(np.float32)
  widths = INPUT, config.hidden_dim, config.feature_dim
  shapes = {"layers_0": widths[:2], "layers_2": widths[1:], "last_layer": (widths[2], 1)}
  head = {
    layer: {"kernel": rng.normal(size=shape) / np.sqrt(shape[0]), "bias": rng.normal(size=shape[1])}
    for layer, shape in shapes.items()
  }
  del head["last_layer"]["bias"]
  if constant is not None:
    head["layers_2"]["kernel"][:, constant] = 0.0
  params = {"mlp": jax.tree.map(np.float32, head)}
  targets = np.sin(inputs[:, 0]) + inputs[:, 1] + 0.1 * rng.normal(size=N)
  features = lambda params: np.asarray(_apply(Head(config, dtype), params, inputs), np.float64)
  return features, params, targets - targets.mean()


@pytest.mark.parametrize("name", HEADS)
def test_v_of_whitened_features_is_a_multiple_of_the_identity(name):
  features, params, targets = scored(name)
  whitened = features(whiten(params, Moments.of(features(params), targets), jnp.float32))
  np.testing.assert_allclose(whitened.mean(0), 0, atol=1e-3)
  _, bound = refit(Moments.of(whitened, targets), 3.0)
  np.testing.assert_allclose(bound.matrix / (N + 3), np.eye(HEADS[name].feature_dim), atol=5e-3)


def test_norm_of_whitened_features_is_scipys_mahalanobis_distance():
  features, params, targets = scored()
  z = features(params)
  whitened = features(whiten(params, Moments.of(z, targets), jnp.float32))
  _, bound = refit(Moments.of(whitened, targets), 1.0)
  norms = mahalanobis_norm(bound.whitening, whitened) * np.sqrt(N + 1)
  inverse = np.linalg.inv(np.cov(z.T, bias=True))
  expected = [distance.mahalanobis(row, z.mean(0), inverse) for row in z]
  np.testing.assert_allclose(norms, expected, rtol=5e-3)


def test_reward_on_whitened_features_is_the_regression_with_an_intercept():
  features, params, targets = scored()
  z = features(params)
  whitened = features(whiten(params, Moments.of(z, targets), jnp.float32))
  w, _ = refit(Moments.of(whitened, targets), 1e-6)
  with_intercept = np.concatenate([z, np.ones((N, 1))], axis=1)
  expected = with_intercept @ np.linalg.lstsq(with_intercept, targets, rcond=None)[0]
  np.testing.assert_allclose(whitened @ w, expected, atol=1e-3)


@pytest.mark.parametrize(("dtype", "noise"), [(jnp.float32, 1e-3), (jnp.bfloat16, 0.3)])
def test_a_feature_without_variance_stays_without_variance(dtype, noise):
  features, params, targets = scored("small", dtype, constant=3)
  folded = whiten(params, Moments.of(features(params), targets), dtype)
  variances = np.linalg.eigvalsh(np.cov(features(folded).T))
  assert variances[0] < noise**2 and variances[-1] < 1.1
  assert folded["mlp"].keys() == params["mlp"].keys()
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert shapes(folded) == shapes(params)
