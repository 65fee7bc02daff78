"""The rewards without weights equal the simulated annotators' deviations and brute force."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from prefpaint_jax import testing
from prefpaint_jax.preference import simulation
from prefpaint_jax.rewards import load_reward
from prefpaint_jax.rewards.objective import outline_objective
from prefpaint_jax.rewards.surroundings import NEAR, near

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def samples():
  """Returns 6 samples of 3 prompts with other sides, the masked images and the masks."""
  images, masks = (x[:, :, :7] for x in testing.tiny_prompts(3))
  masks[0], masks[0, 2:6, 1:4] = 0, 1
  images, rng = np.clip(images, 0.01, 1), np.random.default_rng(0)
  inside = rng.uniform(size=(6, *images.shape[1:])) * np.linspace(0.1, 1, 6)[:, None, None, None]
  holes = np.repeat(masks, 2, 0)
  samples = np.repeat(images, 2, 0) * (1 - holes) + holes * inside
  return samples.astype(np.float32), images * (1 - masks), masks


def weights(masks):
  hole = np.repeat(masks, 2, 0)[..., 0]
  sigma = (0, *[NEAR * min(hole.shape[1:])] * 2)
  return hole, *(ndimage.gaussian_filter(x, sigma, mode="constant") for x in (hole, 1 - hole))


def test_nearness_equals_the_gaussian_filter_of_scipy():
  region = np.random.default_rng(0).uniform(size=(2, 60, 40)).astype(np.float32)
  sigma = (0, *[NEAR * 40] * 2)
  expected = ndimage.gaussian_filter(region, sigma, mode="constant")
  np.testing.assert_allclose(jax.jit(near)(region), expected, atol=1e-6)


def test_scores_equal_the_deviations_of_the_simulated_annotators(samples):
  hole, near_hole, near_known = weights(samples[2])
  expected = simulation.seam_deviation(samples[0], hole, near_hole * near_known)
  np.testing.assert_allclose(load_reward("seam")(*samples), -expected, atol=1e-5)
  around = (1 - hole) * (near_hole + 1e-4)
  expected = simulation.colour_deviation(samples[0], hole, around)
  np.testing.assert_allclose(load_reward("known-colour")(*samples), -expected, atol=1e-5)


def test_seam_equals_a_sum_over_pairs_of_pixels(samples):
  images, _, masks = samples
  hole, near_hole, near_known = weights(masks)
  found = load_reward("seam")(*samples)
  for i, image in enumerate(images):
    border, sums = near_hole[i] * near_known[i], np.zeros((2, 2))
    for y, x in np.ndindex(*image.shape[:2]):
      for other in ((y + 1, x), (y, x + 1)):
        if other[0] < image.shape[0] and other[1] < image.shape[1]:
          step, missing = np.abs(image[y, x] - image[other]).mean(), hole[i][y, x] + hole[i][other]
          if missing < 2:
            weight = 1 if missing == 1 else border[y, x] + border[other]
            sums[int(missing)] += step * weight, weight
    beside, across = sums[:, 0] / sums[:, 1]
    expected = -abs(np.log((across + 0.015) / (beside + 0.015)))
    assert found[i] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["seam", "known-colour"])
def test_invisible_fillings_score_best_and_visible_ones_lower(name):
  y, x = np.mgrid[:32, :32] / 32
  whole = np.stack([0.3 + 0.4 * x, 0.3 + 0.4 * y, 0.6 - 0.2 * x], -1).astype(np.float32)
  mask = np.zeros((32, 32, 1), np.float32)
  mask[10:22, 10:22] = 1
  redder, grey = whole + mask * [0.2, 0, 0], whole * (1 - mask) + 0.5 * mask
  scores = load_reward(name)([whole, redder, grey], whole * (1 - mask), [mask])
  assert scores.max() <= 0 and scores.argmax() == 0
  assert scores[0] > -0.4 and scores[1:].max() < scores[0] - 0.2


@pytest.mark.slow
def test_scores_do_not_depend_on_other_samples_and_are_nan_for_nan(samples):
  images, known, masks = samples
  for name in ("seam", "known-colour"):
    reward = load_reward(name)
    whole = reward(*samples)
    np.testing.assert_allclose(reward(images[2:4], known[1:2], masks[1:2]), whole[2:4], atol=1e-6)
    bad, _ = jax.jit(reward.function)(
      {}, np.where(np.arange(6)[:, None, None, None] == 4, np.nan, images), known, masks, None
    )
    assert np.isnan(bad).tolist() == [False] * 4 + [True, False]


def test_rewards_without_weights_have_an_outline_and_refuse_weights():
  assert [one.params for one in outline_objective("seam,known-colour*2").rewards] == [{}, {}]
  with pytest.raises(ValueError, match=r"\Areward seam@x: it has no weights; give seam\Z"):
    load_reward("seam@x")
