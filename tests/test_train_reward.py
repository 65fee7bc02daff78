"""Tests of the reward model's loss, frozen parameters and metrics, and of the whole command."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from preference_world import SMALL, collect_config, load_config, make_preferences
from scipy import stats

from prefpaint_jax import testing, train_reward
from prefpaint_jax.collect import collect
from prefpaint_jax.data.preferences import main, open_preferences, read_metadata
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.models.reward import network_shapes
from prefpaint_jax.preference import fit
from prefpaint_jax.preference.bound import mahalanobis_norm
from prefpaint_jax.reward import RewardModel
from prefpaint_jax.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_preference_loss_is_the_mean_over_ordered_pairs():
  rewards, scores = jnp.array([[1.0, 3.0, 2.0]]), jnp.array([[0.0, 1.0, 1.0]])
  valid = jnp.ones((1, 3), bool)
  loss, metrics = fit.preference_loss(rewards, scores, valid, 2.0, 0.5)
  squared = (1.0 + 4.0 + 1.0) / 3  # the last two scores tie, so they are not a pair
  pairs = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-1.0))) / 2
  np.testing.assert_allclose(metrics["train/mse"], squared, rtol=1e-6)
  np.testing.assert_allclose(metrics["train/pair_loss"], pairs, rtol=1e-6)
  np.testing.assert_allclose(loss, 2.0 * squared + 0.5 * pairs, rtol=1e-6)
  assert metrics["train/pair_accuracy"] == 1.0


def test_padding_does_not_change_the_preference_loss():
  rng = np.random.default_rng(0)
  rewards, scores = rng.normal(size=(2, 3, 4))
  valid = np.arange(4) < 3 + np.zeros((3, 1))
  changed = np.where(valid, rewards, 99.0)
  loss = lambda rewards: fit.preference_loss(rewards, scores, valid, 1.0, 1.0)[0]
  cut = fit.preference_loss(rewards[:, :3], scores[:, :3], valid[:, :3], 1.0, 1.0)[0]
  np.testing.assert_allclose(loss(changed), cut, rtol=1e-6)
  assert not np.any(jax.grad(loss)(jnp.asarray(changed))[:, 3])


def test_preference_loss_without_pairs_is_finite():
  loss, _ = fit.preference_loss(
    jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 3), bool), 1.0, 1.0
  )
  assert loss == 1.0


def test_pair_accuracy_equals_kendalls_concordance_within_prompts():
  rng = np.random.default_rng(0)
  rewards, truth = rng.normal(size=(2, 20, 5))
  expected = np.mean(
    [(stats.kendalltau(r, t)[0] + 1) / 2 for r, t in zip(rewards, truth, strict=True)]
  )
  found = fit.pair_accuracy(rewards, truth, np.ones(truth.shape, bool))
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_pair_accuracy_leaves_out_ties_and_padding():
  rewards, scores = np.array([[1.0, 2.0, 2.0, 0.0]]), np.array([[1.0, 2.0, 1.0, 9.0]])
  valid = np.array([[True, True, True, False]])
  # Pair 0-1 is right, 1-2 is a tie of the rewards, 0-2 is a tie of the scores, 3 is padding.
  assert fit.pair_accuracy(rewards, scores, valid) == 0.75
  assert np.isnan(fit.pair_accuracy(rewards, np.ones((1, 4)), valid))


@pytest.mark.parametrize(
  ("augmentation", "symmetries"), [("none", 1), ("mirror", 2), ("dihedral", 8)]
)
def test_augmentation_transforms_a_prompt_and_its_candidates_alike(augmentation, symmetries):
  rng = np.random.default_rng(2)
  masked = np.repeat(rng.integers(0, 256, (1, 4, 4, 3), np.uint8), 64, axis=0)
  candidates = np.repeat(masked[:, None], 2, axis=1)
  changed, changed_masked = fit.augment(jax.random.key(1), augmentation, candidates, masked)
  np.testing.assert_array_equal(changed[:, 0], changed_masked)
  np.testing.assert_array_equal(changed[:, 1], changed_masked)
  assert len({np.asarray(x).tobytes() for x in changed_masked}) == symmetries


@pytest.mark.parametrize(
  ("share", "free_layers", "embeddings", "projection"),
  [(0.0, {0, 1, 2, 3}, True, True), (0.5, {2, 3}, False, True), (1.0, set(), False, False)],
)
def test_frozen_share_freezes_the_first_blocks(share, free_layers, embeddings, projection):
  config = RewardConfig.from_dict({"vision": testing.TINY_VISION | {"num_hidden_layers": 4}})
  labels = flatten_dict(fit.label_params(config, share, network_shapes(config)), sep="/")
  free = {path for path, label in labels.items() if label == "trained"}
  layers = {i for i in range(4) if any(f"/layers_{i}/" in p for p in free if p[:4] == "clip")}
  assert layers == free_layers
  assert any("patch_embedding" in path for path in free) == embeddings
  assert any("visual_projection" in path for path in free) == projection
  assert all(path in free for path in labels if not path.startswith("clip"))


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
  return make_preferences(tmp_path_factory.mktemp("preferences"))


@pytest.mark.slow
def test_command_writes_a_reward_with_its_bound_and_resumes_exactly(
  tmp_path, preferences, monkeypatch, capsys
):
  config = load_config("reward", "mini", preferences=str(preferences), norm_bound=3.0, **SMALL)
  model = train_reward.train_reward(config, tmp_path / "whole")
  printed = capsys.readouterr().out
  assert "noise-free scores, all: pair accuracy" in printed
  assert (tmp_path / "whole" / "calibration.png").stat().st_size > 10_000

  loaded = RewardModel.from_pretrained(tmp_path / "whole" / "reward")
  held_out = open_preferences(preferences, "test")
  assert f"\n{len(held_out)} test prompts, " in f"\n{printed}"
  rewards, features, scores = [], [], []
  for one in held_out:
    r, z = loaded.score(one["candidates"] / 255.0, one["masked_image"][None] / 255.0)
    rewards.append(r)
    features.append(z)
    scores.append(one["scores"])
  found = json.loads((tmp_path / "whole" / "calibration.json").read_text())
  # The reported metrics equal those of the saved reward model.
  mse = np.mean((np.concatenate(rewards) - np.concatenate(scores)) ** 2)
  np.testing.assert_allclose(found["metrics"]["held_out/mse"], mse, rtol=1e-4)
  # R comes from the same candidates, and the choice of the parameters from others.
  np.testing.assert_allclose(loaded.bound.noise_scale**2, mse, rtol=1e-4)
  judged = (tmp_path / "whole" / "metrics.jsonl").read_text()
  assert '"validation/pair_accuracy"' in judged and "held_out" not in judged
  norms = mahalanobis_norm(loaded.bound.whitening, np.concatenate(features))
  reported_norm = found["calibration"]["errors"]["truth"]["norm"]["mean"]
  np.testing.assert_allclose(reported_norm, np.mean(norms), rtol=1e-4)
  assert loaded.bound.count == sum(
    len(one["scores"]) for one in open_preferences(preferences, "train")
  )
  assert found["data"] == read_metadata(preferences)
  assert loaded.bound.norm_bound == 3.0 and loaded.bound.noise_scale > 0

  class Killed(Exception):
    pass

  original = checkpoint.Checkpoints.save

  def save_then_die(self, step, *rest):
    original(self, step, *rest)
    self.close()
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "save", save_then_die)
    with pytest.raises(Killed):
      train_reward.train_reward(config, tmp_path / "killed")
  resumed = train_reward.train_reward(config, tmp_path / "killed")
  jax.tree.map(np.testing.assert_array_equal, model.params, resumed.params)
  np.testing.assert_array_equal(model.bound.chol, resumed.bound.chol)
  lines = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "killed")]
  assert lines[0] == lines[1]
  with pytest.raises(ValueError, match=r"learning_rate was 0\.001, now 0\.5"):
    config.learning_rate = 0.5
    train_reward.train_reward(config, tmp_path / "killed")


@pytest.mark.slow
def test_command_writes_a_reward_with_whitened_features(tmp_path, preferences):
  changes = {"whiten": True, "network.activation": "identity", "network.feature_dim": 8}
  config = load_config("reward", "mini", preferences=str(preferences), **SMALL | changes)
  train_reward.train_reward(config, tmp_path)
  loaded = RewardModel.from_pretrained(tmp_path / "reward")
  whole = loaded.bound.matrix / (loaded.bound.count + loaded.bound.lam)
  np.testing.assert_allclose(whole, np.eye(8), atol=1e-2)
  one = next(iter(open_preferences(preferences, "test")))
  rewards, z = loaded.score(one["candidates"] / 255.0, one["masked_image"][None] / 255.0)
  np.testing.assert_allclose(
    z @ loaded.params["mlp"]["last_layer"]["kernel"][:, 0], rewards, rtol=1e-4
  )


@pytest.mark.slow
def test_comparisons_train_a_reward_that_is_not_measured_against_another_unit(tmp_path, capsys):
  source = tmp_path / "candidates"
  collect(collect_config(tmp_path), source)
  names = [json.loads(x)["candidate"] for x in (source / "candidates.jsonl").open()]
  rng = np.random.default_rng(0)
  with (source / "pairs.jsonl").open("w") as file:
    for first, second in itertools.combinations(names, 2):
      image_id = first.rpartition("_")[0]
      if second.rpartition("_")[0] == image_id:
        pair = [first, second]
        better = [first, second, None][rng.integers(3)]
        row = {"image_id": image_id, "candidates": pair, "better": better, "annotator": "mia"}
        print(json.dumps(row), file=file)
  main(load_config("preferences", source=str(source)), tmp_path / "preferences")
  assert "Krippendorff's alpha, nominal): pairs unknown" in capsys.readouterr().out
  preferences = tmp_path / "preferences"
  config = load_config("reward", "mini", preferences=str(preferences), **SMALL)
  train_reward.train_reward(config, tmp_path / "reward")
  printed = capsys.readouterr().out
  assert "scores of pairs are not compared" in printed and "noise-free" not in printed
  found = json.loads((tmp_path / "reward" / "calibration.json").read_text())
  assert set(found["calibration"]["errors"]) == {"targets"}
  assert RewardModel.from_pretrained(tmp_path / "reward" / "reward").bound.count > 0


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"preferences": ""}, r"config\.preferences is empty"),
    ({"augmentation": "flip"}, "augmentation is 'flip'; expected one of none"),
    ({"frozen_share": 2.0}, r"frozen_share is 2\.0"),
    ({"score_weight": 0.0, "pair_weight": 0.0}, "nothing to learn"),
    ({"preferences": "nowhere"}, "nowhere: no such folder"),
    ({"whiten": True}, "whiten is True with network.activation 'gelu'.*give network.activation="),
  ],
)
def test_errors_name_the_field_in_one_line(tmp_path, change, message):
  config = load_config("reward", "mini", preferences="x")
  config.update(change)
  with pytest.raises(ValueError, match=message) as error:
    train_reward.train_reward(config, tmp_path)
  assert "\n" not in str(error.value)


def test_foreign_files_in_the_folder_of_the_reward_are_refused_at_the_start(tmp_path):
  config = load_config("reward", "mini")
  config.preferences = str(tmp_path / "never_read")
  (tmp_path / "reward").mkdir()
  (tmp_path / "reward" / "notes.txt").write_text("mine")
  (tmp_path / "config.json").write_text('{"command": "train_reward"}')
  with pytest.raises(ValueError, match=r"reward is not empty, it has notes\.txt"):
    train_reward.train_reward(config, tmp_path)
