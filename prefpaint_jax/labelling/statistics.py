"""Statistics of annotators: agreement, consistency, time, and flags for careless answers.

A unit is what one value rates: a candidate, or a pair of candidates. The value of a candidate is
its combined score. The value of a pair is 1 if the first candidate is better, -1 if the second is,
and 0 if they are equal; it changes sign with the arbitrary order of the two, so that correlations
and spreads of pairs are about 0 and not about the mean.
"""
# Shapes: N values.

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prefpaint_jax.data.agreement import agreement_by_criterion
from prefpaint_jax.data.answers import Answer
from prefpaint_jax.data.comparisons import comparison_agreement
from prefpaint_jax.data.examples import CRITERIA, MAX_SCORE
from prefpaint_jax.data.rating_files import Rating

LEAST_SPREAD, SPREAD_SHARE, LEAST_VALUES = 0.25, 1 / 3, 20
LEAST_SECONDS, SECONDS_SHARE, LEAST_ANSWERS = 1.0, 1 / 3, 10
# A correlation r of N values differs from 0 if r √(N − 1) > Z: for answers at random, that happens
# once in 200. With ENOUGH values, a correlation of 0.3 does.
Z, ENOUGH = 2.576, 75
LARGEST_SIDE = 0.75
FLAGS = {
  "constant": (
    f"The standard deviation of {LEAST_VALUES} combined scores, or choices, or more is below "
    f"{LEAST_SPREAD:g}, or below a third of the median of the other annotators'."
  ),
  "random": (
    "Neither the correlation with the mean of the other annotators nor that of repeats with the "
    f"first answers is above 0, with {Z:.3g} standard errors, although one of them has {ENOUGH} "
    "values or more, with which a correlation of 0.3 would be. If most of the others answer at "
    "random, a careful annotator with few repeats has this flag too."
  ),
  "too fast": (
    f"The median time of {LEAST_ANSWERS} answers or more is below {LEAST_SECONDS:g} s a candidate, "
    "or below a third of the median of the other annotators'."
  ),
  "one side": (
    f"Of {LEAST_VALUES} decided pairs or more, the share of one side of the screen is above "
    f"{100 * LARGEST_SIDE:g} %, and differs from a half with {Z:.3g} standard errors."
  ),
}
_WEIGHTS = np.array(list(CRITERIA.values())) / sum(CRITERIA.values())


def summarise(
  answers: Sequence[Answer], candidates: Mapping[str, Sequence[str]], pairs: bool
) -> dict[str, Any]:
  """Computes the content of label_report.json. Unknown numbers are None.

  Args:
    answers: of `read_answers`.
    candidates: {image ID: names of its candidates}.
    pairs: the answers are comparisons.
  """
  first = [answer for answer in answers if not answer.repeat]
  names = sorted({answer.annotator for answer in answers})
  values = {name: _values(x for x in first if x.annotator == name) for name in names}
  own = {name: [x for x in answers if x.annotator == name] for name in names}
  annotators = {name: _annotator(own[name], pairs) for name in names}
  for name, found in annotators.items():
    found["others"] = _with_others(values, name, pairs)
    if pairs:
      found |= _cycles(values[name], candidates)
  for name, found in annotators.items():
    others = [other for key, other in annotators.items() if key != name]
    found["flags"] = _flags(found, others)
  unflagged = [answer for answer in first if not annotators[answer.annotator]["flags"]]
  return _finite(
    {
      "mode": "pairs" if pairs else "scores",
      "answers": sum(found["answers"] for found in annotators.values()),
      "repeats": sum(found["repeats"] for found in annotators.values()),
      "agreement": _agreement(first, pairs),
      "agreement_unflagged": _agreement(unflagged, pairs),
      "annotators_of": _coverage(first, candidates, pairs),
      "histograms": _histograms(first, pairs),
      "annotators": annotators,
      "rules": {name: rule for name, rule in FLAGS.items() if pairs or name != "one side"},
    }
  )


def _values(answers: Iterable[Answer]) -> dict[tuple[str, ...], float]:
  """Returns {unit: value}."""
  return {answer.candidates: _value(answer) for answer in answers}


def _value(answer: Answer) -> float:
  """Returns the combined score of a candidate, or the value of a pair."""
  values = np.asarray(answer.values)
  return float(values @ _WEIGHTS) if len(values) == len(_WEIGHTS) else float(values[0])


