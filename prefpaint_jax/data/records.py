"""tfds datasets without TensorFlow: finds them, writes them, and batches their examples."""
# Shapes: H W pixels.

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epy
from PIL import Image

from prefpaint_jax.data.images import to_bytes
from prefpaint_jax.runtime.text import first_line

with epy.lazy_imports():
  import grain
  import tensorflow_datasets as tfds


ENDLESS = 2**31  # epochs; the endless repetition of grain overflows for batches of one

_INCOMPLETE = "incomplete.*"  # folders that tfds is writing, or that a killed process left


def find_records(folder: str | Path) -> list[Path]:
  """Finds the tfds datasets in a folder: NAME/VERSION, VERSION, or the folder itself."""
  return [
    info.parent
    for depth in ("", "*/", "*/*/")
    for info in Path(folder).glob(depth + "dataset_info.json")
    if not info.parent.match(_INCOMPLETE)
  ]


def write_records(
  output_dir: str | Path,
  kind: str,
  description: str,
  features: Mapping[str, Any],
  splits: Mapping[str, Iterable[Mapping[str, Any]]],
  metadata: Mapping[str, Any] | None = None,
) -> Path:
  """Writes examples, in their order, as a tfds dataset in the format array_record.

  Removes what a killed call left; one call at a time may write to a folder.

  Args:
    output_dir: the folder in which the dataset's folder is made.
    kind: name of the dataset.
    features: tfds features, by name.
    splits: {split: its examples}; an example is {feature: value}.
    metadata: JSON object to write to metadata.json.

  Returns:
    The dataset's folder, output_dir/kind/1.0.0.

  Raises:
    ValueError: that folder exists.
    OSError: it cannot be written, on a full disk for example.
  """

  class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = kind
    VERSION = tfds.core.Version("1.0.0")
    # The path of checksums, which this dataset does not need. The default of tfds imports a package
    # that tfds does not install.
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
    raise ValueError(f"{folder}: already contains {kind}; give another folder or delete this one")
  for left in folder.parent.glob(f"{_INCOMPLETE}_{folder.name}"):
    shutil.rmtree(left)
  with (
    tempfile.TemporaryDirectory() as downloads,  # remains empty
    contextlib.redirect_stdout(io.StringIO()),  # hides the message of tfds about a download
  ):
    tfds.disable_progress_bar()
    try:
      builder.download_and_prepare(download_dir=downloads)
    except RuntimeError as error:  # array_record wraps the errors of the file system
      raise OSError(f"{folder}: cannot be written ({first_line(error)}); make room") from error
  return folder


def encode_png(image: np.ndarray) -> io.BytesIO:
  """Encodes an image [H, W] or [H, W, 3] in [0, 1] as a PNG.

  tfds would need TensorFlow to encode an array.
  """
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
  """Makes an endless iterator of batches of examples.

  All processes share one order of the examples. A process reads and stacks only its share of each
  global batch; the shares in the order of the processes are the global batch. `get_state()` and
  `set_state()` of the iterator resume exactly. The state is equal on all processes and does not
  depend on their number.

  Args:
    examples: the dataset; the iterator reads single examples by index.
    batch_size: examples in a global batch; a multiple of `process_count`.
    seed: of the random order.
    process_index: index of this process.
    process_count: number of processes.
    shuffle: whether each epoch has its own random order; False: every epoch keeps the order of
      `examples`.
    stack: function that makes a batch of a list of examples.
    name: plural noun for the examples, for error messages.
  """
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size is {batch_size} for {process_count} processes; "
      f"give a positive multiple of {process_count}"
    )
  if len(examples) < batch_size:
    raise ValueError(
      f"{len(examples)} {name} are fewer than batch_size {batch_size}; "
      f"add {name} or lower batch_size"
    )
  order = grain.MapDataset.range(len(examples)).seed(seed)
  if shuffle:
    order = order.shuffle()
  share = batch_size // process_count
  mine = slice(process_index * share, (process_index + 1) * share)
  read = lambda indices: stack([examples[int(i)] for i in indices[mine]])
  batches = order.repeat(ENDLESS).batch(batch_size).map(read)
  # Four batches in flight hide the decoding. The default of grain, 500, would hold 500 batches.
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)))
