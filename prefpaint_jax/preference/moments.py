"""Sums over samples that ridge regression and the reward-error bound need, in float64."""
# Shapes: N samples, B batch, D features.

from typing import NamedTuple

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Float64

Number = float | int
Scalar = Number | Float[np.ndarray, ""]
# An argument whose shape the function checks; a wrong shape raises a ValueError.
Unchecked = Float[Array | np.ndarray, "..."]


def gram(features: Unchecked) -> Float64[np.ndarray, "D D"]:
  """Computes Σ zzᵀ of features [N, D] in float64. The results of several batches add up.

  Raises:
    ValueError: if the features are not a matrix or not finite.
  """
  features = np.asarray(features, np.float64)
  if features.ndim != 2:
    raise ValueError(f"features have shape {features.shape}; give [samples, width]")
  if not np.isfinite(features).all():
    bad = int((~np.isfinite(features).all(axis=1)).sum())
    raise ValueError(f"{bad} of {len(features)} feature rows are not finite; leave them out")
  return features.T @ features


class Moments(NamedTuple):
  """The sums over samples that ridge regression needs, in float64."""

  gram: Float64[np.ndarray, "D D"]  # Σ zzᵀ
  cross: Float64[np.ndarray, " D"]  # Σ y z
  squares: Scalar  # Σ y²
  count: Scalar  # N
  total: Float64[np.ndarray, " D"]  # Σ z

  @classmethod
  def zeros(cls, width: int) -> "Moments":
    """Returns the moments of no samples, for `width` features."""
    return cls(
      np.zeros((width, width)), np.zeros(width), np.zeros(()), np.zeros(()), np.zeros(width)
    )

  @classmethod
  def of(cls, features: Unchecked, targets: Unchecked) -> "Moments":
    """Computes the moments of features [B, D] and targets [B], the normalised scores.

    Raises:
      ValueError: if the shapes do not match or an entry is not finite.
    """
    features, targets = (np.asarray(x, np.float64) for x in (features, targets))
    if targets.shape != features.shape[:1]:
      raise ValueError(
        f"targets have shape {targets.shape}, features {features.shape}; give one target per sample"
      )
    if not np.isfinite(targets).all():
      bad = int((~np.isfinite(targets)).sum())
      raise ValueError(f"{bad} of {len(targets)} targets are not finite; leave them out")
    count = np.float64(len(targets))
    products = gram(features), features.T @ targets, targets @ targets
    return cls(*products, count, features.sum(axis=0))

  def __add__(self, other: "Moments") -> "Moments":
    """Returns the moments of the union of two sets of samples."""
    return Moments(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

  def add(self, features: Unchecked, targets: Unchecked) -> "Moments":
    """Returns the moments with one more batch of features [B, D] and targets [B]."""
    return self + Moments.of(features, targets)


def sum_over_processes(moments: Moments) -> Moments:
  """Sums the moments of all processes. All processes must call it and get bit-identical results."""
  sums = np.concatenate([np.ravel(part) for part in moments])
  # JAX rounds float64 arrays to float32, so gather their bytes.
  gathered = multihost_utils.process_allgather(sums.view(np.uint32))
  total = np.ascontiguousarray(gathered).view(np.float64).sum(axis=0)
  ends = np.cumsum([part.size for part in moments])[:-1]
  parts = zip(np.split(total, ends), moments, strict=True)
  return Moments(*(flat.reshape(part.shape) for flat, part in parts))