def _agreement(first: Sequence[Answer], pairs: bool) -> dict[str, float]:
  """Computes Krippendorff's alpha, of each criterion and combined or of pairs."""
  if pairs:
    return dict(zip(("pairs", "equal", "by_chance"), comparison_agreement(first), strict=True))
  ratings: dict[str, dict[str, Rating]] = defaultdict(dict)
  for answer in first:
    ratings[answer.candidates[0]][answer.annotator] = Rating(answer.where, answer.values)
  unknown = dict.fromkeys((*CRITERIA, "combined"), math.nan)
  return agreement_by_criterion(ratings, _WEIGHTS) if ratings else unknown


def _coverage(
  first: Sequence[Answer], candidates: Mapping[str, Sequence[str]], pairs: bool
) -> dict[str, dict[str, int]]:
  """Counts prompts, and pairs, by their number of annotators.

  The number of a prompt is the smallest of its candidates, or of its pairs.

  Returns:
    {"prompts" or "pairs": {number of annotators: how many have that number}}.
  """
  number = Counter(answer.candidates for answer in first)
  size = 2 if pairs else 1
  of_prompt = [
    [number[unit] for unit in itertools.combinations(sorted(names), size)]
    for names in candidates.values()
  ]
  counted = {"prompts": Counter(min(units, default=0) for units in of_prompt)}
  if pairs:
    counted["pairs"] = Counter(itertools.chain(*of_prompt))
  return {
    kind: {str(number): counts[number] for number in sorted(counts)}
    for kind, counts in counted.items()
  }


def _histograms(first: Sequence[Answer], pairs: bool) -> dict[str, list[int]]:
  """Counts the scores of each criterion, rounded to 0..7. Pairs have none."""
  if pairs or not first:
    return {}
  scores = np.rint([answer.values for answer in first]).astype(int)
  count = lambda column: np.bincount(column, minlength=int(MAX_SCORE) + 1).tolist()
  return {name: count(scores[:, i]) for i, name in enumerate(CRITERIA)}


def _annotator(answers: Sequence[Answer], pairs: bool) -> dict[str, Any]:
  """Computes the statistics of one annotator that need no other annotator."""
  first = [answer for answer in answers if not answer.repeat]
  items: dict[tuple, list[Answer]] = defaultdict(list)  # the lines of one answer share its seconds
  for answer in answers:
    unit = answer.candidates if pairs else ()
    items[answer.image_id, unit, answer.repeat].append(answer)
  timed = [item for item in items.values() if item[0].seconds is not None]
  seconds = [item[0].seconds for item in timed]
  shares = [item[0].seconds / (2 if pairs else len(item)) for item in timed]
  scores = np.array([answer.values for answer in first]).reshape(len(first), -1)
  value = np.array([_value(answer) for answer in first])
  found: dict[str, Any] = {
    "answers": sum(not repeat for *_, repeat in items),
    "repeats": sum(repeat for *_, repeat in items),
    "values": len(first),
    "timed": len(timed),
    "seconds": float(np.median(seconds)) if timed else math.nan,
    "seconds_per_candidate": float(np.median(shares)) if timed else math.nan,
    "spread": _spread(value, pairs),
  }
  if pairs:
    sided = [x for x in first if x.left is not None and x.values[0]]
    lefts = sum(x.left == x.candidates[x.values[0] < 0] for x in sided)
    found["equal"] = float(np.mean(value == 0)) if len(first) else math.nan
    found |= {"sided": len(sided), "left": lefts / len(sided) if sided else math.nan}
  elif first:
    found["mean"] = dict(zip(CRITERIA, scores.mean(0).tolist(), strict=True))
    found["spreads"] = dict(zip(CRITERIA, scores.std(0).tolist(), strict=True))
    found["histogram"] = _histograms(first, pairs)["overall"]
  return found | {"consistency": _consistency(answers, pairs)}


def _consistency(answers: Sequence[Answer], pairs: bool) -> dict[str, Any]:
  """Compares an annotator's repeats with the first answers.

  "difference" is the mean absolute difference: over the criteria, or 1 for another choice of a
  pair. "by_chance" is the same between any two first answers of different units. "above_chance" is
  1 - difference / by_chance: 1 for equal answers, 0 for answers at random.
  """
  first = {answer.candidates: answer for answer in answers if not answer.repeat}
  both = [(first[x.candidates], x) for x in answers if x.repeat and x.candidates in first]
  rows = np.array([answer.values for answer in first.values()])
  if pairs and len(rows):
    rows = np.concatenate([rows, -rows])  # both orders of each pair
  differ = (lambda a, b: a != b) if pairs else (lambda a, b: np.abs(a - b))
  # The mean difference of two of N values, from counts of equal values.
  chance = []
  for column in rows.T if len(rows) > 1 else ():
    kinds, counts = np.unique(column, return_counts=True)
    total = counts @ differ(kinds[:, None], kinds[None]) @ counts
    chance.append(total / (len(column) * (len(column) - 1)))
  by_chance = float(np.mean(chance)) if chance else math.nan
  change = [differ(np.array(a.values), np.array(b.values)).mean() for a, b in both]
  difference = float(np.mean(change)) if both else math.nan
  before, after = (np.array([_value(pair[i]) for pair in both]) for i in range(2))
  return {
    "values": len(both),
    "difference": difference,
    "by_chance": by_chance,
    "above_chance": 1 - difference / by_chance if by_chance else math.nan,
    "correlation": _correlation(before, after, pairs),
  }


