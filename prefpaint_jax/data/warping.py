"""A picture seen from a new place: forward warping with a depth map, and the holes that it leaves.

The camera is a pinhole: x to the right, y down, z forward, depth is z in any unit, which is that of
the camera's move. Pixel centres lie at whole numbers, (0, 0) the first. Holes are what the old view
cannot tell: what something near hid, and what lay out of its sight.
"""
# Shapes: H W pixels, N = H·W of them in reading order.

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prefpaint_jax.data.depth import synthetic_depth

_CHUNK = 2**20  # tests of a pixel against a patch that are held in memory at once


class Intrinsics(NamedTuple):
  """Of a pinhole camera, in pixels: (x/z, y/z) is seen at (fx x/z + cx, fy y/z + cy)."""

  fx: float
  fy: float
  cx: float
  cy: float

  @classmethod
  def of_view(cls, height: int, width: int, degrees: float = 60.0) -> Intrinsics:
    """A camera that sees so many degrees from left to right, aimed at the picture's middle."""
    focal = width / 2 / np.tan(np.radians(degrees) / 2)
    return cls(focal, focal, (width - 1) / 2, (height - 1) / 2)

  @classmethod
  def parse(cls, source: str | os.PathLike[str]) -> Intrinsics:
    """From "fx,fy,cx,cy", or a file, .npy or text, with the 3x3 matrix fx 0 cx, 0 fy cy, 0 0 1."""
    if not os.path.isfile(source):
      try:
        fx, fy, cx, cy = (float(number) for number in os.fspath(source).split(","))
      except ValueError:
        raise ValueError(
          f"intrinsics {os.fspath(source)!r}: neither a file nor four numbers: give fx,fy,cx,cy"
        ) from None
    else:
      try:
        if Path(source).suffix == ".npy":
          numbers = np.load(source).astype(float)
        else:
          numbers = np.array(Path(source).read_text().replace(",", " ").split(), float)
        matrix = numbers.reshape(3, 3)
      except ValueError:
        raise ValueError(
          f"{os.fspath(source)}: not a matrix of 3x3 numbers: give [fx 0 cx; 0 fy cy; 0 0 1]"
        ) from None
      fx, fy, cx, cy = matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]
      if not np.array_equal(matrix, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]):
        raise ValueError(
          f"{os.fspath(source)}: {matrix.tolist()} is not of a camera without skew: "
          "give [fx 0 cx; 0 fy cy; 0 0 1]"
        )
    if not (min(fx, fy) > 0 and np.isfinite([fx, fy, cx, cy]).all()):
      raise ValueError(f"intrinsics {os.fspath(source)}: fx {fx:g}, fy {fy:g}: give positive ones")
    return cls(float(fx), float(fy), float(cx), float(cy))


class Warped(NamedTuple):
  """A new view; outside of holes it shows old pixels, `image[y, x] = old[source[y, x]]`."""

  image: np.ndarray  # float32 [H, W, 3], holes black
  mask: np.ndarray  # float32 [H, W, 1], 1 = hole
  depth: np.ndarray  # float32 [H, W], as the new camera sees it; 0 in holes
  source: np.ndarray  # int32 [H, W], the old pixel in reading order; -1 in holes


# --------------------------------------------------------------------------------------------- warp
def camera_pose(
  move: Sequence[float] = (0.0, 0.0, 0.0), turn: Sequence[float] = (0.0, 0.0)
) -> tuple[np.ndarray, np.ndarray]:
  """The new camera in the old one's frame: rotation R [3, 3] and place t [3], X_old = R X_new + t.

  Args:
    move: (x, y, z), the way to the right, down, and forward.
    turn: (yaw, pitch) or (yaw, pitch, roll) in degrees: to the right, up, and clockwise. The camera
      yaws first, pitches about the axis that this leaves, and rolls about its own line of sight.
  """
  yaw, pitch, roll = np.radians((*turn, 0.0) if len(turn) == 2 else turn)
  cos, sin = np.cos, np.sin
  about_y = np.array([[cos(yaw), 0, sin(yaw)], [0, 1, 0], [-sin(yaw), 0, cos(yaw)]])
  about_x = np.array([[1, 0, 0], [0, cos(pitch), -sin(pitch)], [0, sin(pitch), cos(pitch)]])
  about_z = np.array([[cos(roll), -sin(roll), 0], [sin(roll), cos(roll), 0], [0, 0, 1]])
  return about_y @ about_x @ about_z, np.asarray(move, float)


