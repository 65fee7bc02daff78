"""Warps an image to a new camera view with a depth map, and finds the holes of that view.

The camera is a pinhole camera: x points right, y down, z forward. Depth is z, in the unit of the
camera's translation. Pixel centres are at integer coordinates; the first pixel is (0, 0). A hole is
a pixel of the new view whose content the old view does not show: an object occluded it, or it was
outside the frame.
"""
# Shapes: H W pixels, N = H·W pixels in row-major order.

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prefpaint_jax.data.depth import synthetic_depth

Pose = tuple[np.ndarray, np.ndarray]  # rotation [3, 3] and translation [3]

_CHUNK = 2**20  # pairs of a pixel and a patch that are tested in memory at once


class Intrinsics(NamedTuple):
  """Intrinsics of a pinhole camera, in pixels: (x, y, z) projects to (fx x/z + cx, fy y/z + cy)."""

  fx: float
  fy: float
  cx: float
  cy: float

  @classmethod
  def of_view(cls, height: int, width: int, degrees: float = 60.0) -> Intrinsics:
    """Makes a camera with a horizontal field of view of `degrees`, centred on the image."""
    focal = width / 2 / np.tan(np.radians(degrees) / 2)
    return cls(focal, focal, (width - 1) / 2, (height - 1) / 2)

  @classmethod
  def parse(cls, source: str | os.PathLike[str]) -> Intrinsics:
    """Parses "fx,fy,cx,cy", or a .npy or text file with the matrix [fx 0 cx; 0 fy cy; 0 0 1]."""
    if not os.path.isfile(source):
      try:
        fx, fy, cx, cy = (float(number) for number in os.fspath(source).split(","))
      except ValueError:
        raise ValueError(
          f"intrinsics {os.fspath(source)!r}: neither a file nor four numbers; give fx,fy,cx,cy"
        ) from None
    else:
      try:
        if Path(source).suffix == ".npy":
          matrix = np.load(source, mmap_mode="r").reshape(3, 3).astype(float)
        else:
          words = Path(source).read_text().replace(",", " ").split()
          matrix = np.array(words, float).reshape(3, 3)
      except (ValueError, TypeError, AttributeError, EOFError):
        raise ValueError(
          f"{os.fspath(source)}: not a 3x3 matrix of numbers; give [fx 0 cx; 0 fy cy; 0 0 1]"
        ) from None
      fx, fy, cx, cy = matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]
      if not np.array_equal(matrix, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]):
        raise ValueError(
          f"{os.fspath(source)}: the matrix is {matrix.tolist()}; expected "
          "[fx 0 cx; 0 fy cy; 0 0 1], without skew"
        )
    if not (min(fx, fy) > 0 and np.isfinite([fx, fy, cx, cy]).all()):
      raise ValueError(
        f"intrinsics {os.fspath(source)}: fx is {fx:g}, fy is {fy:g}; give positive ones"
      )
    return cls(float(fx), float(fy), float(cx), float(cy))


class Warped(NamedTuple):
  """A new view. Outside the holes, its pixels are copies: `image[y, x] = old[source[y, x]]`."""

  image: np.ndarray  # float32 [H, W, 3], holes black
  mask: np.ndarray  # float32 [H, W, 1], 1 = hole
  depth: np.ndarray  # float32 [H, W], relative to the new camera; 0 in holes
  source: np.ndarray  # int32 [H, W], row-major index of the old pixel; -1 in holes


