"""Krippendorff's alpha equals its published values and its definition."""

import itertools
import math

import numpy as np
import pytest

from prefpaint_jax.data import agreement

# Krippendorff's example of four observers and twelve units: alpha is 0.849 for interval data and
# 0.743 for nominal data.
nan = math.nan
OBSERVERS = [
  [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
  [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
  [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
  [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
]


def test_alpha_equals_the_published_value():
  alpha = agreement.krippendorff_alpha(np.transpose(OBSERVERS))
  assert round(alpha, 3) == 0.849


@pytest.mark.parametrize("seed", range(4))
def test_alpha_equals_a_sum_over_all_pairs_of_ratings(seed):
  rng = np.random.default_rng(seed)
  ratings = np.round(rng.normal(3, 1, (7, 1)) + rng.normal(0, seed / 2 + 0.1, (7, 4)), 1)
  ratings[rng.random(ratings.shape) < 0.3] = np.nan
  units = [unit[~np.isnan(unit)] for unit in ratings]
  units = [unit for unit in units if len(unit) > 1]
  values = np.concatenate(units)
  pairs = lambda x: sum((a - b) ** 2 for a, b in itertools.permutations(x, 2))
  observed = sum(pairs(unit) / (len(unit) - 1) for unit in units) / len(values)
  expected = pairs(values) / (len(values) * (len(values) - 1))
  alpha = agreement.krippendorff_alpha(rng.permuted(ratings, axis=1))
  np.testing.assert_allclose(alpha, 1 - observed / expected, rtol=1e-12)


def test_alpha_is_one_for_full_agreement_and_nan_without_pairs_or_variance():
  assert agreement.krippendorff_alpha([[1, 1], [4, 4], [7, math.nan]]) == 1
  for ratings in ([[1, math.nan], [math.nan, 2]], [[3, 3], [3, 3]], np.zeros((0, 2))):
    assert math.isnan(agreement.krippendorff_alpha(ratings))


@pytest.mark.parametrize("seed", range(3))
def test_nominal_alpha_equals_a_sum_over_all_pairs_of_ratings(seed):
  rng = np.random.default_rng(seed)
  ratings = rng.integers(-1, 2, (9, 4)).astype(float)
  ratings[rng.random(ratings.shape) < 0.3] = np.nan
  units = [unit[~np.isnan(unit)] for unit in ratings]
  units = [unit for unit in units if len(unit) > 1]
  values = np.concatenate(units)
  differ = lambda x: sum(a != b for a, b in itertools.permutations(x, 2))
  observed = sum(differ(unit) / (len(unit) - 1) for unit in units) / len(values)
  by_chance = differ(values) / (len(values) * (len(values) - 1))
  alpha, equal, chance = agreement.nominal_agreement(ratings)
  np.testing.assert_allclose([equal, chance], [1 - observed, 1 - by_chance], rtol=1e-12)
  np.testing.assert_allclose(alpha, 1 - observed / by_chance, rtol=1e-12)


def test_nominal_alpha_equals_the_published_value():
  assert round(agreement.nominal_agreement(np.transpose(OBSERVERS))[0], 3) == 0.743
  assert all(map(math.isnan, agreement.nominal_agreement([[1, nan], [nan, 2]])))
  assert agreement.nominal_agreement([[1, 1], [2, 2]])[0] == 1
