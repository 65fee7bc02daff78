"""Arranges images in grids with texts."""
# Shapes: N images, H W pixels.

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prefpaint_jax.data.images import to_bytes

_INK, _MUTED, _MARK = "#1c1f24", "#666c76", (0, 143, 95)  # of marked and of other texts, of frames
_SMALLEST = 10  # size of a font, in pixels


def image_grid(
  images: np.ndarray,
  columns: int,
  scale: int = 1,
  padding: int = 2,
  labels: Sequence[str] | None = None,
  marked: Sequence[bool] | None = None,
  rows: Sequence[str] | None = None,
  caption: str = "",
) -> np.ndarray:
  """Arranges images row by row on a white background: uint8 [grid height, grid width, 3].

  Args:
    images: [N, H, W, 3] in [0, 1]; values outside are clipped.
    columns: images per row; the last row is filled up with white.
    scale: every pixel becomes a square of scale × scale pixels.
    padding: white pixels around every image.
    labels: N short texts, written under the images in a font that fits their width; a row without a
      label has no space for it. A text may have several lines.
    marked: N choices of images that get a coloured frame in the padding and a darker label.
    rows: a name for each row, written above it.
    caption: a text below the grid.
  """
  count, height, width, _ = images.shape
  for name, given in (("labels", labels), ("marks", marked)):
    if given is not None and len(given) != count:
      raise ValueError(f"image_grid: {len(given)} {name} for {count} images; give one for each")
  number = -(-count // columns)
  if rows is not None and len(rows) != number:
    raise ValueError(f"image_grid: {len(rows)} names for {number} rows; give one for each")
  labels, marked = labels or [""] * count, [False] * count if marked is None else marked
  pixels = to_bytes(images).repeat(scale, axis=1).repeat(scale, axis=2)
  size = _size_of(labels, width * scale)
  strips = []
  for row in range(number):
    own = range(row * columns, min(count, (row + 1) * columns))
    lines = max(len(labels[i].splitlines()) for i in own)
    tiles = [_tile(pixels[i], padding, labels[i], lines, size, marked[i]) for i in own]
    tiles += [np.full_like(tiles[0], 255)] * (columns - len(own))
    strip = np.concatenate(tiles, axis=1)
    if rows is not None:
      if strips:
        strips.append(np.full((size // 2, strip.shape[1], 3), 255, np.uint8))
      strips.append(_text([rows[row]], strip.shape[1], size + max(2, size // 5), padding, _INK))
    strips.append(strip)
  if caption:
    strips.append(_text([caption], strips[0].shape[1], size, padding, _MUTED))
  return np.concatenate(strips)


def _size_of(labels: Sequence[str], width: int) -> int:
  """Returns the size of the font: in proportion to the image, smaller if a label is too long."""
  size = int(np.clip(width // 10, _SMALLEST, 28))
  lines = [line for label in labels for line in label.splitlines()]
  too_long = lambda: max(map(ImageFont.load_default(size).getlength, lines)) > width
  while lines and size > _SMALLEST and too_long():
    size -= 1
  return size


def _tile(
  pixels: np.ndarray, padding: int, label: str, lines: int, size: int, marked: bool
) -> np.ndarray:
  """Returns an image with its padding or frame, above a label with space for `lines` lines."""
  frame = np.full((*(length + 2 * padding for length in pixels.shape[:2]), 3), 255, np.uint8)
  if marked:
    frame[:] = _MARK
    edge = padding // 3  # keeps the frames of neighbours apart
    frame[:edge], frame[:, :edge] = 255, 255
    frame[len(frame) - edge :], frame[:, frame.shape[1] - edge :] = 255, 255
  frame[padding : len(frame) - padding, padding : frame.shape[1] - padding] = pixels
  if not lines:
    return frame
  texts = [*label.splitlines(), *[""] * lines][:lines]
  strip = _text(texts, frame.shape[1], size, padding, _INK if marked else _MUTED)
  return np.concatenate([frame, strip])


def _text(lines: Sequence[str], width: int, size: int, indent: int, colour: str) -> np.ndarray:
  """Draws lines of text: uint8 [height, width, 3]; what does not fit into the width is cut off."""
  font, height = ImageFont.load_default(size), round(1.25 * size)
  strip = Image.new("RGB", (width, height * len(lines) + size // 3), "white")
  draw = ImageDraw.Draw(strip)
  for i, line in enumerate(lines):
    draw.text((indent, size // 6 + i * height), line, fill=colour, font=font)
  return np.asarray(strip)