def camera_pose(
  move: Sequence[float] = (0.0, 0.0, 0.0), turn: Sequence[float] = (0.0, 0.0)
) -> Pose:
  """Computes the pose of the new camera in the frame of the old camera.

  Args:
    move: (x, y, z), the translation to the right, down, and forward.
    turn: (yaw, pitch) or (yaw, pitch, roll) in degrees: to the right, up, and clockwise. The
      rotations are intrinsic, in this order.

  Returns:
    The rotation R [3, 3] and the translation t [3], with X_old = R X_new + t.
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
  """Warps an image to the view of a camera that moved and turned (see `camera_pose`).

  1. This function projects every old pixel to the nearest new pixel. If several old pixels project
     to one new pixel, the nearest in depth owns it; at equal depths, the first in row-major order.
  2. A surface that comes closer or rotates is magnified, and cracks open between its pixels.
     Therefore this function also draws each old pixel as a patch: a quadrilateral that shares its
     corners with the neighbours on the same surface. The nearest patch that covers the centre of a
     new pixel replaces the owner in two cases: there is no owner (a crack), or the owner is farther
     than the patch by more than the share `edge` (background seen through a crack).

  Two neighbouring pixels belong to one surface if their depths differ by at most the share `edge`.
  A patch never stretches across a depth edge, so a disoccluded region stays a hole.

  Args:
    image: float32 [H, W, 3].
    depth: [H, W], positive.
    intrinsics: of both cameras; by default a horizontal field of view of 60 degrees.
    move, turn: translation and rotation of the camera, see `camera_pose`.
    edge: by default 0.1, or 8 / side for images whose shorter side is below 80 pixels, because
      there the depth of a slanted plane changes more from pixel to pixel.
  """
  height, width = image.shape[:2]
  edge = max(0.1, 8 / min(height, width)) if edge is None else edge
  if depth.shape != (height, width):
    raise ValueError(
      f"depth is {depth.shape}, its image {height}x{width}; give both the same height and width"
    )
  if not (np.isfinite(depth).all() and (depth > 0).all()):
    raise ValueError("depth has values that are not positive and finite; use fill_unknown")
  intrinsics = intrinsics or Intrinsics.of_view(height, width)
  pose = camera_pose(move, turn)
  depth = np.asarray(depth, np.float64)
  rows, columns = np.indices((height, width))
  x, y, z = (a.ravel() for a in _project(columns, rows, depth, intrinsics, pose))

  # Pixels are compared by their rank from near to far, because ranks have no ties.
  order = np.argsort(z, kind="stable")
  rank = np.empty_like(order)
  rank[order] = np.arange(z.size)
  landed = _landing(x, y, z, height, width)
  owner = np.full(z.size, z.size)
  np.minimum.at(owner, landed[landed >= 0], rank[landed >= 0])

  corners = _project(*_patch_corners(depth, edge), intrinsics, pose)
  patch = np.full(z.size, z.size)
  for pixel, index in _covered(*(a.reshape(4, -1) for a in corners), landed, height, width):
    np.minimum.at(patch, pixel, rank[index])

  by_rank = np.append(z[order], np.inf)  # the last rank means "no pixel"
  front = np.where(by_rank[patch] * (1 + edge) < by_rank[owner], patch, owner)
  source = np.append(order, -1)[front].astype(np.int32)
  hole = source < 0
  return Warped(
    image=np.where(hole[:, None], 0, image.reshape(-1, 3)[source]).reshape(image.shape),
    mask=hole.reshape(height, width, 1).astype(np.float32),
    depth=np.where(hole, 0, by_rank[front]).reshape(height, width).astype(np.float32),
    source=source.reshape(height, width),
  )


def _project(
  u: np.ndarray, v: np.ndarray, depth: np.ndarray, intrinsics: Intrinsics, pose: Pose
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Projects pixels (u, v) of the old camera to x, y and depth z of the new camera.

  All arrays have one shape. z is infinite, and x and y are meaningless, for points behind the new
  camera and for points at less than 1 % of their old depth, which would be magnified more than 100
  times.
  """
  fx, fy, cx, cy = intrinsics
  rotation, shift = pose
  old = (depth * (u - cx) / fx - shift[0], depth * (v - cy) / fy - shift[1], depth - shift[2])
  x, y, z = (sum(r * o for r, o in zip(axis, old, strict=True)) for axis in rotation.T)
  in_front = z > 0.01 * depth
  inverse = 1 / np.where(in_front, z, 1.0)
  return fx * x * inverse + cx, fy * y * inverse + cy, np.where(in_front, z, np.inf)


