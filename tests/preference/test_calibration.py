"""Tests of the calibration with a known truth: scores linear in z, with Gaussian noise."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from prefpaint_jax.preference import bound as bounds
from prefpaint_jax.preference import calibration, calibration_plot
from prefpaint_jax.preference.bound import Bound
from prefpaint_jax.preference.calibration import Samples
from prefpaint_jax.preference.moments import Moments, gram

D, N = 16, 120  # features, training samples
NOISE, LAM = 0.5, 0.01


def world(seed=0):
  """Draws training features [N, D] and new ones [100, D] from one anisotropic Gaussian.

  Its scales are 10 to 0.001, along rotated axes. Also returns the generator.
  """
  rng = np.random.default_rng(seed)
  rotation = np.linalg.qr(rng.standard_normal((D, D)))[0]
  draw = lambda n: rng.standard_normal((n, D)) * np.geomspace(10, 1e-3, D) @ rotation.T
  return rng, draw(N), draw(100)


def fitted_heads(z, targets):
  """Computes ridge heads [D, repetitions] for targets [N, repetitions]."""
  sums = gram(z), z.T @ targets, np.zeros(()), np.float64(N), z.sum(0)
  return bounds.ridge(Moments(*sums), LAM)


def norms_of(z):
  """Returns ‖z‖_{V⁻¹} and, by name, wrong norms; all are functions [M, D] -> [M]."""
  V = LAM * np.eye(D) + z.T @ z
  quadratic = lambda matrix, x: np.sqrt(np.sum(x @ matrix * x, axis=1))
  mistakes = {
    "diagonal": partial(quadratic, np.diag(1 / np.diag(V))),
    "euclidean": lambda x: np.linalg.norm(x, axis=1),
    "released": lambda x: np.linalg.norm(x @ np.linalg.inv(V), axis=1),
    "without the ridge": partial(quadratic, np.linalg.pinv(z.T @ z)),
    "squared": lambda x: quadratic(np.linalg.inv(V), x) ** 2,
  }
  whitening = Bound.fit(z, LAM).whitening
  return lambda x: np.asarray(bounds.mahalanobis_norm(whitening, x), np.float64), mistakes


def test_errors_divided_by_the_norm_are_standard_normal_and_by_other_norms_are_not():
  # For w* ~ N(0, R²/λ I) the ridge head is the posterior mean and R² V⁻¹ the posterior covariance,
  # so (wᵀz − w*ᵀz) / (R‖z‖) is N(0, 1) for all z, features and λ.
  repetitions = 2000
  rng, z, new = world()
  directions = np.concatenate([new[:20], np.linalg.eigh(z.T @ z)[1].T])
  truths = rng.standard_normal((D, repetitions)) * NOISE / np.sqrt(LAM)
  heads = fitted_heads(z, z @ truths + NOISE * rng.standard_normal((N, repetitions)))
  errors = directions @ (heads - truths)
  ours, mistakes = norms_of(z)
  standard = errors / (NOISE * ours(directions)[:, None])
  np.testing.assert_allclose(standard.std(axis=1), 1, atol=0.07)
  p_values = [stats.kstest(row, "norm").pvalue for row in standard]
  assert min(p_values) > 1e-3 / len(directions)

  for name, norm in mistakes.items():  # also with the best common scale
    deviations = (errors / norm(directions)[:, None]).std(axis=1)
    assert deviations.max() > 4 * deviations.min(), name


def test_bound_covers_all_samples_with_probability_one_minus_delta_and_is_tight():
  repetitions = 600
  rng, z, new = world()
  values, directions = np.linalg.eigh(z.T @ z)
  new = np.concatenate([new, directions.T])
  truth = 150 * directions[:, 0]  # the worst case: the direction with the least data
  heads = fitted_heads(z, (z @ truth)[:, None] + NOISE * rng.standard_normal((N, repetitions)))
  errors = np.abs(new @ (heads - truth[:, None]))
  bound = Bound.fit(z, LAM, noise_scale=NOISE, norm_bound=np.linalg.norm(truth))
  ours, mistakes = norms_of(z)

  def covered(norm, constant):
    return np.mean((errors <= constant * norm(new)[:, None]).all(axis=0))

  for delta in calibration.DELTAS:
    C = bounds.confidence(bound, delta)
    assert covered(ours, C) >= 1 - delta
    worst = np.max(errors / ours(new)[:, None], axis=0)
    assert 0.5 < np.median(worst) / C <= 1
    for name in ("diagonal", "euclidean", "released"):
      assert covered(mistakes[name], C) < 0.5, name
    assert covered(ours, C - np.sqrt(LAM) * np.linalg.norm(truth)) == 0  # C without its λ term


def held_out(count=600, seed=1, spread=1.0):
  """Draws samples with calibrated errors, R‖z‖ times a Gaussian, and returns them with a bound."""
  rng = np.random.default_rng(seed)
  norms = np.exp(spread * rng.standard_normal(count)) / 10
  truth = rng.standard_normal(count)
  rewards = truth + NOISE * norms * rng.standard_normal(count)
  targets = truth + NOISE * rng.standard_normal(count)
  kinds = np.where(rng.random(count) < 0.3, "outpainting", "warping")
  bound = Bound.fit(world()[1], LAM, noise_scale=0.03, norm_bound=0.1)
  return Samples(norms, rewards, targets, truth, kinds), bound


@pytest.mark.parametrize("against", ["truth", "targets"])
def test_error_statistics_equal_brute_force_and_scipy(against):
  samples, bound = held_out()
  found = calibration.calibrate(samples, bound).errors[against]
  errors = np.abs(samples.rewards - getattr(samples, against))
  for level, delta in zip(found.levels, (0.1, 0.05, 0.01), strict=True):
    C = bounds.confidence(bound, delta)
    inside = sum(e <= C * n for e, n in zip(errors, samples.norms, strict=True))
    assert 0 < inside < len(errors)
    assert (level.delta, level.constant, level.coverage) == (delta, C, inside / len(errors))
    np.testing.assert_allclose(level.tightness, np.median(errors / (C * samples.norms)), rtol=1e-12)
  within = lambda constant: np.mean(errors <= constant * samples.norms)
  assert within(found.envelope * (1 + 1e-9)) >= 0.95 > within(found.envelope * (1 - 1e-9))
  rank, p_value = stats.pearsonr(stats.rankdata(errors), stats.rankdata(samples.norms))
  np.testing.assert_allclose([found.rank_correlation, found.p_value], [rank, p_value], rtol=1e-6)
  np.testing.assert_allclose(found.norm.quantiles["0.95"], np.quantile(samples.norms, 0.95))
  np.testing.assert_allclose([found.error.mean, found.error.std], [errors.mean(), errors.std()])


def test_envelope_of_gaussian_errors_is_their_quantile():
  samples, bound = held_out(count=100_000)
  found = calibration.calibrate(samples, bound).errors
  np.testing.assert_allclose(found["truth"].envelope, NOISE * stats.norm.ppf(0.975), rtol=0.02)
  assert found["targets"].envelope > 10 * found["truth"].envelope  # ‖z‖ does not bound the noise


def test_statistics_of_a_kind_equal_those_of_its_samples_alone():
  samples, bound = held_out()
  found = calibration.calibrate(samples, bound)
  assert list(found.kinds) == ["outpainting", "warping"] and found.against == "truth"
  for kind, statistics in found.kinds.items():
    own = samples.kinds == kind
    alone = calibration.calibrate(Samples(*(field[own] for field in samples)), bound)
    assert statistics == alone.errors["truth"]


def test_a_calibration_can_be_written_as_json():
  samples, bound = held_out()
  constant = samples._replace(norms=np.full(600, 0.3), truth=None)
  for case in (samples, constant, samples._replace(norms=np.zeros(600), kinds=None)):
    plain = dataclasses.asdict(calibration.calibrate(case, bound))
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_a_bound_without_scalars_has_no_levels():
  samples, _ = held_out()
  found = calibration.calibrate(samples, Bound.from_inverse(np.eye(D)))
  assert found.errors["truth"].levels == []
  assert found.errors["truth"].envelope > 0 and "C is unknown" in calibration.describe(found)


def test_suggested_weight_of_two_norms_equals_the_closed_form():
  # std / mean = (1 − e) / (1 + e) with e = exp(−kΔ), which is ¼ for e = 3/5.
  k, b = calibration.suggest_trust(np.repeat([2.0, 2.1], 50))
  np.testing.assert_allclose([k, np.exp(b)], [-np.log(0.6) / 0.1, 1.4 / (0.8 * np.exp(-2 * k))])


@pytest.mark.parametrize(
  "norms",
  [
    np.random.default_rng(0).gamma(9, 0.0033, 2000),
    np.random.default_rng(0).uniform(99.0, 101.0, 2000).astype(np.float32),
    np.random.default_rng(0).lognormal(0.0, 2.0, 2000),
    np.concatenate([np.zeros(1000), np.ones(1000)]),
  ],
  ids=["small", "far from zero", "heavy tail", "half at zero"],
)
def test_suggested_weight_has_the_requested_spread_and_mean(norms):
  k, b = calibration.suggest_trust(norms)
  gamma = np.exp(b - k * norms.astype(np.float64))
  np.testing.assert_allclose([gamma.std() / gamma.mean(), gamma.mean()], [0.25, 1.4], rtol=1e-6)
  gamma = np.asarray(bounds.trust_weight(norms, k, b), np.float64)  # as `align` computes it
  np.testing.assert_allclose([gamma.std() / gamma.mean(), gamma.mean()], [0.25, 1.4], rtol=1e-3)


def test_nothing_is_suggested_for_nearly_constant_norms():
  rounding = 1e-6 * np.random.default_rng(0).standard_normal(500)
  for norms in (
    np.full(500, 0.3),
    np.float32(0.3 * (1 + rounding)),
    np.repeat([0.1, 9], [490, 10]),
  ):
    assert calibration.suggest_trust(norms) is None


def test_only_a_nearly_constant_weight_is_flagged():
  samples, bound = held_out()
  flat = calibration.calibrate(samples, bound, k=0.05, b=0.7)
  assert flat.trust.nearly_constant and flat.trust.relative_spread < 0.05
  assert "nearly constant" in calibration.describe(flat)
  k, b = flat.trust.suggested_k, flat.trust.suggested_b
  assert f"use k = {k:.4g} and b = {b:.4g} for" in calibration.describe(flat)
  spread = calibration.calibrate(samples, bound, k, b)
  assert not spread.trust.nearly_constant and "constant" not in calibration.describe(spread)
  np.testing.assert_allclose([spread.trust.relative_spread, spread.trust.mean], [0.25, 1.4])


def test_description_states_the_relation_of_norm_and_error():
  samples, bound = held_out()
  describe = lambda samples: calibration.describe(calibration.calibrate(samples, bound))
  assert "the error rises with ‖z‖" in describe(samples)
  assert "trusts the wrong samples" in describe(samples._replace(norms=1 / samples.norms))
  unrelated = samples._replace(norms=np.random.default_rng(5).permutation(samples.norms))
  assert "does not predict the error" in describe(unrelated)
  constant = describe(samples._replace(norms=np.full(600, 0.3)))
  assert "equal for all samples" in constant and "no k changes that" in constant
  assert "the annotators' noise" in describe(samples._replace(truth=None))
  assert "the bound fails" in describe(samples)  # R and S of `held_out()` are too small
  correct = dataclasses.replace(bound, noise_scale=NOISE)
  assert "fails" not in calibration.describe(calibration.calibrate(samples, correct))


@pytest.mark.parametrize("case", ["calibrated", "constant norm", "few samples", "no C"])
def test_plot_writes_a_png_of_1800_by_900_pixels(tmp_path, case):
  samples, bound = held_out(count=3 if case == "few samples" else 200)
  if case == "constant norm":
    samples = samples._replace(norms=np.full(200, 0.3), truth=None)
  bound = Bound.from_inverse(np.eye(D)) if case == "no C" else bound
  path = tmp_path / "new" / "bound.png"
  calibration_plot.plot(calibration.calibrate(samples, bound), samples, path)
  with Image.open(path) as image:
    assert image.format == "PNG" and image.size == (1800, 900)
    assert np.ptp(np.asarray(image.convert("L"))) == 255


@pytest.mark.parametrize(
  ("field", "values", "message"),
  [
    ("rewards", np.ones(5), r"rewards have shape \(5,\), norms \(600,\)"),
    ("norms", np.ones((600, 2)), r"norms have shape \(600, 2\)"),
    ("targets", np.full(600, np.nan), "600 of 600 targets are not finite"),
    ("kinds", ["box"], "1 kinds for 600 samples"),
  ],
)
def test_errors_name_wrong_samples(field, values, message):
  samples, bound = held_out()
  with pytest.raises(ValueError, match=message) as caught:
    calibration.calibrate(samples._replace(**{field: values}), bound)
  assert "\n" not in str(caught.value)
