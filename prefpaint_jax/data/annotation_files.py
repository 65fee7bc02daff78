"""Readers of a folder of scores, in both layouts; they collect every error with its line."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefpaint_jax.data import masks
from prefpaint_jax.data.examples import CRITERIA, MAX_SCORE, SPLITS

_NUMBERS = ("kind", *CRITERIA)  # fields that need not be text
_PROMPTS, _CANDIDATES, _ANNOTATIONS = "prompts.jsonl", "candidates.jsonl", "annotations.jsonl"


class _Prompt(NamedTuple):
  """What is known of a prompt before its pictures and scores are read."""

  where: str  # FILE:LINE, "" where a picture file is all that speaks of it
  source: str
  kind: int | None
  picture: str


class _Painted(NamedTuple):
  """What is known of a candidate before its picture and scores are read."""

  where: str
  image_id: str
  policy: str


class _Rating(NamedTuple):
  where: str
  scores: tuple[float, ...]  # of the three criteria, or the combined one alone


# ------------------------------------------------------------------------------------------- tables
def _read_prompts(folder: Path, faults: list[str]) -> dict[str, _Prompt]:
  """{image_id: _Prompt}; a line with a fault counts if its ID is known, so as to be told once."""
  if not (folder / _PROMPTS).exists():
    ids = sorted(f.name.removesuffix("_mask.png") for f in folder.glob("masks/*_mask.png"))
    return {image_id: _Prompt("", "unknown", None, image_id) for image_id in ids}
  prompts = {}
  for where, row in _rows(folder / _PROMPTS, ("image_id", "source", "kind"), faults):
    image_id, kind = row["image_id"], row["kind"]
    if kind in masks.KINDS:
      kind = masks.KINDS.index(kind)
    elif type(kind) is not int or not 0 <= kind < len(masks.KINDS):
      faults.append(f"{where}: kind is {kind!r}: give one of {', '.join(masks.KINDS)}")
    if image_id in prompts:
      faults.append(f"{where}: image id {image_id!r} is in {prompts[image_id].where} too")
    prompts[image_id] = _Prompt(where, row["source"], kind, str(row.get("picture") or image_id))
  return prompts


def _read_candidates(
  folder: Path, prompts: Mapping[str, _Prompt], faults: list[str]
) -> dict[str, _Painted]:
  """{name: _Painted}"""
  if not (folder / _CANDIDATES).exists():
    names = (file.stem.rpartition("_") for file in folder.glob("inpaint/*.png"))
    by_number = sorted(names, key=lambda name: (name[0], len(name[2]), name[2]))
    return {
      f"{image_id}_{number}": _Painted("", image_id, "unknown")
      for image_id, _, number in by_number
      if image_id in prompts
    }
  painted = {}
  for where, row in _rows(folder / _CANDIDATES, ("image_id", "candidate", "policy"), faults):
    name, image_id = row["candidate"].removesuffix(".png"), row["image_id"]
    if _belongs(where, name, image_id, prompts, faults):
      if name in painted:
        faults.append(f"{where}: candidate {name!r} is in {painted[name].where} too")
      painted[name] = _Painted(where, image_id, row["policy"])
  return painted


def _read_ratings(
  folder: Path, prompts: Mapping[str, _Prompt], painted: Mapping[str, _Painted], faults: list[str]
) -> dict[str, dict[str, _Rating]]:
  """{candidate: {annotator: _Rating}}, in either layout."""
  ours = any((folder / name).exists() for name in (_PROMPTS, _CANDIDATES, _ANNOTATIONS))
  ratings = defaultdict(dict)
  for where, image_id, name, annotator, scores in (
    _read_annotated(folder, faults) if ours else _read_released(folder, faults)
  ):
    if not _belongs(where, name, image_id, prompts, faults):
      continue
    before = ratings[name].get(annotator)
    if name not in painted:
      expected = _CANDIDATES if (folder / _CANDIDATES).exists() else "inpaint/"
      faults.append(f"{where}: unknown candidate {name!r}: it is not in {expected}")
    elif before is None:
      ratings[name][annotator] = _Rating(where, scores)
    elif annotator:
      faults.append(f"{where}: {annotator!r} scored {name!r} in {before.where} already")
    elif scores != before.scores:  # released sets say the same thing flat and grouped
      faults.append(f"{where}: {name!r} has another score in {before.where}")
  return {name: rated for name, rated in ratings.items() if rated}


def _read_annotated(folder: Path, faults: list[str]) -> Iterator[tuple]:
  """(where, image id, candidate, annotator, the scores of the three criteria)"""
  file = folder / _ANNOTATIONS
  if not file.exists():
    raise ValueError(f"{file}: no such file: write the annotators' scores into it, one a line")
  for where, row in _rows(file, ("image_id", "candidate", "annotator", *CRITERIA), faults):
    in_range = lambda score: _is_number(score) and 0 <= score <= MAX_SCORE  # NaN is not
    bad = [name for name in CRITERIA if not in_range(row[name])]
    for name in bad:
      faults.append(
        f"{where}: {name} is {json.dumps(row[name])}: give a number from 0 to {MAX_SCORE:g}"
      )
    if not bad:
      scores = tuple(float(row[name]) for name in CRITERIA)
      name = row["candidate"].removesuffix(".png")
      yield where, row["image_id"], name, row["annotator"], scores


def _read_released(folder: Path, faults: list[str]) -> Iterator[tuple]:
  """(where, image id, candidate, "", (the combined score,)) of JSON files, grouped or not."""
  files = sorted(folder.glob("*.json"))
  if not files:
    raise ValueError(
      f"{folder}: neither {_ANNOTATIONS} nor JSON files of scores are in it: put them there"
    )
  for file in files:
    text = file.read_text("utf-8", errors="replace")
    try:
      # Tuples of pairs for objects: a key that comes twice is seen, and arrays stay lists.
      pairs = json.loads(text, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
      faults.append(f"{file.name}:{error.lineno}: not JSON: {error.msg}")
      continue
    if not isinstance(pairs, tuple):
      faults.append(f"{file.name}:1: not a JSON object of scores")
      continue
    lines = _lines_of_keys(text)
    for key, value in pairs:
      where = f"{file.name}:{lines[key].popleft()}"
      if isinstance(value, tuple):
        judged = [(f"{file.name}:{lines[name].popleft()}", key, name, v) for name, v in value]
      else:
        judged = [(where, None, key, value)]
      for where, image_id, name, said in judged:
        if (
          isinstance(said, list)
          and len(said) == 2
          and all(_is_number(number) and math.isfinite(number) for number in said)
        ):
          name = name.removesuffix(".png")
          image_id = name.rpartition("_")[0] if image_id is None else image_id
          yield where, image_id, name, "", (float(said[0]),)
        else:
          faults.append(f"{where}: {name!r} is not [score, rank], two finite numbers")


def _read_lists(
  folder: Path, prompts: Mapping[str, _Prompt], faults: list[str]
) -> dict[str, frozenset[str]]:
  """{split: its IDs} of the lists that are there."""
  lists, places = {}, {}
  for split in SPLITS:
    file = folder / f"{split}.txt"
    if not file.exists():
      continue
    ids = set()
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), 1):
      image_id, where = line.strip(), f"{file.name}:{number}"
      if not image_id:
        continue
      if image_id not in prompts:
        faults.append(f"{where}: unknown image id {image_id!r}")
      elif image_id in places and image_id not in ids:
        faults.append(f"{where}: {image_id!r} is in {places[image_id]} too: keep it in one split")
      places.setdefault(image_id, where)
      ids.add(image_id)
    lists[split] = frozenset(ids)
  return lists


def _rows(file: Path, fields: Sequence[str], faults: list[str]) -> Iterator[tuple[str, dict]]:
  """("FILE:LINE", object) of each line that is an object with these fields, texts as strings."""
  for number, line in enumerate(file.read_bytes().splitlines(), 1):
    if not line.strip():
      continue
    where = f"{file.name}:{number}"
    try:
      row = json.loads(line)
    except ValueError as error:
      faults.append(f"{where}: not JSON: {getattr(error, 'msg', 'not UTF-8')}")
      continue
    if not isinstance(row, dict):
      faults.append(f"{where}: not a JSON object")
      continue
    missing = [name for name in fields if name not in row]
    texts = {name: row[name] for name in fields if name in row and name not in _NUMBERS}
    wrong = [name for name, text in texts.items() if type(text) not in (str, int) or text == ""]
    if missing:
      faults.append(f"{where}: missing {', '.join(missing)}")
    if wrong:
      faults.append(f"{where}: {', '.join(wrong)}: give a string that is not empty")
    if not missing and not wrong:
      yield where, row | {name: str(text) for name, text in texts.items()}


def _belongs(
  where: str, name: str, image_id: str, prompts: Mapping[str, _Prompt], faults: list[str]
) -> bool:
  """Whether the image ID is known and the candidate's name is ID_<k>; else it is a fault."""
  if image_id not in prompts:
    faults.append(f"{where}: unknown image id {image_id!r}")
  elif name.rpartition("_")[0] != image_id:
    faults.append(f"{where}: candidate {name!r} is not one of image id {image_id!r}")
  else:
    return True
  return False


def _lines_of_keys(text: str) -> dict[str, deque[int]]:
  """{key: the lines of a JSON text where it is one}, in order."""
  lines, line, end = defaultdict(deque), 1, 0
  for string in re.finditer(r'("(?:[^"\\]|\\.)*")(\s*:)?', text):
    line, end = line + text.count("\n", end, string.start()), string.start()
    if string[2]:
      lines[json.loads(string[1])].append(line)
  return lines


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
