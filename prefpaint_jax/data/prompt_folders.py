"""Prompts of a folder of image files and mask files."""
# Shapes: H W pixels.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prefpaint_jax.data import images, masks
from prefpaint_jax.data.captions import check_text, read_captions
from prefpaint_jax.data.examples import SPLITS, UNSEEN, Prompt
from prefpaint_jax.runtime.files import parse_json


class FolderPrompts(Sequence):
  """Prompts of a folder of image files and mask files."""

  has_texts: bool  # a prompt of the folder has a text

  def __init__(self, folder: Path, split: str, listing: str | None, size: tuple[int, int] | None):
    mask_files, whole, masked = (
      {file.name for file in (folder / name).glob("*.png")}
      for name in ("masks", "images", "masks_color")
    )
    self._files, (kinds, self._texts) = [], _read_lines(folder)
    known = sorted(n.removesuffix("_mask.png") for n in mask_files if n.endswith("_mask.png"))
    if not known:
      raise ValueError(f"{folder / 'masks'}: contains no ID_mask.png; add the masks")
    captions = read_captions(folder, known)
    if captions and self._texts:
      raise ValueError(f"{folder}: captions and prompts.jsonl both have texts; keep only one")
    self._texts |= captions
    self.has_texts = any(self._texts.values())
    for id_ in read_ids(folder, split, listing, known):
      if f"{id_}_mask.png" not in mask_files:
        raise ValueError(
          f"{folder / 'masks' / id_}_mask.png: no such file, but {id_} is listed; "
          "add the mask or remove the ID"
        )
      if f"{id_}.png" in whole:
        image = folder / "images" / f"{id_}.png"
      elif f"{id_}_mask_color.png" in masked:
        image = folder / "masks_color" / f"{id_}_mask_color.png"
      else:
        raise ValueError(
          f"{folder}: neither images/{id_}.png nor masks_color/{id_}_mask_color.png exists; "
          f"add one or remove {id_}"
        )
      self._files.append((id_, image, folder / "masks" / f"{id_}_mask.png", kinds.get(id_)))
    self._size = size

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Prompt:
    id_, image_file, mask_file, kind = self._files[index]
    image = images.load_image(image_file)
    mask = images.load_mask(mask_file, image.shape[:2])
    return make_prompt(id_, image, mask, self._size, kind, self._texts.get(id_))


def make_prompt(
  id_: str,
  image: np.ndarray,
  mask: np.ndarray,
  size: tuple[int, int] | None,
  kind: int | None = None,
  text: str | None = None,
) -> Prompt:
  """Makes a prompt and resizes it to `size`; derives the kind from the mask if it is None.

  The true content is taken as known if the missing pixels are not all black.
  """
  complete = bool((image * mask).any())
  kind = masks.mask_kind(mask) if kind is None else kind
  if size is not None and size != image.shape[:2]:
    image, mask = images.resize_prompt(image, mask, size)
    images.check_mask(mask, size, f"prompt {id_} at {size[0]}x{size[1]}")
  prompt = Prompt(id=id_, kind=kind, image=image, mask=mask, complete=complete)
  if text is not None:
    prompt["text"] = text
  return prompt


def read_ids(folder: Path, split: str, listing: str | None, known: list[str]) -> list[str]:
  """Returns the IDs in `listing`, in the list of the split, or `known` if there is no list."""
  if listing is not None:
    file = folder / listing if (folder / listing).exists() else Path(listing)
  else:
    file = folder / f"{split}.txt"
    if not any((folder / f"{name}.txt").exists() for name in (*SPLITS, UNSEEN)):
      return known
  if not file.is_file():
    raise ValueError(f"{file}: no such list of prompts; write one ID per line to it")
  ids = _read_list(file)
  if not ids:
    raise ValueError(f"{file}: the list of prompts is empty; write one ID per line to it")
  for other in (folder / f"{name}.txt" for name in (*SPLITS, UNSEEN)):
    if listing is None and other != file and other.is_file():
      both = sorted(set(ids) & set(_read_list(other)))
      if both:
        more = f" and {len(both) - 5} more" if len(both) > 5 else ""
        raise ValueError(
          f"{file} and {other.name} both list {', '.join(both[:5])}{more}; keep each ID in one list"
        )
  return ids


def _read_list(file: Path) -> list[str]:
  """Reads the IDs of a list, each once."""
  lines = file.read_text("utf-8", errors="replace").splitlines()
  return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _read_lines(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
  """Reads {ID: kind} and {ID: text} from prompts.jsonl; both are empty without that file."""
  file, kinds, texts = folder / "prompts.jsonl", {}, {}
  for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), 1):
    place = f"{file}, line {number}"
    try:
      entry = parse_json(line, place)
      kinds[entry["image_id"]] = masks.KINDS.index(entry["kind"])
    except (ValueError, KeyError, TypeError):
      raise ValueError(
        f'{place}: not {{"image_id": ID, "kind": one of {", ".join(masks.KINDS)}}}; '
        "correct it or delete the file"
      ) from None
    if "text" in entry:
      id_ = str(entry["image_id"])
      if id_ in texts:
        raise ValueError(f"{place}: {id_} has a text in an earlier line; keep one")
      texts[id_] = check_text(entry["text"], f"{place}: text")
  return kinds, texts
