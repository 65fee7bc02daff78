"""The reward fit: its loss, its closed-form last layer, and the whole command in a tiny world."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from prefpaint_jax import testing, train_reward
from prefpaint_jax.reward import RewardModel

CONFIG = Path(__file__).parent.parent / "configs" / "reward.py"


def tiny_config(policy: str):
  spec = importlib.util.spec_from_file_location("reward_config", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.update_from_flattened_dict(
    {
      "policies": (policy,),
      "size": testing.SIZE,
      "num_steps": 2,
      "num_prompts": 12,
      "held_out_prompts": 6,
      "iterations": 3,
      "warmup_iterations": 1,
      "batch_size": 4,
      "log_every": 1,
      "network.vision.hidden_size": 16,
      "network.vision.num_hidden_layers": 1,
      "network.vision.image_size": testing.SIZE,
      "network.vision.patch_size": 4,
    }
  )
  return config


def test_preference_loss_is_the_mean_over_ordered_pairs():
  rewards, scores = jnp.array([[1.0, 3.0, 2.0]]), jnp.array([[0.0, 1.0, 1.0]])
  loss, metrics = train_reward.preference_loss(rewards, scores, pair_weight=0.5)
  squared = (1.0 + 4.0 + 1.0) / 3  # the tie between the last two is no pair
  pairs = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-1.0))) / 2
  np.testing.assert_allclose(metrics["squared_error"], squared, rtol=1e-6)
  np.testing.assert_allclose(metrics["pair_loss"], pairs, rtol=1e-6)
  np.testing.assert_allclose(loss, squared + 0.5 * pairs, rtol=1e-6)
  assert metrics["accuracy"] == 1.0


def test_preference_loss_without_pairs_is_finite():
  loss, _ = train_reward.preference_loss(jnp.zeros((2, 3)), jnp.ones((2, 3)), 1.0)
  assert loss == 1.0


def test_pair_accuracy_is_kendalls_concordance_within_prompts():
  rng = np.random.default_rng(0)
  rewards, truth = rng.normal(size=(2, 20, 5))
  expected = np.mean([(stats.kendalltau(r, t)[0] + 1) / 2 for r, t in zip(rewards, truth)])  # noqa: B905
  np.testing.assert_allclose(train_reward.pair_accuracy(rewards, truth), expected, rtol=1e-12)


def test_refit_recovers_a_linear_truth():
  rng = np.random.default_rng(1)
  features, truth = rng.normal(size=(4000, 6)), rng.normal(size=6)
  targets = features @ truth + 0.1 * rng.normal(size=4000)
  w, bound = train_reward.refit(features, targets, ridge=0.5)
  np.testing.assert_allclose(w, truth, atol=0.01)
  np.testing.assert_allclose(bound.noise_scale, 0.1, rtol=0.05)
  np.testing.assert_allclose(bound.matrix, features.T @ features + 0.5 * np.eye(6), rtol=1e-12)


def test_dihedral_changes_all_pictures_of_a_prompt_alike():
  rng = np.random.default_rng(2)
  masked = rng.uniform(size=(16, 4, 4, 3))
  candidates = np.repeat(masked[:, None], 2, axis=1)
  changed, changed_masked = train_reward.dihedral(jax.random.key(0), candidates, masked)
  np.testing.assert_array_equal(changed[:, 0], changed_masked)
  np.testing.assert_array_equal(changed[:, 1], changed_masked)
  seen = {
    np.asarray(x).tobytes()
    for x in train_reward.dihedral(jax.random.key(1), np.repeat(masked[:1], 64, axis=0))[0]
  }
  assert len(seen) == 8  # the symmetries of a square


@pytest.mark.slow
def test_command_writes_a_reward_with_its_bound(tmp_path, capsys):
  testing.tiny_inpainter().save_pretrained(tmp_path / "policy")
  model = train_reward.train_reward(tiny_config(str(tmp_path / "policy")), tmp_path / "run")
  assert "held out: pair accuracy" in capsys.readouterr().out
  loaded = RewardModel.from_pretrained(tmp_path / "run" / "reward")
  assert loaded.bound.width == model.network.config.feature_dim
  images, masks = testing.tiny_prompts(2)
  masked = images * (1.0 - masks)
  reward, z = loaded.score(images, masked)
  np.testing.assert_array_equal(reward, model.score(images, masked)[0])
  w = np.asarray(loaded.params["mlp"]["last_layer"]["kernel"])[:, 0]
  np.testing.assert_allclose(reward, z @ w, rtol=1e-5, atol=1e-6)
