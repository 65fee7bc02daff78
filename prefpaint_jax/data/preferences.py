"""Builds a dataset of preferences: prompts with candidates and their human scores.

  python -m prefpaint_jax.data.preferences --config=configs/preferences.py --workdir=DIR \\
      --config.source=FOLDER

Reads a folder of human scores (docs/preferences.md has its format), reports all of its errors at
once, and writes a tfds dataset into DIR. `prefpaint_jax.train_reward` trains a reward model on it.
"""
# Shapes: H W pixels, C candidates of one prompt, b prompts of a batch on one process.

from __future__ import annotations

import copy
import functools
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from etils import epy
from ml_collections import ConfigDict
from PIL.PngImagePlugin import PngImageFile

from prefpaint_jax.data import images
from prefpaint_jax.data.annotations import BadAnnotations
from prefpaint_jax.data.examples import VALIDATION, in_validation
from prefpaint_jax.data.images import to_bytes
from prefpaint_jax.data.preference_records import build_preferences, summary
from prefpaint_jax.data.records import endless_batches, find_records
from prefpaint_jax.runtime import cli
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.config_fields import COUNT
from prefpaint_jax.runtime.files import check_is_folder, read_json
from prefpaint_jax.runtime.ranges import check
from prefpaint_jax.runtime.text import print_next
from prefpaint_jax.runtime.weighted_names import split_names
from prefpaint_jax.runtime.workdir import open_workdir

with epy.lazy_imports():
  import grain
  import tensorflow_datasets as tfds


class Preference(TypedDict):
  """One prompt with its candidates and their scores."""

  id: str
  kind: int  # index into masks.KINDS
  text: str  # empty if the prompt has none
  masked_image: np.ndarray  # uint8 [H, W, 3], missing pixels black
  mask: np.ndarray  # uint8 [H, W, 1], 1 = missing
  candidates: np.ndarray  # uint8 [C, H, W, 3]
  scores: np.ndarray  # float32 [C], normalised over the training split
  raw_scores: np.ndarray  # float32 [C], combined scores before normalisation


def open_preferences(
  folder: str | Path, split: str, size: int | tuple[int, int] | None = None
) -> StoredPreferences:
  """Opens the preferences of one split as a sequence. Indexing decodes a preference.

  Args:
    folder: the dataset's folder, or the `output_dir` of `build_preferences`.
    split: "train", "validation" or "test".
    size: a side or (height, width) to resize to; None: the stored size. Images are antialiased;
      no missing pixel is lost.
  """
  return StoredPreferences(folder, split, (size, size) if isinstance(size, int) else size)


def open_splits(
  folder: str | Path, size: int | tuple[int, int] | None = None
) -> dict[str, StoredPreferences]:
  """Opens the splits "train", "validation" and "test"; see `open_training_splits`."""
  return open_training_splits(folder, size) | {"test": open_preferences(folder, "test", size)}


def open_training_splits(
  folder: str | Path, size: int | tuple[int, int] | None = None
) -> dict[str, StoredPreferences]:
  """Opens the splits "train" and "validation"; see `open_preferences`.

  If the dataset has no validation split, a hash of the IDs splits it off the training prompts.

  Raises:
    ValueError: there is only one training prompt.
  """
  train = open_preferences(folder, "train", size)
  if train.has_validation:
    return {"train": train, VALIDATION: open_preferences(folder, VALIDATION, size)}
  if len(train) < 2:
    raise ValueError(f"preferences: {folder} has 1 training prompt; give 2 or more")
  chosen = np.array(in_validation([train.id(index) for index in range(len(train))]))
  return {"train": train.take(~chosen), VALIDATION: train.take(chosen)}


def read_metadata(folder: str | Path) -> dict[str, Any]:
  """Reads the metadata of a dataset (see `preference_records.describe`)."""
  file = _find(folder) / "metadata.json"
  metadata = read_json(file)
  check(f"{file}: num_candidates", metadata.get("num_candidates"), COUNT)
  return metadata


