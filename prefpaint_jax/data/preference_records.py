"""Builds a tfds dataset of preferences from a folder of human scores."""
# Shapes: C candidates of one prompt.

from __future__ import annotations

import functools
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epy
from PIL import Image

from prefpaint_jax.data import images, masks
from prefpaint_jax.data.annotations import Annotations, Candidate, ScoredPrompt, read_annotations
from prefpaint_jax.data.examples import CRITERIA, SPLITS, VALIDATION, in_test, in_validation
from prefpaint_jax.data.records import encode_png, write_records
from prefpaint_jax.runtime.text import align_columns

with epy.lazy_imports():
  import tensorflow_datasets as tfds


def build_preferences(
  source: str | Path,
  output_dir: str | Path,
  weights: Mapping[str, float] = CRITERIA,
  test_share: float = 0.1,
  rewards: str = "",
) -> Path:
  """Builds a tfds dataset from a folder of human scores.

  The result is deterministic.

  Args:
    source: a folder of scores (see `data.annotations`).
    output_dir: the folder in which the dataset's folder is made.
    weights: of the criteria in the combined score; only their ratios matter.
    test_share: share of the images held out if `source` has neither train.txt nor test.txt.
    rewards: see `read_annotations`.

  Returns:
    The dataset's folder.

  Raises:
    BadAnnotations: the folder of scores has errors. The message lists them.
  """
  if not 0 <= test_share < 1:
    raise ValueError(f"test_share is {test_share}; expected a share from 0 to below 1")
  annotations = read_annotations(source, weights, rewards)
  splits = assign_splits(annotations, test_share)
  metadata = describe(annotations, splits, weights) | {"rewards": rewards}
  return write_records(
    output_dir,
    "preferences",
    "Inpaintings of incomplete images, with human scores.",
    _features(),
    {split: map(functools.partial(_record, metadata), ps) for split, ps in splits.items()},
    metadata,
  )


def assign_splits(annotations: Annotations, test_share: float) -> dict[str, list[ScoredPrompt]]:
  """Assigns each prompt to at most one split.

  With lists of training and test prompts, a prompt in no list is left out. With a list of one of
  them, the other split gets all other prompts. Without lists, a hash of the image's ID decides.
  Therefore new prompts do not change the splits of the old ones, and all crops of an image share a
  split. Without validation.txt, a hash also splits the validation images off the training images;
  if all training prompts have one image, single prompts.

  Returns:
    {split: its prompts}, for "train", "validation" and "test", without empty splits.

  Raises:
    ValueError: the training split is empty.
  """
  lists = annotations.lists

  def split_of(prompt: ScoredPrompt) -> str | None:
    if lists:
      named = [split for split, ids in lists.items() if prompt.image_id in ids]
      rest = [split for split in SPLITS if split not in lists]
      return (named + rest + [None])[0]
    return SPLITS[in_test(prompt.picture, test_share)]

  chosen = [split_of(prompt) for prompt in annotations.prompts]
  splits = {
    split: [p for p, its in zip(annotations.prompts, chosen, strict=True) if its == split]
    for split in (*SPLITS, VALIDATION)
  }
  train = splits["train"]
  if VALIDATION not in lists and len(train) > 1:
    single = len({prompt.picture for prompt in train}) == 1
    names = [prompt.image_id if single else prompt.picture for prompt in train]
    for split, wanted in (("train", False), (VALIDATION, True)):
      rows = zip(train, in_validation(names), strict=True)
      splits[split] = [prompt for prompt, chosen in rows if chosen == wanted]
  if not splits["train"]:
    raise ValueError(
      f"none of {len(chosen)} prompts is for training, {len(splits['test'])} are for testing; "
      "list some in train.txt, annotate more, or lower test_share"
    )
  return {split: prompts for split, prompts in splits.items() if prompts}


def describe(
  annotations: Annotations,
  splits: Mapping[str, Sequence[ScoredPrompt]],
  weights: Mapping[str, float],
) -> dict[str, Any]:
  """Returns the metadata of a dataset.

  mean, std       of the combined scores of the training split; they normalise all scores
  weights         of the criteria in the combined score
  alpha           Krippendorff's alpha of each criterion and of the combined score, or of "pairs";
                  None: unknown
  annotators      number of annotators; 0: unknown
  num_candidates  largest number of candidates of a prompt
  counts          {split: {"prompts": {kind: number}, "candidates": number, "ratings": number}}
  left_out        number of candidates and prompts without scores, and of prompts in no list
  """
  scores = np.array([c.score for prompt in splits["train"] for c in prompt.candidates])
  if np.ptp(scores) < 1e-6:
    raise ValueError(
      f"all {len(scores)} training scores are {scores[0]:g}, so they express no preference; "
      "annotate more candidates"
    )
  counts = {}
  for split, prompts in splits.items():
    kinds = Counter(masks.KINDS[prompt.kind] for prompt in prompts)
    candidates = [candidate for prompt in prompts for candidate in prompt.candidates]
    counts[split] = {
      "prompts": {kind: kinds[kind] for kind in masks.KINDS},
      "candidates": len(candidates),
      "ratings": sum(candidate.annotators for candidate in candidates),
    }
  alphas = annotations.agreement.items()
  kept = [prompt for prompts in splits.values() for prompt in prompts]
  return {
    "mean": float(scores.mean()),
    "std": float(scores.std()),
    "weights": {name: float(weights[name]) for name in CRITERIA},
    "alpha": {name: None if math.isnan(alpha) else alpha for name, alpha in alphas},
    "annotators": annotations.annotators,
    "num_candidates": max(len(prompt.candidates) for prompt in kept),
    "counts": counts,
    "left_out": annotations.left_out | {"unlisted": len(annotations.prompts) - len(kept)},
  }


