"""Agreement of annotators: Krippendorff's alpha."""
# Shapes: U units (candidates), R ratings of one.

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from prefpaint_jax.data.annotation_files import _Rating
from prefpaint_jax.data.examples import CRITERIA


def krippendorff_alpha(ratings: np.ndarray) -> float:
  """How far raters agree: 1 wholly, 0 as by chance, below 0 less than that (interval metric).

  ratings: [U, R], NaN where a rating is missing; which rater gave it does not matter. With m_u
  ratings of unit u and n of all units that have two or more,

    alpha = 1 − D_o / D_e,  D_o = (1/n) Σ_u 1/(m_u − 1) Σ_{i≠j in u} (x_i − x_j)²,
                            D_e = 1/(n(n − 1)) Σ_{i≠j} (x_i − x_j)²

  computed from sums of squares about the means, as Σ_{i≠j} (x_i − x_j)² = 2 m Σ_i (x_i − x̄)².
  NaN where that says nothing: no unit has two ratings, or all ratings are equal.
  (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.)
  """
  ratings = np.asarray(ratings, np.float64)
  ratings = ratings[np.sum(~np.isnan(ratings), axis=1) >= 2]
  if not len(ratings) or np.nanmax(ratings) - np.nanmin(ratings) < 1e-9:
    return math.nan
  counts = np.sum(~np.isnan(ratings), axis=1)
  number = counts.sum()
  within = np.nansum((ratings - np.nanmean(ratings, axis=1, keepdims=True)) ** 2, axis=1)
  total = np.nansum((ratings - np.nanmean(ratings)) ** 2)
  return float(1 - (number - 1) / number * np.sum(counts / (counts - 1) * within) / total)


def _agreement(
  ratings: Mapping[str, Mapping[str, _Rating]], weights: np.ndarray
) -> dict[str, float]:
  """Krippendorff's alpha of each criterion and of the combined score, over all candidates."""
  most = max(map(len, ratings.values()))
  table = np.full((len(ratings), most, len(CRITERIA)), np.nan)
  for row, rated in zip(table, ratings.values(), strict=True):
    scores = [rating.scores for rating in rated.values() if len(rating.scores) == len(CRITERIA)]
    row[: len(scores)] = np.reshape(scores, (len(scores), len(CRITERIA)))
  alphas = {name: krippendorff_alpha(table[..., i]) for i, name in enumerate(CRITERIA)}
  return alphas | {"combined": krippendorff_alpha(table @ weights)}