class StoredPreferences(Sequence[Preference]):
  """Preferences of a tfds dataset, read without TensorFlow."""

  num_candidates: int  # largest number of candidates of a prompt, over all splits

  def __init__(self, folder: str | Path, split: str, size: tuple[int, int] | None = None):
    folder = _find(folder)
    self.num_candidates = read_metadata(folder)["num_candidates"]
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
      raise ValueError(
        f"preferences: {folder} has no split {split!r}; it has {', '.join(builder.info.splits)}"
      )
    # Raw bytes: the reader of tfds is ten times slower, because it decodes every feature.
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    self._records = builder.as_data_source(split=split, deserialize_method=raw)
    self._rows: Sequence[int] = range(len(self._records))
    self._size = size
    self.has_validation = VALIDATION in builder.info.splits

  def take(self, chosen: np.ndarray) -> StoredPreferences:
    """Returns the preferences for which `chosen`, bool [N], is True."""
    part = copy.copy(self)
    part._rows = [row for row, wanted in zip(self._rows, chosen, strict=True) if wanted]
    return part

  def _features(self, index: int) -> Mapping[str, Any]:
    from tensorflow_datasets.proto import tf_example_pb2  # here, because the import is slow

    return tf_example_pb2.Example.FromString(self._records[self._rows[index]]).features.feature

  def __len__(self) -> int:
    return len(self._rows)

  def id(self, index: int) -> str:
    """Returns the ID of a preference without decoding its images."""
    return self._features(index)["id"].bytes_list.value[0].decode()

  def outline(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns ranks int [C], normalised scores [C] and text without decoding images."""
    feature = self._features(index)
    return (
      np.array(feature["candidates/rank"].int64_list.value),
      np.array(feature["candidates/normalised_score"].float_list.value, np.float32),
      b"".join(feature["text"].bytes_list.value).decode(),
    )

  def __getitem__(self, index: int) -> Preference:
    feature = self._features(index)
    id_ = feature["id"].bytes_list.value[0].decode()
    mask = _decode(feature["mask"].bytes_list.value[0])[..., None] // 255
    if self._size is None or self._size == mask.shape[:2]:
      resize = lambda image: image
      masked_image = _decode(feature["masked_image"].bytes_list.value[0])
    else:
      resize = lambda image: to_bytes(images.resize_image(image / np.float32(255), self._size))
      whole = _decode(feature["image"].bytes_list.value[0]) / np.float32(255)
      image, mask = images.resize_prompt(whole, mask, self._size)
      images.check_mask(mask, self._size, f"preference {id_} at {self._size[0]}x{self._size[1]}")
      masked_image = to_bytes(image) * (1 - mask)
    return Preference(
      id=id_,
      kind=feature["kind"].int64_list.value[0],
      text=b"".join(feature["text"].bytes_list.value).decode(),  # earlier versions wrote none
      masked_image=masked_image,
      mask=mask,
      candidates=np.stack(
        [resize(_decode(x)) for x in feature["candidates/image"].bytes_list.value]
      ),
      scores=np.array(feature["candidates/normalised_score"].float_list.value, np.float32),
      raw_scores=np.array(feature["candidates/score"].float_list.value, np.float32),
    )


def _find(folder: str | Path) -> Path:
  """Finds the preference dataset in a folder: the folder itself, or at most two levels below."""
  check_is_folder(folder, "one that prefpaint_jax.data.preferences wrote")
  # Only preference datasets have metadata.json.
  found = [path for path in find_records(folder) if (path / "metadata.json").exists()]
  if len(found) != 1:
    raise ValueError(
      f"preferences: {folder} contains {len(found)} datasets; give the folder of one that "
      "prefpaint_jax.data.preferences wrote"
    )
  return found[0]


def _decode(png: bytes) -> np.ndarray:
  """Decodes a PNG to uint8 [H, W, 3] or [H, W]. Image.open would try other formats first."""
  return np.asarray(PngImageFile(io.BytesIO(png)))


def preference_loader(
  preferences: Sequence[Preference],
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  shuffle: bool = True,
  num_candidates: int | None = None,
) -> grain.DatasetIterator:
  """Makes an endless iterator of the batches that `stack` returns; b = batch_size / process_count.

  `records.endless_batches` describes the order, the share of each process, and how to resume.

  Args:
    num_candidates: C; by default the largest number of the dataset, equal for all splits.
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
  """Stacks preferences of one size to a batch, padded with zeros to C = num_candidates.

  Returns:
    {id, text: str [b], kind: int32 [b], masked_image: uint8 [b, H, W, 3],
     candidates: uint8 [b, C, H, W, 3], scores: float32 [b, C], normalised,
     valid: bool [b, C], False for padding}.

  Raises:
    ValueError: two preferences differ in size, or one has more than C candidates.
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
      raise ValueError(f"preferences of two sizes in one batch: {', '.join(names)}; give a size")
    if count > num_candidates:
      raise ValueError(
        f"{preference['id']} has {count} candidates, num_candidates is {num_candidates}; raise it"
      )
    candidates[row, :count] = preference["candidates"]
    scores[row, :count] = preference["scores"]
    valid[row, :count] = True
  return {
    "id": np.array([preference["id"] for preference in preferences]),
    "text": np.array([preference["text"] for preference in preferences]),
    "kind": np.array([preference["kind"] for preference in preferences], np.int32),
    "masked_image": np.stack([preference["masked_image"] for preference in preferences]),
    "candidates": candidates,
    "scores": scores,
    "valid": valid,
  }


def main(config: ConfigDict, workdir: Path) -> None:
  """Builds a preference dataset in the workdir and prints its metadata."""
  check_fields(config, "preferences")
  if not config.source:
    raise ValueError("config.source is empty; give --config.source=FOLDER of scores")
  weights, test_share = config.weights.to_dict(), config.test_share
  writes, progress = ("preferences",), "preferences/*/metadata.json"
  if config.rewards:
    split_names(config.rewards)  # raises ValueError before the workdir is opened
  try:
    with open_workdir(config, workdir, "data.preferences", writes, progress=progress):
      folder = build_preferences(config.source, workdir, weights, test_share, config.rewards)
  except BadAnnotations as error:
    sys.exit(f"error: {error}")  # cli would print only one line
  print(summary(read_metadata(folder)))
  print(f"{folder}: read it with prefpaint_jax.data.preferences.open_preferences")
  reward = ("--config=configs/reward.py", f"--workdir={workdir}_reward")
  print_next(("train_reward", *reward, f"--config.preferences={workdir}"))


if __name__ == "__main__":
  cli.run_with_config(main)
