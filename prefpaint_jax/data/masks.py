"""Draws random masks; as a command, a sheet of examples.

  python -m prefpaint_jax.data.masks --image=PHOTO --output=sheet.png

Writes an image with one row for each kind of mask, with the names that configs/collect.py has:
warping (the holes of a new camera view), outpainting (a missing border), holes (like those of
warping, but the image stays), box and brush.
"""
# `warping.draw_view` draws the true holes of a new camera view, together with the warped image.
# A mask depends only on its size and an integer seed or NumPy generator. It is float32 [H, W, 1],
# 1 = missing. A mask always has missing pixels and known pixels.
# Shapes: H W pixels.

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

Seed = int | np.random.Generator
Range = tuple[float, float]

# The kinds of prompts. Datasets store a kind as its index.
OUTPAINTING, WARPING, BOX, BRUSH = range(4)
KINDS = ("outpainting", "warping", "box", "brush")
SIDES = ("left", "right", "top", "bottom")


def mask_kind(mask: np.ndarray) -> int:
  """Classifies a mask [H, W, 1] by its shape.

  The kind is OUTPAINTING if the known pixels fill a rectangle, BOX if the missing pixels fill a
  rectangle, else WARPING.
  """
  missing = mask[..., 0] >= 0.5
  if _is_rectangle(~missing):
    return OUTPAINTING
  return BOX if _is_rectangle(missing) else WARPING


def _is_rectangle(pixels: np.ndarray) -> bool:
  """Returns whether the true pixels of [H, W] fill a rectangle."""
  rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
  return bool(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())


def outpainting_mask(
  rng: Seed,
  height: int,
  width: int,
  missing: Range = (0.15, 0.40),
  sides: Collection[str] = SIDES,
) -> np.ndarray:
  """Draws a mask of a missing border: the known pixels fill a rectangle.

  Args:
    missing: range of the share of missing pixels, drawn uniformly.
    sides: the sides on which pixels may be missing. The mask has missing columns, missing rows or
      both, on one side or on opposite sides.
  """
  _check(height, width, missing)
  if not sides or not set(sides) <= set(SIDES):
    raise ValueError(f"mask: sides are {sorted(sides)}; expected some of {', '.join(SIDES)}")
  rng = np.random.default_rng(rng)
  # For each axis: whether pixels may be missing at its start, and at its end.
  croppable = [("top" in sides, "bottom" in sides), ("left" in sides, "right" in sides)]
  choices = [axes for axes in ((0,), (1,), (0, 1)) if all(any(croppable[a]) for a in axes)]
  axes = choices[rng.integers(len(choices))]
  share = rng.uniform(1 - missing[1], 1 - missing[0]) ** (1 / len(axes))
  mask = np.ones((height, width, 1), np.float32)
  window = [slice(0, height), slice(0, width)]
  for axis in axes:
    length = mask.shape[axis]
    kept = int(np.clip(round(share * length), 1, length - 1))
    spare = length - kept
    from_start, from_end = croppable[axis]
    anywhere = int(rng.integers(spare + 1))
    allowed = (from_end, from_start, from_start and from_end)
    starts = [s for s, ok in zip((0, spare, anywhere), allowed, strict=True) if ok]
    start = starts[rng.integers(len(starts))]
    window[axis] = slice(start, start + kept)
  mask[window[0], window[1]] = 0.0
  return mask


def box_mask(rng: Seed, height: int, width: int, missing: Range = (0.10, 0.40)) -> np.ndarray:
  """Draws a mask of one missing rectangle at a random position.

  Its aspect ratio differs from that of the image by a factor of at most 2. It never spans the whole
  width or the whole height.

  Args:
    missing: range of the share of missing pixels, drawn uniformly. The mask has whole rows and
      columns, so its share is rounded.
  """
  _check(height, width, missing)
  rng = np.random.default_rng(rng)
  area = rng.uniform(*missing) * height * width
  stretch = np.exp(rng.uniform(-np.log(2), np.log(2)))
  # The lower bound on the rows keeps the columns below the width.
  rows = round(np.sqrt(area * stretch * height / width))
  rows = int(np.clip(rows, min(np.ceil(area / (width - 1)), height - 1), height - 1))
  columns = int(np.clip(round(area / rows), 1, width - 1))
  top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
  mask = np.zeros((height, width, 1), np.float32)
  mask[top : top + rows, left : left + columns] = 1.0
  return mask


