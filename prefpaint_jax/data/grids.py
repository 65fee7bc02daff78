"""Arranges images in grids with texts."""
# Shapes: N images, H W pixels.

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prefpaint_jax.data.images import to_bytes


def image_grid(
  images: np.ndarray,
  columns: int,
  scale: int = 1,
  padding: int = 2,
  labels: Sequence[str] | None = None,
) -> np.ndarray:
  """Arranges images row by row on a white background: uint8 [grid height, grid width, 3].

  Args:
    images: [N, H, W, 3] in [0, 1]; values outside are clipped.
    columns: images per row; the last row is filled up with white.
    scale: every pixel becomes a square of scale × scale pixels.
    padding: white pixels around every image.
    labels: N short texts, written under the images and truncated to their width.
  """
  count, height, width, _ = images.shape
  if labels is not None and len(labels) != count:
    raise ValueError(f"image_grid: {len(labels)} labels for {count} images; give one for each")
  pixels = to_bytes(images)
  pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
  if labels is not None:
    strips = np.stack([_label(text, width * scale) for text in labels])
    pixels = np.concatenate([pixels, strips], axis=1)
  rows = -(-count // columns)
  margins = [(0, rows * columns - count), (padding, padding), (padding, padding), (0, 0)]
  tiles = np.pad(pixels, margins, constant_values=255)
  _, tile_height, tile_width, _ = tiles.shape
  grid = tiles.reshape(rows, columns, tile_height, tile_width, 3).swapaxes(1, 2)
  return grid.reshape(rows * tile_height, columns * tile_width, 3)


def _label(text: str, width: int) -> np.ndarray:
  font = ImageFont.load_default()
  strip = Image.new("RGB", (width, int(font.getbbox("Ág")[3]) + 2), "white")
  ImageDraw.Draw(strip).text((1, 0), text, fill="black", font=font)
  return np.asarray(strip)
