"""Advantages, PPO loss and timestep draws, compared with torch, numpy and numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax.align import ppo

ALL = np.ones(12, bool)


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch", reason="parity needs torch: pip install torch")


def rewards(count=12, seed=0):
  return np.random.default_rng(seed).normal(3.0, 2.0, count).astype(np.float32)


def test_batch_advantages_equal_the_released_arithmetic(torch):
  r = rewards()
  t = torch.tensor(r)
  expected = torch.clamp((t - t.mean()) / (t.std(unbiased=True) + 1e-7), -10, 10)
  ours = jax.jit(ppo.standardise)(r, ALL)
  np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_group_size_one_ignores_std():
  for std in ("batch", "group"):
    np.testing.assert_array_equal(
      ppo.standardise(rewards(), ALL, 1, std), ppo.standardise(rewards(), ALL)
    )


def test_group_advantages_equal_torch(torch):
  r = rewards()
  groups = torch.tensor(r).reshape(3, 4)
  centred = groups - groups.mean(1, keepdim=True)
  by_group = centred / (groups.std(1, unbiased=True, keepdim=True) + 1e-7)
  # The mean of the groups' unbiased variances.
  by_batch = centred / (groups.var(1, unbiased=True).mean().sqrt() + 1e-7)
  ours = ppo.standardise(r, ALL, 4, "group")
  np.testing.assert_allclose(ours, by_group.reshape(-1).numpy(), rtol=1e-5, atol=1e-6)
  ours = ppo.standardise(r, ALL, 4, "batch")
  np.testing.assert_allclose(ours, by_batch.reshape(-1).numpy(), rtol=1e-5, atol=1e-6)


def test_advantages_by_hand():
  ours = ppo.standardise(
    jnp.array([1.0, 2.0, 3.0, 10.0, 10.0, 16.0]), jnp.ones(6, bool), 3, "group"
  )
  # Groups [1, 2, 3] with deviation 1, and [10, 10, 16] with mean 12 and deviation sqrt(12).
  root = np.sqrt(12)
  np.testing.assert_allclose(ours, [-1, 0, 1, -2 / root, -2 / root, 4 / root], rtol=1e-5, atol=1e-6)


def test_advantages_are_clipped():
  r = np.zeros(200, np.float32)
  r[7] = 1.0  # (n − 1) / sqrt(n) = 14.07 deviations above the mean
  ours = ppo.standardise(r, np.ones(200, bool))
  assert ours[7] == 10.0
  assert ppo.standardise(r, np.ones(200, bool), clip=20.0)[7] == pytest.approx(14.07, abs=0.01)
  assert ppo.standardise(-r, np.ones(200, bool), clip=3.0)[7] == -3.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_invalid_samples_get_zero_and_are_left_out_of_every_statistic(bad):
  r, valid = rewards(), ALL.copy()
  valid[[2, 9]] = False
  r[[2, 9]] = bad
  ours = np.asarray(ppo.standardise(r, valid))
  np.testing.assert_allclose(
    ours[valid], ppo.standardise(r[valid], np.ones(10, bool)), rtol=1e-5, atol=1e-6
  )
  assert not ours[~valid].any()
  for std in ("group", "batch"):
    grouped = np.asarray(ppo.standardise(r, valid, 4, std))
    assert np.isfinite(grouped).all() and not grouped[~valid].any()
    groups = [r[i : i + 4][valid[i : i + 4]] for i in (0, 4, 8)]
    centred = [group - group.mean() for group in groups]
    if std == "group":
      expected = [c / np.std(g, ddof=1) for c, g in zip(centred, groups, strict=True)]
    else:
      pooled = sum((c**2).sum() for c in centred) / sum(len(c) - 1 for c in centred)
      expected = [c / np.sqrt(pooled) for c in centred]
    np.testing.assert_allclose(grouped[valid], np.concatenate(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group_size", [2, 8])
def test_pooled_deviation_is_unbiased(group_size):
  """Advantages then have the mean square (S − 1) / S, that of rewards minus their group's mean."""
  r = np.random.default_rng(0).normal(size=4096).astype(np.float32)
  ours = np.asarray(ppo.standardise(r, np.ones(4096, bool), group_size))
  assert np.mean(ours**2) == pytest.approx((group_size - 1) / group_size, rel=1e-5)


