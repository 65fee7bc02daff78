"""A picture seen from new places: warped by its depth, and what opens up there painted.

What is painted stays: it gets a depth, that of the background it is painted on, and later views of
a sweep show it warped along, so that they agree with each other.
"""
# Shapes: H W pixels.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import ndimage

from prefpaint_jax.data import images as image_io
from prefpaint_jax.data.depth import fill_unknown
from prefpaint_jax.data.warping import Intrinsics, camera_pose, warp
from prefpaint_jax.editing.extension import fill
from prefpaint_jax.inpainter import Inpainter

Pose = tuple[np.ndarray, np.ndarray]  # rotation [3, 3] and place [3] of a camera in the first one


class Layer(NamedTuple):
  """What one camera adds to the scene."""

  image: np.ndarray  # float32 [H, W, 3]
  depth: np.ndarray  # [H, W], of all its pixels
  own: np.ndarray  # bool [H, W], the pixels that no layer before it has
  pose: Pose


def sweep(
  inpainter: Inpainter,
  image: Any,
  depth: np.ndarray,
  intrinsics: Intrinsics | None = None,
  move: Sequence[float] = (0.0, 0.0, 0.0),
  turn: Sequence[float] = (0.0, 0.0),
  views: int = 1,
  *,
  key: jax.Array | None = None,
  **options: Any,
) -> list[np.ndarray]:
  """The picture from so many places on the way to a new one, the new one last.

  Every view shows the picture wherever it can be seen from there, then what views before it
  painted, the earliest first; only the rest is painted anew.

  Args:
    image: PIL image, path or array [H, W, 3], of any size.
    depth: [H, W], positive; see `warping.load_depth`, `warping.synthetic_depth`.
    intrinsics: by default a horizontal field of view of 60 degrees.
    move: (x, y, z), to the right, down and forward, in the unit of the depth.
    turn: (yaw, pitch) or (yaw, pitch, roll) in degrees, to the right, up and clockwise.
    views: how many, at equal shares of the move and of the turn.
    key: `jax.random.key`; default `jax.random.key(0)`.
    **options: num_steps, eta, text, guidance_scale and report, as `Inpainter` takes them.

  Returns:
    `views` pictures, float32 [H, W, 3] in [0, 1].
  """
  image = image_io.load_image(image)
  intrinsics = intrinsics or Intrinsics.of_view(*image.shape[:2])
  key = jax.random.key(0) if key is None else key
  layers = [Layer(image, depth, np.ones(image.shape[:2], bool), camera_pose())]
  pictures = []
  for number in range(1, views + 1):
    share = number / views
    pose = camera_pose(share * np.asarray(move), share * np.asarray(turn))
    picture, seen_depth = look(layers, intrinsics, pose)
    hole = seen_depth == 0
    if hole.all():
      raise ValueError(
        f"move {tuple(move)}, turn {tuple(turn)}: nothing of the picture is in sight at "
        f"{share:.0%} of the way: move or turn less"
      )
    if hole.any():
      behind = background_depth(seen_depth)
      # What opens up behind something near does not take on its colour.
      meets = behind <= 1.1 * fill_unknown(seen_depth)
      (picture,) = fill(
        inpainter,
        picture[None],
        hole[None, ..., None].astype(np.float32),
        meets[None],
        key=jax.random.fold_in(key, number),
        **options,
      )
      layers.append(Layer(picture, behind, hole, pose))
    pictures.append(picture)
  return pictures


def look(
  layers: Sequence[Layer], intrinsics: Intrinsics, pose: Pose
) -> tuple[np.ndarray, np.ndarray]:
  """What a camera sees of the layers' own pixels: image [H, W, 3] and depth [H, W], 0 in holes.

  Where several layers show something the first does, and not the nearest: what the photograph
  shows is true, and what is painted behind it or before it is a guess.
  """
  image, depth = np.zeros_like(layers[0].image), np.zeros(layers[0].own.shape, np.float32)
  for layer in layers:
    seen = warp(layer.image, layer.depth, intrinsics, *_relative(layer.pose, pose))
    new = (depth == 0) & (seen.source >= 0) & layer.own.ravel()[seen.source]
    image[new], depth[new] = seen.image[new], seen.depth[new]
  return image, depth


def _relative(old: Pose, new: Pose) -> tuple[np.ndarray, np.ndarray]:
  """The move and the turn in degrees (`camera_pose`) that take a camera from one to another."""
  (old_rotation, old_place), (new_rotation, new_place) = old, new
  rotation = old_rotation.T @ new_rotation
  yaw = np.arctan2(rotation[0, 2], rotation[2, 2])
  pitch = -np.arcsin(np.clip(rotation[1, 2], -1, 1))
  roll = np.arctan2(rotation[1, 0], rotation[1, 1])
  return old_rotation.T @ (new_place - old_place), np.degrees([yaw, pitch, roll])


def background_depth(depth: np.ndarray) -> np.ndarray:
  """[H, W] with the holes (0) as far away as the background beside them.

  What opens up between something near and something far belongs to the far. A missing pixel lies
  in a gap of its row and in one of its column; of the shorter gap's two ends, known pixels both
  unless it goes on to the picture's border, the farther gives the depth. A median over 5x5 pixels
  then takes out the streaks where rows and columns disagree.
  """
  (across, wide), (along, high) = _farther_end(depth), _farther_end(depth.T)
  filled = fill_unknown(np.where(depth > 0, depth, np.where(wide <= high.T, across, along.T)))
  return np.where(depth > 0, depth, ndimage.median_filter(filled, size=5))


def _farther_end(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Of the gap in its row that each pixel lies in: the greater depth at its ends, and its width.

  Depth 0 and infinite width where nothing in the row is known.
  """
  height, width = depth.shape
  bordered = np.pad(depth, [(0, 0), (1, 1)])  # beyond the border nothing is known
  columns = np.arange(width + 2)
  stops = (bordered > 0) | (columns == 0) | (columns == width + 1)
  before = np.maximum.accumulate(np.where(stops, columns, 0), axis=1)
  after = np.minimum.accumulate(np.where(stops, columns, width + 1)[:, ::-1], axis=1)[:, ::-1]
  ends = [np.take_along_axis(bordered, end, axis=1) for end in (before, after)]
  farther, gap = np.maximum(*ends)[:, 1:-1], (after - before)[:, 1:-1]
  return farther, np.where(farther > 0, gap, np.inf)
