"""Agreement of annotators: Krippendorff's alpha."""
# Shapes: U units (candidates), R ratings of one unit.

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from prefpaint_jax.data.examples import CRITERIA
from prefpaint_jax.data.rating_files import Rating


def krippendorff_alpha(ratings: np.ndarray) -> float:
  """Computes Krippendorff's alpha for interval data.

  Alpha is 1 for full agreement, 0 for agreement by chance, and negative for less agreement. With
  m_u ratings of unit u, and n ratings of all units that have two or more,

    alpha = 1 − D_o / D_e,  D_o = (1/n) Σ_u 1/(m_u − 1) Σ_{i≠j in u} (x_i − x_j)²,
                            D_e = 1/(n(n − 1)) Σ_{i≠j} (x_i − x_j)².

  The code computes both from sums of squares, by Σ_{i≠j} (x_i − x_j)² = 2 m Σ_i (x_i − x̄)².
  Source: Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.

  Args:
    ratings: [U, R], NaN for a missing rating. The order of a unit's ratings does not matter.

  Returns:
    Alpha; NaN if no unit has two ratings or if all ratings are equal.
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


def agreement_by_criterion(
  ratings: Mapping[str, Mapping[str, Rating]], weights: np.ndarray
) -> dict[str, float]:
  """Computes Krippendorff's alpha of each criterion and of the combined score.

  Args:
    ratings: {candidate: {annotator: Rating}}.
    weights: [3], of the criteria in the combined score.
  """
  most = max(map(len, ratings.values()))
  table = np.full((len(ratings), most, len(CRITERIA)), np.nan)
  for row, rated in zip(table, ratings.values(), strict=True):
    scores = [rating.scores for rating in rated.values() if len(rating.scores) == len(CRITERIA)]
    row[: len(scores)] = np.reshape(scores, (len(scores), len(CRITERIA)))
  alphas = {name: krippendorff_alpha(table[..., i]) for i, name in enumerate(CRITERIA)}
  return alphas | {"combined": krippendorff_alpha(table @ weights)}
