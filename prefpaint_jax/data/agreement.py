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


def nominal_agreement(ratings: np.ndarray) -> tuple[float, float, float]:
  """Computes Krippendorff's alpha for nominal data, with the two shares that it compares.

  With n_uc ratings c of unit u, m_u = Σ_c n_uc, n_c = Σ_u n_uc, and n = Σ_c n_c, over all units
  that have two ratings or more,

    alpha = (A_o − A_e) / (1 − A_e),  A_o = (1/n) Σ_u Σ_c n_uc (n_uc − 1) / (m_u − 1),
                                      A_e = Σ_c n_c (n_c − 1) / (n(n − 1)).

  Args:
    ratings: [U, R], as of `krippendorff_alpha`; only whether two are equal counts.

  Returns:
    Alpha, the share A_o of equal ratings and their share A_e by chance. All are NaN if no unit has
    two ratings; alpha is NaN if all ratings are equal.
  """
  ratings = np.asarray(ratings, np.float64)
  ratings = ratings[np.sum(~np.isnan(ratings), axis=1) >= 2]
  if not len(ratings):
    return math.nan, math.nan, math.nan
  kinds = np.unique(ratings[~np.isnan(ratings)])
  counts = (ratings[..., None] == kinds).sum(1)  # [U, kinds]
  of_unit, of_kind, number = counts.sum(1), counts.sum(0), counts.sum()
  observed = float(np.sum((counts * (counts - 1)).sum(1) / (of_unit - 1)) / number)
  chance = float(np.sum(of_kind * (of_kind - 1)) / (number * (number - 1)))
  return math.nan if chance == 1 else (observed - chance) / (1 - chance), observed, chance


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
