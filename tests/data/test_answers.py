"""Answers: corrections, repeats, comparisons and their Bradley-Terry scores, and their errors."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from test_annotations import errors_of, rating, write_candidates_folder, write_lines

from prefpaint_jax.data import annotations, comparisons
from prefpaint_jax.data.annotation_files import read_candidates, read_prompts
from prefpaint_jax.data.answers import Answer, read_answers
from prefpaint_jax.data.preference_records import build_preferences, summary
from prefpaint_jax.data.preferences import open_preferences, read_metadata


def comparison(image_id, first, second, better, annotator="mia", **marks):
  name = lambda k: f"{image_id}_{k}"
  row = {"image_id": image_id, "candidates": [name(first), name(second)], "annotator": annotator}
  return row | {"better": None if better is None else name(better)} | marks


def write_pairs_folder(folder, names, rows):
  write_candidates_folder(folder, names, [])
  (folder / "annotations.jsonl").unlink()
  write_lines(folder / "pairs.jsonl", rows)
  return folder


def scores_of(folder):
  read = annotations.read_annotations(folder)
  return {c.name: c.score for prompt in read.prompts for c in prompt.candidates}


# ---------------------------------------------------------------------- corrections and repeats


def test_a_correction_replaces_its_line_and_a_repeat_is_left_out_of_the_scores(tmp_path):
  rows = [
    rating("a", 0, "mia", 1, 1, 1),
    rating("a", 0, "leo", 3, 3, 3) | {"corrects": False, "seconds": 4.5},
    rating("a", 0, "mia", 7, 7, 7) | {"repeat": True},
    rating("a", 0, "mia", 5, 5, 5) | {"corrects": True},
    rating("a", 0, "mia", 6, 6, 6) | {"repeat": True, "corrects": True},
    rating("a", 0, "mia", 2, 2, 2) | {"corrects": True},
    rating("a", 0, "mia", 4, 4, 4) | {"repeat": True},  # a second repeat is a repeat as well
  ]
  folder = write_candidates_folder(tmp_path, {"a": 1}, rows)
  read = annotations.read_annotations(folder)
  assert read.prompts[0].candidates[0].score == pytest.approx((2 + 3) / 2)
  assert read.prompts[0].candidates[0].annotators == read.annotators == 2
  errors = []
  prompts = read_prompts(folder, errors)
  answers = read_answers(folder, prompts, read_candidates(folder, prompts, errors), errors)
  assert [(x.annotator, x.values[0], x.repeat, x.seconds) for x in answers] == [
    ("mia", 2, False, None),
    ("leo", 3, False, 4.5),
    ("mia", 6, True, None),
    ("mia", 4, True, None),
  ]
  assert not errors


def test_errors_of_marks_name_their_line(tmp_path):
  rows = [
    rating("a", 0, "mia", 1, 1, 1),
    rating("a", 0, "mia", 2, 2, 2),
    rating("a", 0, "leo", 2, 2, 2) | {"corrects": True},
    rating("a", 0, "leo", 2, 2, 2) | {"corrects": 1},
    rating("a", 0, "leo", 2, 2, 2) | {"repeat": "yes", "seconds": -1},
    rating("a", 0, "leo", 2, 2, 2) | {"seconds": math.nan},
  ]
  at = "annotations.jsonl"
  assert errors_of(write_candidates_folder(tmp_path, {"a": 1}, rows)) == [
    f"{at}:2: 'mia' already scored 'a_0' in {at}:1",
    f"{at}:3: corrects an answer of 'leo' to 'a_0' that no earlier line has; leave corrects out",
    f"{at}:4: corrects is 1; expected true or false",
    f'{at}:5: repeat is "yes"; expected true or false',
    f"{at}:5: seconds is -1; expected a number from 0",
    f"{at}:6: seconds is NaN; expected a number from 0",
  ]


# ------------------------------------------------------------------------------ comparisons


def test_errors_of_comparisons_name_their_line(tmp_path):
  rows = [
    comparison("a", 0, 1, 1),
    comparison("a", 1, 0, 0),  # the same pair, whatever its order
    comparison("a", 0, 0, 0),
    comparison("a", 0, 1, 2, "leo"),
    comparison("a", 0, 9, 0, "leo"),
    comparison("z", 0, 1, 0, "leo"),
    comparison("a", 0, 1, 0, "leo") | {"candidates": "a_0"},
    comparison("a", 0, 1, 0, "leo", corrects=True),
    {k: v for k, v in comparison("a", 0, 1, 0, "leo").items() if k != "better"},
    comparison("a", 0, 1, 0, "leo", left="a_2"),
    comparison("a", 0, 1, 0, "leo") | {"better": 0},
  ]
  at, one_of = "pairs.jsonl", "expected one of the two candidates or null"
  assert errors_of(write_pairs_folder(tmp_path, {"a": 3}, rows)) == [
    f"{at}:2: 'mia' already scored 'a_0' and 'a_1' in {at}:1",
    f"{at}:3: compares 'a_0' with itself; expected two candidates",
    f'{at}:4: better is "a_2"; {one_of}',
    f"{at}:5: unknown candidate 'a_9'; expected one of candidates.jsonl",
    f"{at}:6: unknown image id 'z'",
    f'{at}:7: candidates is "a_0"; expected two names',
    f"{at}:8: corrects an answer of 'leo' to 'a_0' and 'a_1' that no earlier line has; "
    "leave corrects out",
    f"{at}:9: missing better; {one_of}",
    f'{at}:10: left is "a_2"; {one_of}',
    f"{at}:11: better is 0; {one_of}",
  ]


def test_scores_and_comparisons_in_one_folder_are_an_error_of_one_line(tmp_path):
  folder = write_candidates_folder(tmp_path, {"a": 2}, [rating("a", 0, "mia", 1, 1, 1)])
  write_lines(folder / "pairs.jsonl", [comparison("a", 0, 1, 1)])
  with pytest.raises(ValueError, match="expected one of them; move the other") as error:
    annotations.read_annotations(folder)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(("won", "lost"), [(1, 0), (3, 0), (2.5, 0.5), (2, 5), (1, 1)])
def test_scores_of_two_candidates_solve_the_equation_of_the_optimum(won, lost):
  # d/dm of won log σ(m) + lost log σ(−m) − 2 (m/2)² / (2 PRIOR²), with s = (m/2, −m/2)
  slope = lambda m: won / (1 + np.exp(m)) - lost / (1 + np.exp(-m)) - m / 2 / comparisons.PRIOR**2
  expected = brentq(slope, -50, 50, xtol=1e-13)
  first, second = comparisons.bradley_terry([[0, won], [lost, 0]])
  np.testing.assert_allclose([first, second], [expected / 2, -expected / 2], atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_scores_are_more_probable(seed):
  rng = np.random.default_rng(seed)
  wins = rng.integers(0, 3, (5, 5)) / 2 * (rng.random((5, 5)) < 0.5)
  wins[0], wins[:, 4] = [0, 1, 1, 1, 2], 0  # a clear winner, and one that no comparison reaches
  wins[4] = 0
  np.fill_diagonal(wins, 0)

  def log_posterior(s):
    likelihood = sum(
      wins[i, j] * math.log(1 / (1 + math.exp(s[j] - s[i]))) for i in range(5) for j in range(5)
    )
    return likelihood - sum(x**2 for x in s) / (2 * comparisons.PRIOR**2)

  scores = comparisons.bradley_terry(wins)
  best = log_posterior(scores)
  for size in (1e-3, 1e-1, 1.0):
    for _ in range(100):
      assert log_posterior(scores + rng.normal(0, size, 5)) < best
  assert abs(scores.sum()) < 1e-9 and np.isfinite(scores).all()


def test_scores_recover_the_strengths_that_many_comparisons_were_drawn_from():
  rng = np.random.default_rng(0)
  strengths = np.array([1.5, 0.5, -0.5, -1.5])
  share = 1 / (1 + np.exp(strengths[None] - strengths[:, None]))
  first = np.triu(rng.binomial(4000, share), 1)
  wins = first + np.tril(4000 - first.T, -1)
  np.testing.assert_allclose(comparisons.bradley_terry(wins), strengths, atol=0.1)


def test_scores_of_comparisons_leave_out_repeats_and_count_a_tie_as_half_a_win(tmp_path):
  rows = [
    comparison("a", 0, 1, 1),
    comparison("a", 1, 0, 1, "leo"),
    comparison("a", 0, 1, 0, repeat=True),
    comparison("a", 1, 2, 2),
    comparison("a", 1, 2, None, corrects=True),
    comparison("b", 0, 1, None),
  ]
  folder = write_pairs_folder(tmp_path, {"a": 4, "b": 2}, rows)
  wins = np.zeros((3, 3))
  wins[1, 0], wins[1, 2], wins[2, 1] = 2, 0.5, 0.5
  expected = dict(zip(("a_0", "a_1", "a_2"), comparisons.bradley_terry(wins), strict=True))
  assert scores_of(folder) == pytest.approx(expected | {"b_0": 0, "b_1": 0})
  read = annotations.read_annotations(folder)
  assert read.annotators == 2 and read.left_out == {"candidates": 1, "prompts": 0}
  assert [c.annotators for c in read.prompts[0].candidates] == [2, 2, 1]
  assert read.agreement["pairs"] == 1  # the only pair of two annotators has equal choices


def test_agreement_of_comparisons_does_not_depend_on_the_names_of_the_candidates():
  rng = np.random.default_rng(0)
  truth = np.where(rng.random(60) < 0.9, 1.0, -1.0)  # most first candidates are better
  chosen = np.where(rng.random((60, 3)) < 0.8, truth[:, None], rng.integers(-1, 2, (60, 3)))
  flipped = chosen * rng.choice([-1, 1], (60, 1))
  found = []
  for table in (chosen, flipped):
    rows = [
      Answer("", "p", (f"p_{u}", f"q_{u}"), str(a), (table[u, a],), None, False)
      for u, a in np.ndindex(60, 3)
    ]
    found.append(comparisons.comparison_agreement(rows))
  np.testing.assert_allclose(*found)
  equal = np.mean([chosen[:, i] == chosen[:, j] for i, j in ((0, 1), (0, 2), (1, 2))])
  decided = np.mean(chosen != 0)
  by_chance = 2 * (decided / 2) ** 2 + (1 - decided) ** 2
  np.testing.assert_allclose(found[0][1:], [equal, by_chance], atol=3e-3)


def test_a_dataset_of_comparisons_orders_the_candidates_as_the_annotators_do(tmp_path):
  names = {f"p{i}": 3 for i in range(8)}
  rows = [
    comparison(name, i, j, max(i, j), annotator)
    for name in names
    for annotator in ("mia", "leo")
    for i, j in ((0, 1), (1, 2), (0, 2))
  ]
  rows[0]["better"] = "p0_0"
  folder = write_pairs_folder(tmp_path / "source", names, rows)
  (folder / "train.txt").write_text("\n".join(names))
  build_preferences(folder, tmp_path / "built")
  for preference in open_preferences(tmp_path / "built", "train"):
    assert np.argsort(preference["raw_scores"]).tolist() == [0, 1, 2]
    assert abs(preference["raw_scores"].sum()) < 1e-5
  metadata = read_metadata(tmp_path / "built")
  assert metadata["annotators"] == 2 and 0 < metadata["alpha"]["pairs"] < 1
  text = summary(metadata)
  assert "combined score (of pairs, Bradley-Terry): mean 0.000" in text
  assert "agreement of 2 annotators (Krippendorff's alpha, nominal): pairs 0." in text