def brush_mask(rng: Seed, height: int, width: int, missing: Range = (0.10, 0.50)) -> np.ndarray:
  """Draws a mask of strokes of a round brush.

  Args:
    missing: range of the share of missing pixels, drawn uniformly. The last stroke stops at the
      pixel that completes the share.
  """
  _check(height, width, missing)
  rng = np.random.default_rng(rng)
  wanted = int(np.clip(round(rng.uniform(*missing) * height * width), 1, height * width - 1))
  missing_pixels = np.zeros((height, width), bool)
  while missing_pixels.sum() < wanted:
    _stroke(rng, missing_pixels, wanted)
  return missing_pixels[..., None].astype(np.float32)


def _stroke(rng: np.random.Generator, missing: np.ndarray, wanted: int) -> None:
  """Adds one stroke to `missing` [H, W] in place: a polyline, drawn as a row of discs.

  The stroke ends after its last segment, outside the image, or when `wanted` pixels are missing.
  """
  height, width = missing.shape
  side = min(height, width)
  radius = max(0.75, rng.uniform(0.025, 0.075) * side)  # a disc contains its centre's pixel
  y, x = rng.uniform(0, height), rng.uniform(0, width)
  heading, bend = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
  left = wanted - int(missing.sum())
  for _ in range(rng.integers(3, 11)):
    # Mostly alternating turns of about 90 degrees, like a hand that scribbles over an object.
    heading += bend * rng.uniform(0.4, 2.7)
    bend = -bend if rng.random() < 0.7 else bend
    for _ in range(max(1, round(rng.uniform(0.1, 0.5) * side / (radius / 2)))):
      left -= _disc(missing, y, x, radius, left)
      y, x = y + radius / 2 * np.sin(heading), x + radius / 2 * np.cos(heading)
      if left == 0 or not (0 <= y < height and 0 <= x < width):
        return


def _disc(missing: np.ndarray, y: float, x: float, radius: float, most: int) -> int:
  """Adds a disc to `missing` [H, W] in place.

  Pixel (i, j) is the square from (i, j) to (i + 1, j + 1).

  Args:
    most: the largest number of pixels to add; the nearest to the centre come first.

  Returns:
    The number of added pixels.
  """
  top, left = max(0, int(y - radius)), max(0, int(x - radius))
  window = missing[top : int(y + radius) + 1, left : int(x + radius) + 1]
  rows, columns = np.ogrid[: window.shape[0], : window.shape[1]]
  distance = np.hypot(rows + top + 0.5 - y, columns + left + 0.5 - x)
  fresh = np.argwhere((distance <= radius) & ~window)
  nearest = np.argsort(distance[tuple(fresh.T)], kind="stable")[:most]
  window[tuple(fresh[nearest].T)] = True
  return len(nearest)


def warping_mask(rng: Seed, height: int, width: int) -> np.ndarray:
  """Draws a mask that imitates the holes of a new camera view.

  The mask has a ragged band along one edge, like pixels outside the old view, and two to five bent
  strips, like pixels that near objects occluded in the old view. 8 % to 55 % of the pixels are
  missing.
  """
  _check(height, width)
  rng = np.random.default_rng(rng)
  for _ in range(1000):
    mask = _warping_candidate(rng, height, width)
    if 0.08 <= mask.mean() <= 0.55 and mask_kind(mask) != OUTPAINTING:
      return mask
  raise ValueError(
    f"warping mask: the size is {width}x{height} pixels, too small for holes; use a larger size"
  )


