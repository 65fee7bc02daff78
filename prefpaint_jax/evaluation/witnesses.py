"""Witnesses: distances of samples from the true content of the hole, which no reward uses.

They exist for prompts whose true content is known. For all of them lower is better.

- The Fréchet distance of hole colours compares distributions: two Gaussians are fitted to the RGB
  colours of the hole's pixels over all prompts (each prompt has the same weight), one to the true
  content and one to the samples. The distance is |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), as in FID.
- The error and the saturation error compare every sample with the true content of its prompt. The
  best guess, not the most natural sample, has the least error: diversity and contrast raise it.
"""
# Shapes: N prompts, S samples of each, B images, H W pixels, M moments, R resamples.

from collections.abc import Mapping
from typing import Any

import numpy as np

from prefpaint_jax.evaluation.winrate import bootstrap_means

MEASURES = {
  "hole_colours": "Fréchet distance between the colours of the hole's pixels and the true ones",
  "saturation_error": "absolute difference between the hole's mean saturation and the true one",
  "error": "mean absolute difference between the hole's pixels and the true ones",
}
RULE = (
  "Distances from the true content of the hole, which no reward uses; lower is better. "
  "Brackets are 95 % bootstrap intervals over prompts."
)
UNKNOWN = "Not measured: the true content of the hole is unknown for every prompt."


def measure(samples: np.ndarray, masks: np.ndarray, originals: np.ndarray) -> dict[str, np.ndarray]:
  """Measures samples against the true content.

  Args:
    samples: [B, H, W, 3] in [0, 1].
    masks: [B, H, W, 1], 1 = inpainted.
    originals: whole images [B, H, W, 3].

  Returns:
    "error" and "saturation_error" [B], and "moments" [B, 12]: the mean colour of the hole, and the
    mean of the products of two channels.
  """
  samples, originals, masks = (np.asarray(x, np.float64) for x in (samples, originals, masks))
  share = masks[..., 0] / np.maximum(masks.sum((1, 2, 3)), 1e-12)[:, None, None]
  hole_mean = lambda values: (values * share).sum((1, 2))
  saturation = lambda images: hole_mean(images.max(-1) - images.min(-1))
  mean = np.einsum("bhwi,bhw->bi", samples, share)
  products = np.einsum("bhwi,bhwj,bhw->bij", samples, samples, share)
  return {
    "error": hole_mean(np.abs(samples - originals).mean(-1)),
    "saturation_error": np.abs(saturation(samples) - saturation(originals)),
    "moments": np.concatenate([mean, products.reshape(len(mean), 9)], axis=1),
  }


def frechet_distance(
  mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> np.ndarray:
  """Computes the squared Fréchet distance [...] between Gaussians.

  The trace of (Σ₁ Σ₂)^½ is the sum of the roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½.

  Args:
    mean, other_mean: [..., D].
    covariance, other_covariance: [..., D, D].
  """
  values, vectors = np.linalg.eigh(covariance)
  root = (vectors * np.sqrt(np.maximum(values, 0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
  values = np.linalg.eigvalsh(root @ other_covariance @ root)
  traces = np.trace(covariance + other_covariance, axis1=-2, axis2=-1)
  distance = (
    ((mean - other_mean) ** 2).sum(-1) + traces - 2 * np.sqrt(np.maximum(values, 0)).sum(-1)
  )
  return np.maximum(distance, 0)


def compare(
  policy: Mapping[str, np.ndarray],
  baseline: Mapping[str, np.ndarray],
  truth: np.ndarray,
  is_known: np.ndarray,
) -> dict[str, Any]:
  """Compares the distances of policy and baseline.

  Args:
    policy: measures [N, S] and moments [N, S, 12] of the policy's samples, by name.
    baseline: those of the baseline's samples.
    truth: moments [N, 12] of the prompts' images.
    is_known: [N], whether the image is whole. Other prompts are left out, and so are prompts with a
      measure that is not finite.

  Returns:
    {"rule", "prompts", "measures": {name: {"baseline", "policy", "change": {"value", "low",
    "high"}}}}; no measures if no prompt is left. It can be written as JSON.
  """
  columns = [truth]
  for side in (baseline, policy):
    means = {name: values.astype(np.float64).mean(1) for name, values in side.items()}
    columns += [means["moments"], means["saturation_error"][:, None], means["error"][:, None]]
  table = np.concatenate(columns, axis=1)  # [N, 12 + 2 (12 + 2)]
  table = table[is_known & np.isfinite(table).all(1)]
  if not len(table):
    return {"rule": UNKNOWN, "prompts": 0, "measures": {}}
  means = np.concatenate([table.mean(0)[None], bootstrap_means(table)])  # the estimate comes first
  true, *sides = np.split(means, [12, 26], axis=1)
  found = [
    {
      "hole_colours": frechet_distance(*_gaussian(true), *_gaussian(side[:, :12])),
      "saturation_error": side[:, 12],
      "error": side[:, 13],
    }
    for side in sides
  ]
  measures = {}
  for name in MEASURES:
    old, new = (side[name] for side in found)
    change = new - old
    low, high = np.quantile(change[1:], [0.025, 0.975])
    measures[name] = {
      "baseline": float(old[0]),
      "policy": float(new[0]),
      "change": {"value": float(change[0]), "low": float(low), "high": float(high)},
    }
  return {"rule": RULE, "prompts": len(table), "measures": measures}


def _gaussian(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns means [R, 3] and covariances [R, 3, 3] of moments [R, 12]."""
  mean, products = moments[:, :3], moments[:, 3:].reshape(-1, 3, 3)
  return mean, products - mean[:, :, None] * mean[:, None, :]
