"""Tests of the distances from the true content against SciPy, closed forms and loops."""

import json

import numpy as np
import pytest
from scipy import linalg

from prefpaint_jax.evaluation import tables, witnesses


def draw(number=6, samples=3, size=8, seed=0):
  """Returns samples [N, S, H, W, 3] of one side, masks [N, H, W, 1] and originals [N, H, W, 3]."""
  rng = np.random.default_rng(seed)
  originals, masks = rng.random((number, size, size, 3)), np.zeros((number, size, size, 1))
  for i in range(number):
    masks[i, 1 : 3 + i % 5, 2:7] = 1
  return rng.random((number, samples, size, size, 3)), masks, originals


def measured(samples, masks, originals):
  repeat = lambda x: np.repeat(x, samples.shape[1], axis=0)
  flat = samples.reshape(-1, *samples.shape[2:])
  found = witnesses.measure(flat, repeat(masks), repeat(originals))
  return {name: x.reshape(*samples.shape[:2], *x.shape[1:]) for name, x in found.items()}


def truth_of(masks, originals):
  return witnesses.measure(originals, masks, originals)["moments"]


@pytest.mark.parametrize("size", [1, 3, 5])
def test_frechet_distance_equals_the_formula_with_a_matrix_root(size):
  rng = np.random.default_rng(size)
  means = rng.standard_normal((2, 4, size))
  factors = rng.standard_normal((2, 4, size, size + 1))
  covariances = factors @ np.swapaxes(factors, -1, -2)
  found = witnesses.frechet_distance(means[0], covariances[0], means[1], covariances[1])
  for i in range(4):
    a, b = covariances[:, i]
    root = np.real(linalg.sqrtm(a @ b))
    expected = np.sum((means[0, i] - means[1, i]) ** 2) + np.trace(a + b - 2 * root)
    assert found[i] == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_axis_aligned_gaussians_is_that_of_means_and_deviations():
  mean, other = np.array([0.1, 0.5, 0.3]), np.array([0.4, 0.1, 0.3])
  deviation, wider = np.array([0.2, 0.0, 0.3]), np.array([0.5, 0.4, 0.3])
  expected = np.sum((mean - other) ** 2) + np.sum((deviation - wider) ** 2)
  found = witnesses.frechet_distance(mean, np.diag(deviation**2), other, np.diag(wider**2))
  assert found == pytest.approx(expected, abs=1e-12)
  assert witnesses.frechet_distance(mean, np.diag(wider**2), mean, np.diag(wider**2)) < 1e-12


def test_measures_equal_loops_over_the_pixels_of_the_hole():
  samples, masks, originals = draw()
  found = measured(samples, masks, originals)
  for i, (mask, original) in enumerate(zip(masks[..., 0] > 0, originals, strict=True)):
    for s, sample in enumerate(samples[i]):
      inside, true = sample[mask], original[mask]
      assert found["error"][i, s] == pytest.approx(np.abs(inside - true).mean())
      saturation = abs(np.ptp(inside, axis=1).mean() - np.ptp(true, axis=1).mean())
      assert found["saturation_error"][i, s] == pytest.approx(saturation)
      moments = np.concatenate([inside.mean(0), (inside.T @ inside / len(inside)).ravel()])
      np.testing.assert_allclose(found["moments"][i, s], moments)


def test_colours_of_holes_of_one_size_are_compared_over_all_their_pixels():
  samples, masks, originals = draw(number=10)
  masks[:] = masks[0]
  truth = truth_of(masks, originals)
  sides = [measured(x, masks, originals) for x in (samples, np.sqrt(samples))]
  table = witnesses.compare(*sides, truth, np.ones(10, bool))
  hole = masks[0, ..., 0] > 0
  fit = lambda pixels: (pixels.mean(0), np.cov(pixels.T, bias=True))
  true = fit(originals[:, hole].reshape(-1, 3))
  for name, images in (("policy", samples), ("baseline", np.sqrt(samples))):
    expected = witnesses.frechet_distance(*fit(images[:, :, hole].reshape(-1, 3)), *true)
    assert table["measures"]["hole_colours"][name] == pytest.approx(expected, rel=1e-9)


def test_samples_nearer_to_the_truth_have_smaller_distances_with_intervals_below_zero():
  samples, masks, originals = draw(number=60)
  near = originals[:, None] + 0.1 * (samples - originals[:, None])
  sides = [measured(x, masks, originals) for x in (near, samples**2)]
  table = witnesses.compare(*sides, truth_of(masks, originals), np.ones(60, bool))
  assert set(table["measures"]) == set(witnesses.MEASURES) and table["prompts"] == 60
  for name, found in table["measures"].items():
    change = found["change"]
    assert found["policy"] - found["baseline"] == pytest.approx(change["value"])
    assert change["low"] < change["value"] < change["high"] < 0, name
    assert f"{found['policy']:.4f}" in tables.describe_witnesses(table)
  assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_prompts_without_a_known_truth_or_with_nan_are_left_out():
  samples, masks, originals = draw(number=8)
  sides = [measured(x, masks, originals) for x in (samples, samples**2)]
  truth, known = truth_of(masks, originals), np.arange(8) < 6
  sides[0]["error"][2, 1] = np.nan
  table = witnesses.compare(*sides, truth, known)
  kept = [0, 1, 3, 4, 5]
  alone = [{name: x[kept] for name, x in side.items()} for side in sides]
  assert table == witnesses.compare(*alone, truth[kept], np.ones(5, bool))
  nothing = witnesses.compare(*sides, truth, np.zeros(8, bool))
  assert nothing["measures"] == {} and nothing["prompts"] == 0
  assert "unknown" in tables.describe_witnesses(nothing)
