"""Fidelity of the known pixels equals closed forms, brute force and BrushNet's formulas."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from prefpaint_jax.evaluation import fidelity
from prefpaint_jax.evaluation.fidelity import BRUSHNET


def random_case(size=(20, 24), seed=0):
  """Returns samples, masks and originals of bytes, in [0, 1]."""
  rng = np.random.default_rng(seed)
  samples, originals = rng.integers(0, 256, (2, 3, *size, 3)).astype(np.float32) / 255
  return samples, (rng.uniform(size=(3, *size, 1)) < 0.3).astype(np.float32), originals


def test_mse_and_psnr_of_a_constant_error_have_closed_forms():
  _, masks, originals = random_case()
  samples = 0.5 * originals + 0.25 * (1 - masks) + 7 * masks  # the hole does not count
  found = fidelity.measure(samples, masks, 0.5 * originals)
  np.testing.assert_allclose(found["mse"], [0.0625] * 3, rtol=1e-6)
  np.testing.assert_allclose(found["psnr"], [20 * math.log10(4)] * 3, rtol=1e-6)
  assert "lpips" not in found


def test_brushnet_divides_the_sum_over_channels_by_the_pixels():
  """As `calculate_mse` and `calculate_psnr` of its script, on single images of bytes."""
  samples, masks, originals = random_case()
  found = fidelity.measure(samples, masks, originals, BRUSHNET)
  for i in range(3):
    known = 1 - masks[i]
    prediction, truth = (x[i] * known for x in (samples, originals))
    mse = ((prediction - truth) ** 2).sum() / known.sum()
    np.testing.assert_allclose(found["mse"][i], mse, rtol=1e-5)
    np.testing.assert_allclose(found["psnr"][i], 20 * math.log10(1 / math.sqrt(mse)), rtol=1e-6)
  true = fidelity.measure(samples, masks, originals)
  np.testing.assert_allclose(found["mse"], 3 * true["mse"], rtol=1e-12)
  np.testing.assert_allclose(true["psnr"] - found["psnr"], [10 * math.log10(3)] * 3, rtol=1e-9)


def test_exact_known_pixels_have_infinite_psnr_and_1000_by_brushnet():
  _, masks, originals = random_case()
  found = fidelity.measure(originals, masks, originals)
  assert found["mse"].tolist() == [0.0] * 3 and np.isposinf(found["psnr"]).all()
  assert fidelity.measure(originals, masks, originals, BRUSHNET)["psnr"].tolist() == [1000.0] * 3


def test_lpips_gets_the_known_region_in_minus_one_to_one():
  samples, masks, originals = random_case()
  pairs = []
  lpips = lambda *pair: pairs.append(pair) or np.arange(3.0)
  assert fidelity.measure(samples, masks, originals, "", lpips)["lpips"].tolist() == [0, 1, 2]
  for found, images in zip(pairs[0], (samples, originals), strict=True):
    np.testing.assert_allclose(found, np.where(masks == 1, -1, 2 * images - 1), atol=1e-6)
    assert found.dtype == np.float32


def test_blur_is_a_sum_over_21_mirrored_pixels():
  mask = random_case()[1][0, ..., 0]
  weights = [math.exp(-((i / 3.5) ** 2) / 2) for i in range(-10, 11)]
  kernel = np.outer(weights, weights) / sum(weights) ** 2
  padded = np.pad(mask, 10, mode="reflect")  # without the border's pixel: BORDER_REFLECT_101
  expected = [
    [(padded[y : y + 21, x : x + 21] * kernel).sum() for x in range(mask.shape[1])]
    for y in range(mask.shape[0])
  ]
  np.testing.assert_allclose(fidelity.blur(mask), expected, atol=1e-12)


def test_blending_keeps_the_hole_and_pixels_far_from_it():
  samples, _, originals = random_case((40, 40))
  masks = np.zeros((3, 40, 40, 1), np.float32)
  masks[:, :, :15] = 1
  blended = fidelity.blend(samples, masks, originals)
  np.testing.assert_allclose(blended[:, :, :15], samples[:, :, :15], atol=1e-6)
  np.testing.assert_array_equal(blended[:, :, 25:], originals[:, :, 25:])
  tail = np.exp(-((np.arange(-10, 11) / 3.5) ** 2) / 2)
  weights = [tail[: 10 - d].sum() / tail.sum() for d in range(10)]  # d pixels from the hole
  weights = np.reshape(weights, (10, 1))
  near = originals[:, :, 15:25] * (1 - weights) + samples[:, :, 15:25] * weights
  np.testing.assert_allclose(blended[:, :, 15:25], near, atol=1e-6)


def test_brushnet_blends_bytes_and_cuts_the_result():
  samples, masks, originals = random_case()
  blended = fidelity.blend(samples, masks, originals, BRUSHNET)
  for i in range(3):
    mask = masks[i]
    blurred = np.round(255 * fidelity.blur(mask[..., 0]))[..., None] / 255
    weights = 1 - (1 - mask.astype(np.float64)) * (1 - blurred)
    image, sample = (np.round(255 * x[i]).astype(np.uint8) for x in (originals, samples))
    pasted = (image * (1 - weights) + sample * weights).astype(np.uint8)
    np.testing.assert_array_equal(np.round(255 * blended[i]).astype(np.uint8), pasted)


def test_jpeg_is_that_of_pil_of_a_file_named_jpg(tmp_path):
  samples = random_case()[0]
  found = fidelity.through_jpeg(samples)
  Image.fromarray(np.round(255 * samples[1]).astype(np.uint8)).save(tmp_path / "1.jpg")
  with Image.open(io.BytesIO((tmp_path / "1.jpg").read_bytes())) as image:
    np.testing.assert_array_equal(np.round(255 * found[1]), np.asarray(image))
  assert found.dtype == np.float32 and found.shape == samples.shape


def test_means_are_over_prompts_and_infinite_prompts_are_left_out():
  base = {"psnr": np.array([[10.0, 20.0], [30.0, np.inf], [40.0, 50.0]])}
  policy = {"psnr": base["psnr"] + 1}
  found = fidelity.compare(policy, base)["measures"]["psnr"]
  assert (found["prompts"], found["left_out"]) == (2, 1)
  assert [found[side]["value"] for side in ("baseline", "policy", "change")] == [30, 31, 1]
  assert found["change"] == {"value": 1, "low": 1, "high": 1}
  assert 15 <= found["baseline"]["low"] < 30 < found["baseline"]["high"] <= 45
  first = fidelity.compare(policy, base, BRUSHNET)["measures"]["psnr"]
  assert first["prompts"] == 3 and first["baseline"]["value"] == pytest.approx(80 / 3)
  none = fidelity.compare({"psnr": np.full((3, 2), np.inf)}, base)["measures"]["psnr"]
  assert none == {"prompts": 0, "left_out": 3}
