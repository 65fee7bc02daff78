"""Tests that the simulated annotators prefer the true content, and not merely more colour."""

import numpy as np
import pytest
from scipy import ndimage

from prefpaint_jax.data import examples
from prefpaint_jax.data.images import luma, paste_back
from prefpaint_jax.data.prompts import open_prompts
from prefpaint_jax.preference import simulation


@pytest.fixture(scope="module")
def world():
  """Returns the images and masks of held-out prompts."""
  opened = open_prompts("mini", "test")
  batch = [opened[index] for index in range(384)]
  return np.stack([p["image"] for p in batch]), np.stack([p["mask"] for p in batch])


def combined(images, masks):
  return simulation.true_preference(images, masks)["combined"]


def saturate(images, amount):
  grey = luma(images)[..., None]
  return (grey + amount * (images - grey)).clip(0, 1)


def test_scores_are_from_zero_to_seven_and_combine_by_their_weights(world):
  scores = simulation.true_preference(*world)
  assert set(scores) == {*examples.CRITERIA, "combined"}
  for score in scores.values():
    assert score.shape == (384,) and score.dtype == np.float32
    assert score.min() >= 0 and score.max() <= 7
  assert sum(examples.CRITERIA.values()) == pytest.approx(1)
  expected = sum(weight * scores[name] for name, weight in examples.CRITERIA.items())
  np.testing.assert_allclose(scores["combined"], expected, rtol=1e-6)


def test_true_content_beats_faded_content(world):
  images, masks = world
  true, faded = combined(images, masks), combined(simulation.fade(images, masks), masks)
  assert np.mean(true > faded) >= 0.93
  assert true.mean() > 4.5 and faded.mean() < 3.5


def test_scores_fall_as_fading_increases(world):
  images, masks = world
  means = [combined(simulation.fade(images, masks, a), masks).mean() for a in (0, 0.3, 0.6, 1)]
  assert means == sorted(means, reverse=True)


@pytest.mark.parametrize(
  ("degrade", "accuracy"),
  [
    (lambda x: ndimage.gaussian_filter(x, (0, 3, 3, 0)), 0.85),
    (lambda x: x + np.random.default_rng(0).normal(0, 0.05, x.shape), 0.9),
    (lambda x: x + np.random.default_rng(0).normal(0, 0.1, (len(x), 1, 1, 3)), 0.9),
    (lambda x: np.roll(x, 1, axis=0), 0.95),
    (lambda x: 0 * x, 0.98),
    (lambda x: 0 * x + x.mean((1, 2), keepdims=True), 0.95),
    (lambda x: 0.6 * x, 0.95),
    (lambda x: x[..., [2, 0, 1]], 0.9),
  ],
  ids=["blurred", "noisy", "tinted", "from-another", "black", "flat", "dark", "wrong-hue"],
)
def test_true_content_beats_degraded_content(world, degrade, accuracy):
  images, masks = world
  sample = paste_back(degrade(images).clip(0, 1), images, masks)
  assert np.mean(combined(images, masks) > combined(sample, masks)) >= accuracy


def test_more_colour_or_contrast_than_the_surroundings_lowers_the_score(world):
  images, masks = world
  mean = images.mean((1, 2), keepdims=True)
  for fuller in (
    saturate(images, 1.6),
    saturate(images, 2.5),
    (mean + 1.8 * (images - mean)).clip(0, 1),
  ):
    sample = paste_back(fuller, images, masks)
    assert np.mean(combined(images, masks) > combined(sample, masks)) >= 0.9
  peak = [
    combined(paste_back(saturate(images, a), images, masks), masks).mean()
    for a in (0, 0.5, 1, 1.5, 2)
  ]
  assert np.argmax(peak) == 2


def test_true_content_beats_the_smeared_border(world):
  images, masks = world
  smeared = np.empty_like(images)
  for image, mask, out in zip(images, masks, smeared, strict=True):
    rows, columns = ndimage.distance_transform_edt(
      mask[..., 0], return_distances=False, return_indices=True
    )
    out[:] = image[rows, columns]
  assert np.mean(combined(images, masks) > combined(smeared, masks)) >= 0.8


