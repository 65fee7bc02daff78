"""Tests of the error bound against scipy, brute force and closed forms."""

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from two_processes import run_two_processes

from prefpaint_jax.preference import bound as bounds
from prefpaint_jax.preference import moments as moments_lib
from prefpaint_jax.preference.bound import Bound
from prefpaint_jax.preference.moments import Moments


def features(count=200, width=12, seed=0):
  """Draws correlated features, float32 [count, width]."""
  rng = np.random.default_rng(seed)
  return (rng.standard_normal((count, width)) @ rng.standard_normal((width, width))).astype(
    np.float32
  )


def released_like(width=256, seed=0):
  """Returns V = 0.01·I + 97.9·uuᵀ for a random unit u, with the spectrum of the released matrix."""
  u = np.random.default_rng(seed).standard_normal(width)
  u /= np.linalg.norm(u)
  return 0.01 * np.eye(width) + 97.9 * np.outer(u, u)


def test_v_is_the_ridge_plus_the_sum_of_outer_products():
  z = features()
  fitted = Bound.fit(z, lam=0.3)
  expected = 0.3 * np.eye(12) + sum(np.outer(row, row) for row in z.astype(np.float64))
  np.testing.assert_allclose(fitted.matrix, expected, rtol=1e-12)
  assert fitted.chol.dtype == np.float64 and np.array_equal(fitted.chol, np.tril(fitted.chol))
  assert (fitted.count, fitted.lam, fitted.width) == (200, 0.3, 12)


def test_grams_of_batches_add_up():
  z = features()
  parts = sum(moments_lib.gram(part) for part in np.split(z, 4))
  assert parts.dtype == np.float64
  np.testing.assert_allclose(
    Bound.from_gram(parts, len(z), 0.3).matrix, Bound.fit(z, 0.3).matrix, rtol=1e-12
  )


def test_gram_keeps_small_directions_next_to_large_ones():
  z = np.array([[1e4, 0.0], [1.0, 1e-3]] * 50, np.float32)
  exact = 50 * np.float64(np.float32(1e-3)) ** 2
  np.testing.assert_allclose(moments_lib.gram(z)[1, 1], exact, rtol=1e-12)


def scored(count=200, width=12, seed=0):
  """Draws features [count, width], noisy linear targets [count], and the true head [width]."""
  rng = np.random.default_rng(seed)
  z, head = features(count, width, seed), np.random.default_rng(99).standard_normal(width)
  return z, (z @ head + 0.5 * rng.standard_normal(count)).astype(np.float32), head


def test_moments_of_a_stream_equal_the_direct_sums():
  z, y, _ = scored(100_000, 8)
  z *= np.geomspace(1, 1e-4, 8, dtype=np.float32)
  streamed = Moments.zeros(8)
  for start in range(0, len(z), 96):
    streamed = streamed.add(jnp.asarray(z[start : start + 96]), y[start : start + 96])
  exact_z, exact_y = z.astype(np.float64), y.astype(np.float64)
  products = exact_z.T @ exact_z, exact_z.T @ exact_y, exact_y @ exact_y
  expected = (*products, 100_000, exact_z.sum(0))
  for found, wanted in zip(streamed, expected, strict=True):
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
  merged = Moments.of(z[:60_000], y[:60_000]) + Moments.of(z[60_000:], y[60_000:])
  np.testing.assert_allclose(merged.gram, streamed.gram, rtol=1e-9)


@pytest.mark.parametrize("count", [200, 5])
def test_ridge_equals_least_squares_on_the_augmented_system(count):
  z, y, _ = scored(count)
  augmented = np.concatenate([z, np.sqrt(0.3) * np.eye(12)])
  expected = scipy.linalg.lstsq(augmented, np.concatenate([y, np.zeros(12)]))[0]
  np.testing.assert_allclose(bounds.ridge(Moments.of(z, y), 0.3), expected, rtol=1e-8)


