"""Random masks: the border cropped away, holes such as a change of view leaves, a box, and brush
strokes. (Holes that a change of view truly leaves, together with the moved picture, are drawn by
`warping.draw_view`.)

A mask is drawn from an integer seed or a NumPy generator and depends on nothing else. It is float32
[H, W, 1], 1 = missing, never empty and never full.

  python -m prefpaint_jax.data.masks --image=PHOTO --output=sheet.png

shows what each kind makes of a picture.
"""
# Shapes: H W pixels.

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

Seed = int | np.random.Generator
Range = tuple[float, float]

# The kind of a prompt, stored with it as an index.
OUTPAINTING, WARPING, BOX, BRUSH = range(4)
KINDS = ("outpainting", "warping", "box", "brush")
SIDES = ("left", "right", "top", "bottom")


def mask_kind(mask: np.ndarray) -> int:
  """The kind that an unknown mask [H, W, 1] looks like.

  OUTPAINTING if the known pixels fill a rectangle, as if cropped; BOX if the missing ones do;
  else WARPING.
  """
  missing = mask[..., 0] >= 0.5
  if _is_rectangle(~missing):
    return OUTPAINTING
  return BOX if _is_rectangle(missing) else WARPING


def _is_rectangle(pixels: np.ndarray) -> bool:
  """Whether the true pixels of [H, W] fill a rectangle."""
  rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
  return bool(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())


def outpainting_mask(
  rng: Seed,
  height: int,
  width: int,
  missing: Range = (0.15, 0.40),
  sides: Collection[str] = SIDES,
) -> np.ndarray:
  """Keeps a rectangle; what lies around it, a share of the pixels drawn from `missing`, is cropped.

  The picture loses some of its width, of its height, or of both, on one side or on opposite ones;
  only on those named in `sides`.
  """
  _check(height, width, missing)
  if not sides or not set(sides) <= set(SIDES):
    raise ValueError(f"mask: sides {sorted(sides)}: name some of {', '.join(SIDES)}")
  rng = np.random.default_rng(rng)
  # By axis: may its beginning be cropped, may its end?
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
  """One missing rectangle with a share of the pixels drawn from `missing`, as near as whole rows
  and columns allow. Its shape is the picture's, stretched up to twofold; it lies anywhere in it
  but never reaches from one side to the opposite one.
  """
  _check(height, width, missing)
  rng = np.random.default_rng(rng)
  area = rng.uniform(*missing) * height * width
  stretch = np.exp(rng.uniform(-np.log(2), np.log(2)))
  # At least so many rows that the columns fit.
  rows = round(np.sqrt(area * stretch * height / width))
  rows = int(np.clip(rows, min(np.ceil(area / (width - 1)), height - 1), height - 1))
  columns = int(np.clip(round(area / rows), 1, width - 1))
  top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
  mask = np.zeros((height, width, 1), np.float32)
  mask[top : top + rows, left : left + columns] = 1.0
  return mask


def brush_mask(rng: Seed, height: int, width: int, missing: Range = (0.10, 0.50)) -> np.ndarray:
  """Strokes of a round brush that wanders about, stopped at the pixel where a share drawn from
  `missing` is painted over.
  """
  _check(height, width, missing)
  rng = np.random.default_rng(rng)
  wanted = int(np.clip(round(rng.uniform(*missing) * height * width), 1, height * width - 1))
  painted = np.zeros((height, width), bool)
  while painted.sum() < wanted:
    _stroke(rng, painted, wanted)
  return painted[..., None].astype(np.float32)


def _stroke(rng: np.random.Generator, painted: np.ndarray, wanted: int) -> None:
  """One stroke into `painted` [H, W]: pieces of a line with kinks, as a row of discs.

  It ends with its last piece, where it leaves the picture, or once `wanted` pixels are painted.
  """
  height, width = painted.shape
  side = min(height, width)
  radius = max(0.75, rng.uniform(0.025, 0.075) * side)  # at least the pixel that it is on
  y, x = rng.uniform(0, height), rng.uniform(0, width)
  heading, bend = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
  left = wanted - int(painted.sum())
  for _ in range(rng.integers(3, 11)):
    # Mostly to and fro, as a hand blots something out; the middle of the range is a right angle.
    heading += bend * rng.uniform(0.4, 2.7)
    bend = -bend if rng.random() < 0.7 else bend
    for _ in range(max(1, round(rng.uniform(0.1, 0.5) * side / (radius / 2)))):
      left -= _disc(painted, y, x, radius, left)
      y, x = y + radius / 2 * np.sin(heading), x + radius / 2 * np.cos(heading)
      if left == 0 or not (0 <= y < height and 0 <= x < width):
        return


