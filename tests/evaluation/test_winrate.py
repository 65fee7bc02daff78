"""Tests of the statistics against loops and SciPy, and of drift on synthetic images."""

import itertools
import json
import time

import numpy as np
import pytest
from scipy import stats

from prefpaint_jax.data.images import luma
from prefpaint_jax.data.masks import BRUSH, OUTPAINTING, WARPING
from prefpaint_jax.evaluation import drift, tables, winrate
from prefpaint_jax.evaluation.winrate import Scores
from prefpaint_jax.preference import simulation


def draw_scores(number=40, samples=10, shift=0.4, seed=0):
  """Draws scores [number, samples] for both sides, rounded so that some tie."""
  rng = np.random.default_rng(seed)
  prompt = rng.standard_normal((number, 1))
  draw = lambda: np.round(prompt + 0.5 * rng.standard_normal((number, samples)), 1)
  return Scores((draw() + shift).astype(np.float32), draw().astype(np.float32))


def brute_force_win_rate(scores, baseline, best_of, rivals=1):
  """Returns the rate of each prompt over all choices of different seeds."""
  seeds, rates = range(scores.shape[1]), []
  for own, other in zip(scores.tolist(), baseline.tolist(), strict=True):
    won = []
    for chosen in itertools.combinations(seeds, best_of):
      for against in itertools.combinations(set(seeds) - set(chosen), rivals):
        best, rival = max(own[i] for i in chosen), max(other[j] for j in against)
        won.append(1.0 if best > rival else 0.5 if best == rival else 0.0)
    rates.append(sum(won) / len(won))
  return rates


@pytest.mark.parametrize("samples", [2, 3, 4, 6, 11])
def test_every_statistic_equals_a_loop_over_prompts(samples):
  scores = draw_scores(number=12, samples=samples)
  found = winrate.per_prompt(scores)
  policy, baseline = (side.astype(np.float64) for side in scores)
  expected = {"gain": [np.mean(p) - np.mean(b) for p, b in zip(policy, baseline, strict=True)]}
  same_seed = [list(zip(p, b, strict=True)) for p, b in zip(policy, baseline, strict=True)]
  expected["winrate_paired/s1"] = [
    sum((p > b) + 0.5 * (p == b) for p, b in pairs) / samples for pairs in same_seed
  ]
  for n in (n for n in (1, 3, 10) if n < samples):
    expected[f"winrate/s{n}"] = brute_force_win_rate(policy, baseline, n)
    if n > 1 and 2 * n <= samples:
      expected[f"winrate_each/s{n}"] = brute_force_win_rate(policy, baseline, n, n)
  for n in (n for n in (3, 10) if n <= samples):
    best = lambda row, n=n: np.mean([max(c) for c in itertools.combinations(row, n)])
    pairs = zip(policy, baseline, strict=True)
    expected[f"gain_best/s{n}"] = [best(p) - best(b) for p, b in pairs]
  for prefix, side in (("", policy), ("baseline/", baseline)):
    expected[f"{prefix}reward/mean"] = [sum(row) / samples for row in side]
    expected[f"{prefix}reward/var"] = np.diag(np.cov(side))
  assert set(found) == set(expected) and set(found) <= set(tables.LABELS)
  for name, values in expected.items():
    np.testing.assert_allclose(found[name], values, rtol=1e-12, atol=1e-12, err_msg=name)


def test_policy_against_itself_has_the_rates_of_an_equal_policy_exactly():
  policy = np.random.default_rng(0).standard_normal((40, 20))  # no ties
  found = winrate.summarise({"judge": Scores(policy, policy)}, np.zeros(40, int))
  for group in found["judge"].values():
    for statistic, rate in {
      "winrate/s1": 1 / 2,
      "winrate_paired/s1": 1 / 2,
      "winrate/s3": 3 / 4,
      "winrate/s10": 10 / 11,
      "winrate_each/s3": 1 / 2,
      "winrate_each/s10": 1 / 2,
      "gain": 0,
      "gain_in_sd": 0,
    }.items():
      np.testing.assert_allclose([*group[statistic].values()], rate, atol=1e-12, err_msg=statistic)


def test_tiny_shift_of_every_sample_leaves_the_win_rate_at_one_half():
  scores = np.random.default_rng(0).standard_normal((300, 11))
  group = winrate.estimate(Scores(scores + 1e-3, scores))
  assert group["winrate_paired/s1"]["value"] == 1.0
  assert group["winrate/s1"]["value"] == pytest.approx(0.5, abs=2e-3)
  assert "preferred" not in winrate.verdict(group)