def test_residual_scale_equals_the_root_mean_square_of_residuals():
  (z, y, _), (other_z, other_y, _) = scored(), scored(50, seed=3)
  w = bounds.ridge(Moments.of(z, y), 0.3)
  expected = np.sqrt(np.mean((other_y - other_z @ w) ** 2))
  assert bounds.residual_scale(Moments.of(other_z, other_y), w) == pytest.approx(expected, rel=1e-8)
  perfect = Moments.of(z, z.astype(np.float64) @ w)
  assert bounds.residual_scale(perfect, w) < 1e-6  # rounding can make the sum of squares negative


def test_refit_recovers_head_and_noise_and_bounds_its_error():
  z, y, head = scored(10_000)
  w, fitted = bounds.refit(Moments.of(z[:5000], y[:5000]), 0.3, Moments.of(z[5000:], y[5000:]))
  np.testing.assert_allclose(w, head, atol=0.15)
  np.testing.assert_allclose(fitted.matrix, Bound.fit(z[:5000], 0.3).matrix, rtol=1e-9)
  assert fitted.noise_scale == pytest.approx(0.5, rel=0.03) and fitted.count == 5000
  assert fitted.norm_bound == pytest.approx(np.linalg.norm(w), rel=1e-12)
  error = np.sqrt((w - head) @ fitted.matrix @ (w - head))  # sup of |wᵀz − w*ᵀz| / ‖z‖
  assert error <= bounds.confidence(fitted, 0.01)


def test_overfitting_hides_the_noise_of_training_samples_only():
  z, y, _ = scored(1024)
  train, held_out = Moments.of(z[:24], y[:24]), Moments.of(z[24:], y[24:])
  from_train = bounds.refit(train, 1e-3)[1]
  from_held_out = bounds.refit(train, 1e-3, held_out, norm_bound=7)[1]
  assert from_train.noise_scale < 0.5 < from_held_out.noise_scale
  assert from_held_out.norm_bound == 7


TWO_PROCESSES = """
  import sys
  import jax, numpy as np
  folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
  from prefpaint_jax.preference.moments import Moments, sum_over_processes

  data = np.load(f"{folder}/data.npz")
  own = slice(0, 130) if index == 0 else slice(130, None)
  np.savez(f"{folder}/{index}.npz", *sum_over_processes(Moments.of(data["z"][own], data["y"][own])))
"""


def test_two_processes_get_bit_identical_sums_of_their_moments(tmp_path):
  z, y, _ = scored()
  np.savez(tmp_path / "data.npz", z=z, y=y)
  run_two_processes(TWO_PROCESSES, tmp_path, devices=1)
  first, second = (list(np.load(tmp_path / f"{i}.npz").values()) for i in range(2))
  one_after_the_other = Moments.of(z[:130], y[:130]) + Moments.of(z[130:], y[130:])
  for mine, theirs, expected in zip(first, second, one_after_the_other, strict=True):
    assert mine.dtype == np.float64 and mine.shape == expected.shape
    np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(mine, expected, rtol=1e-15)
  for mine, whole in zip(first, Moments.of(z, y), strict=True):
    np.testing.assert_allclose(mine, whole, rtol=1e-12, atol=1e-12)


def test_sum_over_one_process_changes_nothing():
  moments = Moments.of(*scored()[:2])
  for summed, own in zip(moments_lib.sum_over_processes(moments), moments, strict=True):
    np.testing.assert_array_equal(summed, own)


@pytest.mark.parametrize("lam", [1e-2, 1.0])
def test_norms_equal_those_of_a_brute_force_solve(lam):
  fitted, z = Bound.fit(features(), lam), features(7, seed=1)
  solved = scipy.linalg.solve(fitted.matrix, z.T.astype(np.float64), assume_a="pos")
  mahalanobis = np.sqrt(np.sum(z.T * solved, axis=0))
  released = np.linalg.norm(z @ np.linalg.inv(fitted.matrix), axis=1)
  ours = jax.jit(bounds.mahalanobis_norm)(fitted.whitening, jnp.array(z))
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, mahalanobis, rtol=1e-4)
  ours = jax.jit(bounds.released_norm)(fitted.whitening, jnp.array(z))
  np.testing.assert_allclose(ours, released, rtol=1e-3)