@pytest.mark.parametrize("std", ["batch", "group"])
@pytest.mark.parametrize("outlier", [1e10, 1e19, -1e25, 3e38])
def test_reward_beyond_the_largest_counts_as_not_finite(outlier, std):
  r = rewards()
  r[3] = outlier
  for group_size in (1, 4):
    expected = ppo.standardise(rewards(), np.arange(12) != 3, group_size, std)
    ours = np.asarray(ppo.standardise(r, ALL, group_size, std))
    np.testing.assert_array_equal(ours, expected)
    assert np.count_nonzero(ours) == 11


def test_rewards_up_to_the_largest_have_finite_advantages():
  r = np.float32(ppo.LARGEST_REWARD) * np.linspace(-1, 1, 12, dtype=np.float32)
  for group_size, std in ((1, "batch"), (4, "batch"), (4, "group")):
    ours = ppo.standardise(r, ALL, group_size, std)
    expected = ppo.standardise(r / np.float32(ppo.LARGEST_REWARD), ALL, group_size, std)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_nan_reward_is_never_valid():
  r = rewards()
  r[3] = np.nan
  np.testing.assert_array_equal(ppo.standardise(r, ALL), ppo.standardise(r, np.arange(12) != 3))


@pytest.mark.parametrize("group_size, std", [(1, "batch"), (4, "group"), (4, "batch")])
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.3])
def test_batches_of_equal_rewards_or_one_sample_give_zero(group_size, std, value):
  equal = np.full(12, value, np.float32)
  one = np.arange(12) == 5
  for valid in (ALL, one, np.zeros(12, bool)):
    ours = ppo.standardise(equal, valid, group_size, std)
    np.testing.assert_array_equal(ours, np.zeros(12))
  np.testing.assert_array_equal(ppo.standardise(rewards(), one, group_size, std), np.zeros(12))


def test_wrong_group_size_or_std_is_an_error():
  with pytest.raises(ValueError, match=r"group_size is 5; expected a divisor of .* 12 rewards"):
    ppo.standardise(rewards(), ALL, 5)
  with pytest.raises(ValueError, match="std is 'prompt'"):
    ppo.standardise(rewards(), ALL, 4, "prompt")


def loss_inputs(seed=0, count=16, spread=0.3):
  rng = np.random.default_rng(seed)
  old = rng.normal(-1, 0.2, count)
  return old + rng.normal(0, spread, count), old, rng.normal(0, 1, count), rng.uniform(1, 2, count)


def test_ppo_loss_by_hand():
  # Columns: A > 0 within the range, A > 0 with ρ above it, A < 0 with ρ below it, and A < 0 with ρ
  # above it, where the maximum takes the unclipped term.
  ratio = np.array([1.05, 1.5, 0.5, 1.5])
  advantages = np.array([2.0, 2.0, -1.0, -1.0])
  weights = np.array([1.0, 3.0, 2.0, 0.5])
  loss, metrics = ppo.ppo_loss(jnp.log(ratio), jnp.zeros(4), advantages, weights, 0.1)
  np.testing.assert_allclose(loss, [-2.1, -6.6, 1.8, 0.75], rtol=1e-5)
  np.testing.assert_array_equal(metrics["clipped"], [0, 1, 1, 1])
  np.testing.assert_allclose(metrics["ratio"], ratio, rtol=1e-6)
  np.testing.assert_allclose(metrics["approx_kl"], ratio - 1 - np.log(ratio), rtol=1e-4)


def test_ppo_loss_at_equal_policies_is_minus_the_weighted_advantage():
  _, old, advantages, weights = map(jnp.float32, loss_inputs())
  loss, metrics = ppo.ppo_loss(old, old, advantages, weights, 1e-4)
  np.testing.assert_allclose(loss, -advantages * weights, rtol=1e-6)
  assert not np.any(metrics["clipped"]) and not np.any(metrics["approx_kl"])
  gradient = jax.grad(lambda new: ppo.ppo_loss(new, old, advantages, weights, 1e-4)[0].sum())(old)
  np.testing.assert_allclose(gradient, -advantages * weights, rtol=1e-6)


