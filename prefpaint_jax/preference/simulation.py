"""Simulated annotators, which replace people in tests and in the mini world.

They do not measure human taste. Like an annotator who does not know the true content, they see only
an inpainted image and its mask. They compare the hole with its surroundings: the steps across the
seam (structure), the steps between neighbouring pixels (texture), and the colours (overall). Each
score is MAX_SCORE exp(-deviation). The deviations are two-sided: too much colour, contrast or
detail lowers the score as too little does, so a sample cannot raise its score by adding more.
"""
# Shapes: B images, H W pixels, A annotators.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import ndimage

from prefpaint_jax.data.examples import CRITERIA, MAX_SCORE
from prefpaint_jax.data.images import luma

# Weights of the deviations. The hue's is a colour distance, the others are differences of
# logarithms.
_SEAM, _GRAIN, _SATURATION, _CONTRAST, _HUE = 1.1, 1.4, 0.5, 0.6, 5.0

# Shifts of red minus green, and of yellow minus blue, that a text with the word "warm" asks for.
_WARM = (0.05, 0.15)

# The smallest visible step between neighbours, saturation, and standard deviation of luma.
_JUST_SEEN = {"step": 0.015, "saturation": 0.05, "contrast": 0.05}

# Standard deviation of the Gaussian that defines "near", as a share of the image's shorter side.
_NEAR = 0.08


