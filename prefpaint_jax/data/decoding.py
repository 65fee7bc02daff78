"""Decodes image files, PIL images and arrays to floats, as a viewer shows them.

Colours become those of sRGB. An error is one line that names the file.
"""
# Shapes: H W pixels, C channels: 1, 3, or 4 with alpha.

from __future__ import annotations

import functools
import io
import os
import warnings
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from absl import logging
from PIL import Image, ImageCms, UnidentifiedImageError

from prefpaint_jax.runtime.text import first_line

_BYTES_PER_PIXEL = (
  48  # of memory, while an image is decoded and resized: four float32 copies of RGB
)
_OPENING = Lock()  # held while PIL's limit on the number of pixels is lifted
_TRANSPOSITIONS = {  # of EXIF's orientation
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_SRGB_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # white, red, green, blue
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")


def decode_file(path: str | os.PathLike[str], colours: bool = True) -> np.ndarray:
  """Decodes an image file to [H, W] or [H, W, C] in [0, 1].

  Args:
    colours: convert colours to sRGB; False keeps the stored values, as a mask needs them.

  Raises:
    ValueError: the file is no image, is damaged, or is too large for the memory.
  """
  name = os.fspath(path)
  if not os.path.exists(path):
    raise ValueError(f"{name}: no such file")
  if not os.path.isfile(path):
    raise ValueError(f"{name}: a folder, not a file; give one image")
  return decode_bytes(Path(path).read_bytes(), name, colours)


def decode_bytes(content: bytes, name: str, colours: bool = True) -> np.ndarray:
  """Decodes the content of an image file; see `decode_file`."""
  image = open_bytes(content, name)
  most = _memory() // _BYTES_PER_PIXEL
  if image.width * image.height > most:
    raise ValueError(
      f"{name}: the image is {image.width}x{image.height}; expected at most {most:,} pixels, which "
      "fit into memory; reduce it"
    )
  return pil_to_float(image, name, colours)


def open_bytes(content: bytes, name: str) -> Image.Image:
  """Opens the content of an image file: reads its format and size, and decodes no pixel.

  Raises:
    ValueError: it is no image, or its header is damaged.
  """
  try:
    with _OPENING, warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
      try:
        return Image.open(io.BytesIO(_without_texts(content)))
      finally:
        Image.MAX_IMAGE_PIXELS = limit
  except UnidentifiedImageError:
    raise ValueError(f"{name}: not an image; give a PNG or JPEG") from None
  except Exception as error:  # PIL's readers raise errors of all kinds for damaged headers
    raise ValueError(_damaged(name, error)) from None


def _damaged(name: str, error: Exception) -> str:
  return f"{name}: the image is truncated or damaged ({first_line(error)}); copy it again"


def _without_texts(content: bytes) -> bytes:
  """Removes the text chunks of a PNG: PIL refuses the whole image for one that is too large."""
  if not content.startswith(b"\x89PNG\r\n\x1a\n") or not any(x in content for x in _TEXT_CHUNKS):
    return content
  kept, start = [content[:8]], 8
  while start < len(content):
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    kind, chunk = content[start + 4 : start + 8], content[start:end]
    # XMP may hold the orientation.
    if kind not in _TEXT_CHUNKS or chunk[8:].startswith(b"XML:com.adobe.xmp"):
      kept.append(chunk)
    start = end
  return b"".join(kept)


@functools.cache
def _memory() -> int:
  """Returns the bytes of physical memory; 8 GiB where the platform does not tell."""
  try:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (AttributeError, ValueError, OSError):
    return 2**33


def pil_to_float(image: Image.Image, name: str = "image", colours: bool = True) -> np.ndarray:
  """Converts a PIL image to [H, W] or [H, W, C] in [0, 1], upright.

  Values of more than 8 bits keep their precision. An image of mode I is 8-bit if no value is above
  255, and 16-bit if none is above 65535.

  Raises:
    ValueError: the content is damaged, the mode has no conversion to RGB, or values are out of
      range.
  """
  try:
    image.load()
  except Exception as error:  # PIL's decoders raise errors of all kinds for damaged content
    raise ValueError(_damaged(name, error)) from None
  upright = image
  try:
    orientation = image.getexif().get(0x0112)
  except Exception:  # damaged EXIF says nothing about the orientation
    orientation = None
  if orientation in _TRANSPOSITIONS:
    upright = image.transpose(_TRANSPOSITIONS[orientation])
  if image.mode.startswith("I"):
    return _deep_to_float(image, upright, name)
  if image.mode == "F":
    return array_to_float(np.asarray(upright), name)
  try:
    rgb = upright.convert("RGBA" if image.has_transparency_data else "RGB")
    if colours:
      rgb = _to_srgb(upright, rgb, name)
  except ValueError as error:
    raise ValueError(f"{name}: the mode is {image.mode} ({error}); save it as RGB") from None
  pixels = np.asarray(rgb).astype(np.float32) / 255
  if colours and "icc_profile" not in image.info and "srgb" not in image.info:
    pixels = _from_gamma(pixels, image.info, name)
  return pixels


def _deep_to_float(image: Image.Image, upright: Image.Image, name: str) -> np.ndarray:
  """Converts an image of integers of more than 8 bits; `upright` is the image, transposed."""
  values = np.asarray(upright).astype(np.int64)
  low, high = int(values.min(initial=0)), int(values.max(initial=0))
  if low < 0 or high > 65535:
    raise ValueError(
      f"{name}: values from {low} to {high}; expected 8 or 16 bits, 0 to 65535; convert the image"
    )
  # Readers of PNG and PGM give mode I to 16-bit values.
  is_deep = image.mode != "I" or image.format in ("PNG", "PPM") or high > 255
  bits = getattr(image, "tag_v2", {}).get(258, (16,))
  largest = 4095 if is_deep and bits == (12,) else 65535 if is_deep else 255
  pixels = np.minimum(values / np.float32(largest), 1).astype(np.float32)
  transparent = image.info.get("transparency")
  if isinstance(transparent, int):
    return np.stack([*[pixels] * 3, (values != transparent).astype(np.float32)], axis=-1)
  return pixels


def _to_srgb(image: Image.Image, rgb: Image.Image, name: str) -> Image.Image:
  """Converts the colours of an image with an ICC profile to sRGB.

  Args:
    image: in its own mode.
    rgb: the same image as RGB or RGBA, without regard to the profile.
  """
  profile = image.info.get("icc_profile")
  if not profile:
    return rgb
  mode = image.mode if image.mode in ("L", "CMYK", "LAB") else "L" if image.mode == "LA" else "RGB"
  plain = image if image.mode == mode else rgb.convert(mode)
  try:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    convert = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    # Most profiles are sRGB: their conversion would only round.
    levels = np.linspace(0, 255, 6).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(36, 6, 3)
    probe = Image.fromarray(grid if mode == "RGB" else grid[..., 0].copy())
    if mode in ("RGB", "L"):
      shift = np.asarray(ImageCms.applyTransform(probe, convert)).astype(int)
      if np.abs(shift - np.asarray(probe.convert("RGB"))).max() <= 3:
        return rgb
    converted = ImageCms.applyTransform(plain, convert)
  except (ImageCms.PyCMSError, OSError, ValueError) as error:
    _say_once(f"an ICC profile was ignored ({first_line(error)}), of {name} for example")
    return rgb
  _say_once(f"colours were converted from an ICC profile to sRGB, of {name} for example")
  if rgb.mode == "RGBA":
    converted.putalpha(rgb.getchannel("A"))
  return converted


def _from_gamma(pixels: np.ndarray, info: dict[str, Any], name: str) -> np.ndarray:
  """Converts pixels [H, W, C] to sRGB from the gamma and the primaries that a PNG names."""
  gamma, primaries = info.get("gamma"), info.get("chromaticity")
  is_srgb = not gamma or abs(2.2 * gamma - 1) < 0.05
  same = not primaries or np.abs(np.subtract(primaries, _SRGB_PRIMARIES)).max() < 0.005
  if is_srgb and same:
    return pixels
  encoded = pixels[..., :3]
  above = ((encoded + 0.055) / 1.055) ** 2.4
  linear = (
    np.where(encoded <= 0.04045, encoded / 12.92, above) if is_srgb else encoded ** (1 / gamma)
  )
  if not same:
    try:
      linear = linear @ (np.linalg.inv(_to_xyz(_SRGB_PRIMARIES)) @ _to_xyz(primaries)).T
    except (np.linalg.LinAlgError, ZeroDivisionError):
      _say_once(f"primaries {primaries} were ignored, of {name} for example")
  linear = np.clip(linear, 0, 1)
  shown = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
  _say_once(f"colours were converted from a PNG's gamma to sRGB, of {name} for example")
  return np.concatenate([shown, pixels[..., 3:]], axis=-1).astype(np.float32)


def _to_xyz(primaries: tuple[float, ...]) -> np.ndarray:
  """Computes the matrix [3, 3] from linear RGB to XYZ of (white, red, green, blue) in x, y."""
  xyz = lambda x, y: np.array([x / y, 1.0, (1 - x - y) / y])
  white, *columns = (xyz(*primaries[i : i + 2]) for i in range(0, 8, 2))
  matrix = np.stack(columns, axis=1)
  return matrix * np.linalg.solve(matrix, white)


_said: set[str] = set()


def _say_once(message: str) -> None:
  """Logs a message, once per process for each of its beginnings."""
  kind = message.split(",")[0]
  if kind not in _said:
    _said.add(kind)
    logging.warning("%s", message)


def array_to_float(array: np.ndarray, name: str = "image") -> np.ndarray:
  """Converts an array to float32 in [0, 1] of the same shape."""
  if array.dtype == bool:
    return array.astype(np.float32)
  if array.dtype in (np.uint8, np.uint16):
    return array.astype(np.float32) / np.iinfo(array.dtype).max
  if not np.issubdtype(array.dtype, np.floating):
    raise ValueError(f"{name}: the dtype is {array.dtype}; give uint8, uint16, or floats in [0, 1]")
  low, high = float(array.min(initial=0.0)), float(array.max(initial=0.0))
  if not (low >= 0.0 and high <= 1.0):  # also true for NaN
    raise ValueError(f"{name}: values from {low:g} to {high:g}; give uint8, or floats in [0, 1]")
  return array.astype(np.float32)
