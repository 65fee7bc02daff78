"""Pairs of candidates: which are chosen, their calibrated scores, and batches that resume."""

import itertools
import math

import numpy as np
import pytest
from preference_world import write_scored

from prefpaint_jax.data.pairs import (
  Pairs,
  calibrated_scores,
  choose_pairs,
  open_pairs,
  pair_loader,
  stack_pairs,
)
from prefpaint_jax.data.preference_records import ranks
from prefpaint_jax.data.preferences import open_preferences

SCORES = np.array([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0], [0.5, 0.5, -1.0], [3.0, 1.0, 2.0]] * 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("preferences")
  return write_scored(path, SCORES, texts=("a door", "", "two doors"))


def test_all_pairs_are_those_of_a_double_loop_without_ties():
  rng = np.random.default_rng(0)
  scores = [rng.integers(0, 4, rng.integers(1, 6)).astype(float) for _ in range(20)]
  expected = [
    (prompt, i, j)
    for prompt, own in enumerate(scores)
    for i, j in itertools.permutations(range(len(own)), 2)
    if own[i] > own[j]
  ]
  assert choose_pairs([ranks(own) for own in scores], "all") == expected


def test_extremes_are_the_best_and_the_worst_candidate_of_a_prompt_without_ties():
  found = choose_pairs([ranks(own) for own in SCORES[:4]], "extremes")
  assert found == [(0, 1, 0), (2, 0, 2), (3, 0, 1)]


def test_one_candidate_is_no_pair():
  for which in ("all", "extremes"):
    assert not choose_pairs([ranks([1.0])], which)


def test_calibrated_scores_are_the_row_means_of_a_double_loop():
  scores = np.random.default_rng(0).normal(0, 3, 16)
  expected = [
    sum(1 / (1 + math.exp(b - a)) for j, b in enumerate(scores) if j != i) / (len(scores) - 1)
    for i, a in enumerate(scores)
  ]
  np.testing.assert_allclose(calibrated_scores(scores), expected, rtol=1e-12)
  np.testing.assert_allclose(calibrated_scores(scores).mean(), 0.5, rtol=1e-12)


def test_pair_has_its_candidates_in_order_and_the_gap_of_their_calibrated_scores(folder):
  preferences = open_preferences(folder, "train")
  pairs = Pairs(preferences, "extremes")
  assert len(pairs) == 4 and pairs.has_texts
  by_id = {one["id"]: one for one in preferences}
  for pair, (name, winner, loser) in zip(
    pairs, [("p0", 1, 0), ("p2", 0, 2), ("p3", 0, 1), ("p4", 1, 0)], strict=True
  ):
    one = by_id[name]
    np.testing.assert_array_equal(pair["candidates"], one["candidates"][[winner, loser]])
    np.testing.assert_array_equal(pair["masked_image"], one["masked_image"])
    np.testing.assert_array_equal(pair["mask"], one["mask"])
    assert pair["text"] == one["text"]
    gap = calibrated_scores(one["scores"])
    np.testing.assert_allclose(pair["score_gap"], gap[winner] - gap[loser], rtol=1e-6)
    assert pair["score_gap"] > 0


def test_loader_resumes_exactly_and_tokenizes_the_texts_of_its_rows(folder):
  pairs = Pairs(open_preferences(folder, "train"), "all")

  def tokenize(texts):
    ids = np.array([[len(text)] for text in texts])
    return ((ids, None), (ids + 1, np.ones_like(ids)))

  start = lambda: pair_loader(pairs, 4, seed=1, tokenize=tokenize)
  loader = start()
  next(loader)
  state, expected = loader.get_state(), next(loader)
  resumed = start()
  resumed.set_state(state)
  found = next(resumed)
  assert set(found) == {
    *("candidates", "masked_image", "mask", "score_gap"),
    *("ids_0", "ids_1", "attention_1"),
  }
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value)
  halves = [next(pair_loader(pairs, 4, 1, process, 2, tokenize)) for process in (0, 1)]
  for name, value in next(start()).items():
    np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), value)


def test_batch_of_texts_has_the_tokens_of_each_pair(folder):
  pairs = list(Pairs(open_preferences(folder, "train"), "extremes"))
  tokenize = lambda texts: ((np.array([[len(text)] for text in texts]), None),)
  batch = stack_pairs(pairs, tokenize)
  assert batch["ids_0"].tolist() == [[len(pair["text"])] for pair in pairs]
  assert "ids_0" not in stack_pairs(pairs)


def test_split_without_pairs_or_with_less_than_a_batch_is_refused_in_one_line(folder, tmp_path):
  train = open_preferences(folder, "train")
  tied = np.array([train.id(i) in ("p1", "p5") for i in range(len(train))])
  splits = {"train": train.take(tied)}
  with pytest.raises(ValueError, match=r"no two candidates .* its train split; [^\n]*\Z"):
    open_pairs(splits, "all", folder)
  with pytest.raises(ValueError, match=r"\A4 pairs are fewer than batch_size 5; [^\n]*\Z"):
    pair_loader(Pairs(train, "extremes"), 5, 0)
