"""Reads, checks, resizes and combines images and masks.

Images are float32 in [0, 1]; masks are float32 in {0, 1} with 1 = missing; channels come last. An
error is one line that names the file.
"""
# Shapes: H W pixels.

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from scipy import ndimage

from prefpaint_jax.data import decoding
from prefpaint_jax.runtime.files import atomic_path

# A PIL image, a path, the bytes of a file, or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
Source = Any
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_PIL_LUMINANCE = np.array([19595, 38470, 7471]) / 65536
_ROUNDING = 4e-8  # of a byte as float32 in [0, 1]; luminances of bytes are 6e-8 or more apart


def load_image(source: Source) -> np.ndarray:
  """Loads an image as float32 [H, W, 3] in [0, 1].

  The loader applies the EXIF orientation, converts colours to sRGB, repeats grey over the channels,
  keeps all 16 bits of 16-bit values, and composites transparent pixels on white.

  Args:
    source: a path, a PIL image, or an array of uint8, uint16, bool, or floats in [0, 1].

  Raises:
    ValueError: the source is no image. The message names it.
  """
  pixels = _load(source, _name(source, "image"))
  if pixels.shape[-1] == 4:
    alpha = pixels[..., 3:]
    pixels = alpha * pixels[..., :3] + (1 - alpha)
  return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def load_mask(source: Source, size: tuple[int, int] | None = None) -> np.ndarray:
  """Loads a mask, float32 [H, W, 1]: 1 (missing) for pixels of at least half white, else 0.

  Colours count by their luminance, as PIL converts them to mode L.

  Args:
    source: as for `load_image`.
    size: (height, width) of the mask's image; None: any size.

  Raises:
    ValueError: the mask has transparent pixels, another size, no missing pixel, or no known pixel.
  """
  name = _name(source, "mask")
  pixels = _load(source, name, colours=False)
  if pixels.shape[-1] == 4 and pixels[..., 3].min() < 1:
    # Some editors erase what is missing, others paint it on a transparent layer.
    raise ValueError(
      f"{name}: the mask has transparent pixels; expected an opaque mask; save it with white where "
      "the image is missing and black where it is known"
    )
  if pixels.shape[-1] > 1:
    pixels = pixels[..., :3].astype(np.float64) @ _PIL_LUMINANCE[:, None]
  mask = (pixels >= 0.5 - _ROUNDING).astype(np.float32)
  check_mask(mask, size, name)
  return mask


