"""Drift: measures of samples that no score shows, and which of them changed."""
# Shapes: N prompts, S samples of each, B images, H W pixels, D features.

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import ndimage

from prefpaint_jax.data.images import luma

MEASURES = {
  "brightness": "mean luma of the hole",
  "contrast": "standard deviation of its luma",
  "saturation": "mean distance of its strongest from its weakest channel",
  "sharpness": "mean step of luma between neighbours in it",
  "seam": "log of the mean step across its border over that between visible pixels near it",
  "known_pixels": "largest change of a pixel that was known",
  "diversity": "mean cosine distance between the features of two samples of a prompt",
}
SEEDS, SPREADS = 3.0, 0.2
RULE = (
  f"A change is flagged when it is larger than {SEEDS:g} times the seed variation (how far another "
  f"seed moves the baseline's mean over the prompts) and than {SPREADS:g} times the spread (the "
  "standard deviation between the baseline's pictures)."
)

# "Near" the hole is this share of the picture's shorter side; a smaller step is not seen.
_NEAR, _JUST_SEEN = 0.08, 0.015


# ------------------------------------------------------------------------------------------- drift
def measure(images: np.ndarray, masks: np.ndarray, originals: np.ndarray) -> dict[str, np.ndarray]:
  """Each of MEASURES but diversity, [B], of finished pictures.

  images, originals: [B, H, W, 3] in [0, 1], the latter the prompts' own, of which only the known
  pixels count; masks: [B, H, W, 1], 1 = filled in. What a mask leaves no pixels for is 0.
  """
  images, hole = np.asarray(images, np.float32), np.asarray(masks, np.float32)[..., 0]
  grey = luma(images)
  brightness = _mean(grey, hole)
  contrast = np.sqrt(_mean((grey - brightness[:, None, None]) ** 2, hole))
  saturation = _mean(images.max(-1) - images.min(-1), hole)
  changed = np.abs(images - originals) * (1 - masks)
  reach = max(1, round(_NEAR * min(hole.shape[1:])))
  near = ndimage.maximum_filter(hole, size=(1, 2 * reach + 1, 2 * reach + 1))
  in_hole, close = (_over_pairs(region, np.add) for region in (hole, near))  # how many of the two
  step = np.abs(_over_pairs(images, np.subtract)).mean(-1)
  across, beside = _mean(step, in_hole == 1), _mean(step, (in_hole == 0) & (close == 2))
  return {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "sharpness": _mean(np.abs(_over_pairs(grey, np.subtract)), in_hole == 2),
    "seam": np.log((across + _JUST_SEEN) / (beside + _JUST_SEEN)),
    "known_pixels": changed.max((1, 2, 3)),
  }


def diversity(features: np.ndarray) -> np.ndarray:
  """[N] Mean cosine distance between two of the S samples of a prompt, features [N, S, D].

  0 where all point the same way; S is at least 2.
  """
  features = np.asarray(features, np.float64)
  samples = features.shape[1]
  length = np.linalg.norm(features, axis=-1, keepdims=True)
  directions = features / np.maximum(length, 1e-12)
  # |Σ u|² = S + the sum over ordered pairs of their cosine.
  pairs = np.sum(directions.sum(1) ** 2, axis=-1) - np.sum(directions**2, axis=(1, 2))
  return 1 - pairs / (samples * (samples - 1))


def seed_variation(values: np.ndarray) -> float:
  """How far another seed moves the mean over prompts of a measure [N, S]: a standard deviation.

  The larger of that of the S means over prompts, which sees what all prompts of a seed share, and
  of what the variance within prompts makes of it, which is not small by chance when S is. With one
  sample there is only the bootstrap's over prompts (its closed form), which is larger than both.
  """
  number, samples = values.shape
  if samples == 1:
    return float(values.std() / np.sqrt(number))
  within = np.sqrt(values.var(1, ddof=1).mean() / number)
  return float(max(values.mean(0).std(ddof=1), within))


def drift(
  policy: Mapping[str, np.ndarray],
  baseline: Mapping[str, np.ndarray],
  originals: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
  """Which measures, [N, S] or [N] on each side, have changed by more than seeds change them.

  originals: the same of the prompts' own pictures, [N], where what was in the hole is known.
  Returns {"rule": RULE, "measures": {name: {"baseline", "policy", "change", "seed_variation",
  "spread", "flagged"}}}, with "original" where given; goes into JSON as it is.
  """
  table = {}
  for name in policy:
    ours, theirs = (
      np.reshape(np.asarray(side[name], np.float64), (len(side[name]), -1))
      for side in (policy, baseline)
    )
    finite = np.isfinite(ours).all(1) & np.isfinite(theirs).all(1)
    if not finite.any():
      raise ValueError(
        f"{name}: none of {len(finite)} prompts has finite measures: look at the pictures"
      )
    ours, theirs = ours[finite], theirs[finite]
    change, variation, spread = ours.mean() - theirs.mean(), seed_variation(theirs), theirs.std()
    table[name] = {
      "baseline": float(theirs.mean()),
      "policy": float(ours.mean()),
      "change": float(change),
      "seed_variation": variation,
      "spread": float(spread),
      "flagged": bool(abs(change) > max(SEEDS * variation, SPREADS * spread)),
    }
    if originals is not None and name in originals:
      table[name]["original"] = float(np.mean(np.asarray(originals[name], np.float64)[finite]))
  return {"rule": RULE, "measures": table}


def _over_pairs(values: np.ndarray, combine: np.ufunc) -> np.ndarray:
  """[B, H, W, ...] -> [B, pairs, ...]: `combine` of all neighbours, in columns and in rows."""
  pairs = (combine(values[:, 1:], values[:, :-1]), combine(values[:, :, 1:], values[:, :, :-1]))
  flat = [part.reshape(len(part), -1, *part.shape[3:]) for part in pairs]
  return np.concatenate(flat, axis=1)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """[B, ...] -> [B]; 0 where there is no weight."""
  axes = tuple(range(1, values.ndim))
  return (values * weights).sum(axes) / np.maximum(weights.sum(axes), 1e-12)
