"""Reads the files of a folder of scores, in both layouts, and collects every error with its line.

`data.annotations` describes the layouts. Each reader appends to a list `errors`: one line of text
for each error, which begins with FILE:LINE.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefpaint_jax.data import masks
from prefpaint_jax.data.captions import check_text, read_captions
from prefpaint_jax.data.examples import CRITERIA, MAX_SCORE, SPLITS, VALIDATION
from prefpaint_jax.data.reward_scores import FILE as REWARD_SCORES
from prefpaint_jax.data.reward_scores import read_scores

_NUMBERS = ("kind", *CRITERIA)  # fields that may hold numbers; all others hold text
_PROMPTS, _CANDIDATES, _ANNOTATIONS = "prompts.jsonl", "candidates.jsonl", "annotations.jsonl"


class PromptEntry(NamedTuple):
  """One prompt, before its images and scores are read."""

  where: str  # FILE:LINE; "" if only a mask file names the prompt
  source: str
  kind: int | None  # index into masks.KINDS; None: unknown
  picture: str  # ID of the image that the prompt was drawn from
  text: str = ""


class CandidateEntry(NamedTuple):
  """One candidate, before its image and scores are read."""

  where: str  # FILE:LINE; "" if only an image file names the candidate
  image_id: str
  policy: str


class Rating(NamedTuple):
  """The scores that one annotator gave to one candidate."""

  where: str  # FILE:LINE
  scores: tuple[float, ...]  # of the three criteria, or only the combined one


def read_prompts(folder: Path, errors: list[str]) -> dict[str, PromptEntry]:
  """Reads prompts.jsonl, or lists the masks if that file is missing, and the captions.

  A line with an error still counts as a prompt if its ID is known. Otherwise every score of that
  prompt would add an error about an unknown ID.

  Returns:
    {image ID: entry}.
  """
  prompts, texts = {}, {}
  if (folder / _PROMPTS).exists():
    rows = _rows(folder / _PROMPTS, ("image_id", "source", "kind"), errors)
  else:
    ids = sorted(f.name.removesuffix("_mask.png") for f in folder.glob("masks/*_mask.png"))
    prompts = {image_id: PromptEntry("", "unknown", None, image_id) for image_id in ids}
    rows = ()
  for where, row in rows:
    image_id, kind = row["image_id"], row["kind"]
    if kind in masks.KINDS:
      kind = masks.KINDS.index(kind)
    elif type(kind) is not int or not 0 <= kind < len(masks.KINDS):
      errors.append(f"{where}: kind is {kind!r}; expected one of {', '.join(masks.KINDS)}")
    if image_id in prompts:
      errors.append(f"{where}: image id {image_id!r} is also in {prompts[image_id].where}")
    image = str(row.get("picture") or image_id)
    prompts[image_id] = PromptEntry(where, row["source"], kind, image)
    if "text" in row:
      texts[image_id] = _read(folder, errors, check_text, row["text"], f"{where}: text") or ""
  captions = _read(folder, errors, read_captions, folder, prompts) or {}
  if captions and texts:
    errors.append(f"captions and {_PROMPTS} both have texts; keep only one")
  for image_id, text in (texts | captions).items():
    prompts[image_id] = prompts[image_id]._replace(text=text)
  return prompts


def read_candidates(
  folder: Path, prompts: Mapping[str, PromptEntry], errors: list[str]
) -> dict[str, CandidateEntry]:
  """Reads candidates.jsonl, or lists the images in inpaint/ if that file is missing.

  Returns:
    {candidate: entry}.
  """
  if not (folder / _CANDIDATES).exists():
    names = (file.stem.rpartition("_") for file in folder.glob("inpaint/*.png"))
    by_number = sorted(names, key=lambda name: (name[0], len(name[2]), name[2]))
    return {
      f"{image_id}_{number}": CandidateEntry("", image_id, "unknown")
      for image_id, _, number in by_number
      if image_id in prompts
    }
  candidates = {}
  for where, row in _rows(folder / _CANDIDATES, ("image_id", "candidate", "policy"), errors):
    name, image_id = row["candidate"].removesuffix(".png"), row["image_id"]
    if _is_candidate_of(where, name, image_id, prompts, errors):
      if name in candidates:
        errors.append(f"{where}: candidate {name!r} is also in {candidates[name].where}")
      candidates[name] = CandidateEntry(where, image_id, row["policy"])
  return candidates


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
  own_layout = any((folder / name).exists() for name in (_PROMPTS, _CANDIDATES, _ANNOTATIONS))
  if rewards:
    rows = read_scores(folder, rewards, errors)
  else:
    rows = _read_annotated(folder, errors) if own_layout else _read_released(folder, errors)
  ratings = defaultdict(dict)
  for where, image_id, name, annotator, scores in rows:
    if not _is_candidate_of(where, name, image_id, prompts, errors):
      continue
    before = ratings[name].get(annotator)
    if name not in candidates:
      expected = _CANDIDATES if (folder / _CANDIDATES).exists() else "inpaint/"
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
  file = folder / _ANNOTATIONS
  if not file.exists():
    else_ = ", or give --config.rewards" if (folder / REWARD_SCORES).exists() else ""
    raise ValueError(
      f"{file}: no such file; write one line of scores per annotator and candidate{else_}"
    )
  for where, row in _rows(file, ("image_id", "candidate", "annotator", *CRITERIA), errors):
    in_range = lambda score: _is_number(score) and 0 <= score <= MAX_SCORE  # False for NaN
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
      f"{folder}: contains neither {_ANNOTATIONS} nor JSON files of scores; add one of them"
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
          and all(_is_number(number) and math.isfinite(number) for number in entry)
        ):
          name = name.removesuffix(".png")
          image_id = name.rpartition("_")[0] if image_id is None else image_id
          yield where, image_id, name, "", (float(entry[0]),)
        else:
          errors.append(f"{where}: {name!r} is not [score, rank], two finite numbers")


def read_lists(
  folder: Path, prompts: Mapping[str, PromptEntry], errors: list[str]
) -> dict[str, frozenset[str]]:
  """Reads train.txt, test.txt and validation.txt if they exist.

  Returns:
    {split: the image IDs in its list}, without the splits that have no list.
  """
  lists, places = {}, {}
  for split in (*SPLITS, VALIDATION):
    file = folder / f"{split}.txt"
    if not file.exists():
      continue
    ids = set()
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), 1):
      image_id, where = line.strip(), f"{file.name}:{number}"
      if not image_id:
        continue
      if image_id not in prompts:
        errors.append(f"{where}: unknown image id {image_id!r}")
      elif image_id in places and image_id not in ids:
        errors.append(f"{where}: {image_id!r} is also in {places[image_id]}; keep it in one split")
      places.setdefault(image_id, where)
      ids.add(image_id)
    lists[split] = frozenset(ids)
  return lists


def _read(folder: Path, errors: list[str], function: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a function; if it raises ValueError, appends the error and returns None."""
  try:
    return function(*arguments)
  except ValueError as error:
    errors.append(str(error).replace(f"{folder}/", ""))
    return None


