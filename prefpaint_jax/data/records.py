"""tfds data sets without TensorFlow: find them, write them, and feed what is in them."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epy
from PIL import Image

from prefpaint_jax.data.images import to_bytes

with epy.lazy_imports():
  import grain
  import tensorflow_datasets as tfds


ENDLESS = 2**31  # epochs; grain's own endless repetition overflows for a batch of one


def find_records(folder: str | Path) -> list[Path]:
  """The folders of the tfds data sets in a folder: NAME/VERSION, VERSION, or the folder itself."""
  return [
    info.parent
    for depth in ("", "*/", "*/*/")
    for info in Path(folder).glob(depth + "dataset_info.json")
  ]


def write_records(
  output_dir: str | Path,
  kind: str,
  description: str,
  features: Mapping[str, Any],
  splits: Mapping[str, Iterable[Mapping[str, Any]]],
  metadata: Mapping[str, Any] | None = None,
) -> Path:
  """Writes a tfds data set (array_record) of examples in their order; returns its folder.

  That is `output_dir`/`kind`/1.0.0, which must be new. `features` are those of tfds, by name.
  """

  class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = kind
    VERSION = tfds.core.Version("1.0.0")
    # Where tfds would look for the checksums of downloads, of which there are none; its own search
    # imports a package that it does not install.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
      return tfds.core.DatasetInfo(
        builder=self,
        description=description,
        features=tfds.features.FeaturesDict(features),
        metadata=metadata and tfds.core.MetadataDict(metadata),
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(examples) for split, examples in splits.items()}

    def _generate_examples(self, examples):
      yield from enumerate(examples)

  builder = Records(data_dir=output_dir, file_format="array_record")
  folder = Path(builder.data_dir)
  if folder.exists():
    raise ValueError(f"{folder}: {kind} are there already: give another folder or delete that one")
  with (
    tempfile.TemporaryDirectory() as downloads,  # stays empty
    contextlib.redirect_stdout(io.StringIO()),  # tfds announces a download
  ):
    tfds.disable_progress_bar()
    builder.download_and_prepare(download_dir=downloads)
  return folder


def encode_png(image: np.ndarray) -> io.BytesIO:
  """[H, W] or [H, W, 3] in [0, 1] as an encoded PNG; raw arrays would need TensorFlow."""
  file = io.BytesIO()
  Image.fromarray(to_bytes(image)).save(file, "png")
  file.seek(0)
  return file


def endless_batches(
  examples: Sequence[Any],
  batch_size: int,
  seed: int,
  process_index: int,
  process_count: int,
  shuffle: bool,
  stack: Callable[[Sequence[Any]], dict[str, np.ndarray]],
  name: str,
) -> grain.DatasetIterator:
  """Batches as `stack` makes them of examples; `name` says what these are, should there be few.

  Every epoch is shuffled anew from `seed`. The order is one for all processes: global batch i is
  the i-th run of `batch_size` examples, of which this process reads and stacks its own part, so
  that the parts in order of process are the batch. The iterator's `get_state()` and `set_state()`
  resume exactly; the state is that of every process, whatever their number.
  """
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size is {batch_size} over {process_count} processes: "
      f"give a positive multiple of {process_count}"
    )
  if len(examples) < batch_size:
    raise ValueError(
      f"{len(examples)} {name} are fewer than batch_size {batch_size}: "
      f"add {name} or lower batch_size"
    )
  order = grain.MapDataset.range(len(examples)).seed(seed)
  if shuffle:
    order = order.shuffle()
  share = batch_size // process_count
  mine = slice(process_index * share, (process_index + 1) * share)
  read = lambda indices: stack([examples[int(i)] for i in indices[mine]])
  batches = order.repeat(ENDLESS).batch(batch_size).map(read)
  # An element is a whole batch: a few in flight hide the decoding; grain's default is 500.
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)))
