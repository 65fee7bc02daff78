"""Extends an image beyond its borders, one window of the model's native size at a time.

Each window overlaps the image or earlier windows. The overlap is known to the model, which inpaints
the rest of the window. `plan_windows` assigns each new pixel to a window, `extend` inpaints all
windows, and `inpaint_seamlessly` inpaints a batch of images without a visible seam.
"""
# Shapes: B windows of a batch, H W pixels of the image.

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from scipy import ndimage

from prefpaint_jax.data import images as image_io
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.runtime.memory import check_memory

_MAX_BATCH = 8  # windows
_MAX_SCALE = 1.5  # the shorter side of the image while it is extended, in windows


class Borders(NamedTuple):
  """The number of pixels to add at each side of an image."""

  left: int = 0
  right: int = 0
  top: int = 0
  bottom: int = 0

  @classmethod
  def parse(cls, text: str) -> Borders:
    """Reads "left=256,bottom=128"; a side that is not named gets 0 pixels.

    Raises:
      ValueError: a side is unknown, repeated, negative or not an integer, or all are 0.
    """
    borders = {}
    for part in text.split(","):
      side, _, number = part.strip().partition("=")
      if side not in cls._fields:
        raise ValueError(f"extend {text!r}: {side!r} is no side; name left, right, top or bottom")
      if side in borders:
        raise ValueError(f"extend {text!r}: {side} is named twice; name each side once")
      try:
        borders[side] = int(number)
      except ValueError:
        raise ValueError(
          f"extend {text!r}: {side} is {number!r}; expected a whole number of pixels, {side}=256"
        ) from None
    return cls(**borders).check()

  def check(self) -> Borders:
    """Returns itself; raises ValueError if a side is negative or all sides are 0."""
    for side, pixels in self._asdict().items():
      if pixels < 0:
        raise ValueError(f"extend: {side} is {pixels}; expected 0 or more pixels")
    if not any(self):
      raise ValueError("extend: all sides are 0; give pixels for at least one side, left=256")
    return self


class Plan(NamedTuple):
  """The windows of an extension, in working pixels: those of the canvas at the model's scale.

  A round is a set of windows that do not depend on each other.
  """

  rounds: np.ndarray  # int32 [height, width, 1]: the round that inpaints each pixel; 0: the image
  window: int  # pixels along each side of a window
  batches: list[tuple[int, list[tuple[int, int]]]]  # in order: (round, B top left corners (y, x))


def plan_windows(
  inpainter: Inpainter, size: tuple[int, int], borders: Borders, overlap: float = 0.5
) -> Plan:
  """Plans the windows that extend an image.

  The image is resized so that its shorter side measures 1 to 1.5 windows: in a larger image a
  window would see too little of the image to continue it. The plan extends left and right first,
  over the height of the image, then top and bottom over the whole width.

  The round of a window is one more than the latest round in its overlap. Windows of one round
  can therefore share a batch. All batches have the same size, the largest up to 8 that divides
  every round, so that one compiled program serves them all without padding.

  Args:
    inpainter: gives the size of a window.
    size: (height, width) of the image.
    borders: pixels to add, in pixels of the image.
    overlap: minimum share of each window that is known.

  Raises:
    ValueError: `borders` or `overlap` is out of range.
  """
  if not 0.25 <= overlap <= 0.75:
    raise ValueError(f"overlap is {overlap}; expected the share of a window, from 0.25 to 0.75")
  left, right, top, bottom = borders.check()
  # The canvas, its hole, and both at the working size; float32.
  pixels = (size[0] + top + bottom) * (size[1] + left + right)
  check_memory(32 * pixels, f"extend: an image of {pixels:,} pixels")
  hole = _pad(np.zeros((*size, 1), np.float32), borders, constant_values=1.0)
  window = inpainter.modules.native_size
  scale = np.clip(min(size), window, _MAX_SCALE * window) / min(size)
  hole = image_io.resize_mask(hole, tuple(round(scale * side) for side in hole.shape[:2]))
  rounds = np.where(hole > 0, -1, 0).astype(np.int32)
  corners_of: list[list[tuple[int, int]]] = []  # of each round, from round 1
  for y, x in _windows(hole[..., 0] == 0, window, overlap):
    view = rounds[y : y + window, x : x + window]
    missing = view < 0
    if missing.any():
      number = int(view.max()) + 1
      view[missing] = number
      corners_of += [[] for _ in range(number - len(corners_of))]
      corners_of[number - 1].append((y, x))
  common = math.gcd(*map(len, corners_of))
  batch = max(b for b in range(1, _MAX_BATCH + 1) if common % b == 0)
  batches = [
    (number, corners[first : first + batch])
    for number, corners in enumerate(corners_of, start=1)
    for first in range(0, len(corners), batch)
  ]
  return Plan(rounds, window, batches)