def _disc(painted: np.ndarray, y: float, x: float, radius: float, most: int) -> int:
  """Paints a disc, of its fresh pixels the `most` next to its centre; returns how many they were.

  Pixel (i, j) is the square from (i, j) to (i + 1, j + 1).
  """
  top, left = max(0, int(y - radius)), max(0, int(x - radius))
  window = painted[top : int(y + radius) + 1, left : int(x + radius) + 1]
  rows, columns = np.ogrid[: window.shape[0], : window.shape[1]]
  distance = np.hypot(rows + top + 0.5 - y, columns + left + 0.5 - x)
  fresh = np.argwhere((distance <= radius) & ~window)
  nearest = np.argsort(distance[tuple(fresh.T)], kind="stable")[:most]
  window[tuple(fresh[nearest].T)] = True
  return len(nearest)


def warping_mask(rng: Seed, height: int, width: int) -> np.ndarray:
  """Holes like those of a picture seen from a new place: a ragged band along one edge, which the
  old view did not reach, and two to five bent strips, where something near hid what is behind.

  Between 8 and 55 % of the pixels are missing.
  """
  _check(height, width)
  rng = np.random.default_rng(rng)
  for _ in range(1000):
    mask = _warping_candidate(rng, height, width)
    if 0.08 <= mask.mean() <= 0.55 and mask_kind(mask) != OUTPAINTING:
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


def _check(height: int, width: int, missing: Range = (0.5, 0.5)) -> None:
  if min(height, width) < 2:
    raise ValueError(f"mask: {height}x{width} pixels: give at least 2x2")
  if not 0 < missing[0] <= missing[1] < 1:
    raise ValueError(f"mask: missing {missing}: give the least and the greatest share, in (0, 1)")


# What to draw by its name: the kind to store with a prompt, and how to draw (rng, height, width).
# "holes" imitate a change of view without moving the picture.
DRAW: dict[str, tuple[int, Callable[[Seed, int, int], np.ndarray]]] = {
  "outpainting": (OUTPAINTING, outpainting_mask),
  "holes": (WARPING, warping_mask),
  "box": (BOX, box_mask),
  "brush": (BRUSH, brush_mask),
}


# ------------------------------------------------------------------------------------ contact sheet
def contact_sheet(image: np.ndarray, number: int, seed: int) -> np.ndarray:
  """`number` draws of each kind on a picture [H, W, 3], a row each, holes grey; uint8.

  The first row moves the camera, before a synthetic scene.
  """
  from prefpaint_jax.data import warping
  from prefpaint_jax.data.images import image_grid

  views = [warping.draw_view(seed + i, image) for i in range(number)]
  draws = [("warping", view.image, view.mask) for view in views]
  for name, (_, draw) in DRAW.items():
    draws += [(name, image, draw(seed + i, *image.shape[:2])) for i in range(number)]
  pictures = [picture * (1 - mask) + 0.5 * mask for _, picture, mask in draws]
  labels = [f"{name} {mask.mean():.0%}" for name, _, mask in draws]
  return image_grid(np.stack(pictures), columns=number, labels=labels)


def _command() -> None:
  # Flags are of the whole process: defined here, they stay out of the commands that import this.
  from absl import flags

  from prefpaint_jax.data import images
  from prefpaint_jax.data.images import save_png
  from prefpaint_jax.runtime import cli as app

  source = flags.DEFINE_string("image", None, "Picture to draw on.", required=True)
  output = flags.DEFINE_string("output", None, "PNG to write.", required=True)
  size = flags.DEFINE_integer("size", 256, "Side of the square cut from its middle.", lower_bound=2)
  number = flags.DEFINE_integer("number", 6, "Draws of each kind.", lower_bound=1)
  seed = flags.DEFINE_integer("seed", 0, "The same seed draws the same masks.", lower_bound=0)

  def main() -> None:
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
