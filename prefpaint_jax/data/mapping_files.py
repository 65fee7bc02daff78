"""Prompts of a folder with mapping_file.json, the format of the benchmark BrushBench.

The file has an object for each ID: `image`, a path in the folder; the text, `caption`, or
`prompt_full` as EditBench calls it; `inpainting_mask` and `outpainting_mask`. Images have 512x512
pixels. A mask is a list of start, length, start, length, ..., or of pairs [start, length]: runs of
missing pixels in row-major order, the first pixel is 1 (`rle2mask` of TencentARC/BrushNet,
examples/brushnet/evaluate_brushnet.py).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefpaint_jax.data import images
from prefpaint_jax.data.captions import check_text
from prefpaint_jax.data.examples import Prompt
from prefpaint_jax.data.prompt_folders import make_prompt, read_ids
from prefpaint_jax.runtime.files import read_json

MAPPING = "mapping_file.json"
OUTPAINTING = "outpainting"  # FOLDER:outpainting has the prompts with the other mask
SIZE = (512, 512)  # of the masks; the file does not give it


class MappedPrompts(Sequence):
  """Prompts of a folder with mapping_file.json.

  Args:
    folder: the folder.
    split, listing: choose the IDs, see `prompt_folders.read_ids`.
    field: the mask, "inpainting_mask" or "outpainting_mask".
    size: (height, width) to resize to; None: the stored size.
  """

  def __init__(
    self,
    folder: Path,
    split: str,
    listing: str | None,
    field: str,
    size: tuple[int, int] | None,
  ):
    entries = _read_mapping(folder / MAPPING)
    ids = read_ids(folder, split, listing, list(entries))
    self._prompts = []
    for id_ in ids:
      if id_ not in entries:
        raise ValueError(f"{folder / MAPPING}: no entry {id_!r}, but it is listed; remove the ID")
      self._prompts.append((id_, *_check_entry(entries[id_], field, f"{folder / MAPPING}: {id_}")))
    self._folder, self._size = folder, size
    self.has_texts = any(text for _, _, text, _ in self._prompts)

  def __len__(self) -> int:
    return len(self._prompts)

  def __getitem__(self, index: int) -> Prompt:
    id_, file, text, runs = self._prompts[index]
    image = images.load_image(self._folder / file)
    if image.shape[:2] != SIZE:
      found = "x".join(map(str, image.shape[:2]))
      raise ValueError(f"{self._folder / file} is {found}; expected 512x512, the size of its mask")
    mask = decode_runs(runs)[..., None]
    images.check_mask(mask, SIZE, f"{self._folder / MAPPING}: {id_}")
    return make_prompt(id_, image, mask, self._size, text=text)


def decode_runs(runs: np.ndarray) -> np.ndarray:
  """Decodes runs [N, 2] of (start, length), the first pixel is 1, to a mask float32 [512, 512]."""
  mask = np.zeros(SIZE, np.float32)
  for start, length in runs:
    mask.ravel()[start - 1 : start - 1 + length] = 1.0
  return mask


def _read_mapping(file: Path) -> dict[str, Any]:
  """Reads the entries of a mapping file by ID; raises ValueError for a repeated ID."""
  entries = read_json(file)
  pairs = json.loads(file.read_bytes(), object_pairs_hook=tuple)  # keeps repeated keys
  id_, count = Counter(id_ for id_, _ in pairs).most_common(1)[0] if pairs else ("", 0)
  if count != 1:
    problem = f"{id_!r} is there {count} times; keep one" if count else "there is no entry; add one"
    raise ValueError(f"{file}: {problem}")
  return entries


def _check_entry(entry: Any, field: str, place: str) -> tuple[str, str, np.ndarray]:
  """Returns path of the image, text and runs [N, 2] of an entry; raises ValueError for errors."""
  text = "prompt_full" if isinstance(entry, dict) and "prompt_full" in entry else "caption"
  wanted = ("image", text, field)
  if missing := [name for name in wanted if not isinstance(entry, dict) or name not in entry]:
    raise ValueError(f"{place} has no {', '.join(missing)}; expected {', '.join(wanted)}")
  image, caption = (check_text(entry[name], f"{place}: {name}") for name in wanted[:2])
  numbers = entry[field]
  if isinstance(numbers, list) and all(isinstance(x, list) and len(x) == 2 for x in numbers):
    numbers = list(itertools.chain.from_iterable(numbers))
  if not isinstance(numbers, list) or len(numbers) % 2 or any(type(x) is not int for x in numbers):
    raise ValueError(f"{place}: {field} is not a list of start, length, ..., integers; correct it")
  pixels = SIZE[0] * SIZE[1]
  runs = np.array([min(x, pixels + 1) for x in numbers], np.int64).reshape(-1, 2)
  if (runs < 1).any() or (runs.sum(1) - 1 > pixels).any():
    raise ValueError(f"{place}: {field} has a run outside of pixels 1 to {pixels}; correct it")
  return image, caption, runs
