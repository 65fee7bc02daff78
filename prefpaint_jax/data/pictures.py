"""Sources of images: folders and tfds datasets.

A source is written as
  FOLDER                                  the image files in a folder, at any depth;
  tfds:NAME[/CONFIG][:VERSION][:SPLIT]    a prepared tfds dataset of images, such as tfds:kitti;
  tfds:FOLDER[:SPLIT]                     the same dataset, given by its folder;
  "mini"                                  the embedded photographs.
A mixture is written as "2*FOLDER,1*tfds:kitti": two thirds of the prompts come from FOLDER.

Images may have texts: of captions.jsonl or captions/ID.txt in FOLDER, where ID is the path of an
image in FOLDER without its suffix (see `data.captions`), or the feature "text" of a dataset.
"""
# Shapes: H W pixels of an image.

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from etils import epy

from prefpaint_jax import mini
from prefpaint_jax.data import images
from prefpaint_jax.data.captions import decode_text, read_captions
from prefpaint_jax.data.records import find_records
from prefpaint_jax.runtime.text import first_line

with epy.lazy_imports():
  import tensorflow_datasets as tfds


PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class SourceImage(NamedTuple):
  """One image of a source."""

  id: str  # path relative to the folder, or number in the tfds split; the same on every machine
  source: str
  image: np.ndarray  # float32 [H, W, 3] in [0, 1]
  text: str = ""


def open_pictures(source: str | Path) -> FolderPictures | RecordPictures:
  """Opens one source as a sequence of `SourceImage`. Indexing decodes an image."""
  if str(source).startswith("tfds:"):
    return RecordPictures(str(source))
  return FolderPictures(source)


def open_mixture(mixture: str | Path) -> list[tuple[float, FolderPictures | RecordPictures]]:
  """Opens every source of a mixture: a list of (weight, images). The default weight is 1."""
  if Path(mixture).is_dir():
    return [(1.0, open_pictures(mixture))]
  parts = []
  for part in str(mixture).split(","):
    weight, _, source = part.strip().rpartition("*")
    try:
      number = float(weight) if weight else 1.0
    except ValueError:
      number = np.nan
    if not 0.0 < number < np.inf:
      raise ValueError(
        f"pictures {part.strip()!r}: the weight is {weight!r}; give a positive number, as 2*SOURCE"
      )
    parts.append((number, open_pictures(source)))
  return parts


class FolderPictures(Sequence):
  """The image files of a folder and its subfolders, sorted by path, without hidden files.

  Links are followed. A file that is reached in several ways is one image.
  """

  def __init__(self, source: str | Path):
    self.source = str(source)
    self._folder = Path(mini.locate(source, "photos"))
    if not self._folder.is_dir():
      found = "is a file" if self._folder.is_file() else "is not a folder"
      raise ValueError(
        f"pictures: {self.source!r} {found}; give a folder, tfds:NAME, or a mixture of both"
      )
    self._files = sorted(_find_images(self._folder))
    if not self._files:
      raise ValueError(
        f"{self._folder}: contains no {', '.join(PHOTO_SUFFIXES)}; give a folder of images "
        "(or tfds:FOLDER for a tfds dataset)"
      )
    self._texts = read_captions(self._folder, map(self.id, range(len(self))))
    self.has_texts = any(self._texts.values())

  def __len__(self) -> int:
    return len(self._files)

  def id(self, index: int) -> str:
    return Path(self._files[index]).with_suffix("").as_posix()

  def __getitem__(self, index: int) -> SourceImage:
    image = images.load_image(self._folder / self._files[index])
    return SourceImage(self.id(index), self.source, image, self._texts.get(self.id(index), ""))


def _find_images(root: Path) -> list[str]:
  """Finds the image files below a folder: paths relative to it, one for each file.

  Device and inode identify folders and files. Otherwise links could repeat an image, which puts it
  into both splits, or lead in circles. A path without a link is preferred.
  """
  # A link to a folder above the root would lead back to the root.
  visited = {_identity(folder) for folder in root.resolve().parents}
  folders, linked_folders, linked_files, files = [""], [], [], {}
  while folders or linked_folders:
    folder = folders.pop() if folders else linked_folders.pop(0)
    where = os.path.join(root, folder)
    if (this := _identity(where)) in visited:
      continue
    visited.add(this)
    with os.scandir(where) as entries:
      for entry in sorted(entries, key=lambda entry: entry.name):
        path, is_link = os.path.join(folder, entry.name), entry.is_symlink()
        if entry.name.startswith("."):
          continue
        if os.path.isdir(entry.path) if is_link else entry.is_dir():
          if os.access(entry.path, os.R_OK | os.X_OK):  # e.g. not lost+found
            (linked_folders if is_link else folders).append(path)
        elif entry.name.lower().endswith(PHOTO_SUFFIXES):
          if is_link:
            linked_files.append(path)
          else:
            files.setdefault(_identity(entry.path), path)
  for path in linked_files:
    files.setdefault(_identity(os.path.join(root, path)), path)
  return list(files.values())


