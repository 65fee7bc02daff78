"""Preferences: prompts with their candidates and what people think of these, to build, open, feed.

  python -m prefpaint_jax.data.preferences --config=configs/preferences.py --workdir=DIR \\
      --config.source=FOLDER

reads a folder of human scores (data/annotations.py says which), refuses all of its faults in one
report, and writes a tfds data set into DIR that a reward is trained on.
"""
# Shapes: H W pixels, C candidates of one prompt, b prompts of one process.

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from etils import epy
from ml_collections import ConfigDict
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from prefpaint_jax import app
from prefpaint_jax.data import images, masks
from prefpaint_jax.data.annotations import (
  SPLITS,
  Annotations,
  BadAnnotations,
  Candidate,
  ScoredPrompt,
  read_annotations,
)
from prefpaint_jax.data.records import (
  encode_png,
  endless_batches,
  find_records,
  to_bytes,
  write_records,
)
from prefpaint_jax.simulation import CRITERIA

with epy.lazy_imports():  # slow: only where data are read or written
  import grain
  import tensorflow_datasets as tfds


class Preference(TypedDict):
  id: str
  kind: int  # index into masks.KINDS
  masked_image: np.ndarray  # uint8 [H, W, 3], the hole black
  mask: np.ndarray  # uint8 [H, W, 1], 1 = missing
  candidates: np.ndarray  # uint8 [C, H, W, 3]
  scores: np.ndarray  # float32 [C], normalised over the training split
  raw_scores: np.ndarray  # float32 [C], combined from the criteria, as people gave them


# --------------------------------------------------------------------------------------------- open


def open_preferences(
  folder: str | Path, split: str, size: int | tuple[int, int] | None = None
) -> StoredPreferences:
  """The preferences of one split, to be indexed in any order; decoded when asked for.

  `folder` is what `build_preferences` wrote, or the folder that this lies in. `size`, a side or
  (height, width), resizes what is read: pictures antialiased, masks by the nearest pixel.
  """
  return StoredPreferences(folder, split, (size, size) if isinstance(size, int) else size)


def read_metadata(folder: str | Path) -> dict[str, Any]:
  """What was found out when the data set was built: see `describe`."""
  return json.loads((_find(folder) / "metadata.json").read_text())


class StoredPreferences(Sequence[Preference]):
  """Preferences of a tfds folder, read without TensorFlow."""

  num_candidates: int  # the most that any prompt of the data set has, in whatever split

  def __init__(self, folder: str | Path, split: str, size: tuple[int, int] | None = None):
    folder = _find(folder)
    self.num_candidates = read_metadata(folder)["num_candidates"]
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
      raise ValueError(
        f"preferences: {folder} has no split {split!r}: it has {', '.join(builder.info.splits)}"
      )
    # tfds' own reader takes ten times as long, for all the features that are not asked for.
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    self._records = builder.as_data_source(split=split, deserialize_method=raw)
    self._size = size

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Preference:
    from tensorflow_datasets.proto import tf_example_pb2  # slow

    record = self._records[range(len(self))[index]]
    feature = tf_example_pb2.Example.FromString(record).features.feature
    id_ = feature["id"].bytes_list.value[0].decode()
    mask = _decode(feature["mask"].bytes_list.value[0])[..., None] // 255
    if self._size is None or self._size == mask.shape[:2]:
      resize = lambda image: image
      masked_image = _decode(feature["masked_image"].bytes_list.value[0])
    else:
      resize = lambda image: to_bytes(images.resize_image(image / np.float32(255), self._size))
      mask = images.resize_mask(mask, self._size)
      images.check_mask(mask, self._size, f"preference {id_} at {self._size[0]}x{self._size[1]}")
      # From the whole picture, so that the hole's black does not run into what is known.
      masked_image = resize(_decode(feature["image"].bytes_list.value[0])) * (1 - mask)
    return Preference(
      id=id_,
      kind=feature["kind"].int64_list.value[0],
      masked_image=masked_image,
      mask=mask,
      candidates=np.stack(
        [resize(_decode(x)) for x in feature["candidates/image"].bytes_list.value]
      ),
      scores=np.array(feature["candidates/normalised_score"].float_list.value, np.float32),
      raw_scores=np.array(feature["candidates/score"].float_list.value, np.float32),
    )


def _find(folder: str | Path) -> Path:
  """The data set in a folder, or in one that this lies in."""
  # Other data sets have no metadata.
  found = [path for path in find_records(folder) if (path / "metadata.json").exists()]
  if len(found) != 1:
    raise ValueError(
      f"preferences: {folder} holds {len(found)} data sets: name the folder of one, "
      "as prefpaint_jax.data.preferences writes it"
    )
  return found[0]