def warp(
  image: np.ndarray,
  depth: np.ndarray,
  intrinsics: Intrinsics | None = None,
  move: Sequence[float] = (0.0, 0.0, 0.0),
  turn: Sequence[float] = (0.0, 0.0),
  edge: float | None = None,
) -> Warped:
  """The picture as a camera sees it that moved and turned (`camera_pose`).

  1. Every old pixel lands on the new pixel nearest to where it is seen, and of all that land on one
     the nearest in depth owns it; the first in reading order where depths are equal.
  2. Where a surface comes closer or turns, its pixels land apart. Each is therefore also drawn as
     the patch that it is: a quadrilateral whose corners it shares with those neighbours that are
     of the same surface. A new pixel whose centre lies in a patch (the nearest patch if several)
     shows it if nobody owns it, a crack, or if its owner is farther away by more than `edge`,
     background seen through a crack.

  Neighbouring pixels are of one surface if their depths differ by no more than the share `edge`; a
  patch never stretches across a depth edge, so what opens there stays a hole.

  Args:
    image: float32 [H, W, 3].
    depth: [H, W], positive.
    intrinsics: of both cameras; by default a horizontal field of view of 60 degrees.
    edge: by default 0.1. Where a side has fewer than 80 pixels it is 8 / side, since the depth of a
      slanted plane changes more from one pixel to the next there.
  """
  height, width = image.shape[:2]
  edge = max(0.1, 8 / min(height, width)) if edge is None else edge
  if depth.shape != (height, width):
    raise ValueError(
      f"depth is {depth.shape}, its image {height}x{width}: give both the same height and width"
    )
  if not (np.isfinite(depth).all() and (depth > 0).all()):
    raise ValueError("depth: unknown, negative or infinite in places: see load_depth, fill_unknown")
  intrinsics = intrinsics or Intrinsics.of_view(height, width)
  pose = camera_pose(move, turn)
  depth = np.asarray(depth, np.float64)
  rows, columns = np.indices((height, width))
  x, y, z = (a.ravel() for a in _see(columns, rows, depth, intrinsics, pose))

  # Pixels are compared by their rank from near to far, which has no ties.
  order = np.argsort(z, kind="stable")
  rank = np.empty_like(order)
  rank[order] = np.arange(z.size)
  landed = _landing(x, y, z, height, width)
  owner = np.full(z.size, z.size)
  np.minimum.at(owner, landed[landed >= 0], rank[landed >= 0])

  corners = _see(*_patch_corners(depth, edge), intrinsics, pose)
  patch = np.full(z.size, z.size)
  for pixel, index in _covered(*(a.reshape(4, -1) for a in corners), landed, height, width):
    np.minimum.at(patch, pixel, rank[index])

  by_rank = np.append(z[order], np.inf)  # the last one is nobody
  front = np.where(by_rank[patch] * (1 + edge) < by_rank[owner], patch, owner)
  source = np.append(order, -1)[front].astype(np.int32)
  hole = source < 0
  return Warped(
    image=np.where(hole[:, None], 0, image.reshape(-1, 3)[source]).reshape(image.shape),
    mask=hole.reshape(height, width, 1).astype(np.float32),
    depth=np.where(hole, 0, by_rank[front]).reshape(height, width).astype(np.float32),
    source=source.reshape(height, width),
  )