def _with_others(
  values: Mapping[str, Mapping[tuple[str, ...], float]], name: str, pairs: bool
) -> dict[str, Any]:
  """Correlates an annotator's values with the mean of all others' values of the same unit."""
  others: dict[tuple[str, ...], list[float]] = defaultdict(list)
  for other, rated in values.items():
    for unit, value in rated.items() if other != name else ():
      others[unit].append(value)
  common = [unit for unit in values[name] if unit in others]
  own = np.array([values[name][unit] for unit in common])
  means = np.array([np.mean(others[unit]) for unit in common])
  return {"values": len(common), "correlation": _correlation(own, means, pairs)}


def _cycles(
  values: Mapping[tuple[str, ...], float], candidates: Mapping[str, Sequence[str]]
) -> dict[str, int]:
  """Counts the triples of candidates with three decided pairs, and those that are cycles."""
  triples = cycles = 0
  for names in candidates.values():
    for a, b, c in itertools.combinations(sorted(names), 3):
      ab, bc, ac = (values.get(pair, 0.0) for pair in ((a, b), (b, c), (a, c)))
      if ab and bc and ac:
        triples += 1
        cycles += ab == bc == -ac  # a > b > c > a, or the other way round
  return {"triples": triples, "cycles": cycles}


def _spread(values: np.ndarray, pairs: bool) -> float:
  """Computes the standard deviation [N]; of pairs, about 0."""
  if not len(values):
    return math.nan
  return float(np.sqrt(np.mean((values - (0.0 if pairs else values.mean())) ** 2)))


def _correlation(first: np.ndarray, second: np.ndarray, pairs: bool) -> float:
  """Computes the correlation of two arrays [N], of pairs about 0; NaN if one is constant."""
  if len(first) < 3:
    return math.nan
  if not pairs:
    first, second = first - first.mean(), second - second.mean()
  size = float(np.linalg.norm(first) * np.linalg.norm(second))
  return float(first @ second) / size if size > 1e-9 else math.nan


def _flags(found: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the names of the FLAGS of an annotator."""
  flags = []
  if found["values"] >= LEAST_VALUES:
    least = max(LEAST_SPREAD, SPREAD_SHARE * _median(others, "spread", "values", LEAST_VALUES))
    flags += ["constant"] if found["spread"] < least else []
  measured = [found["others"], found["consistency"]]
  measured = [x for x in measured if not math.isnan(x["correlation"])]
  related = [x["correlation"] * math.sqrt(x["values"] - 1) > Z for x in measured]
  if any(x["values"] >= ENOUGH for x in measured) and not any(related) and not flags:
    flags.append("random")  # a constant annotator has no correlation
  if found["timed"] >= LEAST_ANSWERS:
    median = _median(others, "seconds_per_candidate", "timed", LEAST_ANSWERS)
    least = max(LEAST_SECONDS, SECONDS_SHARE * median)
    flags += ["too fast"] if found["seconds_per_candidate"] < least else []
  if found.get("sided", 0) >= LEAST_VALUES:
    away = abs(found["left"] - 0.5)
    certain = 2 * away * math.sqrt(found["sided"]) > Z
    flags += ["one side"] if away > LARGEST_SIDE - 0.5 and certain else []
  return flags


def _median(others: Sequence[Mapping[str, Any]], key: str, count: str, least: int) -> float:
  """Returns the median of a statistic of the annotators with `least` values; 0 if none has."""
  found = [other[key] for other in others if other[count] >= least]
  return float(np.median(found)) if found else 0.0


def _finite(content: Any) -> Any:
  """Replaces NaN by None in nested dictionaries."""
  if isinstance(content, dict):
    return {key: _finite(value) for key, value in content.items()}
  return None if isinstance(content, float) and not math.isfinite(content) else content
