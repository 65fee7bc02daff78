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
from typing import NamedTuple

from prefpaint_jax.data.annotation_files import (
  CANDIDATES,
  PROMPTS,
  CandidateEntry,
  PromptEntry,
  is_candidate_of,
  is_collected,
)
from prefpaint_jax.data.answers import ANNOTATIONS, is_number, read_answers
from prefpaint_jax.data.reward_scores import FILE as REWARD_SCORES
from prefpaint_jax.data.reward_scores import read_scores


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
  if own_layout and not rewards:
    return _read_annotated(folder, prompts, candidates, errors)
  rows = read_scores(folder, rewards, errors) if rewards else _read_released(folder, errors)
  ratings = defaultdict(dict)
  for where, image_id, name, annotator, scores in rows:
    if not (
      is_candidate_of(where, name, image_id, prompts, errors)
      and is_collected(folder, where, name, candidates, errors)
    ):
      continue
    before = ratings[name].get(annotator)
    if before is None:
      ratings[name][annotator] = Rating(where, scores)
    elif annotator:
      errors.append(f"{where}: {annotator!r} already scored {name!r} in {before.where}")
    elif scores != before.scores:  # the released files repeat equal scores, flat and grouped
      errors.append(f"{where}: {name!r} has another score in {before.where}")
  return dict(ratings)


def _read_annotated(
  folder: Path,
  prompts: Mapping[str, PromptEntry],
  candidates: Mapping[str, CandidateEntry],
  errors: list[str],
) -> dict[str, dict[str, Rating]]:
  """Reads annotations.jsonl without its repeats."""
  if not (folder / ANNOTATIONS).exists():
    else_ = ", or give --config.rewards" if (folder / REWARD_SCORES).exists() else ""
    raise ValueError(
      f"{folder / ANNOTATIONS}: no such file; score the candidates with prefpaint_jax.label{else_}"
    )
  ratings = defaultdict(dict)
  for answer in read_answers(folder, prompts, candidates, errors):
    if not answer.repeat:
      ratings[answer.candidates[0]][answer.annotator] = Rating(answer.where, answer.values)
  return dict(ratings)


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