def _see(u, v, depth, intrinsics: Intrinsics, pose) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Where the new camera sees the old one's pixels (u, v), of one shape: x, y, and depth z.

  z is infinite, and x and y mean nothing, for what lies behind the new camera, or so close before
  it that a pixel would be as wide as a hundred.
  """
  fx, fy, cx, cy = intrinsics
  rotation, place = pose
  old = (depth * (u - cx) / fx - place[0], depth * (v - cy) / fy - place[1], depth - place[2])
  x, y, z = (sum(r * o for r, o in zip(axis, old, strict=True)) for axis in rotation.T)
  before = z > 0.01 * depth
  inverse = 1 / np.where(before, z, 1.0)
  return fx * x * inverse + cx, fy * y * inverse + cy, np.where(before, z, np.inf)


def _landing(x, y, z, height: int, width: int) -> np.ndarray:
  """[N]: the pixel nearest to each (x, y); -1 out of view."""
  columns, rows = np.floor(x + 0.5), np.floor(y + 0.5)
  seen = np.isfinite(z) & (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
  return np.where(seen, rows * width + columns, -1).astype(np.int64)


def _patch_corners(depth: np.ndarray, edge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """u, v and depth [4, H, W] of each pixel's corners, clockwise from the top left.

  A corner's depth is the harmonic mean, which is exact for planes, over those of the four pixels
  around it that are of the pixel's own surface.
  """
  height, width = depth.shape
  inverse = 1 / np.pad(depth, 1, mode="edge")
  around = np.stack([inverse[:-1, :-1], inverse[:-1, 1:], inverse[1:, 1:], inverse[1:, :-1]])
  means = np.broadcast_to(around.mean(0), around.shape).copy()
  torn = around.max(0) > (1 + edge) * around.min(0)
  means[:, torn] = _surface_means(around[:, torn], edge)
  # The pixel is the third, clockwise, of the four around its first corner, and so on.
  own = [means[2, :-1, :-1], means[3, :-1, 1:], means[0, 1:, 1:], means[1, 1:, :-1]]
  rows, columns = np.indices((height, width))
  u = np.stack([columns - 0.5, columns + 0.5, columns + 0.5, columns - 0.5])
  v = np.stack([rows - 0.5, rows - 0.5, rows + 0.5, rows + 0.5])
  return u, v, 1 / np.stack(own)


def _surface_means(values: np.ndarray, edge: float) -> np.ndarray:
  """[4, n], of each column: every value becomes the mean of those that a chain links to it.

  Links are between values of which the greater is at most (1 + edge) times the less.
  """
  order = np.argsort(values, axis=0)
  rising = np.take_along_axis(values, order, 0)
  surface = np.zeros(values.shape, int)
  surface[1:] = np.cumsum(rising[1:] > (1 + edge) * rising[:-1], axis=0)
  means = np.zeros_like(values)
  for number in range(4):
    members = surface == number
    mean = (rising * members).sum(0) / np.maximum(members.sum(0), 1)
    means += members * mean
  result = np.empty_like(values)
  np.put_along_axis(result, order, means, 0)
  return result


def _covered(x, y, z, landed, height: int, width: int):
  """Yields (new pixels, patches that cover them) in chunks, but for each patch's own pixel.

  x, y, z: [4, N], the corners of the patches as the new camera sees them. landed: [N].
  """
  left, right = np.maximum(np.ceil(x.min(0)), 0), np.minimum(np.floor(x.max(0)), width - 1)
  top, bottom = np.maximum(np.ceil(y.min(0)), 0), np.minimum(np.floor(y.max(0)), height - 1)
  columns, rows = np.maximum(right - left + 1, 0), np.maximum(bottom - top + 1, 0)
  count = np.where(np.isfinite(z).all(0), rows * columns, 0).astype(np.int64)
  # Most patches are about a pixel large and cover the one that they landed on.
  alone = (count == 1) & (landed == top * width + left)
  patches = np.flatnonzero((count > 0) & ~alone)
  chunk = np.cumsum(count[patches]) // _CHUNK
  for some in np.split(patches, np.flatnonzero(np.diff(chunk)) + 1):
    index = np.repeat(some, count[some])
    step = np.arange(index.size) - np.repeat(np.cumsum(count[some]) - count[some], count[some])
    u, v = left[index] + step % columns[index], top[index] + step // columns[index]
    inside = _in_patch(x[:, index], y[:, index], u, v)
    yield (v * width + u)[inside].astype(np.int64), index[inside]


def _in_patch(x: np.ndarray, y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """[n]: whether (u, v) is in or on one of the triangles 0 1 2 and 0 2 3 of corners [4, n]."""

  def side(i: int, j: int) -> np.ndarray:
    return (x[j] - x[i]) * (v - y[i]) - (y[j] - y[i]) * (u - x[i])

  diagonal = side(0, 2)
  first, second = [side(0, 1), side(1, 2), -diagonal], [diagonal, side(2, 3), side(3, 0)]
  return np.logical_or.reduce(
    [np.minimum.reduce(t) >= 0 for t in (first, second)]
    + [np.maximum.reduce(t) <= 0 for t in (first, second)]
  )


# -------------------------------------------------------------------------------------------- draw
def draw_view(
  rng: int | np.random.Generator,
  image: np.ndarray,
  depth: np.ndarray | None = None,
  intrinsics: Intrinsics | None = None,
  missing: tuple[float, float] = (0.08, 0.55),
) -> Warped:
  """The picture [H, W, 3] from a random new place, with a share of holes in the range `missing`.

  The camera moves mostly to the side, less up or down and forward or back, and turns a little; how
  far is found by trial. Without a depth map the scene is a synthetic one.
  """
  if not 0 < missing[0] < missing[1] < 1:
    raise ValueError(f"missing {missing}: give the least and the greatest share, in (0, 1)")
  rng = np.random.default_rng(rng)
  if depth is None:
    depth = synthetic_depth(rng, *image.shape[:2])
  for _ in range(8):
    move = np.median(depth) * rng.normal(0, (1.0, 0.25, 0.5))
    turn = rng.normal(0, (20.0, 8.0, 4.0))
    amount, low, high = rng.uniform(0.1, 0.4), 0.0, None
    for _ in range(8):
      view = warp(image, depth, intrinsics, amount * move, amount * turn)
      share = view.mask.mean()
      if missing[0] <= share <= missing[1]:
        return view
      low, high = (amount, high) if share < missing[0] else (low, amount)
      amount = 2 * low if high is None else (low + high) / 2
  raise ValueError(
    f"missing {missing}: no view of {image.shape[0]}x{image.shape[1]} pixels found with that share "
    "of holes: give a wider range"
  )
