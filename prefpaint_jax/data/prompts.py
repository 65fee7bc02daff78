"""Prompts, images with their masks: opens them, batches them, and writes them as a dataset.

A prompt is a dict {id: str, kind: int (index into masks.KINDS), image: float32 [H, W, 3] in [0, 1],
mask: float32 [H, W, 1], 1 = missing}. The missing pixels of the image hold the true content if it
is known, else black; `complete` says which. Code that conditions on a prompt must multiply the
image by (1 - mask). `text` is the text of the prompt if its source has one.
`drawn_prompts.DrawnPrompts` adds fields for the origin of a prompt.
"""
# Shapes: H W pixels, b prompts of a batch on one process.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epy

from prefpaint_jax import mini
from prefpaint_jax.data import images, masks
from prefpaint_jax.data.captions import decode_text
from prefpaint_jax.data.drawn_prompts import DrawnPrompts
from prefpaint_jax.data.examples import UNSEEN, Prompt, stack
from prefpaint_jax.data.mapping_files import MAPPING, OUTPAINTING, MappedPrompts
from prefpaint_jax.data.prompt_folders import FolderPrompts, make_prompt
from prefpaint_jax.data.records import encode_png, endless_batches, find_records, write_records
from prefpaint_jax.runtime.files import read_json

with epy.lazy_imports():
  import grain
  import tensorflow_datasets as tfds


def open_prompts(
  source: str | Path, split: str, size: int | tuple[int, int] | None = None
) -> Sequence[Prompt]:
  """Opens the prompts of one split as a sequence. Indexing decodes a prompt.

  The attribute `has_texts` of the sequence says whether its source has texts.

  `source` is one of
    "mini"            the embedded 32x32 prompts;
    FOLDER            a dataset of `build_prompts`, or a tfds dataset with the same features;
    FOLDER            with masks/ID_mask.png, and for each mask images/ID.png (the whole image) or
                      masks_color/ID_mask_color.png (the image with the missing pixels black).
                      train.txt, test.txt and unseen.txt list the IDs of the splits, one per line;
                      without all three, every split has all prompts. prompts.jsonl may list the
                      kinds of the masks, which are otherwise derived from the masks.
                      captions.jsonl or captions/ID.txt may hold texts (see `data.captions`);
    FOLDER            with mapping_file.json, as BrushBench has it (see `data.mapping_files`);
                      FOLDER:outpainting takes the outpainting masks;
    FOLDER:LIST.txt   either folder, with the IDs in LIST.txt, a file in the folder or a path;
    FOLDER            images at any depth; one prompt is drawn from each;
    tfds:NAME         the images of a tfds dataset; one prompt is drawn from each;
    2*A,1*B           a mixture of sources of images (see `data.pictures`).

  Args:
    source: as above.
    split: "train" or "test"; "unseen" if the prompts have that split (see `final_split`). One tenth
      of the images of a source is "test".
    size: a side or (height, width) to resize to; None: the stored size. Images are antialiased;
      no missing pixel is lost. Prompts drawn from images are cropped at the centre.
  """
  size = (size, size) if isinstance(size, int) else size
  folder, listing = Path(mini.locate(source, "prompts")), None
  head, _, tail = str(source).rpartition(":")
  if not folder.exists() and tail == OUTPAINTING and (Path(head) / MAPPING).is_file():
    return MappedPrompts(Path(head), split, None, "outpainting_mask", size)
  if not folder.exists() and head and tail.endswith(".txt"):
    folder, listing = Path(head), tail
  if (folder / MAPPING).is_file():
    return MappedPrompts(folder, split, listing, "inpainting_mask", size)
  if (folder / "masks").is_dir():
    return FolderPrompts(folder, split, listing, size)
  if folder.is_dir() and (records := find_records(folder)):
    return _RecordPrompts(folder, records, split, size)
  if folder.is_dir() or str(source).startswith("tfds:") or any(c in str(source) for c in "*,"):
    if size is None:
      raise ValueError(f"prompts: {source} contains images; give the size of the prompts to draw")
    return DrawnPrompts(source, split, None, size)
  found = "is a file" if folder.is_file() else "is not a folder"
  raise ValueError(
    f"prompts: {folder} {found}; give 'mini', a folder, FOLDER:LIST.txt, or tfds:NAME"
  )


def final_split(source: str | Path) -> str:
  """Returns the split to judge a policy on: "unseen" if the prompts have it, otherwise "test"."""
  folder = Path(mini.locate(source, "prompts"))
  names = [path.stem for path in folder.glob(f"{UNSEEN}.txt")]
  for found in find_records(folder):
    splits = read_json(found / "dataset_info.json").get("splits", ())
    names += [split["name"] for split in splits if isinstance(split, dict) and "name" in split]
  return UNSEEN if UNSEEN in names else "test"


