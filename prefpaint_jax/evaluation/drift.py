"""Drift: properties of samples that the rewards do not show, and tests whether they changed."""
# Shapes: N prompts, S samples of each, B images, H W pixels, D features.

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import ndimage

from prefpaint_jax.data.images import luma

MEASURES = {
  "brightness": "mean luma of the hole",
  "contrast": "standard deviation of the hole's luma",
  "saturation": "mean of the largest minus the smallest colour channel in the hole",
  "sharpness": "mean step of luma between neighbouring pixels of the hole",
  "seam": "log ratio of the mean step across the hole's border to that of visible pixels near it",
  "known_pixels": "largest change of a known pixel",
  "diversity": "mean cosine distance between the features of two samples of a prompt",
}
SEEDS, SPREADS = 3.0, 0.2
RULE = (
  f"A change is flagged when it is larger than {SEEDS:g} times the seed variation (how far another "
  f"seed moves the baseline's mean over the prompts) and than {SPREADS:g} times the spread (the "
  "standard deviation over the baseline's samples)."
)

# The distance that is "near" the hole, as a share of the image's shorter side, and the smallest
# visible step.
_NEAR, _JUST_SEEN = 0.08, 0.015


def measure(images: np.ndarray, masks: np.ndarray, originals: np.ndarray) -> dict[str, np.ndarray]:
  """Computes all MEASURES except diversity, each [B]; 0 if the mask leaves no pixels for one.

  Args:
    images: samples [B, H, W, 3] in [0, 1].
    masks: [B, H, W, 1], 1 = inpainted.
    originals: the prompts' images [B, H, W, 3]; only their known pixels are used.
  """
  images, hole = np.asarray(images, np.float32), np.asarray(masks, np.float32)[..., 0]
  grey = luma(images)
  brightness = _mean(grey, hole)
  contrast = np.sqrt(_mean((grey - brightness[:, None, None]) ** 2, hole))
  saturation = _mean(images.max(-1) - images.min(-1), hole)
  changed = np.abs(images - originals) * (1 - masks)
  reach = max(1, round(_NEAR * min(hole.shape[1:])))
  near = ndimage.maximum_filter(hole, size=(1, 2 * reach + 1, 2 * reach + 1))
  # For each pair of neighbours, the number of its pixels in the hole, and near it.
  in_hole, close = (_over_pairs(region, np.add) for region in (hole, near))
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
  """Computes the mean cosine distance [N] between two of the S ≥ 2 samples of a prompt.

  `features` are [N, S, D]. The distance is 0 if all features of a prompt have one direction.
  """
  features = np.asarray(features, np.float64)
  samples = features.shape[1]
  length = np.linalg.norm(features, axis=-1, keepdims=True)
  directions = features / np.maximum(length, 1e-12)
  # |Σ u|² = S + the sum of the cosines of all ordered pairs.
  pairs = np.sum(directions.sum(1) ** 2, axis=-1) - np.sum(directions**2, axis=(1, 2))
  return 1 - pairs / (samples * (samples - 1))


def seed_variation(values: np.ndarray) -> float:
  """Estimates the standard deviation over seeds of a measure's mean over prompts.

  There are two estimates: the standard deviation of the S means over prompts, which includes
  effects that all prompts of a seed share, and the estimate from the variance within prompts,
  which is reliable even for small S. The result is the larger one. For S = 1 it is the
  standard error over prompts, which is larger than both.

  Args:
    values: a measure [N, S].
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
  """Finds the measures that differ between policy and baseline by more than seeds explain.

  Args:
    policy: measures [N, S] or [N] of the policy's samples, by name.
    baseline: measures of the baseline's samples, by name.
    originals: measures [N] of the prompts' complete images, by name; None: unknown.

  Returns:
    {"rule": RULE, "measures": {name: {"baseline", "policy", "change", "seed_variation", "spread",
    "flagged"}}}, and "original" for the names in `originals`. It can be written as JSON.

  Raises:
    ValueError: if a measure is finite for no prompt.
  """
  table = {}
  for name in policy:
    new, old = (
      np.reshape(np.asarray(side[name], np.float64), (len(side[name]), -1))
      for side in (policy, baseline)
    )
    finite = np.isfinite(new).all(1) & np.isfinite(old).all(1)
    if not finite.any():
      raise ValueError(
        f"{name}: none of {len(finite)} prompts has finite measures; check the samples"
      )
    new, old = new[finite], old[finite]
    change, variation, spread = new.mean() - old.mean(), seed_variation(old), old.std()
    table[name] = {
      "baseline": float(old.mean()),
      "policy": float(new.mean()),
      "change": float(change),
      "seed_variation": variation,
      "spread": float(spread),
      "flagged": bool(abs(change) > max(SEEDS * variation, SPREADS * spread)),
    }
    if originals is not None and name in originals:
      table[name]["original"] = float(np.mean(np.asarray(originals[name], np.float64)[finite]))
  return {"rule": RULE, "measures": table}


def _over_pairs(values: np.ndarray, combine: np.ufunc) -> np.ndarray:
  """Applies `combine` to all pairs of neighbours: [B, H, W, ...] -> [B, pairs, ...]."""
  pairs = (combine(values[:, 1:], values[:, :-1]), combine(values[:, :, 1:], values[:, :, :-1]))
  flat = [part.reshape(len(part), -1, *part.shape[3:]) for part in pairs]
  return np.concatenate(flat, axis=1)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Computes the weighted mean [B] of values [B, ...]; 0 if all weights are 0."""
  axes = tuple(range(1, values.ndim))
  return (values * weights).sum(axes) / np.maximum(weights.sum(axes), 1e-12)