def test_norm_is_accurate_in_float32_for_the_released_spectrum():
  chol = np.linalg.cholesky(released_like())
  z = np.random.default_rng(1).standard_normal((5, 256)) * 0.01
  expected = np.sqrt(np.sum(z.T * scipy.linalg.cho_solve((chol, True), z.T), axis=0))
  whitening = np.linalg.inv(chol)
  ours = bounds.mahalanobis_norm(whitening, jnp.array(z, jnp.float32))
  np.testing.assert_allclose(ours, expected, rtol=1e-5)
  assert not np.any(bounds.mahalanobis_norm(whitening, jnp.zeros((2, 256), jnp.bfloat16)))


def test_released_norm_is_ten_times_the_papers_norm_for_the_released_matrix():
  whitening = np.linalg.inv(np.linalg.cholesky(released_like()))
  z = jnp.array(np.random.default_rng(1).standard_normal((64, 256)) * 0.01, jnp.float32)
  paper, released = bounds.mahalanobis_norm(whitening, z), bounds.released_norm(whitening, z)
  np.testing.assert_allclose(released / paper, 10, rtol=1e-3)
  np.testing.assert_allclose(
    bounds.trust_weight(released, k=0.05, b=0.7), bounds.trust_weight(paper, k=0.5, b=0.7), 1e-3
  )


def test_trust_weight_equals_the_released_clamp():
  norm = jnp.array([0.0, 1.0, 5.0, 14.0, 20.0])
  expected = np.clip(np.exp(-0.05 * np.asarray(norm) + 0.7), 1.0, 2.21)
  ours = bounds.trust_weight(norm, 0.05, 0.7, minimum=1.0, maximum=2.21)
  np.testing.assert_allclose(ours, expected, rtol=1e-6)
  assert ours[-1] == 1.0
  assert ours[0] == pytest.approx(2.0138, abs=1e-4)
  free = bounds.trust_weight(norm, 0.05, 0.7)
  assert free[-1] == pytest.approx(np.exp(-0.3), abs=1e-6)


def test_bound_from_the_inverse_recovers_v_and_lambda():
  fitted = Bound.fit(features(8, 12), lam=0.05)  # fewer samples than features, so λ is exact
  again = Bound.from_inverse(np.linalg.inv(fitted.matrix))
  np.testing.assert_allclose(again.matrix, fitted.matrix, rtol=1e-8, atol=1e-8)
  assert again.lam == pytest.approx(0.05, rel=1e-8)
  assert again.count is None


def test_bound_from_a_float32_inverse_has_the_released_spectrum():
  inverse = np.linalg.inv(released_like()).astype(np.float32)
  found = Bound.from_inverse(inverse)
  assert found.lam == pytest.approx(0.01, rel=1e-3)
  assert np.linalg.eigvalsh(found.matrix)[-1] == pytest.approx(97.91, rel=2e-2)
  z = np.random.default_rng(1).standard_normal((5, 256)).astype(np.float32)
  np.testing.assert_allclose(
    bounds.released_norm(found.whitening, z), np.linalg.norm(z @ inverse, axis=1), rtol=1e-3
  )


def test_confidence_of_one_feature_equals_the_closed_form():
  # V = λ + Σz² = 2 + 14 = 16, so det(V)^½ det(λ)^−½ = sqrt(8).
  fitted = Bound.fit(np.array([[1.0], [2.0], [3.0]]), 2.0, noise_scale=0.5, norm_bound=3.0)
  expected = 0.5 * np.sqrt(2 * np.log(np.sqrt(8) / 0.1)) + np.sqrt(2) * 3
  assert bounds.confidence(fitted, delta=0.1) == pytest.approx(expected, rel=1e-12)


def test_confidence_equals_the_log_determinant_and_does_not_overflow():
  fitted = Bound.fit(features(), 0.3, noise_scale=1.0, norm_bound=0.0)
  log_ratio = 0.5 * np.linalg.slogdet(fitted.matrix)[1] - 0.5 * 12 * np.log(0.3)
  expected = np.sqrt(2 * (log_ratio + np.log(20)))
  assert bounds.confidence(fitted, delta=0.05) == pytest.approx(expected, rel=1e-10)
  wide = Bound.from_gram(np.eye(500) * 1e4, 500, 1e-4, noise_scale=1.0, norm_bound=0.0)
  assert np.isfinite(bounds.confidence(wide, 0.05))  # det(V) overflows float64