def _identity(path: str | Path) -> tuple[int, int]:
  """Returns the device and the inode of a file or folder."""
  try:
    found = os.stat(path)
  except OSError as error:
    raise ValueError(f"{path}: cannot be read ({error.strerror}); remove or mend it") from None
  return found.st_dev, found.st_ino


class RecordPictures(Sequence):
  """The images of a tfds dataset, read without TensorFlow.

  If a record has several images, this class reads the feature "image", or else "hr".
  """

  def __init__(self, source: str):
    self.source = source
    name, split = re.fullmatch(r"tfds:(.*?)(?::([A-Za-z_][\w-]*))?", source).groups()
    builder, split = _open_builder(source, name), split or "train"
    if split not in builder.info.splits:
      raise ValueError(
        f"{source}: no split {split!r}; it has {', '.join(builder.info.splits) or 'none'}"
      )
    self._name, self._feature = f"{builder.name}_{split}", _image_feature(source, builder)
    features = dict(builder.info.features)
    self.has_texts = isinstance(features.get("text"), tfds.features.Text)
    # Of a record, only the text and the encoded bytes of the image are read.
    read = [self._feature, *(["text"] if self.has_texts else [])]
    self._features = tfds.features.FeaturesDict({name: features[name] for name in read})
    try:
      self._records = builder.as_data_source(
        split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        file_format="array_record",
      )
    except (NotImplementedError, ValueError):  # tfds raises these for formats without random access
      raise ValueError(
        f"{source}: the file format is {builder.info.file_format.value}; expected array_record, "
        f"which has random access: {_how_to_prepare(builder)} --overwrite"
      ) from None

  def __len__(self) -> int:
    return len(self._records)

  def id(self, index: int) -> str:
    return f"{self._name}_{range(len(self))[index]:07d}"

  def __getitem__(self, index: int) -> SourceImage:
    record = self._features.deserialize_example_np(
      self._records[range(len(self))[index]],
      decoders={self._feature: tfds.decode.SkipDecoding()},
    )
    try:
      image = images.load_image(record[self._feature])
    except ValueError as error:
      raise ValueError(
        f"{self.source}: image {self.id(index)} is damaged ({first_line(error)}); prepare the "
        "dataset again"
      ) from None
    place = f"{self.source}: the text of image {self.id(index)}"
    text = decode_text(record["text"], place) if self.has_texts else ""
    return SourceImage(self.id(index), self.source, image, text)


def _open_builder(source: str, name: str) -> tfds.core.DatasetBuilder:
  """Opens a prepared dataset, given by its name or its folder."""
  folders = find_records(Path(name)) if name else []
  if len(folders) > 1:
    raise ValueError(
      f"{source}: the folder contains {len(folders)} datasets; give the folder of one"
    )
  if folders:
    return tfds.builder_from_directory(folders[0])
  try:
    builder = tfds.builder(name)
  except (ValueError, AssertionError, RuntimeError, ImportError) as error:  # tfds raises all four
    raise ValueError(
      f"{source}: tfds cannot open it ({first_line(error)}); give the name of a dataset of "
      "tensorflow_datasets or the folder of a prepared dataset"
    ) from None
  if not builder.is_prepared():
    raise ValueError(
      f"{source}: not prepared, {builder.data_dir} is empty; {_how_to_prepare(builder)}, or set "
      "TFDS_DATA_DIR to the folder that contains it"
    )
  return builder


def _image_feature(source: str, builder: tfds.core.DatasetBuilder) -> str:
  """Returns the name of the feature to read: "image", "hr", or the only image of a record."""
  features = dict(builder.info.features or {})
  names = sorted(name for name in features if isinstance(features[name], tfds.features.Image))
  choices = [name for name in ("image", "hr") if name in names][:1] or names
  if len(choices) != 1:
    raise ValueError(
      f"{source}: has the features {', '.join(sorted(features))}, of which these are images: "
      f"{', '.join(names) or 'none'}; give a dataset with one image, or with one named image or hr"
    )
  return choices[0]


def _how_to_prepare(builder: tfds.core.DatasetBuilder) -> str:
  config = f"/{builder.builder_config.name}" if builder.builder_config else ""
  return f"run tfds build {builder.name}{config} --file_format=array_record"


class Cached(Sequence):
  """A source with a cache of the most recently used images, of at most `limit` bytes."""

  def __init__(self, source: FolderPictures | RecordPictures, limit: int = 2**29):
    self.id, self.source, self._images = source.id, source.source, source
    self.has_texts = source.has_texts
    self._limit, self._bytes, self._kept, self._lock = limit, 0, OrderedDict(), Lock()

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> SourceImage:
    with self._lock:
      if index in self._kept:
        self._kept.move_to_end(index)
        return self._kept[index]
    image = self._images[index]  # outside the lock, so that several threads decode at a time
    with self._lock:
      if index not in self._kept:
        self._kept[index] = image
        self._bytes += image.image.nbytes
      while self._bytes > self._limit:
        self._bytes -= self._kept.popitem(last=False)[1].image.nbytes
    return image
