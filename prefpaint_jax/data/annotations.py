"""Human scores of inpaintings: read, checked against the pictures, and joined by prompt.

A folder holds the mask of every prompt, its whole picture or the one with the hole blacked, and its
candidates:

  masks/ID_mask.png    images/ID.png or masks_color/ID_mask_color.png    inpaint/ID_<k>.png

and what was said of them, in one of two layouts.

A candidates folder has a line of JSON for each of
  prompts.jsonl      {"image_id", "source", "kind"}, and "picture" where several IDs share one
  candidates.jsonl   {"image_id", "candidate", "policy"}
  annotations.jsonl  {"image_id", "candidate", "annotator", "structure", "texture", "overall"}
of which the first two may be missing: the prompts are then those with a mask, the candidates those
in inpaint/. A released folder has JSON files of {candidate: [score, rank]} or
{image_id: {candidate: [score, rank]}} instead, with one combined score, often normalised already.

train.txt and test.txt may list the IDs of the splits, one a line. Faults are never skipped: all of
them are collected, and refused in one report that names the file and line of each.
"""
# Shapes: U units (candidates), R ratings of one.

from __future__ import annotations

import json
import math
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefpaint_jax.data import images, masks
from prefpaint_jax.simulation import CRITERIA, MAX_SCORE

SPLITS = ("train", "test")
MAX_FAULTS = 50  # of a report; the others are counted

_NUMBERS = ("kind", *CRITERIA)  # fields that need not be text
_PROMPTS, _CANDIDATES, _ANNOTATIONS = "prompts.jsonl", "candidates.jsonl", "annotations.jsonl"


class Candidate(NamedTuple):
  """One inpainting and what was said of it; NaN where only a combined score is known."""

  name: str
  policy: str
  file: Path
  structure: float  # this and the next two: the annotators' mean, 0 to 7
  texture: float
  overall: float
  score: float  # the combined score
  annotators: int


class ScoredPrompt(NamedTuple):
  """One prompt and its scored candidates, in the order of their file or else of their number."""

  image_id: str
  source: str
  kind: int  # index into masks.KINDS
  picture: str  # what the prompt was cut from: prompts of one picture belong in one split
  image: Path  # the whole picture where that is known, else the one with the hole blacked
  mask: Path
  candidates: tuple[Candidate, ...]


class Annotations(NamedTuple):
  prompts: tuple[ScoredPrompt, ...]
  lists: dict[str, frozenset[str]]  # the IDs in train.txt and test.txt, as far as these are there
  agreement: dict[str, float]  # Krippendorff's alpha of each criterion, and of the combined score
  annotators: int  # people; 0 where nothing is said of them
  left_out: dict[str, int]  # candidates without a score, prompts without a scored candidate


class BadAnnotations(ValueError):
  """Faults in a folder of scores: a line that counts them, then one for each."""

  def __init__(self, folder: Path, faults: Sequence[str]):
    more = len(faults) - MAX_FAULTS
    lines = [f"{folder}: {len(faults)} faults; mend them all, nothing is skipped"]
    lines += faults[:MAX_FAULTS] + ([f"and {more} more"] if more > 0 else [])
    super().__init__("\n".join(lines))


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


def read_annotations(folder: str | Path, weights: Mapping[str, float] = CRITERIA) -> Annotations:
  """Everything in a folder of scores; `weights` of the criteria make the combined score.

  Several annotators of one candidate are averaged. Candidates that nobody scored are left out, and
  so are prompts that have no others; they are counted, they are no fault.

  Raises:
    BadAnnotations: lists every fault.
  """
  folder, faults = Path(folder), []
  weights = _check_weights(weights)
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such folder: give one with masks/, inpaint/ and scores")
  prompts = _read_prompts(folder, faults)
  painted = _read_candidates(folder, prompts, faults)
  ratings = _read_ratings(folder, prompts, painted, faults)
  lists = _read_lists(folder, prompts, faults)

  scored = defaultdict(list)
  for name, candidate in painted.items():
    if name in ratings:
      scored[candidate.image_id].append(name)
  joined, places = [], []
  for image_id, names in ((id_, scored[id_]) for id_ in prompts if id_ in scored):
    said = [painted[name].where or next(iter(ratings[name].values())).where for name in names]
    places.append([prompts[image_id].where or said[0], *said])
    candidates = [
      _join(folder, name, painted[name].policy, list(ratings[name].values()), weights)
      for name in names
    ]
    joined.append(_scored_prompt(folder, image_id, prompts[image_id], candidates))
  with ThreadPoolExecutor() as pool:  # decoders let go of the interpreter's lock
    checked = list(pool.map(lambda prompt, at: _check(folder, prompt, at), joined, places))
  faults += [fault for _, found in checked for fault in found]
  if faults:
    raise BadAnnotations(folder, faults)
  if not joined:
    raise ValueError(f"{folder}: none of {len(painted)} candidates has a score: annotate them")
  everyone = {annotator for rated in ratings.values() for annotator in rated}
  return Annotations(
    prompts=tuple(prompt for prompt, _ in checked),
    lists=lists,
    agreement=_agreement(ratings, weights),
    annotators=len(everyone - {""}),
    left_out={
      "candidates": len(painted) - len(ratings),
      "prompts": len(prompts) - len(joined),
    },
  )