@pytest.mark.parametrize(("best_of", "rivals"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_win_rate_is_that_of_independent_normal_samples(best_of, rivals, correlation):
  # Samples of one seed are correlated; the rate is that of independent ones.
  rng = np.random.default_rng(1)
  shared, own, other = rng.standard_normal((3, 20_000, 6))
  mix = lambda noise: np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * noise
  rate = winrate.win_rate(mix(own) + 0.8, mix(other), best_of, rivals).mean()
  x = np.linspace(-7, 9, 4001)
  # P(max of n > max of m) is the integral of P(max of m < x) over the density of the maximum of n.
  density = best_of * stats.norm.pdf(x - 0.8) * stats.norm.cdf(x - 0.8) ** (best_of - 1)
  expected = np.trapezoid(density * stats.norm.cdf(x) ** rivals, x)
  assert rate == pytest.approx(expected, abs=0.005)


def test_ties_count_half():
  np.testing.assert_array_equal(winrate.wins([1, 2, 3], [2, 2, 2]), [0, 0.5, 1])
  policy, baseline = np.array([[1.0, 5, 2, 5]]), np.array([[5.0, 0, 5, 5]])
  # Pairs (i, j ≠ i): 1 beats 0; both 5 beat 0 and tie with two 5 of three; 2 beats 0.
  np.testing.assert_allclose(winrate.win_rate(policy, baseline), (1 + 1 + 1 + 1 + 1.5) / 12)
  constant = np.ones((1, 6))
  for best_of, rivals in ((1, 1), (3, 1), (3, 3)):
    np.testing.assert_allclose(winrate.win_rate(constant, constant, best_of, rivals), 0.5)


def test_gain_in_sd_divides_by_the_pooled_deviation_within_prompts():
  scores = draw_scores(number=30, samples=4)
  policy, baseline = (side.astype(np.float64) for side in scores)
  found = winrate.estimate(scores)["gain_in_sd"]
  ratio = lambda rows: (
    (policy[rows] - baseline[rows]).mean() / np.sqrt(baseline[rows].var(1, ddof=1).mean())
  )
  assert found["value"] == pytest.approx(ratio(np.arange(30)), rel=1e-9)
  rng = np.random.default_rng(3)
  low, high = np.quantile([ratio(rng.integers(30, size=30)) for _ in range(2000)], [0.025, 0.975])
  tolerance = 0.05 * (high - low)
  assert found["low"] == pytest.approx(low, abs=tolerance)
  assert found["high"] == pytest.approx(high, abs=tolerance)


def test_gain_in_sd_is_left_out_where_the_baseline_does_not_vary():
  policy = np.random.default_rng(0).standard_normal((10, 3))
  group = winrate.estimate(Scores(policy + 9, np.zeros((10, 3))))
  assert "gain_in_sd" not in group
  assert winrate.verdict(group) == "The policy is preferred."
  assert "gain +" in tables.describe("judge", group)
  json.dumps(group, allow_nan=False)
  # A resample of prompts that do not vary has no ratio.
  baseline = np.zeros((3, 2))
  baseline[0] = -1, 1
  found = winrate.estimate(Scores(baseline + 1, baseline))["gain_in_sd"]
  assert (
    found["value"] == pytest.approx(1 / np.sqrt(2 / 3)) and np.isfinite([*found.values()]).all()
  )


@pytest.mark.parametrize(
  ("shift", "number", "expected"),
  [
    (0.0, 400, "No preference is significant."),
    (0.2, 2000, "The policy wins more often, but its gain is too small to be seen."),
    (-0.2, 2000, "The baseline wins more often, but its gain is too small to be seen."),
    (0.7, 400, "The policy is preferred."),
    (-0.7, 400, "The baseline is preferred."),
    (0.7, 4, "No preference is significant."),
  ],
)
def test_verdict_needs_the_interval_and_a_visible_gain(shift, number, expected):
  policy, baseline = np.random.default_rng(0).standard_normal((2, number, 3))
  assert winrate.verdict(winrate.estimate(Scores(policy + shift, baseline))) == expected


def test_warning_names_the_prompts_where_the_best_of_ten_is_worse():
  rng = np.random.default_rng(0)
  baseline = rng.standard_normal((60, 11))
  policy = 0.5 + np.where(np.arange(60)[:, None] < 30, 0.1, 1.0) * rng.standard_normal((60, 11))
  kinds = np.repeat([OUTPAINTING, WARPING], 30)  # only the first kind's samples hardly vary
  warn = lambda *sides: winrate.best_of_warning(
    winrate.summarise({"a": Scores(*sides)}, kinds)["a"]
  )
  text = warn(policy, baseline)
  gains = policy[:30].max(1).mean() - baseline[:30].max(1).mean()
  assert "best of 10 samples scores below" in text and "outpainting: -0." in text
  assert gains < -0.5 and "warping" not in text
  assert not warn(baseline, baseline) and not warn(baseline + 0.1, baseline)
  assert "best of 3 samples" in warn(policy[:, :4], baseline[:, :4])
  assert not warn(policy[:, :2], baseline[:, :2])


def test_summary_of_a_kind_equals_that_of_its_prompts_alone():
  scores = {"learned": draw_scores(seed=1), "true": draw_scores(seed=2, shift=-1)}
  kinds = np.random.default_rng(0).choice([OUTPAINTING, WARPING, BRUSH], 40)
  summary = winrate.summarise(scores, kinds)
  assert list(summary) == ["learned", "true"]
  for judge, groups in summary.items():
    assert list(groups) == ["all", "outpainting", "warping", "brush"]
    assert groups["all"]["prompts"] == 40 == sum(g["prompts"] for g in groups.values()) - 40
    for kind, name in ((OUTPAINTING, "outpainting"), (WARPING, "warping"), (BRUSH, "brush")):
      own = kinds == kind
      alone = Scores(*(side[own] for side in scores[judge]))
      assert winrate.summarise({judge: alone}, kinds[own])[judge]["all"] == groups[name]
  assert summary["true"]["all"]["winrate/s1"]["high"] < 0.5


def test_summary_has_the_intervals_of_its_statistics_and_can_be_written_as_json():
  scores = draw_scores()
  summary = winrate.summarise({"judge": scores}, np.zeros(40, int))
  for statistic, values in winrate.per_prompt(scores).items():
    found = summary["judge"]["all"][statistic]
    np.testing.assert_allclose(found["value"], values.mean(), rtol=1e-12)
    expected = np.quantile(winrate.bootstrap_means(values), [0.025, 0.975])
    np.testing.assert_allclose([found["low"], found["high"]], expected, rtol=1e-9, atol=1e-12)
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_quantiles_of_bootstrap_means_agree_with_scipy(level):
  values = np.random.default_rng(0).gamma(2.0, size=60)
  found = np.quantile(winrate.bootstrap_means(values), [(1 - level) / 2, (1 + level) / 2])
  oracle = stats.bootstrap(
    (values,), np.mean, confidence_level=level, method="percentile", n_resamples=10_000, rng=1
  ).confidence_interval
  np.testing.assert_allclose(found, oracle, atol=0.03 * np.ptp(oracle))


def test_bootstrap_means_equal_means_of_drawn_prompts_for_any_chunk_size(monkeypatch):
  values = np.random.default_rng(0).standard_normal((17, 3))
  rng = np.random.default_rng(5)
  expected = [values[rng.integers(17, size=17)].mean(0) for _ in range(200)]
  for draws in (1, 100, 2**20):
    monkeypatch.setattr(winrate, "_DRAWS", draws)
    np.testing.assert_allclose(winrate.bootstrap_means(values, 200, seed=5), expected)
  np.testing.assert_allclose(
    winrate.bootstrap_means(values[:, 1], 200, seed=5), np.array(expected)[:, 1]
  )


def test_ten_thousand_resamples_of_a_thousand_prompts_take_less_than_a_second():
  columns = np.random.default_rng(0).standard_normal((1000, 12))
  start = time.process_time()
  assert winrate.bootstrap_means(columns).shape == (10_000, 12)
  assert time.process_time() - start < 1


def test_prompts_without_finite_scores_are_left_out_and_counted():
  policy, baseline = draw_scores()
  kinds = np.repeat([OUTPAINTING, WARPING], 20)
  policy[3, 2], baseline[25, 0] = np.nan, np.inf
  kept = np.setdiff1d(np.arange(40), [3, 25])
  found = winrate.summarise({"judge": Scores(policy, baseline)}, kinds)["judge"]
  alone = winrate.summarise({"judge": Scores(policy[kept], baseline[kept])}, kinds[kept])
  for name, left_out in (("all", 2), ("outpainting", 1), ("warping", 1)):
    assert found[name] == alone["judge"][name] | {"left_out": left_out}
  policy[:20] = np.nan
  found = winrate.summarise({"judge": Scores(policy, baseline)}, kinds)["judge"]
  assert found["outpainting"] == {"prompts": 0, "left_out": 20}
  assert "–" in tables.describe_table("judge", found)


@pytest.mark.parametrize(
  ("policy", "baseline", "message"),
  [
    (np.ones((4, 2)), np.ones((4, 3)), r"reward: the policy's scores are \(4, 2\) .* \(4, 3\)"),
    (np.ones(4), np.ones(4), "give \\[N, S\\] for both"),
    (np.ones((5, 2)), np.ones((5, 2)), "for 4 prompts"),
    (np.ones((4, 1)), np.ones((4, 1)), "give .* S ≥ 2"),
    (np.full((4, 2), np.nan), np.ones((4, 2)), "none of 4 prompts has finite scores"),
  ],
)
def test_errors_name_the_judge_and_the_shapes(policy, baseline, message):
  with pytest.raises(ValueError, match=message) as caught:
    winrate.summarise({"reward": Scores(policy, baseline)}, np.zeros(4, int))
  assert "\n" not in str(caught.value)


def test_text_table_has_every_statistic():
  scores = draw_scores(samples=20)
  summary = winrate.summarise({"judge": scores}, np.repeat([OUTPAINTING, WARPING], 20))
  lines = tables.describe_table("judge", summary["judge"]).splitlines()
  assert len(lines) == 2 + len(tables.LABELS) and max(map(len, lines)) <= 120
  for statistic, line in zip(tables.LABELS, lines[2:], strict=True):
    assert line.startswith(tables.LABELS[statistic])
    for group in summary["judge"].values():
      assert tables.show(statistic, group[statistic]["high"]) in line


def test_line_of_a_judge_begins_with_its_name_and_win_rate():
  scores = draw_scores()
  group = winrate.estimate(scores)
  line = tables.describe("learned reward", group)
  assert line.startswith(f"learned reward     WinRate {group['winrate/s1']['value']:.3f} [")
  assert f"gain {group['gain']['value']:+.3f} ({group['gain_in_sd']['value']:+.2f} SD)" in line
  assert line.endswith(f"mean {scores.policy.mean():+.3f}, base {scores.baseline.mean():+.3f}")
  scores.policy[2] = np.nan
  assert tables.describe("judge", winrate.estimate(scores)).endswith("1 left out")
  nothing = winrate.estimate(Scores(np.full((4, 2), np.nan), np.ones((4, 2))))
  assert "none of 4 prompts has finite scores" in tables.describe("judge", nothing)


@pytest.fixture(scope="module")
def textures():
  """Returns random images and masks [6, 16, 16, ...]: five boxes, and one hole at the border."""
  rng = np.random.default_rng(0)
  images = rng.uniform(0.2, 0.7, (6, 16, 16, 3)).astype(np.float32)
  masks = np.zeros((6, 16, 16, 1), np.float32)
  for i in range(5):
    masks[i, 3 : 9 + i, 4 : 12 - i] = 1
  masks[5, :, 10:] = 1
  return images, masks


def moved(images, changed, masks, tolerance=1e-5):
  """Returns the names of the measures that change if the hole gets the content of `changed`."""
  before = drift.measure(images, masks, images)
  after = drift.measure(images + masks * (changed - images), masks, images)
  return {name for name in before if np.abs(after[name] - before[name]).max() > tolerance}


def test_each_measure_responds_only_to_its_property(textures):
  images, masks = textures
  grey = luma(images)[..., None]
  hole_mean = (grey * masks).sum((1, 2), keepdims=True) / masks.sum((1, 2), keepdims=True)
  # A change of the hole's colours also changes the step across its border.
  assert moved(images, images + 0.1, masks) == {"brightness", "seam"}
  assert moved(images, grey + 0.5 * (images - grey), masks) == {"saturation", "seam"}
  fuller = hole_mean + 1.3 * (grey - hole_mean) + (images - grey)
  assert moved(images, fuller, masks) == {"contrast", "sharpness", "seam"}
  mirrored = images.copy()  # moves pixels inside the hole, not at its border
  mirrored[:5, 5:7, 6:8] = images[:5, 6:4:-1, 6:8]
  mirrored[4], mirrored[5] = images[4], images[5]
  assert moved(images, mirrored, masks) == {"sharpness"}
  assert moved(images, images, masks) == set()


def test_measures_equal_loops_over_pixels(textures):
  images, masks = textures
  images = images.astype(np.float64)
  originals = images + 0.01 * np.random.default_rng(1).standard_normal(images.shape)
  found = drift.measure(images, masks, originals)
  reach = 1  # 0.08 of 16 pixels
  for i, (image, hole, original) in enumerate(zip(images, masks[..., 0], originals, strict=True)):
    grey = image @ [0.299, 0.587, 0.114]
    places = [(r, c) for r in range(16) for c in range(16)]
    missing = [p for p in places if hole[p]]
    known = [p for p in places if not hole[p]]
    near = {
      (r, c) for r, c in places if any(max(abs(r - a), abs(c - b)) <= reach for a, b in missing)
    }
    pairs = [((r, c), (r, c + 1)) for r in range(16) for c in range(15)]
    pairs += [((r, c), (r + 1, c)) for r in range(15) for c in range(16)]
    step = lambda p, q, image=image: np.abs(image[p] - image[q]).mean()
    across = np.mean([step(p, q) for p, q in pairs if hole[p] + hole[q] == 1])
    beside = [step(p, q) for p, q in pairs if hole[p] + hole[q] == 0 and {p, q} <= near]
    expected = {
      "brightness": np.mean([grey[p] for p in missing]),
      "contrast": np.std([grey[p] for p in missing]),
      "saturation": np.mean([np.ptp(image[p]) for p in missing]),
      "sharpness": np.mean([abs(grey[p] - grey[q]) for p, q in pairs if hole[p] + hole[q] == 2]),
      "seam": np.log((across + 0.015) / (np.mean(beside) + 0.015)),
      "known_pixels": max(np.abs(image[p] - original[p]).max() for p in known),
    }
    assert set(found) == set(expected) == set(drift.MEASURES) - {"diversity"}
    for name, value in expected.items():
      np.testing.assert_allclose(found[name][i], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_measures_are_finite_for_thin_holes_and_flat_images():
  masks = np.zeros((3, 16, 16, 1), np.float32)
  masks[0, 3, 4] = 1
  masks[1] = 1
  masks[1, 0, 0] = 0
  masks[2, :, ::2] = 1
  flat = np.full((3, 16, 16, 3), 0.5, np.float32)
  for name, values in drift.measure(flat, masks, flat).items():
    np.testing.assert_allclose(values, 0.5 if name == "brightness" else 0, atol=1e-6, err_msg=name)


def test_diversity_equals_the_mean_cosine_distance_of_pairs():
  features = np.random.default_rng(0).standard_normal((5, 4, 7))
  expected = [
    np.mean(
      [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(f) for b in f[:i]]
    )
    for f in features
  ]
  np.testing.assert_allclose(drift.diversity(features), expected, rtol=1e-12)
  same = np.repeat(features[:, :1], 4, axis=1) * np.arange(1, 5)[:, None]
  np.testing.assert_allclose(drift.diversity(same), 0, atol=1e-12)


def test_seed_variation_is_the_deviation_of_the_mean_over_prompts():
  rng = np.random.default_rng(0)
  for samples in (2, 5, 50):
    values = rng.standard_normal((400, 1)) + 0.3 * rng.standard_normal((400, samples))
    assert drift.seed_variation(values) == pytest.approx(0.3 / 20, rel=0.35)
    shared = values + 0.5 * np.linspace(-1, 1, samples)  # an effect of the seed on all prompts
    assert drift.seed_variation(shared) == pytest.approx(
      np.hypot(0.015, 0.5 * np.linspace(-1, 1, samples).std(ddof=1)), rel=0.1
    )
  values = rng.standard_normal((400, 1))
  draws = winrate.bootstrap_means(values[:, 0]).std()
  assert drift.seed_variation(values) == pytest.approx(draws, rel=0.03)


@pytest.fixture(scope="module")
def distribution():
  """Returns `inpaint` (seed -> samples [48, 3, 16, 16, 3]), known images and masks."""
  rng = np.random.default_rng(0)
  prompts = rng.uniform(0.3, 0.7, (48, 1, 1, 1, 3))
  known = np.clip(prompts + 0.1 * rng.standard_normal((48, 1, 16, 16, 3)), 0, 1)
  masks = np.zeros((48, 3, 16, 16, 1), np.float32)
  masks[:, :, 4:13, 5:14] = 1

  def inpaint(seed):
    rng = np.random.default_rng(seed)
    tone = 0.05 * rng.standard_normal((48, 3, 1, 1, 3))
    content = prompts + tone + 0.1 * rng.standard_normal((48, 3, 16, 16, 3))
    return np.where(masks > 0, np.clip(content, 0, 1), known).astype(np.float32)

  return inpaint, np.broadcast_to(known, (48, 3, 16, 16, 3)).astype(np.float32), masks


def measured(images, masks, originals):
  flat = (x.reshape(-1, *x.shape[2:]) for x in (images, masks, originals))
  found = {name: values.reshape(48, 3) for name, values in drift.measure(*flat).items()}
  return found | {"diversity": drift.diversity(images.reshape(48, 3, -1) - 0.5)}


def flagged(table):
  return {name for name, found in table["measures"].items() if found["flagged"]}


def test_two_seeds_of_one_distribution_are_not_flagged(distribution):
  inpaint, known, masks = distribution
  for seed in range(5):
    sides = [measured(inpaint(seed), masks, known), measured(inpaint(100 + seed), masks, known)]
    assert flagged(drift.drift(*sides)) == set()


@pytest.mark.parametrize(("samples", "most"), [(1, 0.05), (2, 0.006), (3, 0.003), (10, 0.0)])
def test_equal_distributions_are_rarely_flagged(samples, most):
  # The hardest case: prompts do not differ, so all of the spread comes from seeds.
  draws = np.random.default_rng(0).standard_normal((2, 2000, 50, samples))
  names = [str(i) for i in range(2000)]
  policy, baseline = (dict(zip(names, side, strict=True)) for side in draws)
  assert len(flagged(drift.drift(policy, baseline))) <= most * 2000


def test_faded_copies_and_changed_known_pixels_are_flagged(distribution):
  inpaint, known, masks = distribution
  before, after = inpaint(1), inpaint(2)
  flat = after.reshape(-1, *after.shape[2:])
  faded = simulation.fade(flat, masks.reshape(-1, *masks.shape[2:])).reshape(after.shape)
  baseline = measured(before, masks, known)
  table = drift.drift(measured(faded, masks, known), baseline)
  assert {"contrast", "saturation", "sharpness"} <= flagged(table)
  assert not flagged(table) & {"brightness", "known_pixels"}
  shifted = measured(np.clip(after + 0.004, 0, 1), masks, known)
  assert flagged(drift.drift(shifted, baseline)) == {"known_pixels"}
  alike = np.repeat(after[:, :1], 3, axis=1) + 0.01 * (after - after[:, :1])
  assert "diversity" in flagged(drift.drift(measured(alike, masks, known), baseline))


def test_drift_has_the_differences_of_means_and_its_rule_and_can_be_written_as_json(distribution):
  inpaint, known, masks = distribution
  policy, baseline = (measured(inpaint(seed), masks, known) for seed in (1, 2))
  originals = {
    name: values[:, 0] for name, values in measured(known, masks, known).items() if values.ndim == 2
  }
  policy["seam"][7, 1] = np.nan
  table = drift.drift(policy, baseline, originals)
  assert json.loads(json.dumps(table, allow_nan=False)) == table
  assert "3 times" in table["rule"] and "0.2 times" in table["rule"]
  for name, found in table["measures"].items():
    kept = np.arange(48) != (7 if name == "seam" else -1)
    means = [side[name][kept].astype(np.float64).mean() for side in (policy, baseline)]
    np.testing.assert_allclose([found["policy"], found["baseline"]], means, rtol=1e-12)
    np.testing.assert_allclose(found["change"], means[0] - means[1], rtol=1e-9)
    assert ("original" in found) == (name != "diversity")
    assert name in tables.describe_drift(table)
  with pytest.raises(ValueError, match="seam: none of 48 prompts has finite measures"):
    drift.drift(policy | {"seam": np.full((48, 3), np.nan)}, baseline)