def _decode(png: bytes) -> np.ndarray:
  """uint8 [H, W, 3] or [H, W]; Image.open would try several formats first."""
  return np.asarray(PngImageFile(io.BytesIO(png)))


# --------------------------------------------------------------------------------------------- feed


def preference_loader(
  preferences: Sequence[Preference],
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  shuffle: bool = True,
  num_candidates: int | None = None,
) -> grain.DatasetIterator:
  """Endless batches, as `stack` makes them; b is batch_size / process_count.

  Where `num_candidates` is not given C is the data set's, the same for all splits and processes.
  See `records.endless_batches` for order, shares and resuming.
  """
  if num_candidates is None:
    num_candidates = preferences.num_candidates
  return endless_batches(
    preferences,
    batch_size,
    seed,
    process_index,
    process_count,
    shuffle,
    functools.partial(stack, num_candidates=num_candidates),
    name="preferences",
  )


def stack(preferences: Sequence[Preference], num_candidates: int) -> dict[str, np.ndarray]:
  """Preferences of one size as one batch, padded with zeros to C = num_candidates.

  {id: str [b], kind: int32 [b], masked_image: uint8 [b, H, W, 3], candidates: uint8
  [b, C, H, W, 3], scores: float32 [b, C], normalised, valid: bool [b, C], False for padding}
  """
  shape = preferences[0]["masked_image"].shape
  number = len(preferences)
  candidates = np.zeros((number, num_candidates, *shape), np.uint8)
  scores = np.zeros((number, num_candidates), np.float32)
  valid = np.zeros((number, num_candidates), bool)
  for row, preference in enumerate(preferences):
    count, *found = preference["candidates"].shape
    if tuple(found) != shape:
      names = [
        f"{p['id']} is {x[0]}x{x[1]}" for p, x in ((preferences[0], shape), (preference, found))
      ]
      raise ValueError(f"preferences of two sizes in one batch: {', '.join(names)}: give a size")
    if count > num_candidates:
      raise ValueError(
        f"{preference['id']} has {count} candidates, num_candidates is {num_candidates}: raise it"
      )
    candidates[row, :count] = preference["candidates"]
    scores[row, :count] = preference["scores"]
    valid[row, :count] = True
  return {
    "id": np.array([preference["id"] for preference in preferences]),
    "kind": np.array([preference["kind"] for preference in preferences], np.int32),
    "masked_image": np.stack([preference["masked_image"] for preference in preferences]),
    "candidates": candidates,
    "scores": scores,
    "valid": valid,
  }


# -------------------------------------------------------------------------------------------- build


def build_preferences(
  source: str | Path,
  output_dir: str | Path,
  weights: Mapping[str, float] = CRITERIA,
  test_share: float = 0.1,
) -> Path:
  """Turns a folder of human scores into a tfds data set in `output_dir`; returns its folder.

  `weights` of the criteria make the combined score; `test_share` of the prompts are held out where
  no lists say which. The same scores give the same data set.
  """
  if not 0 <= test_share < 1:
    raise ValueError(f"test_share is {test_share}: give a share of the prompts, below 1")
  annotations = read_annotations(source, weights)
  splits = assign_splits(annotations, test_share)
  metadata = describe(annotations, splits, weights)
  return write_records(
    output_dir,
    "preferences",
    "Inpaintings of incomplete pictures, and what people think of them.",
    _features(),
    {split: map(functools.partial(_record, metadata), ps) for split, ps in splits.items()},
    metadata,
  )


def assign_splits(annotations: Annotations, test_share: float) -> dict[str, list[ScoredPrompt]]:
  """{split: its prompts}, each prompt in one at most; splits without any are left out.

  Lists of IDs are taken at their word: with both, what neither names is left out; with one, the
  other split is the rest. Without lists a split is drawn from a hash of the picture, so that it
  stays the same when other prompts are added, and crops of one picture are never parted.
  """
  lists = annotations.lists

  def split_of(prompt: ScoredPrompt) -> str | None:
    if lists:
      named = [split for split, ids in lists.items() if prompt.image_id in ids]
      rest = [split for split in SPLITS if split not in lists]
      return (named + rest + [None])[0]
    digest = hashlib.sha256(prompt.picture.encode()).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") < test_share * 2**64]

  chosen = [split_of(prompt) for prompt in annotations.prompts]
  splits = {
    split: [p for p, its in zip(annotations.prompts, chosen, strict=True) if its == split]
    for split in SPLITS
  }
  if not splits["train"]:
    raise ValueError(
      f"none of {len(chosen)} prompts is for training, {len(splits['test'])} are for testing: "
      "list some in train.txt, annotate more, or lower test_share"
    )
  return {split: prompts for split, prompts in splits.items() if prompts}


