"""Depth maps: reads them, fills in unknown depth, and draws synthetic ones."""
# Shapes: H W pixels.

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image
from scipy import ndimage

from prefpaint_jax.data.images import SIXTEEN_BIT_MODES
from prefpaint_jax.runtime.text import first_line


def load_depth(
  path: str | os.PathLike[str], size: tuple[int, int] | None = None, scale: float = 1 / 256
) -> np.ndarray:
  """Reads a depth map as float32 [H, W].

  In the file, 0 and NaN mean unknown depth. A pixel of unknown depth gets the depth of the nearest
  pixel whose depth is known.

  Args:
    path: a .npy file of floats, or a 16-bit PNG of depth divided by `scale`.
    size: (height, width) of the image that the depth map belongs to; None: any size.
    scale: the default is the scale of KITTI, whose unit is the metre.

  Raises:
    ValueError: the file cannot be read, has another size, or holds no known depth.
  """
  name = os.fspath(path)
  try:
    if Path(path).suffix == ".npy":
      # Mapped, because the shape in the header of a broken file may ask for any memory.
      depth = np.load(path, mmap_mode="r")
      if not isinstance(depth, np.ndarray):
        raise ValueError("it is an archive of arrays")
    else:
      with Image.open(path) as file:
        if file.mode not in SIXTEEN_BIT_MODES:
          raise ValueError(f"the pixels have mode {file.mode}, not 16 bits")
        depth = np.asarray(file) * scale
  except FileNotFoundError:
    raise ValueError(f"{name}: no such file") from None
  except Exception as error:  # PIL's decoders raise errors of all kinds for damaged files
    raise ValueError(
      f"{name}: the depth cannot be read ({first_line(error)}); give a grey 16-bit PNG, or a .npy "
      "of floats"
    ) from None
  if depth.ndim != 2 or not np.issubdtype(depth.dtype, np.floating):
    raise ValueError(f"{name}: {depth.dtype} of shape {depth.shape}; expected floats [H, W]")
  if size is not None and depth.shape != tuple(size):
    raise ValueError(
      f"{name}: the depth is {depth.shape[1]}x{depth.shape[0]} pixels, its image "
      f"{size[1]}x{size[0]}; give both the same height and width"
    )
  unknown = np.isnan(depth) | (depth == 0)
  if (depth < 0).any() or np.isinf(depth).any():
    low, high = np.nanmin(depth), np.nanmax(depth)
    raise ValueError(f"{name}: depths from {low:g} to {high:g}; give 0 for unknown depth")
  if unknown.all():
    raise ValueError(f"{name}: every depth is unknown (0); give the depth of some pixels")
  if unknown.any():
    logging.warning(
      "%s: the depth of %.1f %% of the pixels is unknown; the nearest known depth replaces it",
      name,
      100 * unknown.mean(),
    )
  return fill_unknown(depth).astype(np.float32)


def fill_unknown(depth: np.ndarray) -> np.ndarray:
  """Replaces every depth that is 0 or NaN by the depth of the nearest known pixel, [H, W]."""
  unknown = ~(depth > 0)
  nearest = ndimage.distance_transform_edt(unknown, return_distances=False, return_indices=True)
  return depth[tuple(nearest)]


def synthetic_depth(rng: int | np.random.Generator, height: int, width: int) -> np.ndarray:
  """Draws the depth map of a simple scene, for an image without one: float32 [H, W], 1 to 4.

  The scene has a ground plane, from depth 1 at the bottom to 4 at the horizon; a slightly slanted
  back wall; and two to five upright, roundish objects on the ground.
  """
  rng = np.random.default_rng(rng)
  x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
  horizon = rng.uniform(0.35, 0.6)
  # On a plane, inverse depth is linear in pixel coordinates.
  ground = 0.25 + 0.75 * (y - horizon) / (1 - horizon)
  wall = 0.25 + rng.uniform(0.0, 0.1) * np.abs(x - rng.integers(2))
  inverse = np.maximum(ground, wall)
  feet = np.sort(rng.uniform(horizon + 0.1, 0.95, rng.integers(2, 6)))
  for foot in feet:  # from far to near, so that near objects hide far ones
    nearness = 0.25 + 0.75 * (foot - horizon) / (1 - horizon)
    half_width, half_height = nearness * rng.uniform(0.1, 0.2), nearness * rng.uniform(0.15, 0.35)
    across, up = (x - rng.uniform(0, 1)) / half_width, (y - (foot - half_height)) / half_height
    angle = np.arctan2(up, across)
    bumps = sum(rng.uniform(0, 0.12) * np.sin(k * angle + rng.uniform(0, 6.3)) for k in (2, 3, 5))
    inverse = np.where(across**2 + up**2 < (1 + bumps) ** 2, nearness, inverse)
  return (1 / inverse).astype(np.float32)