def true_preference(
  images: np.ndarray, masks: np.ndarray, texts: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
  """Computes the simulated annotators' scores of samples, without noise.

  Args:
    images: samples [B, H, W, 3] in [0, 1].
    masks: [B, H, W, 1], 1 = inpainted.
    texts: B texts. The annotators know two words: with "warm" the hole should be more red and
      yellow than its surroundings, with "cold" more blue. None: no texts.

  Returns:
    The CRITERIA and their weighted mean "combined", each float32 [B] in [0, MAX_SCORE].
  """
  images, hole = np.asarray(images, np.float32), np.asarray(masks, np.float32)[..., 0]
  visible = 1 - hole
  sigma = (0, *[_NEAR * min(hole.shape[1:])] * 2)
  near_hole, near_visible = (
    ndimage.gaussian_filter(region, sigma, mode="constant") for region in (hole, visible)
  )
  seam = near_hole * near_visible  # large where hole and visible pixels are both near
  deviations = {
    "structure": _SEAM * seam_deviation(images, hole, seam),
    "texture": _GRAIN * grain_deviation(images, hole, seam),
    # 1e-4 gives far pixels a weight, for masks without visible pixels near the hole.
    "overall": colour_deviation(images, hole, visible * (near_hole + 1e-4), tints(texts)),
  }
  scores = {
    name: (MAX_SCORE * np.exp(-deviation)).astype(np.float32)
    for name, deviation in deviations.items()
  }
  return scores | {"combined": combine(scores)}


def combine(scores: Mapping[str, np.ndarray]) -> np.ndarray:
  """Computes the weighted mean of the criteria; works for true and for annotated scores."""
  return sum(np.float32(weight) * scores[name] for name, weight in CRITERIA.items())


def annotate(
  rng: int | np.random.Generator,
  scores: Mapping[str, np.ndarray],
  num_annotators: int = 3,
  noise: float = 0.7,
) -> dict[str, np.ndarray]:
  """Draws annotators' scores: true scores plus independent Gaussian noise, rounded to 0..7.

  Args:
    rng: a generator or its seed.
    scores: true scores [B] of each of the CRITERIA.
    num_annotators: A.
    noise: standard deviation of the noise.

  Returns:
    int32 [B, A] for each of the CRITERIA.

  Raises:
    ValueError: the noise is negative or not finite.
  """
  if not 0 <= noise < np.inf:
    raise ValueError(f"noise is {noise}; expected a finite number from 0 on; give such a number")
  rng = np.random.default_rng(rng)
  noisy = {
    name: scores[name][:, None] + rng.normal(0, noise, (len(scores[name]), num_annotators))
    for name in CRITERIA
  }
  return {
    name: np.clip(np.round(values), 0, MAX_SCORE).astype(np.int32) for name, values in noisy.items()
  }


def fade(
  images: np.ndarray,
  masks: np.ndarray,
  amount: float | np.ndarray = 1.0,
  contrast: float = 0.35,
  saturation: float = 0.15,
) -> np.ndarray:
  """Lowers the contrast and saturation of the missing pixels; known pixels stay bit-identical.

  Args:
    images: [B, H, W, 3].
    masks: [B, H, W, 1], 1 = missing.
    amount: a number or [B], in [0, 1]; 0 changes nothing.
    contrast: share of the contrast that remains at `amount` 1.
    saturation: share of the saturation that remains at `amount` 1.
  """
  grey = luma(images)[..., None]
  mean = (grey * masks).sum((1, 2), keepdims=True) / masks.sum((1, 2), keepdims=True)
  faded = mean + contrast * (grey - mean) + saturation * (images - grey)
  share = masks * np.reshape(np.asarray(amount, np.float32), (-1, 1, 1, 1))
  return images + share * (faded.clip(0, 1) - images)


def perturb(rng: np.random.Generator, images: np.ndarray, masks: np.ndarray) -> np.ndarray:
  """Degrades the missing pixels at random, for candidates of a wide range of quality.

  Each of contrast, saturation, brightness, tint, blur and noise changes in some images
  [B, H, W, 3]; a quarter of the images is faded. Known pixels stay the same.
  """
  count = len(images)
  draw = lambda low, high: rng.uniform(low, high, (count, 1, 1, 1)).astype(np.float32)
  some = lambda share: (rng.random((count, 1, 1, 1)) < share).astype(np.float32)
  grey = luma(images)[..., None]
  mean = (grey * masks).sum((1, 2), keepdims=True) / masks.sum((1, 2), keepdims=True)
  saturation, contrast = np.exp(draw(-1.2, 0.8)), np.exp(draw(-0.9, 0.8))
  coloured = grey + (1 + some(0.5) * (saturation - 1)) * (images - grey)
  changed = mean + (1 + some(0.5) * (contrast - 1)) * (coloured - mean)
  tint = rng.normal(0, 0.08, (count, 1, 1, 3)).astype(np.float32)
  changed = changed + some(0.4) * tint + some(0.4) * draw(-0.2, 0.2)
  blurred = ndimage.gaussian_filter(changed, (0, 1.0, 1.0, 0))
  changed = changed + some(0.15) * (blurred - changed)
  noise = rng.normal(0, 1, images.shape).astype(np.float32)
  changed = changed + some(0.15) * draw(0.0, 0.08) * noise
  changed = images + masks * (np.clip(changed, 0, 1) - images)
  return fade(changed, masks, some(0.25)[:, 0, 0, 0] * draw(0.3, 1.0)[:, 0, 0, 0])


def seam_deviation(images: np.ndarray, hole: np.ndarray, seam: np.ndarray) -> np.ndarray:
  """Compares steps across the border of the hole with steps between visible pixels near it.

  A step is the mean absolute difference of two neighbouring pixels.

  Args:
    images: [B, H, W, 3].
    hole: [B, H, W], 1 = missing.
    seam: weights [B, H, W] of the pixels, large near the border of the hole.

  Returns:
    [B], |log| of the ratio of the mean steps.
  """
  across, beside = 0.0, 0.0
  across_weight, beside_weight = 0.0, 0.0
  for step, inside, weight in _steps(images, hole, seam):
    crossing, known = (inside == 1).astype(np.float32), (inside == 0) * weight
    across, across_weight = across + _sum(step * crossing), across_weight + _sum(crossing)
    beside, beside_weight = beside + _sum(step * known), beside_weight + _sum(known)
  return _log_ratio(
    _ratio(across, across_weight), _ratio(beside, beside_weight), _JUST_SEEN["step"]
  )


def grain_deviation(images: np.ndarray, hole: np.ndarray, seam: np.ndarray) -> np.ndarray:
  """Compares steps between neighbours in the hole with steps between visible pixels near it.

  Rows and columns are compared separately, so that a hole filled with its smeared border deviates.
  The arguments are those of `seam_deviation`; the result is [B].
  """
  deviation, pairs = 0.0, 1e-6
  for step, inside, weight in _steps(images, hole, seam):
    missing, known = (inside == 2).astype(np.float32), (inside == 0) * weight
    in_hole = _ratio(_sum(step * missing), _sum(missing))
    visible = _ratio(_sum(step * known), _sum(known))
    deviation = deviation + _sum(missing) * _log_ratio(in_hole, visible, _JUST_SEEN["step"])
    pairs = pairs + _sum(missing)
  return deviation / pairs


def tints(texts: Sequence[str] | None) -> np.ndarray | float:
  """Returns 1 for each text with the word "warm", -1 with "cold", and 0 for others or None."""
  if texts is None:
    return 0.0
  words = [text.lower().split() for text in texts]
  return np.array([("warm" in one) - ("cold" in one) for one in words], np.float32)


def colour_deviation(
  images: np.ndarray, hole: np.ndarray, around: np.ndarray, tint: np.ndarray | float = 0.0
) -> np.ndarray:
  """Compares saturation, luma contrast and mean hue of the hole with its surroundings.

  Args:
    images: [B, H, W, 3].
    hole: weights [B, H, W] of the hole.
    around: weights [B, H, W] of the surroundings.
    tint: how much warmer than its surroundings the hole should be: 1, 0 or -1 for each image.

  Returns:
    [B], the weighted sum of the three deviations.
  """
  grey, red_green, yellow_blue = _opponents(images)
  colourful = np.hypot(red_green, yellow_blue)

  def mean(values, weight):
    return _ratio(_sum(values * weight), _sum(weight))

  def spread(values, weight):
    variance = mean(values**2, weight) - mean(values, weight) ** 2
    return np.sqrt(np.maximum(variance, 0))

  saturation = _log_ratio(mean(colourful, hole), mean(colourful, around), _JUST_SEEN["saturation"])
  contrast = _log_ratio(spread(grey, hole), spread(grey, around), _JUST_SEEN["contrast"])
  shifts = (mean(c, hole) - mean(c, around) for c in (red_green, yellow_blue))
  hue = np.hypot(*(shift - tint * wanted for shift, wanted in zip(shifts, _WARM, strict=True)))
  return _SATURATION * saturation + _CONTRAST * contrast + _HUE * hue


def _opponents(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Converts RGB to luma, red minus green, and yellow minus blue."""
  red, green, blue = np.moveaxis(images, -1, 0)
  return luma(images), red - green, (red + green) / 2 - blue


def _steps(
  images: np.ndarray, hole: np.ndarray, seam: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields (steps, numbers of pixels in the hole, weights) of all pairs of neighbours.

  The first item has the vertical neighbours, the second the horizontal ones.
  """
  for axis in (1, 2):
    first = (slice(None),) * axis + (slice(None, -1),)
    second = (slice(None),) * axis + (slice(1, None),)
    step = np.abs(images[second] - images[first]).mean(-1)
    yield step, np.round(hole[first] + hole[second]), seam[first] + seam[second]


def _sum(values: np.ndarray) -> np.ndarray:
  """Sums over pixels: [B, H, W] -> [B]."""
  return values.sum((1, 2))


def _ratio(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
  """Divides a sum by its weight; 0 / 0 is 0."""
  return total / np.maximum(weight, 1e-12)


def _log_ratio(first: np.ndarray, second: np.ndarray, just_seen: float) -> np.ndarray:
  """Computes |log| of the ratio of two positive sizes; near 0 for sizes below `just_seen`."""
  return np.abs(np.log((first + just_seen) / (second + just_seen)))