def describe(
  annotations: Annotations,
  splits: Mapping[str, Sequence[ScoredPrompt]],
  weights: Mapping[str, float],
) -> dict[str, Any]:
  """The metadata of a data set.

  mean, std      of the combined scores of the training split, by which all are normalised
  weights        of the criteria in the combined score
  alpha          Krippendorff's, of each criterion and of the combined score; None: not known
  annotators     how many people; 0: not known
  num_candidates the most of any prompt
  counts         {split: {"prompts": {kind: number}, "candidates": number, "ratings": number}}
  left_out       candidates and prompts without scores, prompts in no list
  """
  scores = np.array([c.score for prompt in splits["train"] for c in prompt.candidates])
  if np.ptp(scores) < 1e-6:
    raise ValueError(
      f"all {len(scores)} scores for training are {scores[0]:g}: they prefer nothing; "
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
  """int [C]: 1 for the best; ties share the best rank of theirs, and the next ranks stay empty.

  Means that differ by less than 1e-6 are a tie: those of equal scores differ by rounding.
  """
  scores = np.asarray(scores, np.float64)
  return 1 + np.sum(scores[None, :] > scores[:, None] + 1e-6, axis=1)


def _features() -> dict[str, Any]:
  text, image = tfds.features.Text, tfds.features.Image
  return {
    "id": text(),
    "source": text(),
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
  mask = images.load_mask(prompt.mask)
  order = ranks([candidate.score for candidate in prompt.candidates])

  def record(candidate: Candidate, rank: int) -> dict[str, Any]:
    said = candidate._asdict()
    return {
      "image": _stored(said.pop("file")),
      "normalised_score": (candidate.score - metadata["mean"]) / metadata["std"],
      "rank": rank,
      **said,
    }

  return {
    "id": prompt.image_id,
    "source": prompt.source,
    "kind": prompt.kind,
    "image": _stored(prompt.image),
    "mask": encode_png(mask[..., 0]),
    "masked_image": encode_png(images.load_image(prompt.image) * (1 - mask)),
    "candidates": [record(*pair) for pair in zip(prompt.candidates, map(int, order), strict=True)],
  }


def _stored(file: Path) -> io.BytesIO:
  """A picture file as it is where that is a plain RGB PNG, else its picture as one."""
  with Image.open(file) as picture:
    plain = picture.format == "PNG" and picture.mode == "RGB"
    plain = plain and not {"transparency", "exif"} & set(picture.info)
  return io.BytesIO(file.read_bytes()) if plain else encode_png(images.load_image(file))


# --------------------------------------------------------------------------------------------- main


def summary(metadata: Mapping[str, Any]) -> str:
  """The metadata in a few lines."""
  kinds = masks.KINDS
  table = [("", *kinds, "prompts", "candidates", "ratings")]
  for split, counts in metadata["counts"].items():
    numbers = [counts["prompts"][kind] for kind in kinds]
    row = (split, *numbers, sum(numbers), counts["candidates"], counts["ratings"])
    table.append(tuple(map(str, row)))
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = [
    "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table
  ]
  alphas = ", ".join(
    f"{name} {'not known' if alpha is None else format(alpha, '.3f')}"
    for name, alpha in metadata["alpha"].items()
  )
  left_out = metadata["left_out"]
  weights = ", ".join(f"{name} {weight:g}" for name, weight in metadata["weights"].items())
  lines += [
    f"combined score ({weights}): mean {metadata['mean']:.3f}, standard deviation "
    f"{metadata['std']:.3f} over the training split",
    f"agreement of {metadata['annotators'] or 'an unknown number of'} annotators "
    f"(Krippendorff's alpha, interval): {alphas}",
    f"left out: {left_out['candidates']} candidates without a score, {left_out['prompts']} prompts "
    f"without a scored candidate, {left_out['unlisted']} prompts in no list",
  ]
  return "\n".join(lines)


def main(config: ConfigDict, workdir: Path) -> None:
  if not config.source:
    raise ValueError("config.source is empty: name the folder with the scores")
  try:
    folder = build_preferences(config.source, workdir, config.weights.to_dict(), config.test_share)
  except BadAnnotations as error:
    sys.exit(f"error: {error}")  # its lines, where other errors have one
  app.open_workdir(config, workdir)
  print(summary(read_metadata(folder)))
  print(f"{folder}: read it with prefpaint_jax.data.preferences.open_preferences")


if __name__ == "__main__":
  app.run_with_config(main)
