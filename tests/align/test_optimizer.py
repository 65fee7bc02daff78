"""The optimiser, compared with optax and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from prefpaint_jax.align.optimizer import make_optimizer, rate_of_iteration, stochastic_round

PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8), "bias": jnp.ones(8)}


def follow(optimizer, gradients_of, updates: int):
  """Returns parameters and state after `updates` updates with `gradients_of(index)`."""

  @jax.jit
  def run(params):
    def one(carry, index):
      params, state = carry
      changes, state = optimizer.update(gradients_of(index), state, params)
      return (optax.apply_updates(params, changes), state), None

    return jax.lax.scan(one, (params, optimizer.init(params)), jnp.arange(updates))[0]

  return run(PARAMS)


def noisy(index):
  keys = jax.random.split(jax.random.key(index), 2)
  return {
    name: 0.1 + jax.random.normal(key, PARAMS[name].shape)
    for name, key in zip(PARAMS, keys, strict=True)
  }


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_reported_learning_rate_is_the_step_of_the_last_update(warmup, accumulation):
  config = ConfigDict(
    {
      "learning_rate": 0.5,
      "warmup_updates": warmup,
      "updates_per_iteration": 2,
      "gradient_accumulation": accumulation,
    }
  )
  optimizer = make_optimizer("sgd", 0.5, warmup_updates=warmup)
  state, step = optimizer.init(jnp.zeros(())), jnp.zeros(())
  for iteration in range(1, 8):
    if iteration % accumulation == 0:
      for _ in range(config.updates_per_iteration):
        step, state = optimizer.update(jnp.ones(()), state)
    assert rate_of_iteration(config, iteration) == pytest.approx(-float(step), rel=1e-6)


def test_sgd_steps_by_the_learning_rate_times_the_gradient():
  params, _ = follow(make_optimizer("sgd", 0.5), lambda _: PARAMS, 1)
  jax.tree.map(lambda p, q: np.testing.assert_allclose(p, 0.5 * q, rtol=1e-6), params, PARAMS)


def test_adamw_ignores_a_constant_factor_of_the_gradient():
  optimizer = make_optimizer("adamw", 1e-3)
  ours, _ = follow(optimizer, noisy, 5)
  scaled, _ = follow(optimizer, lambda i: jax.tree.map(lambda g: 1.4 * g, noisy(i)), 5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, scaled)


def test_learning_rate_rises_linearly_in_the_warm_up():
  optimizer = make_optimizer("sgd", 1.0, warmup_updates=4)
  constant = lambda _: jax.tree.map(jnp.ones_like, PARAMS)
  params, _ = follow(optimizer, constant, 6)
  walked = 0.25 + 0.5 + 0.75 + 1 + 1 + 1
  np.testing.assert_allclose(params["bias"], 1 - walked, rtol=1e-6)


@pytest.mark.slow
def test_stochastic_rounding_gives_a_neighbour_and_is_unbiased():
  x = jnp.array([1.001, -3.14159, 2e-20, 0.0, 5.0, jnp.inf], jnp.float32)
  draw = jax.vmap(lambda key: stochastic_round(x, key).astype(jnp.float32))
  drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)), np.float64)
  nearest = np.asarray(x.astype(jnp.bfloat16), np.float64)
  finite = np.isfinite(x)
  spacing = np.abs(nearest[finite]) * 2**-7
  error = drawn[:, finite] - np.asarray(x, np.float64)[finite]
  assert (np.abs(error) <= spacing).all()
  error = error.mean(0)
  assert (np.abs(error) <= 4 * spacing / 2 / np.sqrt(4000)).all()
  assert (drawn[:, 3] == 0).all() and (drawn[:, 4] == 5).all() and np.isinf(drawn[:, 5]).all()


@pytest.mark.slow
def test_moments_in_bfloat16_follow_moments_in_float32():
  """With rounding to nearest, the second moment would stop: it changes by 0.1 % an update."""
  whole, whole_state = follow(make_optimizer("adamw", 1e-3), noisy, 1500)
  half, half_state = follow(make_optimizer("adamw", 1e-3, moments_dtype="bfloat16"), noisy, 1500)
  moments, exact = (
    [x for x in jax.tree.leaves(state) if x.ndim] for state in (half_state, whole_state)
  )
  assert {x.dtype for x in moments} == {jnp.dtype(jnp.bfloat16)}
  for ours, theirs in zip(
    moments, (x for x in jax.tree.leaves(whole_state) if x.ndim), strict=True
  ):
    scale = np.abs(theirs).mean()
    np.testing.assert_allclose(ours.astype(jnp.float32).mean(), theirs.mean(), atol=0.02 * scale)
  travelled = np.abs(whole["kernel"] - PARAMS["kernel"]).mean()
  assert np.abs(half["kernel"] - whole["kernel"]).mean() < 0.02 * travelled


@pytest.mark.parametrize(
  "arguments", [{"name": "adam"}, {"name": "sgd", "moments_dtype": "float16"}], ids=str
)
def test_unknown_names_are_errors(arguments):
  with pytest.raises(ValueError, match="expected '"):
    make_optimizer(learning_rate=1.0, **arguments)


@pytest.mark.parametrize(("clip_norm", "factor"), [(2.5, 0.5), (6.0, 1.0), (None, 1.0)])
def test_gradients_are_scaled_to_the_largest_norm(clip_norm, factor):
  gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # of norm 5
  optimizer = make_optimizer("sgd", 1.0, clip_norm=clip_norm)
  changes, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
  for name, gradient in gradients.items():
    np.testing.assert_allclose(changes[name], -factor * gradient, rtol=1e-6)