@pytest.mark.parametrize("clip_range, spread", [(0.2, 0.3), (1e-4, 1e-4)])
def test_ppo_loss_and_gradient_equal_torch_and_finite_differences(torch, clip_range, spread):
  new, old, advantages, weights = loss_inputs(spread=spread)
  with jax.enable_x64():
    total = lambda new: ppo.ppo_loss(new, old, advantages, weights, clip_range)[0].sum()
    loss, metrics = ppo.ppo_loss(*map(jnp.array, (new, old, advantages, weights)), clip_range)
    gradient = np.asarray(jax.grad(total)(jnp.array(new)))
    small = 1e-8 * np.eye(len(new))
    differences = [(total(new + h) - total(new - h)) / 2e-8 for h in small]
  assert 0 < metrics["clipped"].sum() < len(new)

  t = torch.tensor(new, requires_grad=True)
  a = torch.tensor(advantages)
  ratio = torch.exp(t - torch.tensor(old))
  clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
  expected = torch.tensor(weights) * torch.maximum(-a * ratio, -a * clipped)
  expected.sum().backward()
  np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-12)
  np.testing.assert_allclose(gradient, t.grad.numpy(), rtol=1e-10)
  np.testing.assert_allclose(gradient, differences, rtol=1e-5, atol=1e-5)


def test_approx_kl_keeps_its_digits_near_ratio_one():
  log_prob, old, one = (np.float32([x]) for x in (1e-3, 0, 1))
  _, metrics = ppo.ppo_loss(log_prob, old, one, one, 1e-4)
  assert metrics["approx_kl"][0] == pytest.approx(np.expm1(1e-3) - 1e-3, rel=1e-3)


def test_invalid_samples_of_nan_change_neither_loss_nor_gradient():
  inputs = [np.array(x, np.float32) for x in loss_inputs()]
  valid = np.arange(16) % 4 != 1
  clean = [x[valid] for x in inputs]
  for x in inputs:
    x[~valid] = np.nan

  def mean_loss(new, old, advantages, weights, valid):
    loss, _ = ppo.ppo_loss(new, old, advantages, weights, 0.2, valid)
    return ppo.masked_mean(loss, valid)

  value, gradient = jax.value_and_grad(mean_loss)(*inputs, valid)
  expected, expected_gradient = jax.value_and_grad(mean_loss)(*clean, np.ones(12, bool))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient[valid], expected_gradient, rtol=1e-5)
  assert not np.any(gradient[~valid])


def test_timesteps_are_drawn_without_replacement_from_the_whole_range():
  keys = jax.random.split(jax.random.key(0), 200)
  draws = np.asarray(jax.vmap(lambda key: ppo.draw_timesteps(key, 10, 4, first=1, last=8))(keys))
  assert draws.shape == (200, 4) and draws.dtype == np.int32
  assert all(len(set(row)) == 4 for row in draws.tolist())
  counts = np.bincount(draws.ravel(), minlength=10)
  assert not counts[[0, 8, 9]].any()
  # A draw has each of the 7 steps with probability 4/7; the tolerance is 4 standard deviations.
  np.testing.assert_allclose(counts[1:8], 200 * 4 / 7, atol=4 * np.sqrt(200 * 12 / 49))
  everything = ppo.draw_timesteps(jax.random.key(1), 6, 6)
  assert sorted(everything.tolist()) == list(range(6))


def test_impossible_draws_are_errors():
  with pytest.raises(ValueError, match="k is 5; expected 1 to 4"):
    ppo.draw_timesteps(jax.random.key(0), 10, 5, first=2, last=6)
  with pytest.raises(ValueError, match="rollout of 10 steps"):
    ppo.draw_timesteps(jax.random.key(0), 10, 1, last=11)


def test_masked_mean_ignores_invalid_values():
  values = jnp.array([[1.0, np.nan, 5.0], [2.0, np.inf, 4.0]])
  assert ppo.masked_mean(values, jnp.array([True, False, True])) == 3.0
  assert ppo.masked_mean(values, jnp.zeros(3, bool)) == 0.0