def ranks(scores: Sequence[float]) -> np.ndarray:
  """Ranks scores [C]: int [C], 1 for the highest. Ties share their best rank, as in 1, 2, 2, 4.

  Scores that differ by less than 1e-6 are a tie, because the means of equal scores can differ by
  rounding.
  """
  scores = np.asarray(scores, np.float64)
  return 1 + np.sum(scores[None, :] > scores[:, None] + 1e-6, axis=1)


def _features() -> dict[str, Any]:
  """Returns the tfds features of a record, by name."""
  text, image = tfds.features.Text, tfds.features.Image
  return {
    "id": text(),
    "source": text(),
    "text": text(),
    "kind": tfds.features.ClassLabel(names=list(masks.KINDS)),
    "image": image(shape=(None, None, 3), encoding_format="png"),
    "mask": image(shape=(None, None, 1), encoding_format="png"),
    "masked_image": image(shape=(None, None, 3), encoding_format="png"),
    "candidates": tfds.features.Sequence(
      {
        "name": text(),
        "policy": text(),
        "image": image(shape=(None, None, 3), encoding_format="png"),
        **dict.fromkeys(CRITERIA, np.float32),
        "score": np.float32,
        "normalised_score": np.float32,
        "rank": np.int32,
        "annotators": np.int32,
      }
    ),
  }


def _record(metadata: Mapping[str, Any], prompt: ScoredPrompt) -> dict[str, Any]:
  """Reads the images of a prompt and returns its record."""
  mask = images.load_mask(prompt.mask)
  order = ranks([candidate.score for candidate in prompt.candidates])

  def record(candidate: Candidate, rank: int) -> dict[str, Any]:
    fields = candidate._asdict()
    return {
      "image": _stored(fields.pop("file")),
      "normalised_score": (candidate.score - metadata["mean"]) / metadata["std"],
      "rank": rank,
      **fields,
    }

  return {
    "id": prompt.image_id,
    "source": prompt.source,
    "text": prompt.text,
    "kind": prompt.kind,
    "image": _stored(prompt.image),
    "mask": encode_png(mask[..., 0]),
    "masked_image": encode_png(images.load_image(prompt.image) * (1 - mask)),
    "candidates": [record(*pair) for pair in zip(prompt.candidates, map(int, order), strict=True)],
  }


def _stored(file: Path) -> io.BytesIO:
  """Returns the bytes of an image file as an RGB PNG; re-encodes it only if it is not one."""
  with Image.open(file) as image:
    plain = image.format == "PNG" and image.mode == "RGB"
    plain = plain and not {"transparency", "exif", "icc_profile", "gamma"} & set(image.info)
  return io.BytesIO(file.read_bytes()) if plain else encode_png(images.load_image(file))


def summary(metadata: Mapping[str, Any]) -> str:
  """Formats the metadata of a preference dataset as text: counts, score statistics, agreement."""
  kinds = masks.KINDS
  table = [("", *kinds, "prompts", "candidates", "ratings")]
  for split, counts in metadata["counts"].items():
    numbers = [counts["prompts"][kind] for kind in kinds]
    row = (split, *numbers, sum(numbers), counts["candidates"], counts["ratings"])
    table.append(tuple(map(str, row)))
  lines = align_columns(table, right=True)
  alphas = ", ".join(
    f"{name} {'unknown' if alpha is None else format(alpha, '.3f')}"
    for name, alpha in metadata["alpha"].items()
  )
  left_out = metadata["left_out"]
  weights = ", ".join(f"{name} {weight:g}" for name, weight in metadata["weights"].items())
  compared = "pairs" in metadata["alpha"]
  agreement = (
    f"agreement of {metadata['annotators'] or 'an unknown number of'} annotators "
    f"(Krippendorff's alpha, {'nominal' if compared else 'interval'}): {alphas}"
  )
  made_of = metadata.get("rewards") or ("of pairs, Bradley-Terry" if compared else weights)
  lines += [
    f"combined score ({made_of}): mean {metadata['mean']:z.3f}, standard "
    f"deviation {metadata['std']:.3f} over the training split",
    "each reward is standardised over all candidates" if metadata.get("rewards") else agreement,
    f"left out: {left_out['candidates']} candidates without a score, {left_out['prompts']} prompts "
    f"without a scored candidate, {left_out['unlisted']} prompts in no list",
  ]
  return "\n".join(lines)