def _warping_candidate(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  """Draws one mask, in unit coordinates in which the camera moves along x from a band at x = 0."""
  x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
  if rng.random() < 0.25:  # with probability 1/4 the camera moves up or down
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
  """Draws a strip [H, W]: long in y, slanted and bent, thinner towards its ends."""
  centre_x, centre_y = rng.uniform(0.1, 1.0), rng.uniform(0.1, 0.9)
  half_length, half_width = rng.uniform(0.15, 0.45), rng.uniform(0.02, 0.06)
  along = (y - centre_y) / half_length
  spine = centre_x + rng.normal(0, 0.06) * along + rng.normal(0, 0.05) * along**2
  return np.abs(x - spine) < half_width * np.sqrt(np.clip(1 - along**2, 0, None))


def _check(height: int, width: int, missing: Range = (0.5, 0.5)) -> None:
  """Raises ValueError for an image below 2x2 pixels or a range of shares outside (0, 1)."""
  if min(height, width) < 2:
    raise ValueError(f"mask: the size is {width}x{height} pixels; give at least 2x2 pixels")
  if not 0 < missing[0] <= missing[1] < 1:
    raise ValueError(f"mask: missing is {missing}; give the least and the largest share, in (0, 1)")


# {name: (kind that a prompt stores, function of (rng, height, width) that draws the mask)}.
# "holes" imitates a new camera view and does not warp the image.
DRAW: dict[str, tuple[int, Callable[[Seed, int, int], np.ndarray]]] = {
  "outpainting": (OUTPAINTING, outpainting_mask),
  "holes": (WARPING, warping_mask),
  "box": (BOX, box_mask),
  "brush": (BRUSH, brush_mask),
}


def contact_sheet(image: np.ndarray, number: int, seed: int) -> np.ndarray:
  """Draws a contact sheet, uint8: a row of `number` examples for each kind of mask, holes grey.

  The first row shows new camera views of the image [H, W, 3] with a synthetic depth map.
  """
  from prefpaint_jax.data import warping
  from prefpaint_jax.data.grids import image_grid

  views = [warping.draw_view(seed + i, image) for i in range(number)]
  draws = [("warping", view.image, view.mask) for view in views]
  for name, (_, draw) in DRAW.items():
    draws += [(name, image, draw(seed + i, *image.shape[:2])) for i in range(number)]
  examples = [drawn * (1 - mask) + 0.5 * mask for _, drawn, mask in draws]
  labels = [f"{name} {mask.mean():.0%}" for name, _, mask in draws]
  return image_grid(np.stack(examples), columns=number, labels=labels)


def _command() -> None:
  # absl flags are global. Defined at module level, they would appear in every command that imports
  # this module.
  from absl import flags

  from prefpaint_jax.data import images
  from prefpaint_jax.data.images import save_png
  from prefpaint_jax.runtime import cli as app
  from prefpaint_jax.runtime.config_fields import SEED
  from prefpaint_jax.runtime.files import check_output
  from prefpaint_jax.runtime.memory import check_memory
  from prefpaint_jax.runtime.ranges import Integer

  source = flags.DEFINE_string("image", None, "Image to draw on.", required=True)
  output = flags.DEFINE_string("output", None, "PNG to write.", required=True)
  within = app.within
  size = flags.DEFINE(within(Integer(2, 4096)), "size", 256, "Side of the centred square crop.")
  number = flags.DEFINE(within(Integer(1, 100)), "number", 6, "Examples of each kind.")
  seed = flags.DEFINE(within(SEED), "seed", 0, "The same seed draws the same masks.")

  def main() -> None:
    what = f"--number={number.value} --size={size.value}"
    check_memory(64 * (1 + len(DRAW)) * number.value * size.value**2, what)
    check_output(output.value, {"--image": source.value})
    image = images.load_image(source.value)
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    image = images.resize_image(
      image[top : top + side, left : left + side], (size.value, size.value)
    )
    save_png(output.value, contact_sheet(image, number.value, seed.value))
    print(output.value)

  app.run(main)


if __name__ == "__main__":
  _command()