def test_bound_holds_for_a_ridge_head_on_noisy_linear_rewards():
  rng = np.random.default_rng(0)
  z, head, lam, noise = features(300), rng.standard_normal(12), 0.1, 0.5
  new = features(500, seed=9)
  fitted = Bound.fit(z, lam, noise_scale=noise, norm_bound=np.linalg.norm(head))
  for _ in range(20):
    rewards = z @ head + noise * rng.standard_normal(300)
    ridge = np.linalg.solve(fitted.matrix, z.T @ rewards)
    norm = bounds.mahalanobis_norm(fitted.whitening, jnp.array(new))
    assert np.all(np.abs(new @ (ridge - head)) <= bounds.confidence(fitted, 0.01) * norm)


def test_effective_rank_equals_the_entropy_of_known_spectra():
  assert bounds.effective_rank(Bound.from_gram(np.eye(8) * 5, 8, 0.1)) == pytest.approx(8)
  one_line = np.linspace(1, 3, 10)[:, None] * np.ones((1, 8))
  assert bounds.effective_rank(Bound.fit(one_line, 0.1)) == pytest.approx(1, abs=1e-6)
  spectrum = np.array([6.0, 3.0, 1.0])
  expected = np.exp(scipy.stats.entropy(spectrum))
  found = bounds.effective_rank(Bound.from_gram(np.diag(spectrum), 3, 0.01))
  assert found == pytest.approx(expected, rel=1e-10)
  assert bounds.effective_rank(Bound.from_gram(np.zeros((3, 3)), 0, 0.25)) == 0


@pytest.mark.parametrize("scalars", [{}, {"noise_scale": 0.1, "norm_bound": np.float64(1 / 3)}])
@pytest.mark.parametrize("where", ["folder", "some/bound.safetensors"])
def test_saving_and_loading_keeps_all_fields(tmp_path, scalars, where):
  fitted = Bound.fit(features(), 0.3, **scalars)
  bounds.save_bound(fitted, tmp_path / where)
  loaded = bounds.load_bound(tmp_path / where)
  np.testing.assert_allclose(loaded.chol, fitted.chol, rtol=1e-10, atol=1e-10)
  assert loaded.chol.dtype == np.float64
  for field in dataclasses.fields(Bound)[1:]:
    assert getattr(loaded, field.name) == getattr(fitted, field.name)


def test_a_bound_without_count_is_saved_and_loaded(tmp_path):
  saved = Bound.from_inverse(np.eye(3) * 2)
  bounds.save_bound(saved, tmp_path)
  loaded = bounds.load_bound(tmp_path)
  assert loaded.count is None and loaded.lam == saved.lam


def test_errors_name_files_that_cannot_be_read(tmp_path):
  from safetensors.numpy import save_file

  with pytest.raises(ValueError, match=r"bound\.safetensors: no such file"):
    bounds.load_bound(tmp_path)
  path = tmp_path / "bound.safetensors"
  path.write_bytes(b"short")
  with pytest.raises(ValueError, match="cannot be read"):
    bounds.load_bound(path)
  save_file({"V": np.eye(2)}, path)
  with pytest.raises(ValueError, match="lam"):
    bounds.load_bound(path)
  save_file({"W": np.eye(2)}, path, {"lam": "1.0"})
  with pytest.raises(ValueError, match="cannot be read"):
    bounds.load_bound(path)
  save_file({"V": -np.eye(2)}, path, {"lam": "1.0"})
  with pytest.raises(ValueError, match="not positive definite"):
    bounds.load_bound(path)


