"""Renders new views of an image: warps it by its depth and inpaints the pixels that it uncovers.

Inpainted pixels get the depth of the background beside them. Later views of a sweep warp these
pixels too, so that all views show the same scene.
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
from prefpaint_jax.data.warping import Intrinsics, Pose, camera_pose, warp
from prefpaint_jax.editing.extension import inpaint_seamlessly
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.runtime.config_fields import COUNT
from prefpaint_jax.runtime.memory import check_memory
from prefpaint_jax.runtime.ranges import check


class Layer(NamedTuple):
  """One view of the scene and the pixels that it adds to the earlier views."""

  image: np.ndarray  # float32 [H, W, 3]
  depth: np.ndarray  # [H, W], positive at every pixel
  added: np.ndarray  # bool [H, W], the pixels that no earlier layer shows
  pose: Pose  # of its camera, relative to that of the image


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
  """Renders views of an image along a camera path; the last view is at the end of the path.

  A pixel of a view comes from the image if the camera sees the image there, else from the earliest
  view that inpainted it. The model inpaints the remaining pixels.

  Args:
    inpainter: the model.
    image: PIL image, path or array [H, W, 3], of any size.
    depth: [H, W], positive; see `depth.load_depth` and `depth.synthetic_depth`.
    intrinsics: of the camera; default: a horizontal field of view of 60 degrees.
    move: (x, y, z) to the right, down and forward, in the unit of the depth.
    turn: (yaw, pitch) or (yaw, pitch, roll) in degrees, to the right, up and clockwise.
    views: number of views, equally spaced along the path.
    key: `jax.random.key`; default `jax.random.key(0)`.
    **options: `num_steps`, `eta`, `text`, `guidance_scale` and `report` of `Inpainter`.

  Returns:
    `views` images, float32 [H, W, 3] in [0, 1].

  Raises:
    ValueError: a view shows no pixel of the image.
  """
  check("views", views, COUNT)
  image = image_io.load_image(image)
  check_memory(8 * image.size * views, f"views={views}")  # colours and depths of each, float32
  intrinsics = intrinsics or Intrinsics.of_view(*image.shape[:2])
  key = jax.random.key(0) if key is None else key
  layers = [Layer(image, depth, np.ones(image.shape[:2], bool), camera_pose())]
  rendered = []
  for number in range(1, views + 1):
    share = number / views
    pose = camera_pose(share * np.asarray(move), share * np.asarray(turn))
    view, view_depth = render(layers, intrinsics, pose)
    hole = view_depth == 0
    if hole.all():
      raise ValueError(
        f"move {tuple(move)}, turn {tuple(turn)}: no pixel of the image is in sight at "
        f"{share:.0%} of the way; move or turn less"
      )
    if hole.any():
      behind = background_depth(view_depth)
      # The background does not continue the colours of a nearer object beside it.
      continuous = behind <= 1.1 * fill_unknown(view_depth)
      (view,) = inpaint_seamlessly(
        inpainter,
        view[None],
        hole[None, ..., None].astype(np.float32),
        continuous[None],
        key=jax.random.fold_in(key, number),
        **options,
      )
      layers.append(Layer(view, behind, hole, pose))
    rendered.append(view)
  return rendered


def render(
  layers: Sequence[Layer], intrinsics: Intrinsics, pose: Pose
) -> tuple[np.ndarray, np.ndarray]:
  """Renders the added pixels of the layers from a camera: image [H, W, 3] and depth [H, W].

  The depth is 0 where no layer is visible. Where several layers are visible, the first wins, even
  if a later one is nearer: the first layer is the image, and the depth of later layers is a guess.
  """
  image, depth = np.zeros_like(layers[0].image), np.zeros(layers[0].added.shape, np.float32)
  for layer in layers:
    warped = warp(layer.image, layer.depth, intrinsics, *_relative(layer.pose, pose))
    new = (depth == 0) & (warped.source >= 0) & layer.added.ravel()[warped.source]
    image[new], depth[new] = warped.image[new], warped.depth[new]
  return image, depth


def _relative(old: Pose, new: Pose) -> tuple[np.ndarray, np.ndarray]:
  """Computes the move and turn (in degrees, as `camera_pose`) from one camera to another."""
  (old_rotation, old_position), (new_rotation, new_position) = old, new
  rotation = old_rotation.T @ new_rotation
  yaw = np.arctan2(rotation[0, 2], rotation[2, 2])
  pitch = -np.arcsin(np.clip(rotation[1, 2], -1, 1))
  roll = np.arctan2(rotation[1, 0], rotation[1, 1])
  return old_rotation.T @ (new_position - old_position), np.degrees([yaw, pitch, roll])


def background_depth(depth: np.ndarray) -> np.ndarray:
  """Fills the unknown pixels (0) of a depth map [H, W] with the depth of the nearby background.

  A hole between a near and a far object shows the far one. A missing pixel is in a gap of its row
  and in a gap of its column. This function takes the shorter gap and, of the known pixels at its
  two ends, the greater depth; a gap that reaches the border has one end. A 5x5 median removes the
  streaks where rows and columns disagree.
  """
  (across, wide), (along, high) = _farther_end(depth), _farther_end(depth.T)
  filled = fill_unknown(np.where(depth > 0, depth, np.where(wide <= high.T, across, along.T)))
  return np.where(depth > 0, depth, ndimage.median_filter(filled, size=5))


def _farther_end(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Measures the gap of the row around each pixel: the greater depth at its ends, and its width.

  Both are [H, W]. In a row without a known pixel the depth is 0 and the width infinite.
  """
  height, width = depth.shape
  bordered = np.pad(depth, [(0, 0), (1, 1)])  # pixels beyond the border are unknown
  columns = np.arange(width + 2)
  stops = (bordered > 0) | (columns == 0) | (columns == width + 1)
  before = np.maximum.accumulate(np.where(stops, columns, 0), axis=1)
  after = np.minimum.accumulate(np.where(stops, columns, width + 1)[:, ::-1], axis=1)[:, ::-1]
  ends = [np.take_along_axis(bordered, end, axis=1) for end in (before, after)]
  farther, gap = np.maximum(*ends)[:, 1:-1], (after - before)[:, 1:-1]
  return farther, np.where(farther > 0, gap, np.inf)
