"""The report on annotators: its numbers against closed forms, the flags, and the page."""

import itertools
import json
import math
import re

import numpy as np
import pytest

from prefpaint_jax.data.agreement import krippendorff_alpha
from prefpaint_jax.data.examples import CRITERIA
from prefpaint_jax.data.prompts import open_prompts
from prefpaint_jax.labelling import report, statistics
from prefpaint_jax.preference import simulation

PROMPTS, EACH = 40, 4


def write_folder(folder, candidates, lines, file="annotations.jsonl"):
  """Writes prompts and candidates, {image ID: number}, without images, and the answers."""
  folder.mkdir(parents=True, exist_ok=True)
  prompts = [{"image_id": name, "source": "photos", "kind": 0} for name in candidates]
  named = [
    {"image_id": name, "candidate": f"{name}_{k}", "policy": "base"}
    for name, number in candidates.items()
    for k in range(number)
  ]
  for name, rows in (("prompts.jsonl", prompts), ("candidates.jsonl", named), (file, lines)):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


def line(image_id, k, annotator, *scores, **marks):
  row = {"image_id": image_id, "candidate": f"{image_id}_{k}", "annotator": annotator}
  return row | dict(zip(CRITERIA, scores, strict=True)) | marks


def pair(image_id, i, j, better, annotator, **marks):
  name = lambda k: None if k is None else f"{image_id}_{k}"
  row = {"image_id": image_id, "candidates": [name(i), name(j)], "annotator": annotator}
  return row | {"better": name(better)} | marks


# ------------------------------------------------------------------------- simulated annotators


@pytest.fixture(scope="module")
def truth():
  """True scores [prompts, candidates] of each criterion, of samples of a wide range of quality."""
  opened = open_prompts("mini", "test")
  batch = [opened[i] for i in range(PROMPTS)]
  repeat = lambda key: np.repeat(np.stack([prompt[key] for prompt in batch]), EACH, axis=0)
  images, masks = repeat("image"), repeat("mask")
  samples = simulation.perturb(np.random.default_rng(0), images, masks)
  scores = simulation.true_preference(samples, masks)
  return {name: scores[name].reshape(PROMPTS, EACH) for name in CRITERIA}