class _RecordPrompts(Sequence):
  """Prompts of a tfds dataset, read without TensorFlow."""

  def __init__(self, folder: Path, found: list[Path], split: str, size: tuple[int, int] | None):
    if len(found) > 1:
      raise ValueError(
        f"prompts: {folder} contains {len(found)} tfds datasets; give the folder of one"
      )
    builder = tfds.builder_from_directory(found[0])
    if missing := {"id", "kind", "image", "mask"} - set(builder.info.features):
      raise ValueError(
        f"prompts: {found[0]} has no {', '.join(sorted(missing))}; "
        f"give tfds:{folder} to draw prompts from its images"
      )
    if split not in builder.info.splits:
      raise ValueError(
        f"prompts: {found[0]} has no split {split!r}; it has {', '.join(builder.info.splits)}"
      )
    as_stored = {name: tfds.decode.SkipDecoding() for name in ("image", "mask")}
    self._records = builder.as_data_source(split=split, decoders=as_stored)
    self._folder, self._size = found[0], size
    self.has_texts = isinstance(dict(builder.info.features).get("text"), tfds.features.Text)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Prompt:
    record = self._records[range(len(self))[index]]
    id_ = record["id"].decode()
    try:
      image, mask = images.load_image(record["image"]), images.load_mask(record["mask"])
    except ValueError as error:
      raise ValueError(f"{self._folder}: prompt {id_}: {error}") from None
    text = None
    if self.has_texts:
      text = decode_text(record["text"], f"{self._folder}: the text of prompt {id_}")
    return make_prompt(id_, image, mask, self._size, int(record["kind"]), text)


def prompt_loader(
  prompts: Sequence[Prompt],
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  shuffle: bool = True,
) -> grain.DatasetIterator:
  """Makes an endless iterator of the batches that `examples.stack` returns.

  A batch has b = batch_size / process_count prompts. `records.endless_batches` describes the order,
  the share of each process, and how to resume.
  """
  return endless_batches(
    prompts, batch_size, seed, process_index, process_count, shuffle, stack, name="prompts"
  )


def build_prompts(
  output_dir: str | Path,
  photos: str | Path,
  num_train: int,
  num_test: int,
  size: int = 32,
  seed: int = 0,
  test_share: float = 0.22,
  crop: tuple[int, int] = (48, 176),
  unseen: str | Path | None = None,
  num_unseen: int = 0,
) -> Path:
  """Draws prompts from photographs and writes them as a tfds dataset.

  The prompts are random crops with alternating masks "outpainting" and "holes", and have the texts
  of their photographs if there are any. The result is deterministic.

  Args:
    output_dir: the folder in which the dataset's folder is made.
    photos: a source or mixture of images (see `data.pictures`).
    num_train: prompts of the split "train".
    num_test: prompts of the split "test".
    size: side of a prompt in pixels.
    seed, test_share, crop: see `DrawnPrompts`.
    unseen: other images, whole, for the split "unseen"; None: no such split.
    num_unseen: prompts of the split "unseen".

  Returns:
    The dataset's folder.
  """

  def draw(source: str | Path, split: str, number: int, test_share: float) -> DrawnPrompts:
    kinds = {"outpainting": 1.0, "holes": 1.0}
    return DrawnPrompts(source, split, number, size, seed, "random", crop, test_share, kinds)

  drawn = {
    "train": draw(photos, "train", num_train, test_share),
    "test": draw(photos, "test", num_test, test_share),
  }
  if unseen is not None:
    drawn[UNSEEN] = draw(unseen, "test", num_unseen, 1.0)
  with_text = any(prompts.has_texts for prompts in drawn.values())
  image = lambda C: tfds.features.Image(shape=(None, None, C), encoding_format="png")
  return write_records(
    output_dir,
    "prompts",
    "Images and masks of their missing pixels (white).",
    {
      "id": tfds.features.Text(),
      "kind": tfds.features.ClassLabel(names=list(masks.KINDS)),
      "image": image(3),
      "mask": image(1),
      **({"text": tfds.features.Text()} if with_text else {}),
    },
    {split: _records(prompts, split, with_text) for split, prompts in drawn.items()},
  )


def _records(prompts: Sequence[Prompt], split: str, with_text: bool) -> Iterator[dict[str, Any]]:
  """Yields the tfds records of drawn prompts."""
  for prompt in prompts:
    record: dict[str, Any] = {
      "id": prompt["id"].replace("test", UNSEEN, 1) if split == UNSEEN else prompt["id"],
      "kind": prompt["kind"],
      "image": encode_png(prompt["image"]),
      "mask": encode_png(prompt["mask"][..., 0]),
    }
    if with_text:
      record["text"] = prompt.get("text", "")
    yield record
