"""Reads the scores of a folder, in both layouts, and collects every error with its line.

`data.annotations` describes the layouts. Each reader appends to a list `errors`: one line of text
for each error, which begins with FILE:LINE.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefpaint_jax.data.annotation_files import (
  CANDIDATES,
  PROMPTS,
  CandidateEntry,
  PromptEntry,
  is_candidate_of,
  read_rows,
)
from prefpaint_jax.data.examples import CRITERIA, MAX_SCORE
from prefpaint_jax.data.reward_scores import FILE as REWARD_SCORES
from prefpaint_jax.data.reward_scores import read_scores

ANNOTATIONS = "annotations.jsonl"


class Rating(NamedTuple):
  """The scores that one annotator gave to one candidate."""

  where: str  # FILE:LINE
  scores: tuple[float, ...]  # of the three criteria, or only the combined one


def read_ratings(
  folder: Path,
  prompts: Mapping[str, PromptEntry],
  candidates: Mapping[str, CandidateEntry],
  errors: list[str],
  rewards: str = "",
) -> dict[str, dict[str, Rating]]:
  """Reads the scores of a folder in either layout.

  Args:
    rewards: names and weights of the rewards whose scores are read instead of people's.

  Returns:
    {candidate: {annotator: rating}}; the annotator is "" in the released layout.
  """
  own_layout = any((folder / name).exists() for name in (PROMPTS, CANDIDATES, ANNOTATIONS))
  if rewards:
    rows = read_scores(folder, rewards, errors)
  else:
    rows = _read_annotated(folder, errors) if own_layout else _read_released(folder, errors)
  ratings = defaultdict(dict)
  for where, image_id, name, annotator, scores in rows:
    if not is_candidate_of(where, name, image_id, prompts, errors):
      continue
    before = ratings[name].get(annotator)
    if name not in candidates:
      expected = CANDIDATES if (folder / CANDIDATES).exists() else "inpaint/"
      errors.append(f"{where}: unknown candidate {name!r}; expected one of {expected}")
    elif before is None:
      ratings[name][annotator] = Rating(where, scores)
    elif annotator:
      errors.append(f"{where}: {annotator!r} already scored {name!r} in {before.where}")
    elif scores != before.scores:  # the released files repeat equal scores, flat and grouped
      errors.append(f"{where}: {name!r} has another score in {before.where}")
  return {name: rated for name, rated in ratings.items() if rated}


def _read_annotated(folder: Path, errors: list[str]) -> Iterator[tuple]:
  """Yields (FILE:LINE, image ID, candidate, annotator, three scores) of annotations.jsonl."""
  file = folder / ANNOTATIONS
  if not file.exists():
    else_ = ", or give --config.rewards" if (folder / REWARD_SCORES).exists() else ""
    raise ValueError(
      f"{file}: no such file; write one line of scores per annotator and candidate{else_}"
    )
  for where, row in read_rows(file, ("image_id", "candidate", "annotator", *CRITERIA), errors):
    in_range = lambda score: is_number(score) and 0 <= score <= MAX_SCORE  # False for NaN
    bad = [name for name in CRITERIA if not in_range(row[name])]
    for name in bad:
      errors.append(
        f"{where}: {name} is {json.dumps(row[name])}; expected a number from 0 to {MAX_SCORE:g}"
      )
    if not bad:
      scores = tuple(float(row[name]) for name in CRITERIA)
      name = row["candidate"].removesuffix(".png")
      yield where, row["image_id"], name, row["annotator"], scores


def _read_released(folder: Path, errors: list[str]) -> Iterator[tuple]:
  """Yields (FILE:LINE, image ID, candidate, "", (combined score,)) of the JSON files.

  A file holds {candidate: [score, rank]} or {image ID: {candidate: [score, rank]}}.
  """
  files = sorted(folder.glob("*.json"))
  if not files:
    raise ValueError(
      f"{folder}: contains neither {ANNOTATIONS} nor JSON files of scores; add one of them"
    )
  for file in files:
    text = file.read_text("utf-8", errors="replace")
    try:
      # Objects become tuples of pairs, so that repeated keys are kept. Arrays remain lists.
      pairs = json.loads(text, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
      errors.append(f"{file.name}:{error.lineno}: not JSON: {error.msg}")
      continue
    if not isinstance(pairs, tuple):
      errors.append(f"{file.name}:1: not a JSON object of scores")
      continue
    lines = _lines_of_keys(text)
    for key, value in pairs:
      where = f"{file.name}:{lines[key].popleft()}"
      if isinstance(value, tuple):
        entries = [(f"{file.name}:{lines[name].popleft()}", key, name, v) for name, v in value]
      else:
        entries = [(where, None, key, value)]
      for where, image_id, name, entry in entries:
        if (
          isinstance(entry, list)
          and len(entry) == 2
          and all(is_number(number) and math.isfinite(number) for number in entry)
        ):
          name = name.removesuffix(".png")
          image_id = name.rpartition("_")[0] if image_id is None else image_id
          yield where, image_id, name, "", (float(entry[0]),)
        else:
          errors.append(f"{where}: {name!r} is not [score, rank], two finite numbers")


def _lines_of_keys(text: str) -> dict[str, deque[int]]:
  """Returns {key: numbers of the lines that hold this key} of a JSON text, in order."""
  lines, line, end = defaultdict(deque), 1, 0
  for string in re.finditer(r'("(?:[^"\\]|\\.)*")(\s*:)?', text):
    line, end = line + text.count("\n", end, string.start()), string.start()
    if string[2]:
      lines[json.loads(string[1])].append(line)
  return lines


def is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