def _windows(known: np.ndarray, window: int, overlap: float) -> Iterator[tuple[int, int]]:
  """Yields the top left corners of the windows around a known rectangle, from the inside out."""
  height, width = known.shape
  rows, columns = np.flatnonzero(known.any(1)), np.flatnonzero(known.any(0))
  (top, bottom), (left, right) = (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)
  step = int((1 - overlap) * window)
  # Neighbours in one ring overlap each other by half of `overlap`, because each also overlaps the
  # ring inside.
  stride = int((1 - overlap / 2) * window)
  for x in _rings(left, right, width, window, step):
    yield from ((y, x) for y in _side_by_side(top, bottom, height, window, stride))
  for y in _rings(top, bottom, height, window, step):
    yield from ((y, x) for x in _side_by_side(0, width, width, window, stride))


def _rings(start: int, stop: int, length: int, window: int, step: int) -> Iterator[int]:
  """Yields the first pixels of windows from [start, stop) to 0, then to `length`, evenly spaced."""
  for border, first_pixel in (
    (start, lambda distance: start - distance),
    (length - stop, lambda distance: stop + distance - window),
  ):
    count = math.ceil(border / step)
    for ring in range(1, count + 1):
      yield int(first_pixel(round(border * ring / count)))


def _side_by_side(start: int, stop: int, length: int, window: int, stride: int) -> list[int]:
  """Returns the first pixels of windows that cover [start, stop), from the middle outwards."""
  start = min(start, length - window)  # rounding can make [start, stop) one pixel shorter
  spare = stop - start - window
  offsets = np.linspace(0, spare, math.ceil(spare / stride) + 1).round().astype(int)
  return [int(start + x) for x in sorted(offsets, key=lambda offset: abs(2 * offset - spare))]


def extend(
  inpainter: Inpainter,
  image: Any,
  left: int = 0,
  right: int = 0,
  top: int = 0,
  bottom: int = 0,
  *,
  key: jax.Array | None = None,
  overlap: float = 0.5,
  **options: Any,
) -> np.ndarray:
  """Extends an image by the given number of pixels at each side.

  Args:
    inpainter: the model.
    image: PIL image, path or array [H, W, 3], of any size.
    left, right, top, bottom: pixels to add, in pixels of the image.
    key: `jax.random.key`; default `jax.random.key(0)`.
    overlap: minimum share of each window that is known.
    **options: `num_steps`, `eta`, `text`, `negative_text`, `guidance_scale` and `report` of
      `Inpainter`.

  Returns:
    float32 [top + H + bottom, left + W + right, 3] in [0, 1]. Pixels of the image are unchanged.

  Raises:
    ValueError: no side grows, or `overlap` is out of range.
  """
  image = image_io.load_image(image)
  borders = Borders(left, right, top, bottom)
  rounds, window, batches = plan_windows(inpainter, image.shape[:2], borders, overlap)
  key = jax.random.key(0) if key is None else key
  canvas = _pad(image, borders, mode="edge")
  hole = _pad(np.zeros_like(image[..., :1]), borders, constant_values=1.0)
  working = image_io.resize_image(canvas, rounds.shape[:2]).copy()
  for index, (number, corners) in enumerate(batches):
    boxes = [np.s_[y : y + window, x : x + window] for y, x in corners]
    views = np.stack([working[box] for box in boxes])
    missing = np.stack([rounds[box] == number for box in boxes])
    samples = inpaint_seamlessly(
      inpainter,
      views,
      missing.astype(np.float32),
      key=jax.random.fold_in(key, index),
      **options,
    )
    for box, sample in zip(boxes, samples, strict=True):
      working[box] = sample
  extended = image_io.resize_image(working, canvas.shape[:2])
  if extended.shape != working.shape:  # resizing leaves a seam around the image
    extended = _remove_seam(extended, canvas, hole, hole[..., 0] > 0)
  return np.where(hole > 0, extended, canvas)


