"""Reads the answers of annotators: annotations.jsonl and pairs.jsonl.

A line of annotations.jsonl has the scores of one candidate, a line of pairs.jsonl one comparison:

  {"image_id", "candidate", "annotator", "structure", "texture", "overall"}
  {"image_id", "candidates": [A, B], "better": A, B or null for equal, "annotator"}

Both may have "seconds", the time of the whole answer, "corrects": true if the line replaces an
earlier one of the same annotator, and "repeat": true if the annotator had the same item before. A
repeat measures consistency and is no further rating. A comparison may have "left", the candidate
that was shown on the left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefpaint_jax.data.annotation_files import (
  CandidateEntry,
  PromptEntry,
  is_candidate_of,
  is_collected,
  read_rows,
)
from prefpaint_jax.data.examples import CRITERIA, MAX_SCORE

ANNOTATIONS, PAIRS = "annotations.jsonl", "pairs.jsonl"


class Answer(NamedTuple):
  """The scores of one candidate, or the comparison of two, by one annotator."""

  where: str  # FILE:LINE
  image_id: str
  candidates: tuple[str, ...]  # one, or two in the order of their names
  annotator: str
  # Scores of the CRITERIA; or 1 if the first of two is better, -1 if the second is, 0 if equal.
  values: tuple[float, ...]
  seconds: float | None  # of the whole answer, which may have lines for several candidates
  repeat: bool
  left: str | None = None


def has_pairs(folder: Path) -> bool:
  """Returns whether the answers of a folder are comparisons.

  Raises:
    ValueError: the folder has both kinds of answers.
  """
  if (folder / ANNOTATIONS).exists() and (folder / PAIRS).exists():
    raise ValueError(
      f"{folder} has {ANNOTATIONS} and {PAIRS}; expected one of them; move the other to another "
      "folder"
    )
  return (folder / PAIRS).exists()


def read_answers(
  folder: Path,
  prompts: Mapping[str, PromptEntry],
  candidates: Mapping[str, CandidateEntry],
  errors: list[str],
) -> list[Answer]:
  """Reads the answers of a folder, repeats included; a correction takes the place of its line.

  Args:
    errors: gets a line, FILE:LINE and the error, for each error.

  Raises:
    ValueError: the folder has both kinds of answers.
  """
  lines = _comparisons if has_pairs(folder) else _scores
  answers: list[Answer] = []
  places: dict[tuple, int] = {}
  for answer, corrects in lines(folder, errors):
    where, image_id, names, annotator = answer[:4]
    if not all(
      is_candidate_of(where, name, image_id, prompts, errors)
      and is_collected(folder, where, name, candidates, errors)
      for name in names
    ):
      continue
    key, shown = (annotator, names, answer.repeat), " and ".join(map(repr, names))
    place = places.get(key)
    if corrects and place is not None:
      answers[place] = answer
    elif corrects:
      errors.append(
        f"{where}: corrects an answer of {annotator!r} to {shown} that no earlier line has; "
        "leave corrects out"
      )
    elif place is not None and not answer.repeat:
      errors.append(f"{where}: {annotator!r} already scored {shown} in {answers[place].where}")
    else:
      places[key] = len(answers)
      answers.append(answer)
  return answers


def _scores(folder: Path, errors: list[str]) -> Iterator[tuple[Answer, bool]]:
  """Yields each line of annotations.jsonl, and whether it corrects another one."""
  names = ("image_id", "candidate", "annotator", *CRITERIA)
  for where, row in read_rows(folder / ANNOTATIONS, names, errors):
    in_range = lambda score: is_number(score) and 0 <= score <= MAX_SCORE  # False for NaN
    bad = [name for name in CRITERIA if not in_range(row[name])]
    for name in bad:
      errors.append(
        f"{where}: {name} is {json.dumps(row[name])}; expected a number from 0 to {MAX_SCORE:g}"
      )
    marks = _marks(where, row, errors)
    if marks and not bad:
      scores = tuple(float(row[name]) for name in CRITERIA)
      name = row["candidate"].removesuffix(".png")
      seconds, repeat, corrects = marks
      answer = Answer(where, row["image_id"], (name,), row["annotator"], scores, seconds, repeat)
      yield answer, corrects


def _comparisons(folder: Path, errors: list[str]) -> Iterator[tuple[Answer, bool]]:
  """Yields each line of pairs.jsonl, and whether it corrects another one."""
  for where, row in read_rows(folder / PAIRS, ("image_id", "annotator"), errors):
    pair = row.get("candidates")
    marks = _marks(where, row, errors)
    if not (isinstance(pair, list) and len(pair) == 2 and all(type(x) is str for x in pair)):
      errors.append(f"{where}: candidates is {json.dumps(pair)}; expected two names")
      continue
    pair = sorted(name.removesuffix(".png") for name in pair)
    if pair[0] == pair[1]:
      errors.append(f"{where}: compares {pair[0]!r} with itself; expected two candidates")
      continue
    plain = lambda name: name.removesuffix(".png") if type(name) is str else name
    chosen = {name: plain(row.get(name)) for name in ("better", "left")}
    missing = "better" not in row
    bad = [name for name, value in chosen.items() if value not in (*pair, None)]
    for name in bad:
      errors.append(
        f"{where}: {name} is {json.dumps(row[name])}; expected one of the two candidates or null"
      )
    if missing:
      errors.append(f"{where}: missing better; expected one of the two candidates or null")
    if marks and not bad and not missing:
      value = {pair[0]: 1.0, pair[1]: -1.0, None: 0.0}[chosen["better"]]
      seconds, repeat, corrects = marks
      about = where, row["image_id"], tuple(pair), row["annotator"]
      yield Answer(*about, (value,), seconds, repeat, chosen["left"]), corrects


def _marks(
  where: str, row: Mapping[str, Any], errors: list[str]
) -> tuple[float | None, bool, bool] | None:
  """Returns seconds, repeat and corrects of a line; None if one of them has an error."""
  count = len(errors)
  for name in ("repeat", "corrects"):
    if type(row.get(name, False)) is not bool:
      errors.append(f"{where}: {name} is {json.dumps(row[name])}; expected true or false")
  seconds = row.get("seconds")
  if "seconds" in row and not (is_number(seconds) and 0 <= seconds < math.inf):
    errors.append(f"{where}: seconds is {json.dumps(seconds)}; expected a number from 0")
  found = seconds, row.get("repeat", False), row.get("corrects", False)
  return found if len(errors) == count else None


def is_number(value: Any) -> bool:
  """Returns whether a JSON value is a number."""
  return isinstance(value, int | float) and not isinstance(value, bool)