def _rows(file: Path, fields: Sequence[str], errors: list[str]) -> Iterator[tuple[str, dict]]:
  """Yields ("FILE:LINE", object) of each line that holds a JSON object with all `fields`.

  Fields outside `_NUMBERS` are converted to strings.
  """
  for number, line in enumerate(file.read_bytes().splitlines(), 1):
    if not line.strip():
      continue
    where = f"{file.name}:{number}"
    try:
      row = json.loads(line)
    except ValueError as error:
      errors.append(f"{where}: not JSON: {getattr(error, 'msg', 'not UTF-8')}")
      continue
    if not isinstance(row, dict):
      errors.append(f"{where}: not a JSON object")
      continue
    missing = [name for name in fields if name not in row]
    texts = {name: row[name] for name in fields if name in row and name not in _NUMBERS}
    wrong = [name for name, text in texts.items() if type(text) not in (str, int) or text == ""]
    if missing:
      errors.append(f"{where}: missing {', '.join(missing)}")
    if wrong:
      errors.append(f"{where}: {', '.join(wrong)}: expected a non-empty string")
    if not missing and not wrong:
      yield where, row | {name: str(text) for name, text in texts.items()}


def _is_candidate_of(
  where: str,
  name: str,
  image_id: str,
  prompts: Mapping[str, PromptEntry],
  errors: list[str],
) -> bool:
  """Returns whether the image ID is known and the candidate is named ID_<k>.

  If not, it appends an error.
  """
  if image_id not in prompts:
    errors.append(f"{where}: unknown image id {image_id!r}")
  elif name.rpartition("_")[0] != image_id:
    errors.append(f"{where}: candidate {name!r} does not belong to image id {image_id!r}")
  else:
    return True
  return False


def _lines_of_keys(text: str) -> dict[str, deque[int]]:
  """Returns {key: numbers of the lines that hold this key} of a JSON text, in order."""
  lines, line, end = defaultdict(deque), 1, 0
  for string in re.finditer(r'("(?:[^"\\]|\\.)*")(\s*:)?', text):
    line, end = line + text.count("\n", end, string.start()), string.start()
    if string[2]:
      lines[json.loads(string[1])].append(line)
  return lines


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
