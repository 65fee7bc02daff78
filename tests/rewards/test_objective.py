"""Rewards by name, users' functions, and the combinations of several rewards."""

import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax import testing
from prefpaint_jax.preference.bound import Bound, save_bound
from prefpaint_jax.rewards import load_reward
from prefpaint_jax.rewards.objective import (
  Objective,
  combined,
  label_rewards,
  open_objective,
  warn_without_texts,
)
from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.runtime.weighted_names import split_names

pytestmark = pytest.mark.usefixtures("quick_compilation")

MINE = """
import jax.numpy as jnp
import numpy as np

def brightness(images, masks):
  return (images * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))

def says(images, texts):
  return texts + 0.0 * images[:, 0, 0, 0]

says.tokenize = lambda texts: np.array([len(text) for text in texts], np.float32)

def slow(images, texts):
  return [len(text) + float(image.mean()) for image, text in zip(images, texts)]

slow.host = True

def pixels(images):
  return images[:, 0, 0]

def column(images):
  return images[:, :1, 0, 0]

pixels.host = True

def broken(images):
  raise RuntimeError("no such service\\nmore")

broken.host = True

def wants(images, mood):
  return images

def reads(images, texts):
  return images

number = 3

def fails(images):
  raise RuntimeError("wrong colour\\nmore")

def one_score(images):
  return images.mean()

def long_texts(images, texts):
  return texts.sum(-1)

long_texts.tokenize = lambda texts: np.array([[len(text)] * max(map(len, texts)) for text in texts])
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
  file = tmp_path_factory.mktemp("rewards") / "mine.py"
  file.write_text(MINE)
  return file


@pytest.fixture(scope="module")
def samples():
  """Returns 6 samples of 3 prompts, the masked images and the masks."""
  images, masks = testing.tiny_prompts(3)
  rng = np.random.default_rng(0)
  filled = np.repeat(images, 2, 0) + np.repeat(masks, 2, 0) * rng.uniform(size=(6, 8, 8, 3))
  return np.clip(filled, 0, 1).astype(np.float32), images * (1 - masks), masks


@pytest.mark.parametrize("name", ["mini*1,seam", "seam,seam", "seam*2"])
def test_a_list_is_refused_where_one_reward_is_expected(name, tmp_path):
  with pytest.raises(ValueError, match=r"\Areward '[^\n]*' is a list; expected one reward here"):
    load_reward(name)
  testing.tiny_reward().save_pretrained(tmp_path / "a,b")
  assert load_reward(tmp_path / "a,b").feature_dim


def test_names_and_weights_are_split():
  assert split_names("mini") == [("mini", 1.0)]
  found = split_names("prefpaint*1, runs/a*b*0.2,my.py:f*-0.5")
  assert found == [("prefpaint", 1.0), ("runs/a*b", 0.2), ("my.py:f", -0.5)]


@pytest.mark.parametrize(
  ("names", "message"),
  [
    ("mini*", r"reward 'mini\*': the weight '' is no number; give NAME\*WEIGHT"),
    ("mini*much", "reward 'mini.much': the weight 'much' is no number"),
    ("mini*0", "reward mini: weight is 0.0; expected"),
    ("mini*nan", "reward mini: weight is nan; expected"),
    ("mini,", "reward 'mini,' has an empty name"),
    ("mini,mini*2", "reward 'mini,mini.2' has 'mini' twice"),
  ],
)
def test_bad_names_are_refused_in_one_line(names, message):
  with pytest.raises(ValueError, match=rf"\A{message}[^\n]*\Z"):
    split_names(names)


@pytest.mark.parametrize(
  ("function", "message"),
  [
    ("dark", "mine.py: has no function 'dark'"),
    ("number", "mine.py: has no function 'number'"),
    ("wants", "the parameters are images, mood; expected some of images, masked_images"),
    ("reads", "reads texts without an attribute `tokenize`"),
  ],
)
def test_bad_functions_are_refused_in_one_line(mine, function, message):
  with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
    load_reward(f"{mine}:{function}")


def test_files_that_cannot_be_run_are_refused_in_one_line(tmp_path):
  (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
  with pytest.raises(ValueError, match=r"\Areward [^\n]*bad.py: cannot be run \(ModuleNotFound"):
    load_reward(f"{tmp_path}/bad.py:f")
  with pytest.raises(ValueError, match=r"\Areward [^\n]*none.py: no such file; give"):
    load_reward(f"{tmp_path}/none.py:f")


def test_functions_of_users_score_each_sample(mine, samples):
  images, known, masks = samples
  own = np.repeat(masks, 2, 0)
  expected = (images * own).sum((1, 2, 3)) / own.sum((1, 2, 3))
  scores = load_reward(f"{mine}:brightness")(images, known, masks)
  np.testing.assert_allclose(scores, expected, rtol=1e-5)
  texts = ["a", "", "abc"]
  np.testing.assert_allclose(
    load_reward(f"{mine}:says")(images, known, masks, texts), [1, 1, 0, 0, 3, 3]
  )
  expected = images.mean((1, 2, 3)) + np.array([1, 1, 0, 0, 3, 3])
  np.testing.assert_allclose(
    load_reward(f"{mine}:slow")(images, known, masks, texts), expected, rtol=1e-5
  )


def test_failures_of_functions_are_one_line(mine, samples):
  with pytest.raises(
    ValueError, match=r"\Areward broken: failed with RuntimeError: no such service\Z"
  ):
    load_reward(f"{mine}:broken")(*samples)
  with pytest.raises(
    ValueError, match=r"\Areward pixels: returned an array of \[6, 3\]; expected \[6\]"
  ):
    load_reward(f"{mine}:pixels")(*samples)
  with pytest.raises(
    ValueError, match=r"\Areward column: returned an array of \[6, 1\]; expected \[6\]"
  ):
    load_reward(f"{mine}:column")(*samples)


@pytest.mark.parametrize(
  ("function", "message"),
  [
    ("fails", "failed with RuntimeError: wrong colour"),
    ("one_score", r"returned an array of \[\]; expected \[6\], a score for each sample"),
    ("long_texts", r"tokenize makes .* of 3 texts; expected a row for each text, of a shape"),
  ],
)
def test_failures_of_compiled_functions_are_one_line(mine, samples, function, message):
  with pytest.raises(ValueError, match=rf"\Areward {function}: {message}[^\n]*\Z"):
    load_reward(f"{mine}:{function}")(*samples, ["a", "bc", "d"])


def test_mini_reward_equals_the_reward_model(samples):
  from prefpaint_jax import RewardModel

  images, known, _ = samples
  expected = RewardModel.from_pretrained("mini").score(images, known)
  found = load_reward("mini").score(images, known)
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_rewards_that_read_texts_warn_where_there_are_none(mine, capsys):
  rewards = [load_reward(f"{mine}:{name}") for name in ("brightness", "says", "slow")]
  warn_without_texts(rewards, True, "runs/a")
  assert not capsys.readouterr().err
  warn_without_texts(rewards, False, "runs/a")
  expected = "runs/a has no texts: the reward says reads the empty text\n"
  assert capsys.readouterr().err == expected


def test_combinations_equal_their_definitions():
  rng, S = np.random.default_rng(0), 4
  scores = [rng.normal(size=12).astype(np.float32), 100 * rng.normal(size=12).astype(np.float32)]
  scores[0][1] = scores[0][0]  # a tie
  valid = np.ones(12, bool)
  valid[5] = False
  found = {}
  for combine in ("sum", "gdpo", "winrate"):
    objective = Objective((Reward("a", len), Reward("b", len)), (2.0, 0.5), combine)
    found[combine] = np.asarray(combined(objective, [jnp.asarray(x) for x in scores], valid, S))
  np.testing.assert_allclose(found["sum"], 2 * scores[0] + 0.5 * scores[1], rtol=1e-6)
  for i in range(12):
    group = [j for j in range(i // S * S, i // S * S + S) if valid[j]]
    if not valid[i]:
      continue
    gdpo, wins = 0.0, 0.0
    for weight, score in zip((2.0, 0.5), scores, strict=True):
      values = score[group].astype(np.float64)
      gdpo += weight * (score[i] - values.mean()) / (values.std(ddof=1) + 1e-4)
      others = [j for j in group if j != i]
      beaten = [(score[i] > score[j]) + 0.5 * (score[i] == score[j]) for j in others]
      wins += weight * np.mean(beaten)
    assert found["gdpo"][i] == pytest.approx(gdpo, abs=1e-4)
    assert found["winrate"][i] == pytest.approx(wins, abs=1e-6)


def test_objective_of_one_sample_per_prompt_compares_the_batch():
  objective = Objective((Reward("a", len),), (1.0,), "winrate")
  found = combined(objective, [jnp.array([3.0, 1.0, 2.0])], np.ones(3, bool), 1)
  np.testing.assert_allclose(found, [1.0, 0.0, 0.5])


def test_labels_are_short_and_unique():
  names = ["runs/a/reward", "runs/b/reward", "x/reward.pt", "seam", "hub/mini", "mini"]
  labels = ["a/reward", "b/reward", "reward.pt", "seam", "mini"]
  assert label_rewards(names[:5]) == labels
  assert len(set(label_rewards([*names, "seam@x", "a.py:f", "b.py:f"]))) == 9
  assert label_rewards(["seam@x/y", "a/b.py:f", "c.py:f"]) == ["seam", "f", "c.py:f"]


def test_bound_is_that_of_the_first_learned_reward(mine, tmp_path):
  bound = Bound.fit(np.eye(64, dtype=np.float32), lam=1.0)
  save_bound(bound, tmp_path)
  objective = open_objective("seam,mini*2", bound=str(tmp_path / "bound.safetensors"))
  assert objective.trusted.name == "mini"
  np.testing.assert_array_equal(objective.trusted.bound.whitening, bound.whitening)
  objective = open_objective(f"{mine}:brightness,mini*2", "gdpo")
  assert [reward.name for reward in objective.rewards] == ["brightness", "mini"]
  assert objective.trusted.name == "mini" and objective.trusted.bound is not None
