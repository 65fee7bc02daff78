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

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prefpaint_jax.data import images, masks
from prefpaint_jax.data.agreement import _agreement
from prefpaint_jax.data.annotation_files import (
  _Prompt,
  _Rating,
  _read_candidates,
  _read_lists,
  _read_prompts,
  _read_ratings,
)
from prefpaint_jax.data.examples import CRITERIA

MAX_FAULTS = 50  # of a report; the others are counted


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
