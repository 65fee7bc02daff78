"""A photograph with a wider field of view: its canvas grows in windows of the model's own size.

Each window overlaps what is there already, the photograph or earlier windows, which the model is
given as known; it paints the rest of the window. `plan_windows` decides which window paints what,
`extend` paints, `fill` is one painting that meets its surroundings without a seam.
"""
# Shapes: B windows painted at once, H W pixels of the photograph, n of a window's sides.

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

_MOST_AT_ONCE = 8  # windows of a batch
_LARGEST = 1.5  # windows that the photograph's shorter side may measure, while it is painted on


class Borders(NamedTuple):
  """How many pixels a photograph grows by, at each side."""

  left: int = 0
  right: int = 0
  top: int = 0
  bottom: int = 0

  @classmethod
  def parse(cls, text: str) -> Borders:
    """From "left=256,bottom=128"; sides that are not named stay where they are."""
    borders = {}
    for part in text.split(","):
      side, _, number = part.strip().partition("=")
      if side not in cls._fields:
        raise ValueError(f"extend {text!r}: {side!r} is no side: name left, right, top or bottom")
      if side in borders:
        raise ValueError(f"extend {text!r}: {side} is named twice: name each side once")
      try:
        borders[side] = int(number)
      except ValueError:
        raise ValueError(
          f"extend {text!r}: {side} is {number!r}, not a whole number: give pixels, {side}=256"
        ) from None
    return cls(**borders).check()

  def check(self) -> Borders:
    """Itself, unless a side is negative or none grows."""
    for side, pixels in self._asdict().items():
      if pixels < 0:
        raise ValueError(f"extend: {side} is {pixels}: give 0 or more pixels")
    if not any(self):
      raise ValueError("extend: no side grows: give at least one of them pixels, left=256")
    return self


class Plan(NamedTuple):
  """Which window paints what. All sizes are in working pixels."""

  turn: np.ndarray  # int32 [*canvas, 1]: in which turn a pixel is painted; 0 = of the photograph
  window: int  # pixels along each side of a window
  batches: list[tuple[int, list[tuple[int, int]]]]  # (turn, B top left corners) in painting order


# --------------------------------------------------------------------------------------------- plan
def plan_windows(
  inpainter: Inpainter, size: tuple[int, int], borders: Borders, overlap: float = 0.5
) -> Plan:
  """The windows that extend a photograph of this (height, width).

  They are laid on the photograph at its own scale if its shorter side measures 1 to 1.5 windows; a
  smaller one is enlarged to 1 window, and a larger one made smaller, to 1.5: a window that saw
  less of it could not tell what it continues. Left and right grow first, over the photograph's
  height, then top and bottom over the whole width. The share `overlap` of every window, or more,
  lies on what was there before.

  A window comes in the turn after the last one whose pixels it sees, so windows of one turn can be
  painted in any order, or at once. Batches are all of one size, the largest that divides each turn:
  one program serves them all, and none paints in vain.
  """
  if not 0.25 <= overlap <= 0.75:
    raise ValueError(f"overlap is {overlap}: give the share of a window, from 0.25 to 0.75")
  hole = _pad(np.zeros((*size, 1), np.float32), borders.check(), constant_values=1.0)
  window = inpainter.modules.native_size
  scale = np.clip(min(size), window, _LARGEST * window) / min(size)
  hole = image_io.resize_mask(hole, tuple(round(scale * side) for side in hole.shape[:2]))
  turn = np.where(hole > 0, -1, 0).astype(np.int32)
  turns: list[list[tuple[int, int]]] = []
  for y, x in _windows(hole[..., 0] == 0, window, overlap):
    seen = turn[y : y + window, x : x + window]
    missing = seen < 0
    if missing.any():
      number = int(seen.max()) + 1
      seen[missing] = number
      turns += [[] for _ in range(number - len(turns))]
      turns[number - 1].append((y, x))
  common = math.gcd(*map(len, turns))
  at_once = max(b for b in range(1, _MOST_AT_ONCE + 1) if common % b == 0)
  batches = [
    (number, corners[first : first + at_once])
    for number, corners in enumerate(turns, start=1)
    for first in range(0, len(corners), at_once)
  ]
  return Plan(turn, window, batches)


