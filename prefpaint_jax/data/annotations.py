"""Human scores of inpaintings: reads them, checks the images, and joins the scores by prompt.

A folder holds the images of every prompt:

  masks/ID_mask.png               the mask, white = missing
  images/ID.png                   the whole image, or instead of it
  masks_color/ID_mask_color.png   the image with the missing pixels black
  inpaint/ID_<k>.png              the candidates

and their scores, in one of two layouts.

A candidates folder has three files with one JSON object per line:
  prompts.jsonl      {"image_id", "source", "kind"}, "picture" if several IDs share one image, and
                     "text" if the prompt has one
  candidates.jsonl   {"image_id", "candidate", "policy"}
  annotations.jsonl  {"image_id", "candidate", "annotator", "structure", "texture", "overall"}
The first two are optional. Without them, every mask is a prompt and every image in inpaint/ is a
candidate. A released folder has JSON files of {candidate: [score, rank]} or
{image_id: {candidate: [score, rank]}} instead, with one combined score per candidate, which is
often normalised already. A candidates folder may have comparisons, pairs.jsonl, instead of
annotations.jsonl (see `data.answers`); they become one combined score per candidate. Instead of
prompts.jsonl, captions.jsonl or captions/ID.txt may have the texts (see `data.captions`).

train.txt, validation.txt and test.txt may list the IDs of the splits, one per line. The reader
skips no errors: it collects all of them and raises one report that names the file and the line of
each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prefpaint_jax.data import images, masks
from prefpaint_jax.data.agreement import agreement_by_criterion
from prefpaint_jax.data.annotation_files import (
  PromptEntry,
  read_candidates,
  read_lists,
  read_prompts,
)
from prefpaint_jax.data.answers import has_pairs, read_answers
from prefpaint_jax.data.comparisons import comparison_agreement, rate_comparisons
from prefpaint_jax.data.examples import CRITERIA
from prefpaint_jax.data.rating_files import Rating, read_ratings
from prefpaint_jax.runtime.files import check_is_folder

MAX_ERRORS = 50  # that a report lists; it counts the others


class Candidate(NamedTuple):
  """One inpainting and its scores. A criterion is NaN if only a combined score is known."""

  name: str
  policy: str
  file: Path
  structure: float  # mean over the annotators, 0 to 7; so are the next two
  texture: float
  overall: float
  score: float  # the combined score
  annotators: int


class ScoredPrompt(NamedTuple):
  """One prompt and its scored candidates, in the order of their file, else of their numbers."""

  image_id: str
  source: str
  kind: int  # index into masks.KINDS
  picture: str  # ID of the image the prompt was drawn from; its prompts belong in one split
  image: Path  # the whole image if there is one, else the image with the missing pixels black
  mask: Path
  candidates: tuple[Candidate, ...]
  text: str = ""


class Annotations(NamedTuple):
  """The content of a folder of scores."""

  prompts: tuple[ScoredPrompt, ...]
  lists: dict[str, frozenset[str]]  # {split: the IDs in SPLIT.txt}, for the files that exist
  agreement: dict[str, float]  # Krippendorff's alpha: each criterion and combined; or "pairs"
  annotators: int  # number of annotators; 0: unknown
  left_out: dict[str, int]  # candidates without a score, prompts without a scored candidate


class BadAnnotations(ValueError):
  """The errors in a folder of scores: a line that counts them, then one line for each."""

  def __init__(self, folder: Path, errors: Sequence[str]):
    more = len(errors) - MAX_ERRORS
    lines = [f"{len(errors)} errors in the annotations of {folder}. Fix all of them and rerun:"]
    lines += errors[:MAX_ERRORS] + ([f"and {more} more"] if more > 0 else [])
    super().__init__("\n".join(lines))


def read_annotations(
  folder: str | Path, weights: Mapping[str, float] = CRITERIA, rewards: str = ""
) -> Annotations:
  """Reads a folder of scores and decodes all of its images once to check them.

  The scores of several annotators are averaged. Candidates without a score are left out and
  counted, and so are prompts without a scored candidate.

  Args:
    folder: in one of the two layouts that the module describes.
    weights: of the criteria in the combined score; only their ratios matter.
    rewards: names and weights of rewards, whose scores in scores.jsonl are read instead of people's
      (see `data.reward_scores`).

  Raises:
    BadAnnotations: the folder has errors. The message lists them.
    ValueError: the weights are invalid, or the folder has no scores.
  """
  folder, errors = Path(folder), []
  weights = _check_weights(weights)
  check_is_folder(folder, "a folder with masks/, inpaint/ and scores")
  prompts = read_prompts(folder, errors)
  candidates = read_candidates(folder, prompts, errors)
  if compared := not rewards and has_pairs(folder):
    answers = read_answers(folder, prompts, candidates, errors)
    ratings = rate_comparisons(answers)
  else:
    ratings = read_ratings(folder, prompts, candidates, errors, rewards)
  lists = read_lists(folder, prompts, errors)

  scored = defaultdict(list)
  for name, candidate in candidates.items():
    if name in ratings:
      scored[candidate.image_id].append(name)
  joined, places = [], []
  for image_id, names in ((id_, scored[id_]) for id_ in prompts if id_ in scored):
    where = [candidates[name].where or next(iter(ratings[name].values())).where for name in names]
    places.append([prompts[image_id].where or where[0], *where])
    rated = [
      _join(folder, name, candidates[name].policy, list(ratings[name].values()), weights)
      for name in names
    ]
    joined.append(_scored_prompt(folder, image_id, prompts[image_id], rated))
  with ThreadPoolExecutor() as pool:  # PIL's decoders release the GIL
    checked = list(pool.map(lambda prompt, at: _check(folder, prompt, at), joined, places))
  errors += [error for _, found in checked for error in found]
  if errors:
    raise BadAnnotations(folder, errors)
  if not joined:
    raise ValueError(f"{folder}: none of {len(candidates)} candidates has a score; annotate them")
  agreement = (
    {"pairs": comparison_agreement(answers)[0]}
    if compared
    else agreement_by_criterion(ratings, weights)
  )
  everyone = {annotator for rated in ratings.values() for annotator in rated}
  return Annotations(
    prompts=tuple(prompt for prompt, _ in checked),
    lists=lists,
    agreement=agreement,
    annotators=len(everyone - {""}),
    left_out={
      "candidates": len(candidates) - len(ratings),
      "prompts": len(prompts) - len(joined),
    },
  )


def _check(
  folder: Path, prompt: ScoredPrompt, places: Sequence[str]
) -> tuple[ScoredPrompt, list[str]]:
  """Decodes the images of a prompt and collects the errors.

  Args:
    places: FILE:LINE of the prompt, then of each of its candidates.

  Returns:
    The prompt, with its kind derived from the mask if no file names it; and the errors.
  """
  errors = []

  def load(where: str, function, *arguments) -> np.ndarray | None:
    try:
      return function(*arguments)
    except ValueError as error:
      errors.append(f"{where}: {str(error).replace(f'{folder}/', '')}")
      return None

  image = load(places[0], images.load_image, prompt.image)
  size = None if image is None else image.shape[:2]
  mask = load(places[0], images.load_mask, prompt.mask, size)
  if size is None and mask is not None:
    size = mask.shape[:2]
  for candidate, where in zip(prompt.candidates, places[1:], strict=True):
    sample = load(where, images.load_image, candidate.file)
    if sample is not None and size is not None and sample.shape[:2] != size:
      found, expected = ("x".join(map(str, x)) for x in (sample.shape[:2], size))
      name = candidate.file.relative_to(folder)
      errors.append(f"{where}: {name} is {found}, its prompt is {expected}; give both one size")
  if prompt.kind is None and mask is not None:
    prompt = prompt._replace(kind=masks.mask_kind(mask))
  return prompt, errors


def _check_weights(weights: Mapping[str, float]) -> np.ndarray:
  """Returns the weights as an array [3] in the order of the criteria, with sum 1."""
  values = np.array([weights.get(name, math.nan) for name in CRITERIA], np.float64)
  good = set(weights) == set(CRITERIA) and np.isfinite(values).all() and (values >= 0).all()
  if not good or values.sum() <= 0:
    raise ValueError(
      f"weights are {dict(weights)}; give {', '.join(CRITERIA)}, none negative and not all 0"
    )
  return values / values.sum()


def _scored_prompt(
  folder: Path, image_id: str, prompt: PromptEntry, candidates: Sequence[Candidate]
) -> ScoredPrompt:
  """Adds the paths of the image and of the mask to a prompt."""
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
    text=prompt.text,
  )


def _join(
  folder: Path, name: str, policy: str, rated: Sequence[Rating], weights: np.ndarray
) -> Candidate:
  """Averages the scores of a candidate's annotators."""
  means = np.mean([rating.scores for rating in rated], axis=0)
  combined = float(means[0]) if len(means) == 1 else float(means @ weights)
  criteria = [math.nan] * len(CRITERIA) if len(means) == 1 else means.tolist()
  return Candidate(
    name, policy, folder / "inpaint" / f"{name}.png", *criteria, combined, len(rated)
  )