def test_seam_and_grain_deviations_equal_loops_over_pixels():
  rng = np.random.default_rng(0)
  image, hole = rng.random((7, 6, 3)), (rng.random((7, 6)) < 0.4).astype(float)
  weight = rng.random((7, 6))
  pairs = [((r, c), (r, c + 1)) for r in range(7) for c in range(5)]
  pairs_down = [((r, c), (r + 1, c)) for r in range(6) for c in range(6)]

  def step(a, b):
    return np.abs(image[a] - image[b]).mean()

  def mean(chosen, inside, weights):
    chosen = [(a, b) for a, b in chosen if hole[a] + hole[b] == inside]
    w = [weight[a] + weight[b] if weights else 1 for a, b in chosen]
    return np.average([step(a, b) for a, b in chosen], weights=w), len(chosen)

  def log_ratio(ours, theirs):
    return abs(np.log((ours + 0.015) / (theirs + 0.015)))

  both = pairs + pairs_down
  seam = log_ratio(mean(both, 1, False)[0], mean(both, 0, True)[0])
  grain, number = 0, 0
  for chosen in (pairs, pairs_down):
    ours, count = mean(chosen, 2, False)
    grain += count * log_ratio(ours, mean(chosen, 0, True)[0])
    number += count
  arguments = (image[None], hole[None], weight[None])
  np.testing.assert_allclose(simulation.seam_deviation(*arguments)[0], seam, rtol=1e-5)
  np.testing.assert_allclose(simulation.grain_deviation(*arguments)[0], grain / number, rtol=1e-5)


def test_scores_do_not_depend_on_the_batch_or_on_mirroring(world):
  images, masks = world
  together = combined(images, masks)
  np.testing.assert_allclose(combined(images[5:7], masks[5:7]), together[5:7], rtol=1e-5)
  mirrored = combined(images[:, :, ::-1], masks[:, :, ::-1])
  np.testing.assert_allclose(mirrored, together, rtol=1e-4)


def test_flat_images_and_thin_holes_have_finite_scores():
  images = np.full((3, 32, 32, 3), 0.5, np.float32)
  masks = np.zeros((3, 32, 32, 1), np.float32)
  masks[0, 3, 4] = 1  # one pixel
  masks[1] = 1
  masks[1, 0, 0] = 0  # all pixels but one
  masks[2, :, ::2] = 1  # no horizontal neighbours in the hole
  for score in simulation.true_preference(images, masks).values():
    np.testing.assert_allclose(score, 7, rtol=1e-3)


def test_fading_lowers_contrast_and_saturation_and_keeps_the_mean_and_known_pixels(world):
  images, masks = world
  faded = simulation.fade(images, masks)
  known = np.broadcast_to(masks == 0, images.shape)
  np.testing.assert_array_equal(faded[known], images[known])
  np.testing.assert_array_equal(simulation.fade(images, masks, 0.0), images)
  half = simulation.fade(images, masks, np.linspace(0, 1, len(images)))
  np.testing.assert_array_equal(half[0], images[0])
  np.testing.assert_allclose(half[-1], faded[-1], atol=1e-6)
  hole = masks[0, ..., 0] == 1
  before, after = (luma(x[0][hole]) for x in (images, faded))
  np.testing.assert_allclose(after.mean(), before.mean(), atol=1e-5)
  np.testing.assert_allclose(after.std(), 0.35 * before.std(), rtol=1e-4)
  colours = [np.ptp(x[0][hole], axis=-1).mean() for x in (images, faded)]
  np.testing.assert_allclose(colours[1], 0.15 * colours[0], rtol=1e-4)


def test_annotators_give_integer_scores_around_the_truth(world):
  scores = simulation.true_preference(*world)
  given = simulation.annotate(0, scores, num_annotators=64, noise=0.7)
  for name in examples.CRITERIA:
    assert given[name].shape == (384, 64) and given[name].dtype == np.int32
    assert given[name].min() >= 0 and given[name].max() <= 7
    middle = (scores[name] > 2) & (scores[name] < 5)  # no score is clipped
    error = given[name][middle] - scores[name][middle, None]
    assert abs(error.mean()) < 0.05
    assert error.std() == pytest.approx(np.sqrt(0.7**2 + 1 / 12), rel=0.05)  # of noise and rounding
  again = simulation.annotate(np.random.default_rng(0), scores, num_annotators=64, noise=0.7)
  np.testing.assert_array_equal(given["overall"], again["overall"])
  assert simulation.combine(given).shape == (384, 64)