def test_errors_name_wrong_arguments():
  with pytest.raises(ValueError, match=r"\(3, 4\); give a square"):
    Bound.from_inverse(np.ones((3, 4)))
  with pytest.raises(ValueError, match="not positive definite"):
    Bound.from_inverse(np.diag([1.0, -1.0]))
  with pytest.raises(ValueError, match="lam is 0"):
    Bound.fit(features(), 0)
  with pytest.raises(ValueError, match="1 of 3 feature rows"):
    moments_lib.gram(np.array([[1.0], [np.nan], [2.0]]))
  with pytest.raises(ValueError, match=r"shape \(3,\)"):
    moments_lib.gram(np.ones(3))
  with pytest.raises(ValueError, match=r"targets have shape \(2,\), features \(3, 4\)"):
    Moments.of(np.ones((3, 4)), np.ones(2))
  with pytest.raises(ValueError, match="1 of 2 targets are not finite"):
    Moments.of(np.ones((2, 4)), np.array([1.0, np.inf]))
  with pytest.raises(ValueError, match="the moments have no samples"):
    bounds.residual_scale(Moments.zeros(4), np.ones(4))
  with pytest.raises(ValueError, match="12 features and the reward model has 256"):
    bounds.check_bound(Bound.fit(features(), 1.0), 256)
  bounds.check_bound(Bound.fit(features(), 1.0), 12)
  with pytest.raises(ValueError, match="noise_scale"):
    bounds.confidence(Bound.fit(features(), 1.0), 0.1)
  with pytest.raises(ValueError, match="delta is 1"):
    bounds.confidence(Bound.fit(features(), 1.0), 1)


# -------------------------------------------------------------------------------- condition
def conditioned(condition: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns the eigenvectors and eigenvalues of a V whose largest eigenvalue stands alone."""
  q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))
  return q, np.concatenate([[condition], np.ones(23)])


@pytest.mark.parametrize("name", ["mahalanobis", "released"])
@pytest.mark.parametrize("exponent", range(2, 15, 2))
def test_norm_equals_float64_or_is_refused(name, exponent):
  q, eigenvalues = conditioned(10.0**exponent)
  fitted = Bound(np.linalg.cholesky((q * eigenvalues) @ q.T), 1.0)
  z = np.outer(np.linspace(1, 2, 8), q[:, 0]).astype(np.float32)  # where most digits cancel
  norm = bounds.mahalanobis_norm if name == "mahalanobis" else bounds.released_norm
  if 10.0**exponent <= bounds.CONDITION[name] / 2:
    power = 1 if name == "mahalanobis" else 2
    expected = np.sqrt(((z.astype(np.float64) @ q) ** 2 / eigenvalues**power).sum(1))
    np.testing.assert_allclose(norm(fitted.whitening, z), expected, rtol=5e-3)
  elif 10.0**exponent >= bounds.CONDITION[name] * 2:
    with pytest.raises(ValueError, match=r"\Athe condition number of V is 1\.0e\+\d\d; [^\n]*\Z"):
      norm(fitted.whitening, z)


def test_default_k_spreads_the_weights_of_the_released_v_as_the_released_code():
  """The released V⁻¹ has one eigenvalue of 0.0102 and 255 of about 100."""
  q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(256, 256)))
  inverse = (q * np.concatenate([[0.0102], np.full(255, 100.0)])) @ q.T
  whitening = Bound.from_inverse(inverse.astype(np.float32)).whitening
  rng = np.random.default_rng(1)
  scale = rng.uniform(0.002, 0.008, (64, 1))
  z = rng.normal(0.5, 0.2, (64, 1)) * q[:, 0] + scale * rng.normal(size=(64, 256))
  configs = Path(__file__).parents[2] / "configs"
  config = runpy.run_path(str(configs / "rl.py"))["get_config"]
  spread = lambda gamma: np.std(gamma) / np.mean(gamma)
  trust, released = config().trust, config("released").trust
  ours = bounds.trust_weight(bounds.mahalanobis_norm(whitening, z), trust.k, trust.b)
  theirs = np.exp(released.b - released.k * np.linalg.norm(z @ inverse, axis=1))
  np.testing.assert_allclose(ours, theirs, rtol=2e-2)
  assert spread(ours) > 0.05
  assert spread(bounds.trust_weight(bounds.mahalanobis_norm(whitening, z), 0.05, trust.b)) < 0.02