def _landing(x: np.ndarray, y: np.ndarray, z: np.ndarray, height: int, width: int) -> np.ndarray:
  """Returns the row-major index [N] of the pixel nearest to each (x, y); -1 outside the view."""
  columns, rows = np.floor(x + 0.5), np.floor(y + 0.5)
  seen = np.isfinite(z) & (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
  return np.where(seen, rows * width + columns, -1).astype(np.int64)


def _patch_corners(depth: np.ndarray, edge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Computes u, v and depth [4, H, W] of each pixel's corners, clockwise from the top left.

  The depth of a corner is the harmonic mean over the pixels around it that belong to the pixel's
  surface. The harmonic mean is exact for planes.
  """
  height, width = depth.shape
  inverse = 1 / np.pad(depth, 1, mode="edge")
  around = np.stack([inverse[:-1, :-1], inverse[:-1, 1:], inverse[1:, 1:], inverse[1:, :-1]])
  means = np.broadcast_to(around.mean(0), around.shape).copy()
  torn = around.max(0) > (1 + edge) * around.min(0)
  means[:, torn] = _surface_means(around[:, torn], edge)
  # Of the four pixels around a corner, clockwise, this pixel is the third at its first corner, the
  # fourth at its second, the first at its third, and the second at its fourth.
  own = [means[2, :-1, :-1], means[3, :-1, 1:], means[0, 1:, 1:], means[1, 1:, :-1]]
  rows, columns = np.indices((height, width))
  u = np.stack([columns - 0.5, columns + 0.5, columns + 0.5, columns - 0.5])
  v = np.stack([rows - 0.5, rows - 0.5, rows + 0.5, rows + 0.5])
  return u, v, 1 / np.stack(own)


def _surface_means(values: np.ndarray, edge: float) -> np.ndarray:
  """Replaces every value of [4, n] by the mean of the values of its surface in its column.

  Two values are linked if the larger is at most (1 + edge) times the smaller. A surface is a set of
  values that chains of links connect.
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


def _covered(
  x: np.ndarray, y: np.ndarray, z: np.ndarray, landed: np.ndarray, height: int, width: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields arrays (new pixels, patches that cover them), in chunks.

  A patch that covers only the pixel that it landed on is left out.

  Args:
    x, y, z: [4, N], corners of the patches in the view of the new camera.
    landed: [N], the pixel that each patch landed on (see `_landing`).
  """
  left, right = np.maximum(np.ceil(x.min(0)), 0), np.minimum(np.floor(x.max(0)), width - 1)
  top, bottom = np.maximum(np.ceil(y.min(0)), 0), np.minimum(np.floor(y.max(0)), height - 1)
  columns, rows = np.maximum(right - left + 1, 0), np.maximum(bottom - top + 1, 0)
  count = np.where(np.isfinite(z).all(0), rows * columns, 0).astype(np.int64)
  # Most patches are about one pixel large and cover only the pixel that they landed on.
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
  """Tests for each column of corners [4, n] whether the quadrilateral contains (u, v): bool [n].

  The quadrilateral is the union of the triangles 0 1 2 and 0 2 3, with their edges.
  """

  def side(i: int, j: int) -> np.ndarray:
    return (x[j] - x[i]) * (v - y[i]) - (y[j] - y[i]) * (u - x[i])

  diagonal = side(0, 2)
  first, second = [side(0, 1), side(1, 2), -diagonal], [diagonal, side(2, 3), side(3, 0)]
  return np.logical_or.reduce(
    [np.minimum.reduce(t) >= 0 for t in (first, second)]
    + [np.maximum.reduce(t) <= 0 for t in (first, second)]
  )


def draw_view(
  rng: int | np.random.Generator,
  image: np.ndarray,
  depth: np.ndarray | None = None,
  intrinsics: Intrinsics | None = None,
  missing: tuple[float, float] = (0.08, 0.55),
) -> Warped:
  """Warps an image [H, W, 3] to a random view whose share of holes is in a given range.

  The camera moves mostly sideways, less vertically and along its axis, and turns slightly. A
  bisection finds the amount of motion that gives the share of holes.

  Args:
    depth: [H, W], positive; None: a synthetic scene.
    missing: the least and the largest share of holes.

  Raises:
    ValueError: no view with such a share was found.
  """
  if not 0 < missing[0] < missing[1] < 1:
    raise ValueError(f"missing is {missing}; give the least and the largest share, in (0, 1)")
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
    f"missing is {missing}; no view of {image.shape[0]}x{image.shape[1]} pixels has that share of "
    "holes: give a wider range"
  )