def simulated_scores(truth, rng):
  """Returns lines of six annotators with a tenth of repeats."""
  shape = (PROMPTS, EACH)

  def draw(name):
    if name.startswith("careful"):
      flat = {criterion: scores.ravel() for criterion, scores in truth.items()}
      drawn = simulation.annotate(rng, flat, 1, 0.7)
      return {criterion: drawn[criterion][:, 0].reshape(shape) for criterion in CRITERIA}
    if name == "constant":  # 4, and rarely 5
      return {criterion: 4 + (rng.random(shape) < 0.05) for criterion in CRITERIA}
    return {criterion: rng.integers(0, 8, shape) for criterion in CRITERIA}

  lines = []
  for name in ("careful a", "careful b", "careful c", "constant", "random", "too fast"):
    times = rng.lognormal(np.log(2.0 if name == "too fast" else 20.0), 0.4, PROMPTS)
    kind = "careful" if name == "too fast" else name
    for repeat in (False, True):
      scores = draw(kind)
      for p in rng.choice(PROMPTS, PROMPTS // 10, replace=False) if repeat else range(PROMPTS):
        for k in range(EACH):
          given = [int(scores[criterion][p, k]) for criterion in CRITERIA]
          marks = {"seconds": round(times[p], 2)} | ({"repeat": True} if repeat else {})
          lines.append(line(f"p{p}", k, name, *given, **marks))
  return lines


def simulated_pairs(truth, rng):
  """Returns lines of six annotators with a tenth of repeats, and the side of each candidate."""
  quality = simulation.combine(truth)
  lines = []
  for name in ("careful a", "careful b", "careful c", "constant", "random", "too fast", "one side"):
    for p, (i, j) in itertools.product(range(PROMPTS), itertools.combinations(range(EACH), 2)):
      for repeat in (False, True) if rng.random() < 0.1 else (False,):
        left = (i, j)[rng.integers(2)]
        difference = quality[p, i] - quality[p, j] + rng.normal(0, 0.7)
        better = None if abs(difference) < 0.2 else (i, j)[int(difference < 0)]
        if name == "constant":
          better = None
        elif name == "random":
          better = (i, j, None)[rng.integers(3)]
        elif name == "one side":
          better = left
        seconds = rng.lognormal(np.log(0.8 if name == "too fast" else 6.0), 0.4)
        marks = {"seconds": seconds, "left": f"p{p}_{left}"} | ({"repeat": True} if repeat else {})
        lines.append(pair(f"p{p}", i, j, better, name, **marks))
  return lines


@pytest.mark.parametrize("seed", range(3))
def test_careless_annotators_have_their_flag_and_careful_ones_have_none(seed, truth, tmp_path):
  lines = simulated_scores(truth, np.random.default_rng(seed))
  folder = write_folder(tmp_path, {f"p{p}": EACH for p in range(PROMPTS)}, lines)
  found = report.write(folder)
  flags = {name: one["flags"] for name, one in found["annotators"].items()}
  careless = ("constant", "random", "too fast")
  assert flags == {f"careful {x}": [] for x in "abc"} | {name: [name] for name in careless}
  assert found["annotators_of"] == {"prompts": {"6": PROMPTS}}
  alone = [row for row in lines if row["annotator"].startswith("careful")]
  names = {f"p{p}": EACH for p in range(PROMPTS)}
  expected = report.write(write_folder(tmp_path / "careful", names, alone))["agreement"]
  assert found["agreement_unflagged"] == expected
  assert expected["combined"] > found["agreement"]["combined"] + 0.2


@pytest.mark.parametrize("seed", range(3))
def test_careless_answers_to_pairs_have_their_flag(seed, truth, tmp_path):
  lines = simulated_pairs(truth, np.random.default_rng(seed))
  names = {f"p{p}": EACH for p in range(PROMPTS)}
  found = report.write(write_folder(tmp_path, names, lines, "pairs.jsonl"))
  flags = {name: one["flags"] for name, one in found["annotators"].items()}
  expected = {f"careful {x}": [] for x in "abc"} | {"constant": ["constant"]}
  expected |= {"random": ["random"], "too fast": ["too fast"], "one side": ["random", "one side"]}
  assert flags == expected
  cycles = {
    name: one["cycles"] / max(1, one["triples"]) for name, one in found["annotators"].items()
  }
  assert cycles["careful a"] < 0.1 < cycles["random"] < 0.4


# ------------------------------------------------------------------------------- single numbers


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """The report of three annotators; one has an odd name, a correction and two repeated items."""
  rng = np.random.default_rng(0)
  candidates = {"a": 2, "b": 3, "c": 1, "d": 1}
  lines, given = [], {}
  for name in ("<b>mia</b>", "leo", "ann"):
    for unit in ("a_0", "a_1", "b_0", "b_1", *(["b_2", "c_0"] if name != "ann" else [])):
      given[name, unit] = rng.integers(0, 8, 3).tolist()
      seconds = 10.0 * candidates[unit[0]]
      lines.append(line(unit[0], int(unit[2]), name, *given[name, unit], seconds=seconds))
  repeats = {x: rng.integers(0, 8, 3).tolist() for x in ("a_0", "a_1", "b_0", "b_1", "b_2")}
  lines += [line(x[0], int(x[2]), "leo", *s, repeat=True, seconds=8) for x, s in repeats.items()]
  given["leo", "c_0"] = [1, 1, 2]
  lines.append(line("c", 0, "leo", 1, 1, 2, corrects=True, seconds=3))
  folder = write_folder(tmp_path_factory.mktemp("report"), candidates, lines)
  found = report.write(folder)
  assert json.loads((folder / "label_report.json").read_text()) == found
  return folder, found, given, repeats


def combined(scores):
  return np.asarray(scores) @ np.array(list(CRITERIA.values()))


def test_agreement_is_alpha_of_each_criterion_without_repeats(written):
  _, found, given, _ = written
  units = sorted({unit for _, unit in given})
  table = np.full((len(units), 3, 3), np.nan)
  for u, a in np.ndindex(len(units), 3):
    table[u, a] = given.get((("<b>mia</b>", "leo", "ann")[a], units[u]), [np.nan] * 3)
  for i, name in enumerate(CRITERIA):
    assert found["agreement"][name] == pytest.approx(krippendorff_alpha(table[..., i]))
  assert found["agreement"]["combined"] == pytest.approx(krippendorff_alpha(combined(table)))


def test_numbers_of_an_annotator_are_those_of_the_answers(written):
  _, found, given, repeats = written
  assert (found["answers"], found["repeats"]) == (8, 2)
  assert found["annotators_of"] == {"prompts": {"0": 1, "2": 2, "3": 1}}
  leo = found["annotators"]["leo"]
  assert (leo["answers"], leo["repeats"], leo["values"]) == (3, 2, 6)
  assert leo["seconds"] == np.median([20, 30, 3, 8, 8])
  assert leo["seconds_per_candidate"] == np.median([10, 10, 3, 8 / 2, 8 / 3])
  own = np.array([scores for (name, _), scores in given.items() if name == "leo"])
  for i, name in enumerate(CRITERIA):
    assert leo["mean"][name] == pytest.approx(own[:, i].mean())
    assert leo["spreads"][name] == pytest.approx(own[:, i].std())
  assert leo["spread"] == pytest.approx(combined(own).std())
  assert leo["histogram"] == [int((own[:, 2] == x).sum()) for x in range(8)]
  before = np.array([given["leo", unit] for unit in repeats])
  after = np.array(list(repeats.values()))
  consistency = leo["consistency"]
  assert consistency["values"] == 5
  assert consistency["difference"] == pytest.approx(np.abs(before - after).mean())
  chance = np.mean([np.abs(x - y).mean() for x, y in itertools.permutations(own, 2)])
  assert consistency["by_chance"] == pytest.approx(chance)
  expected = np.corrcoef(combined(before), combined(after))[0, 1]
  assert consistency["correlation"] == pytest.approx(expected)
  others = [
    np.mean([combined(given[x, unit]) for x in ("<b>mia</b>", "ann") if (x, unit) in given])
    for name, unit in given
    if name == "leo"
  ]
  assert leo["others"]["values"] == 6
  expected = np.corrcoef(combined(own), others)[0, 1]
  assert leo["others"]["correlation"] == pytest.approx(expected)


def test_page_is_self_contained_and_escapes_names(written):
  folder, found, *_ = written
  page = (folder / "label_report.html").read_text()
  assert "<b>mia" not in page and "&lt;b&gt;mia" in page
  assert "<script" not in page and "<link" not in page and "src=" not in page
  for rule in found["rules"].values():
    assert report.escape(rule) in page
  numbers = re.findall(r'd="([^"]*)"', page)
  assert len(numbers) >= 8 * 3 and not any("nan" in number for number in numbers)


def test_numbers_of_pairs_are_those_of_the_answers(tmp_path):
  rows = [
    pair("a", 0, 1, 0, "mia", seconds=4, left="a_0"),
    pair("a", 1, 2, 1, "mia", seconds=6, left="a_2"),
    pair("a", 0, 2, 2, "mia", seconds=9, left="a_2"),  # a cycle
    pair("a", 0, 1, 1, "mia", repeat=True, seconds=5),
    pair("a", 0, 1, 0, "leo"),
    pair("a", 1, 2, None, "leo"),
    pair("a", 0, 2, 0, "leo"),
  ]
  found = report.write(write_folder(tmp_path, {"a": 3, "b": 2}, rows, "pairs.jsonl"))
  mia, leo = found["annotators"]["mia"], found["annotators"]["leo"]
  assert (mia["triples"], mia["cycles"], leo["triples"]) == (1, 1, 0)
  assert (mia["answers"], mia["repeats"], mia["seconds"]) == (3, 1, 5.5)
  assert mia["seconds_per_candidate"] == 2.75 and leo["seconds"] is None
  assert (mia["left"], mia["sided"], leo["left"]) == (pytest.approx(2 / 3), 3, None)
  assert (mia["equal"], leo["equal"]) == (0, pytest.approx(1 / 3))
  assert mia["consistency"]["values"] == 1 and mia["consistency"]["difference"] == 1
  # Three choices in both orders are three of each side: 18 of 30 ordered pairs differ.
  assert mia["consistency"]["by_chance"] == pytest.approx(18 / 30)
  assert (mia["spread"], leo["spread"]) == (1, pytest.approx(math.sqrt(2 / 3)))
  assert found["annotators_of"] == {"prompts": {"0": 1, "2": 1}, "pairs": {"0": 1, "2": 3}}
  # Values of mia: 1, 1, -1; of leo: 1, 0, 1. Equal choices: 1 of 3.
  assert mia["others"]["correlation"] == pytest.approx((1 - 1) / math.sqrt(3 * 2), abs=1e-12)
  assert found["agreement"]["equal"] == pytest.approx(1 / 3)
  page = (tmp_path / "label_report.html").read_text()
  assert "1<small>[of 1]</small>" in page and "33 % of them are equal" in page


@pytest.mark.parametrize("pairs", [False, True])
def test_a_single_answer_has_a_report_without_numbers_that_need_more(pairs, tmp_path):
  rows = [pair("a", 0, 1, 0, "mia")] if pairs else [line("a", 0, "mia", 1, 2, 3)]
  file = "pairs.jsonl" if pairs else "annotations.jsonl"
  found = report.write(write_folder(tmp_path, {"a": 2}, rows, file))
  mia = found["annotators"]["mia"]
  assert mia["flags"] == [] and mia["others"]["correlation"] is None
  assert found["agreement"]["pairs" if pairs else "combined"] is None
  assert "NaN" not in (tmp_path / "label_report.json").read_text()
  assert "too few to say" in (tmp_path / "label_report.html").read_text()


def test_a_careful_annotator_beside_a_constant_one_is_not_called_random(tmp_path):
  rng = np.random.default_rng(0)
  names = {f"p{p}": 4 for p in range(30)}
  lines = [
    line(p, k, name, *(rng.integers(0, 8, 3).tolist() if name == "mia" else [4, 4, 4]))
    for name in ("mia", "leo")
    for p in names
    for k in range(4)
  ]
  found = report.write(write_folder(tmp_path, names, lines))["annotators"]
  assert (found["mia"]["flags"], found["leo"]["flags"]) == ([], ["constant"])


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    (None, "annotations.jsonl: no such file; score the candidates with prefpaint_jax.label"),
    ([], "annotations.jsonl has no answers; score the candidates with prefpaint_jax.label"),
    ([{"x": 1}, {"x": 1}], "annotations.jsonl:1: missing .*; correct the file .and 1 more errors."),
  ],
)
def test_a_folder_without_a_report_is_an_error_of_one_line(lines, message, tmp_path):
  folder = write_folder(tmp_path, {"a": 1}, lines or [])
  if lines is None:
    (folder / "annotations.jsonl").unlink()
  with pytest.raises(ValueError, match=message) as error:
    report.write(folder)
  assert "\n" not in str(error.value)
  assert not (folder / "label_report.html").exists()


def test_the_rule_of_each_flag_is_in_the_report():
  assert set(statistics.FLAGS) == {"constant", "random", "too fast", "one side"}