def krippendorff_alpha(ratings: np.ndarray) -> float:
  """How far raters agree: 1 wholly, 0 as by chance, below 0 less than that (interval metric).

  ratings: [U, R], NaN where a rating is missing; which rater gave it does not matter. With m_u
  ratings of unit u and n of all units that have two or more,

    alpha = 1 − D_o / D_e,  D_o = (1/n) Σ_u 1/(m_u − 1) Σ_{i≠j in u} (x_i − x_j)²,
                            D_e = 1/(n(n − 1)) Σ_{i≠j} (x_i − x_j)²

  computed from sums of squares about the means, as Σ_{i≠j} (x_i − x_j)² = 2 m Σ_i (x_i − x̄)².
  NaN where that says nothing: no unit has two ratings, or all ratings are equal.
  (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.)
  """
  ratings = np.asarray(ratings, np.float64)
  ratings = ratings[np.sum(~np.isnan(ratings), axis=1) >= 2]
  if not len(ratings) or np.nanmax(ratings) - np.nanmin(ratings) < 1e-9:
    return math.nan
  counts = np.sum(~np.isnan(ratings), axis=1)
  number = counts.sum()
  within = np.nansum((ratings - np.nanmean(ratings, axis=1, keepdims=True)) ** 2, axis=1)
  total = np.nansum((ratings - np.nanmean(ratings)) ** 2)
  return float(1 - (number - 1) / number * np.sum(counts / (counts - 1) * within) / total)


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


# ----------------------------------------------------------------------------------------- pictures


def _check(
  folder: Path, prompt: ScoredPrompt, places: Sequence[str]
) -> tuple[ScoredPrompt, list[str]]:
  """Decodes the pictures of a prompt; its kind, seen from the mask where nobody said; faults.

  places: FILE:LINE that speaks of the prompt, and of each of its candidates.
  """
  faults = []

  def load(where: str, function, *arguments) -> np.ndarray | None:
    try:
      return function(*arguments)
    except ValueError as error:
      faults.append(f"{where}: {str(error).replace(f'{folder}/', '')}")
      return None

  image = load(places[0], images.load_image, prompt.image)
  size = None if image is None else image.shape[:2]
  mask = load(places[0], images.load_mask, prompt.mask, size)
  if size is None and mask is not None:
    size = mask.shape[:2]
  for candidate, where in zip(prompt.candidates, places[1:], strict=True):
    painted = load(where, images.load_image, candidate.file)
    if painted is not None and size is not None and painted.shape[:2] != size:
      found, expected = ("x".join(map(str, x)) for x in (painted.shape[:2], size))
      name = candidate.file.relative_to(folder)
      faults.append(f"{where}: {name} is {found}, its prompt {expected}: give both the same size")
  if prompt.kind is None and mask is not None:
    prompt = prompt._replace(kind=masks.mask_kind(mask))
  return prompt, faults


# ------------------------------------------------------------------------------------------- scores


def _check_weights(weights: Mapping[str, float]) -> np.ndarray:
  """[3], in the order of the criteria, of sum 1."""
  values = np.array([weights.get(name, math.nan) for name in CRITERIA], np.float64)
  good = set(weights) == set(CRITERIA) and np.isfinite(values).all() and (values >= 0).all()
  if not good or values.sum() <= 0:
    raise ValueError(
      f"weights are {dict(weights)}: give {', '.join(CRITERIA)}, none below 0 and one above"
    )
  return values / values.sum()


def _scored_prompt(
  folder: Path, image_id: str, prompt: _Prompt, candidates: Sequence[Candidate]
) -> ScoredPrompt:
  """Says where the pictures of a prompt must lie."""
  whole = folder / "images" / f"{image_id}.png"
  masked = folder / "masks_color" / f"{image_id}_mask_color.png"
  return ScoredPrompt(
    image_id=image_id,
    source=prompt.source,
    kind=prompt.kind,
    picture=prompt.picture,
    image=whole if whole.exists() else masked,
    mask=folder / "masks" / f"{image_id}_mask.png",
    candidates=tuple(candidates),
  )


def _join(
  folder: Path, name: str, policy: str, rated: Sequence[_Rating], weights: np.ndarray
) -> Candidate:
  """A candidate with the mean of what its annotators said."""
  means = np.mean([rating.scores for rating in rated], axis=0)
  combined = float(means[0]) if len(means) == 1 else float(means @ weights)
  criteria = [math.nan] * len(CRITERIA) if len(means) == 1 else means.tolist()
  return Candidate(
    name, policy, folder / "inpaint" / f"{name}.png", *criteria, combined, len(rated)
  )


def _agreement(
  ratings: Mapping[str, Mapping[str, _Rating]], weights: np.ndarray
) -> dict[str, float]:
  """Krippendorff's alpha of each criterion and of the combined score, over all candidates."""
  most = max(map(len, ratings.values()))
  table = np.full((len(ratings), most, len(CRITERIA)), np.nan)
  for row, rated in zip(table, ratings.values(), strict=True):
    scores = [rating.scores for rating in rated.values() if len(rating.scores) == len(CRITERIA)]
    row[: len(scores)] = np.reshape(scores, (len(scores), len(CRITERIA)))
  alphas = {name: krippendorff_alpha(table[..., i]) for i, name in enumerate(CRITERIA)}
  return alphas | {"combined": krippendorff_alpha(table @ weights)}
