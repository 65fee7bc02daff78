"""Random masks of the two kinds of prompt: *outpainting* (the border is cropped away) and *warping*
(holes such as a change of view leaves).

A mask is drawn from an integer seed or a NumPy generator and depends on nothing else. It is float32
[H, W, 1], 1 = missing, never empty and never full.
"""
# Shapes: H W pixels.

from __future__ import annotations

import numpy as np

OUTPAINTING, WARPING = 0, 1
KINDS = ("outpainting", "warping")


def mask_kind(mask: np.ndarray) -> int:
  """OUTPAINTING if the known pixels of [H, W, 1] fill a rectangle, as if cropped; else WARPING."""
  known = mask[..., 0] < 0.5
  rows, columns = np.flatnonzero(known.any(1)), np.flatnonzero(known.any(0))
  rectangle = known[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
  return OUTPAINTING if rectangle.all() else WARPING


def outpainting_mask(
  rng: int | np.random.Generator, height: int, width: int, keep: tuple[float, float] = (0.60, 0.85)
) -> np.ndarray:
  """Keeps a rectangle with a share of the pixels drawn from `keep`; what lies around is missing.

  The picture loses some of its width, of its height, or of both, on one side or on opposite ones.
  """
  _check_size(height, width)
  rng = np.random.default_rng(rng)
  axes = ((0,), (1,), (0, 1))[rng.integers(3)]
  share = rng.uniform(*keep) ** (1 / len(axes))
  mask = np.ones((height, width, 1), np.float32)
  window = [slice(0, height), slice(0, width)]
  for axis in axes:
    length = mask.shape[axis]
    kept = int(np.clip(round(share * length), 1, length - 1))
    spare = length - kept
    start = (0, spare, int(rng.integers(spare + 1)))[rng.integers(3)]
    window[axis] = slice(start, start + kept)
  mask[window[0], window[1]] = 0.0
  return mask


def warping_mask(rng: int | np.random.Generator, height: int, width: int) -> np.ndarray:
  """Holes like those of a picture seen from a new place: a ragged band along one edge, which the
  old view did not reach, and two to five bent strips, where something near hid what is behind.

  Between 8 and 55 % of the pixels are missing.
  """
  _check_size(height, width)
  rng = np.random.default_rng(rng)
  for _ in range(1000):
    mask = _warping_candidate(rng, height, width)
    if 0.08 <= mask.mean() <= 0.55 and mask_kind(mask) == WARPING:
      return mask
  raise ValueError(f"warping mask: no holes fit into {height}x{width} pixels: use a larger size")


def _warping_candidate(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  """One draw, in unit coordinates where the camera moved along x and the band lies at x = 0."""
  x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
  if rng.random() < 0.25:  # now and then the camera moves up or down
    x, y = y, x
  if rng.random() < 0.5:
    x = 1 - x
  phases, slant = rng.uniform(0, 2 * np.pi, 2), rng.normal(0, 0.05)
  ragged = 0.03 * np.sin(2 * np.pi * y + phases[0]) + 0.02 * np.sin(10 * np.pi * y + phases[1])
  missing = x < rng.uniform(0.06, 0.2) + slant * (y - 0.5) + ragged
  for _ in range(rng.integers(2, 6)):
    missing |= _strip(rng, x, y)
  return missing[..., None].astype(np.float32)


def _strip(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """A spindle: long in y, leaning and bent, thinner towards its ends."""
  centre_x, centre_y = rng.uniform(0.1, 1.0), rng.uniform(0.1, 0.9)
  half_length, half_width = rng.uniform(0.15, 0.45), rng.uniform(0.02, 0.06)
  along = (y - centre_y) / half_length
  spine = centre_x + rng.normal(0, 0.06) * along + rng.normal(0, 0.05) * along**2
  return np.abs(x - spine) < half_width * np.sqrt(np.clip(1 - along**2, 0, None))


def _check_size(height: int, width: int) -> None:
  if min(height, width) < 2:
    raise ValueError(f"mask: {height}x{width} pixels: give at least 2x2")