def _pad(image: np.ndarray, borders: Borders, **options: Any) -> np.ndarray:
  """Pads [H, W, C] by `borders`; `options` are those of `np.pad`."""
  left, right, top, bottom = borders
  return np.pad(image, [(top, bottom), (left, right), (0, 0)], **options)


def inpaint_seamlessly(
  inpainter: Inpainter,
  images: np.ndarray,
  masks: np.ndarray,
  continuous: np.ndarray | None = None,
  **options: Any,
) -> np.ndarray:
  """Inpaints images without a visible seam around their holes.

  Args:
    inpainter: the model.
    images: [B, H, W, 3] in [0, 1]; pixels under the mask are ignored.
    masks: [B, H, W, 1], 1 = missing.
    continuous: bool [B, H, W], false at missing pixels that belong to another object than the known
      pixels beside them, so that their colours may differ. Default: true everywhere.
    **options: those of `Inpainter`.

  Returns:
    float32 [B, H, W, 3]. Known pixels are unchanged.

  Raises:
    ValueError: an image has no known pixel.
  """
  samples = inpainter(images, masks, paste_back=False, **options)
  known = [image_io.spread_known(image, mask) for image, mask in zip(images, masks, strict=True)]
  continuous = np.ones(masks.shape[:3], bool) if continuous is None else continuous
  seamless = [_remove_seam(*one) for one in zip(samples, known, masks, continuous, strict=True)]
  return np.where(masks > 0, np.stack(seamless), images)


def _remove_seam(
  sample: np.ndarray, known: np.ndarray, mask: np.ndarray, continuous: np.ndarray
) -> np.ndarray:
  """Shifts the colours of a sample so that the rim of its hole has the colours of `known`.

  The VAE reconstructs known pixels with slightly different colours, and the hole with them. This
  function measures the difference at the rim, the outermost pixels of the hole, and continues it
  into the hole as a membrane (the solution of Laplace's equation): sums of blurs at the scales 1,
  2, 4, ... weigh a pixel of the rim at distance r by 1/r², the Poisson kernel of a straight rim.
  The shift fades within an eighth of the shorter side.

  Args:
    sample: [H, W, 3].
    known: [H, W, 3] of `spread_known`, the colours that the rim should have.
    mask: [H, W, 1].
    continuous: bool [H, W]; pixels of the rim where it is false are not used.
  """
  missing = mask[..., 0] > 0
  rim = missing & continuous & ndimage.binary_dilation(~missing)
  height, width = missing.shape
  reach = min(height, width) / 8
  channels = [rim * offset for offset in np.moveaxis(known - sample, -1, 0)] + [rim]
  total = np.zeros((4, height, width), np.float32)
  for scale in 2 ** np.arange(round(np.log2(max(reach, 1))) + 2):
    coarse = max(1, width // scale), max(1, height // scale)
    for channel, sums in zip(channels, total, strict=True):
      small = Image.fromarray(channel.astype(np.float32)).resize(coarse, Image.Resampling.BILINEAR)
      sums += np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
  *shift, weight = total
  fade = np.exp(-0.5 * (ndimage.distance_transform_edt(missing) / reach) ** 2)
  shift = np.stack(shift, axis=-1) * (fade / np.maximum(weight, 1e-9))[..., None]
  return np.clip(sample + shift, 0.0, 1.0).astype(np.float32)
