"""Image files of a command: pairs of images and masks in folders, and formats to write."""
# Shapes: H W pixels.

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from prefpaint_jax.data.decoding import decode_file
from prefpaint_jax.data.images import save_png
from prefpaint_jax.runtime.files import atomic_path

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by suffix
READ = (*FORMATS, ".bmp", ".tif", ".tiff")  # suffixes of the images that are taken from a folder
QUALITY = 95  # of JPEG and WebP
_DESCRIPTION = 0x010E  # EXIF's ImageDescription


class Pair(NamedTuple):
  """An image, its mask, and the file that the result goes to."""

  image: Path
  mask: Path
  output: Path


def find_pairs(image: str, mask: str, output: str) -> list[Pair]:
  """Pairs images and masks: two files, a folder and one mask, or two folders.

  The mask of NAME.jpg in a folder is NAME.* or NAME_mask.*; its result is NAME.png in the folder
  `output`. One folder may have both, with NAME_mask.*. Without folders `output` is a file.

  Raises:
    ValueError: a folder has no image, two images have the same name, or an image has no mask.
  """
  if not Path(image).is_dir():
    if Path(mask).is_dir():
      raise ValueError(f"--mask={mask} is a folder; expected the mask of {image}; give one file")
    return [Pair(Path(image), Path(mask), Path(output))]
  images = _by_name(Path(image), "--image")
  masks = _by_name(Path(mask), "--mask") if Path(mask).is_dir() else {}
  is_mask = lambda name: name.endswith("_mask") and name.removesuffix("_mask") in images
  images = {name: file for name, file in images.items() if not is_mask(name)}
  pairs = []
  for name, file in images.items():
    found = masks.get(f"{name}_mask") or masks.get(name) if masks else Path(mask)
    if found in (None, file):
      raise ValueError(f"--mask={mask}: no mask of {file.name}; add {name}.png or {name}_mask.png")
    pairs.append(Pair(file, found, Path(output) / f"{name}.png"))
  return pairs


def _by_name(folder: Path, flag: str) -> dict[str, Path]:
  """Returns the images of a folder by name without suffix, in the order of their names."""
  found: dict[str, Path] = {}
  for file in sorted(folder.iterdir()):
    if file.suffix.lower() in READ:
      if file.stem in found:
        raise ValueError(
          f"{flag}={folder}: {found[file.stem].name} and {file.name} have one name; rename one"
        )
      found[file.stem] = file
  if not found:
    raise ValueError(f"{flag}={folder}: no images; expected files that end in {', '.join(READ)}")
  return found


def check_drawn(path: str | os.PathLike[str]) -> None:
  """Raises ValueError for a mask that is a colour photograph.

  Masks have few colours, or colours that hardly differ from grey. The luminance of a photograph
  would be a mask too, but not one that anybody wants.
  """
  pixels = decode_file(path, colours=False)
  if pixels.ndim < 3 or pixels.shape[-1] < 3:
    return
  pixels = pixels[..., :3]
  coloured = np.ptp(pixels, axis=-1) > 0.1
  if coloured.mean() > 0.1 and len(np.unique(np.uint8(15 * pixels[coloured]), axis=0)) > 64:
    raise ValueError(
      f"{os.fspath(path)}: a colour photograph; expected a mask, white where the image is missing "
      "and black elsewhere; give --mask another file"
    )


def save_image(
  path: str | os.PathLike[str], image: np.ndarray, text: Mapping[str, str] | None = None
) -> None:
  """Writes a uint8 image [H, W, 3] in the format of the suffix, whole or not at all.

  Args:
    text: {keyword: text}; PNG has it in text chunks, JPEG and WebP in EXIF's ImageDescription.
  """
  suffix = Path(path).suffix.lower()
  if FORMATS[suffix] == "PNG":
    save_png(path, image, text)
    return
  exif = Image.Exif()
  exif[_DESCRIPTION] = "; ".join(f"{name}: {value}" for name, value in (text or {}).items())
  options = {"subsampling": 0} if FORMATS[suffix] == "JPEG" else {}
  with atomic_path(path) as partial:
    picture = Image.fromarray(image)
    picture.save(partial, format=FORMATS[suffix], quality=QUALITY, exif=exif, **options)