def _windows(known: np.ndarray, window: int, overlap: float) -> Iterator[tuple[int, int]]:
  """Top left corners of the windows around a known rectangle, each next to what comes before it."""
  height, width = known.shape
  rows, columns = np.flatnonzero(known.any(1)), np.flatnonzero(known.any(0))
  (top, bottom), (left, right) = (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)
  step = int((1 - overlap) * window)
  # Those side by side share as much with the ring inside as with each other, so half the overlap
  # between them will do.
  stride = int((1 - overlap / 2) * window)
  for x in _rings(left, right, width, window, step):
    yield from ((y, x) for y in _side_by_side(top, bottom, height, window, stride))
  for y in _rings(top, bottom, height, window, step):
    yield from ((y, x) for x in _side_by_side(0, width, width, window, stride))


def _rings(start: int, stop: int, length: int, window: int, step: int) -> Iterator[int]:
  """Where windows begin that go from [start, stop) to 0, then to `length`, by equal steps."""
  for border, place in (
    (start, lambda grown: start - grown),
    (length - stop, lambda grown: stop + grown - window),
  ):
    count = math.ceil(border / step)
    for ring in range(1, count + 1):
      yield int(place(round(border * ring / count)))


def _side_by_side(start: int, stop: int, length: int, window: int, stride: int) -> list[int]:
  """Where windows begin that cover [start, stop), from the middle to both ends."""
  start = min(start, length - window)  # rounding may have made [start, stop) a pixel too short
  spare = stop - start - window
  places = np.linspace(0, spare, math.ceil(spare / stride) + 1).round().astype(int)
  return [int(start + place) for place in sorted(places, key=lambda place: abs(2 * place - spare))]


# -------------------------------------------------------------------------------------------- paint
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
  """The photograph with so many pixels painted at each side.

  Args:
    image: PIL image, path or array [H, W, 3], of any size.
    left, right, top, bottom: pixels of the photograph's own.
    key: `jax.random.key`; default `jax.random.key(0)`.
    overlap: share of each window that lies on what is known.
    **options: num_steps, eta, text, guidance_scale and report, as `Inpainter` takes them.

  Returns:
    float32 [top + H + bottom, left + W + right, 3] in [0, 1]; the photograph in it is unchanged.
  """
  image = image_io.load_image(image)
  borders = Borders(left, right, top, bottom)
  turn, window, batches = plan_windows(inpainter, image.shape[:2], borders, overlap)
  key = jax.random.key(0) if key is None else key
  canvas = _pad(image, borders, mode="edge")
  hole = _pad(np.zeros_like(image[..., :1]), borders, constant_values=1.0)
  working = image_io.resize_image(canvas, turn.shape[:2]).copy()
  for index, (number, corners) in enumerate(batches):
    boxes = [np.s_[y : y + window, x : x + window] for y, x in corners]
    seen = np.stack([working[box] for box in boxes])
    missing = np.stack([turn[box] == number for box in boxes])
    filled = fill(
      inpainter,
      seen,
      missing.astype(np.float32),
      key=jax.random.fold_in(key, index),
      **options,
    )
    for box, content in zip(boxes, filled, strict=True):
      working[box] = content
  extended = image_io.resize_image(working, canvas.shape[:2])
  if extended.shape != working.shape:  # resized, it no longer meets the photograph to the pixel
    extended = _join(extended, canvas, hole, hole[..., 0] > 0)
  return np.where(hole > 0, extended, canvas)


def _pad(image: np.ndarray, borders: Borders, **how: Any) -> np.ndarray:
  left, right, top, bottom = borders
  return np.pad(image, [(top, bottom), (left, right), (0, 0)], **how)


