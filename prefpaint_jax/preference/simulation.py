"""Simulated annotators: a stand-in for people, to try everything where there are none.

This is a simulation, not a measurement of human taste. It looks at a finished picture and its mask
only, as an annotator does who never saw what was really there, and asks three things of a filling:
does it go on across the seam (structure), has it the grain of what is near (texture), and do its
colours belong there (overall). Each answer is MAX_SCORE exp(-deviation), and each deviation is
two-sided: too much colour, contrast or detail is disliked as too little is, so that no filling is
liked for merely having more of something.
"""
# Shapes: B pictures, H W pixels, A annotators.

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from scipy import ndimage

from prefpaint_jax.data.examples import CRITERIA, MAX_SCORE
from prefpaint_jax.data.images import luma

# How hard a deviation is punished. Differences of logarithms, but for the hue: a colour distance.
_SEAM, _GRAIN, _SATURATION, _CONTRAST, _HUE = 1.1, 1.4, 0.5, 0.6, 5.0

# Below these a difference is not seen: neighbouring pixels, saturation, standard deviation of luma.
_JUST_SEEN = {"step": 0.015, "saturation": 0.05, "contrast": 0.05}

# "Near" is a Gaussian of this share of the picture's shorter side.
_NEAR = 0.08


def true_preference(images: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
  """What the simulated annotators think of fillings, without their noise.

  images: [B, H, W, 3] in [0, 1], finished pictures; masks: [B, H, W, 1], 1 = filled in.
  Returns the CRITERIA and their weighted mean, "combined", each float32 [B] in [0, MAX_SCORE].
  """
  images, hole = np.asarray(images, np.float32), np.asarray(masks, np.float32)[..., 0]
  visible = 1 - hole
  sigma = (0, *[_NEAR * min(hole.shape[1:])] * 2)
  near_hole, near_visible = (
    ndimage.gaussian_filter(region, sigma, mode="constant") for region in (hole, visible)
  )
  seam = near_hole * near_visible  # large where both are close
  deviations = {
    "structure": _SEAM * seam_deviation(images, hole, seam),
    "texture": _GRAIN * grain_deviation(images, hole, seam),
    # Where the visible part has nothing near the hole the whole of it is compared.
    "overall": colour_deviation(images, hole, visible * (near_hole + 1e-4)),
  }
  scores = {
    name: (MAX_SCORE * np.exp(-deviation)).astype(np.float32)
    for name, deviation in deviations.items()
  }
  return scores | {"combined": combine(scores)}


def combine(scores: Mapping[str, np.ndarray]) -> np.ndarray:
  """The weighted mean of the criteria, for true scores and for annotated ones."""
  return sum(np.float32(weight) * scores[name] for name, weight in CRITERIA.items())


def annotate(
  rng: int | np.random.Generator,
  scores: Mapping[str, np.ndarray],
  num_annotators: int = 3,
  noise: float = 0.7,
) -> dict[str, np.ndarray]:
  """Whole scores 0..7 of annotators who err independently by `noise` (standard deviation).

  Returns int32 [B, A] for each of the CRITERIA; `combine` works on them too.
  """
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
  """Makes what is under the mask look like an old print: grey, and of low contrast about its mean.

  images: [B, H, W, 3]; masks: [B, H, W, 1]; amount: in [0, 1], one or [B] (0 changes nothing, 1
  leaves only these shares of contrast and saturation). Known pixels stay the same, bit for bit.
  """
  grey = luma(images)[..., None]
  mean = (grey * masks).sum((1, 2), keepdims=True) / masks.sum((1, 2), keepdims=True)
  faded = mean + contrast * (grey - mean) + saturation * (images - grey)
  share = masks * np.reshape(np.asarray(amount, np.float32), (-1, 1, 1, 1))
  return images + share * (faded.clip(0, 1) - images)


def perturb(rng: np.random.Generator, images: np.ndarray, masks: np.ndarray) -> np.ndarray:
  """Spoils what is under the masks at random: candidates wider than any one policy paints.

  Each picture [B, H, W, 3] gets a random contrast, saturation, brightness and tint, and some of
  them blur or noise; a quarter is faded. Known pixels stay the same.
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


# ---------------------------------------------------------------------------------- the deviations
def seam_deviation(images: np.ndarray, hole: np.ndarray, seam: np.ndarray) -> np.ndarray:
  """[B] How much the steps across the seam differ from the steps between visible pixels near it.

  images: [B, H, W, 3]; hole, seam: [B, H, W], what is missing and a weight that says where to look.
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
  """[B] How much the steps between neighbours in the hole differ from those of visible ones nearby.

  Rows and columns are judged apart, so that smearing the border into the hole is noticed.
  """
  deviation, pairs = 0.0, 1e-6
  for step, inside, weight in _steps(images, hole, seam):
    filled, known = (inside == 2).astype(np.float32), (inside == 0) * weight
    ours, theirs = (
      _ratio(_sum(step * filled), _sum(filled)),
      _ratio(_sum(step * known), _sum(known)),
    )
    deviation = deviation + _sum(filled) * _log_ratio(ours, theirs, _JUST_SEEN["step"])
    pairs = pairs + _sum(filled)
  return deviation / pairs


def colour_deviation(images: np.ndarray, hole: np.ndarray, around: np.ndarray) -> np.ndarray:
  """[B] How much the hole's saturation, luma contrast and mean hue differ from its surroundings'.

  hole, around: weights [B, H, W] of the two regions.
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
  hue = np.hypot(*(mean(c, hole) - mean(c, around) for c in (red_green, yellow_blue)))
  return _SATURATION * saturation + _CONTRAST * contrast + _HUE * hue


def _opponents(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Luma, red against green, and yellow against blue."""
  red, green, blue = np.moveaxis(images, -1, 0)
  return luma(images), red - green, (red + green) / 2 - blue


def _steps(
  images: np.ndarray, hole: np.ndarray, seam: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """For rows and for columns: the absolute step between neighbours, how many of the two are in the
  hole, and their weight."""
  for axis in (1, 2):
    first = (slice(None),) * axis + (slice(None, -1),)
    second = (slice(None),) * axis + (slice(1, None),)
    step = np.abs(images[second] - images[first]).mean(-1)
    yield step, np.round(hole[first] + hole[second]), seam[first] + seam[second]


def _sum(values: np.ndarray) -> np.ndarray:
  return values.sum((1, 2))


def _ratio(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
  return total / np.maximum(weight, 1e-12)


def _log_ratio(ours: np.ndarray, theirs: np.ndarray, just_seen: float) -> np.ndarray:
  """|log| of a ratio of two positive sizes, blunted below what can just be seen."""
  return np.abs(np.log((ours + just_seen) / (theirs + just_seen)))