def load_pairs(
  image: Source | Sequence[Source], mask: Source | Sequence[Source]
) -> tuple[np.ndarray, np.ndarray]:
  """Loads B images of one size and their masks: [B, H, W, 3] and [B, H, W, 1].

  Args:
    image: one image (B = 1), or a list or an array of B images.
    mask: B masks, or one mask for all images.
  """
  mask_sources, images = _listed(mask), load_images(image)
  if len(mask_sources) not in (1, len(images)):
    raise ValueError(
      f"{len(mask_sources)} masks for {len(images)} images; give one for all, or one for each"
    )
  masks = [load_mask(source, images[0].shape[:2]) for source in mask_sources]
  return images, np.stack(masks * (len(images) // len(masks)))


def load_images(image: Source | Sequence[Source], name: str = "images") -> np.ndarray:
  """Loads one image, or a list or an array of B images of one size: [B, H, W, 3].

  Args:
    name: of the argument, for the message.

  Raises:
    ValueError: there is no image, or one cannot be read or has another size.
  """
  sources = _listed(image)
  if not sources:
    raise ValueError(f"{name}: the list is empty; give at least one image")
  images = [load_image(source) for source in sources]
  for source, other in zip(sources, images, strict=True):
    if other.shape != images[0].shape:
      raise ValueError(
        f"{_name(source, 'image')}: the image is {_extent(other.shape)}, the first of the list "
        f"{_extent(images[0].shape)} (width x height); give images of one size, or one at a time"
      )
  return np.stack(images)


def _listed(source: Source | Sequence[Source]) -> list[Source]:
  several = isinstance(source, list | tuple) or getattr(source, "ndim", 0) == 4
  return list(source) if several else [source]


def check_mask(mask: np.ndarray, size: tuple[int, int] | None = None, name: str = "mask") -> None:
  """Checks a mask [H, W, 1].

  Args:
    size: the expected (height, width); None: any size.
    name: of the mask, for the message.

  Raises:
    ValueError: the mask has another size, no missing pixel, or no known pixel.
  """
  if size is not None and mask.shape[:2] != tuple(size):
    raise ValueError(
      f"{name}: the mask is {_extent(mask.shape)}, its image {_extent(size)} "
      "(width x height); give both the same size"
    )
  missing = float(np.mean(mask))
  if missing == 0.0:
    raise ValueError(
      f"{name}: the mask is empty (no white pixel); make the missing pixels white (255)"
    )
  if missing == 1.0:
    raise ValueError(f"{name}: the mask is full (all white); make the known pixels black (0)")


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes [H, W, C] in [0, 1] to [*size, C] with an antialiased Lanczos filter.

  Values are clipped to [0, 1], because the filter overshoots at edges.
  """
  if image.shape[:2] == tuple(size):
    return image
  height, width = size
  channels = [
    Image.fromarray(channel).resize((width, height), Image.Resampling.LANCZOS)
    for channel in np.moveaxis(np.asarray(image, np.float32), -1, 0)
  ]
  return np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), 0.0, 1.0)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes [H, W, 1] to [*size, 1] without losing a missing pixel; the mask stays binary.

  Where a side shrinks, a new pixel is missing if it overlaps a missing pixel. Where a side grows, a
  new pixel is missing if its centre is in a missing pixel.
  """
  for axis, new in enumerate(size):
    old, index = mask.shape[axis], np.arange(new)
    if new >= old:
      mask = mask.take((2 * index + 1) * old // (2 * new), axis)
    else:
      first, last = index * old // new, ((index + 1) * old - 1) // new
      # Two neighbours overlap the same old pixel if its middle is cut: `reduceat` counts it once.
      mask = np.maximum(np.maximum.reduceat(mask, first, axis), mask.take(last, axis))
  return mask


def resize_prompt(
  image: np.ndarray, mask: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Resizes an image [H, W, 3] and its mask [H, W, 1] to `size`.

  The content of the hole does not change a known pixel of the result.
  """
  if image.shape[:2] == tuple(size):
    return image, mask
  small_mask = resize_mask(mask, size)
  known = resize_image(spread_known(image, mask), size)
  return np.where(small_mask > 0, resize_image(image, size), known), small_mask


def resize_prompts(
  images: np.ndarray, masks: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Resizes images [B, H, W, 3] and their masks [B, H, W, 1] as `resize_prompt`.

  Raises:
    ValueError: a mask is full at `size`.
  """
  pairs = [resize_prompt(*pair, size) for pair in zip(images, masks, strict=True)]
  small_images, small_masks = map(np.stack, zip(*pairs, strict=True))
  if small_masks.all(axis=(1, 2, 3)).any():
    raise ValueError(
      f"mask: the {_extent(masks.shape[1:])} leave no known pixel at {_extent(size)}, the "
      "size at which the model works; leave larger known regions"
    )
  return small_images, small_masks


def spread_known(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Replaces every missing pixel of [H, W, C] by the nearest known pixel."""
  nearest = ndimage.distance_transform_edt(
    mask[..., 0] > 0, return_distances=False, return_indices=True
  )
  return image[tuple(nearest)]


def paste_back(result, image, mask):
  """Combines the missing pixels of `result` with the known pixels of `image`.

  All are NumPy arrays or all are JAX arrays: [..., H, W, 3], and the mask [..., H, W, 1].
  """
  return mask * result + (1 - mask) * image


def _load(source: Source, name: str, colours: bool = True) -> np.ndarray:
  """Loads [H, W, C] in [0, 1] with 1, 3 or 4 channels, the last of 4 alpha."""
  if isinstance(source, str | os.PathLike):
    pixels = decoding.decode_file(source, colours)
  elif isinstance(source, bytes):
    pixels = decoding.decode_bytes(source, name, colours)
  elif isinstance(source, Image.Image):
    pixels = decoding.pil_to_float(source, name, colours)
  else:
    pixels = decoding.array_to_float(np.asarray(source), name)
  if pixels.ndim == 2:
    pixels = pixels[..., None]
  if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or 0 in pixels.shape:
    raise ValueError(
      f"{name}: the shape is {pixels.shape}; expected [H, W], or [H, W, C] with 1, 3 or 4 channels"
    )
  return pixels


def _name(source: Source, otherwise: str) -> str:
  """Returns the path of a source for an error message, or `otherwise` if it has none."""
  if isinstance(source, str | os.PathLike):
    return os.fspath(source)
  return getattr(source, "filename", "") or otherwise


def _extent(shape: Sequence[int]) -> str:
  """Describes (height, width, ...) as tools for images do."""
  return f"{shape[1]}x{shape[0]} pixels"


def to_bytes(image: np.ndarray) -> np.ndarray:
  """Converts values in [0, 1] to uint8, rounded to the nearest; clips values outside.

  Raises ValueError for values that are not finite.
  """
  if not np.isfinite(image).all():
    raise ValueError("image has values that are not finite; check the model that made it")
  return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


def save_png(
  path: str | os.PathLike[str], image: np.ndarray, text: Mapping[str, str] | None = None
) -> None:
  """Writes a uint8 image [H, W, 3] as a PNG, whole or not at all.

  Args:
    text: {keyword: text} of the PNG's text chunks.
  """
  content = png_bytes(image, text)
  with atomic_path(path) as temporary:
    temporary.write_bytes(content)


def png_bytes(image: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
  """Encodes an image as `save_png` writes it."""
  fields, file = PngImagePlugin.PngInfo(), io.BytesIO()
  for name, value in (text or {}).items():
    fields.add_text(name, value)
  Image.fromarray(image).save(file, format="PNG", pnginfo=fields)
  return file.getvalue()


def luma(images: np.ndarray) -> np.ndarray:
  """Computes the luma of RGB images (Rec. 601): [..., 3] -> [...]."""
  return images @ np.array([0.299, 0.587, 0.114], np.float32)