def fill(
  inpainter: Inpainter,
  images: np.ndarray,
  holes: np.ndarray,
  meets: np.ndarray | None = None,
  **options: Any,
) -> np.ndarray:
  """Images with their holes painted and no seam around them.

  Args:
    images: [B, H, W, 3] in [0, 1]; what is in the holes is not looked at.
    holes: [B, H, W, 1], 1 = missing.
    meets: bool [B, H, W], false at missing pixels next to a known one that they do not continue:
      there an edge is right. Default: they all continue their surroundings.
    **options: of `Inpainter`.

  Returns:
    float32 [B, H, W, 3]; pixels outside of the holes are as they were.
  """
  height, width = images.shape[1:3]
  size = inpainter.working_size(height, width)
  factor = inpainter.modules.vae.config.factor
  cells = np.stack([_whole_cells(hole, size, factor) for hole in holes])
  if cells.all(axis=(1, 2, 3)).any():
    raise ValueError(
      f"next to nothing of the {height}x{width} pixels is known, too little to go by: leave more"
    )
  spread = [_spread_known(image, hole) for image, hole in zip(images, holes, strict=True)]
  small = np.stack([image_io.resize_image(image, size) for image in spread])
  painted = inpainter(small, cells, paste_back=False, **options)
  painted = [image_io.resize_image(content, (height, width)) for content in painted]
  meets = np.ones(holes.shape[:3], bool) if meets is None else meets
  joined = [_join(*one) for one in zip(painted, spread, holes, meets, strict=True)]
  return np.where(holes > 0, np.stack(joined), images)


def _whole_cells(hole: np.ndarray, size: tuple[int, int], factor: int) -> np.ndarray:
  """A hole [H, W, 1] at the working size [*size, 1], grown to whole cells of the VAE.

  A latent pixel is either missing or known to the UNet. One that the hole touches is in part grey,
  so calling it known would have that grey continued.
  """
  rows, columns = (side // factor for side in size)
  share = Image.fromarray(hole[..., 0]).resize((columns, rows), Image.Resampling.BOX)
  touched = (np.asarray(share) > 1e-3).astype(np.float32)
  return touched.repeat(factor, axis=0).repeat(factor, axis=1)[..., None]


def _spread_known(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
  """The image with every missing pixel like the nearest known one."""
  nearest = ndimage.distance_transform_edt(
    hole[..., 0] > 0, return_distances=False, return_indices=True
  )
  return image[tuple(nearest)]


def _join(
  painted: np.ndarray, spread: np.ndarray, hole: np.ndarray, meets: np.ndarray
) -> np.ndarray:
  """The painting, shifted in colour so that the outermost pixels of its hole are like `spread`.

  The VAE gives back the known pixels a little changed, and the hole with them. What the outermost
  pixels lack spreads inwards as a membrane between them would: sums of blurs at the scales 1, 2, 4,
  ... weigh an outermost pixel at distance r by 1/r², the Poisson kernel of a straight rim. It fades
  within an eighth of the shorter side.
  """
  missing = hole[..., 0] > 0
  rim = missing & meets & ndimage.binary_dilation(~missing)
  height, width = missing.shape
  reach = min(height, width) / 8
  channels = [rim * lack for lack in np.moveaxis(spread - painted, -1, 0)] + [rim]
  total = np.zeros((4, height, width), np.float32)
  for scale in 2 ** np.arange(round(np.log2(max(reach, 1))) + 2):
    coarse = max(1, width // scale), max(1, height // scale)
    for channel, sums in zip(channels, total, strict=True):
      small = Image.fromarray(channel.astype(np.float32)).resize(coarse, Image.Resampling.BILINEAR)
      sums += np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
  *shift, weight = total
  fade = np.exp(-0.5 * (ndimage.distance_transform_edt(missing) / reach) ** 2)
  shift = np.stack(shift, axis=-1) * (fade / np.maximum(weight, 1e-9))[..., None]
  return np.clip(painted + shift, 0.0, 1.0).astype(np.float32)
