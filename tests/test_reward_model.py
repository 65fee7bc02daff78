"""RewardModel: preprocessing, scoring, saving and loading, and released files of the bound."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import prefpaint_jax
from prefpaint_jax import reward as reward_lib
from prefpaint_jax import testing
from prefpaint_jax.models import reward
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.preference.bound import Bound, mahalanobis_norm, save_bound
from prefpaint_jax.reward import RewardModel

PHOTOS = Path(prefpaint_jax.__file__).parent / "mini" / "photos"


@pytest.fixture(scope="module")
def model() -> RewardModel:
  return testing.tiny_reward()


@pytest.fixture(scope="module")
def scored_images() -> tuple[np.ndarray, np.ndarray]:
  """Returns six samples [6, 8, 8, 3] of two masked images [2, 8, 8, 3]."""
  images, masks = testing.tiny_prompts(2)
  noise = np.random.default_rng(0).uniform(size=(6, 8, 8, 3))
  known = np.repeat(images * (1 - masks), 3, axis=0)
  return (known + noise * np.repeat(masks, 3, axis=0)).astype(np.float32), images * (1 - masks)


# ----------------------------------------------------------------------------- early fusion
def test_early_fusion_without_differences_sees_only_pixels_and_the_mask(scored_images):
  samples, masked = scored_images
  pixels = reward.preprocess(samples, 8)
  masked_pixels = np.repeat(reward.preprocess(masked, 8), 3, axis=0)
  all_channels = reward.early_channels(pixels, masked_pixels)
  plain = reward.early_channels(pixels, masked_pixels, differences=False)
  assert all_channels.shape[-1] == 13 and plain.shape[-1] == 7
  np.testing.assert_array_equal(plain, all_channels[..., :7])
  hole = np.all(np.repeat(masked, 3, axis=0) == 0, axis=-1, keepdims=True)
  expected = [pixels * hole, masked_pixels * ~hole, hole]
  np.testing.assert_allclose(plain, np.concatenate(expected, -1), atol=1e-6)


@pytest.mark.parametrize(("differences", "channels"), [({}, 13), ({"differences": False}, 7)])
def test_a_reward_config_says_whether_early_fusion_sees_differences(differences, channels):
  config = {"fusion": "early", "num_heads": 2, "vision": testing.TINY_VISION, **differences}
  shapes = reward.network_shapes(RewardConfig.from_dict(config))
  kernel = shapes["clip"]["vision_model"]["embeddings"]["patch_embedding"]["kernel"]
  assert kernel.shape[2] == channels
  with pytest.raises(
    ValueError, match="reward config: differences is 'no'; expected true or false"
  ):
    RewardConfig.from_dict({"differences": "no"})


# ------------------------------------------------------------------------------- preprocessing
@pytest.mark.parametrize(
  ("name", "crop"),
  [
    ("coffee.jpg", None),  # wide
    ("rocket.jpg", None),
    ("cat.jpg", (300, 180)),  # tall
    ("astronaut.jpg", None),  # square
    ("astronaut.jpg", (224, 224)),  # already of the right size
    ("raccoon.jpg", (224, 301)),  # crop only, by an odd number of pixels
    ("raccoon.jpg", (190, 285)),  # 285 * (224 / 190) is 336, but in floating point below it
    ("coffee.jpg", (90, 133)),  # smaller than the target
    ("dandelions.jpg", (24, 500)),  # a narrow strip
    ("cat.jpg", (300, 31)),
  ],
)
def test_preprocessing_equals_transformers_with_the_crop_of_torchvision(name, crop):
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  transformers = pytest.importorskip("transformers")
  photo = Image.open(PHOTOS / name).convert("RGB")
  if crop is not None:
    assert photo.height >= crop[0] and photo.width >= crop[1]
    photo = photo.crop((0, 0, crop[1], crop[0]))
  pixels = np.asarray(photo, np.float32) / 255
  ours = np.asarray(reward.preprocess(pixels[None], 224))
  processor = transformers.CLIPImageProcessorPil()  # its defaults: bicubic, 224
  # transformers' own crop rounds down; the reward was trained with torchvision's.
  whole = processor(photo, return_tensors="np", do_center_crop=False)["pixel_values"]
  top, left = (round((side - 224) / 2) for side in np.shape(whole)[2:])
  expected = np.asarray(whole)[:, :, top : top + 224, left : left + 224]
  # In units of pixel values in [0, 1]: transformers rounds to bytes after the resize.
  error = np.abs(ours - np.moveaxis(expected, 1, -1)) * reward.CLIP_STD
  assert ours.shape == (1, 224, 224, 3)
  assert error.mean() < 1 / 255
  assert error.max() < 8 / 255


def test_centre_crop_starts_where_torchvision_starts():
  # torchvision's center_crop: int(round((length - size) / 2)), with halves rounded to even.
  starts = [0, 0, 1, 2, 2, 2, 3, 4]
  for rest, start in enumerate(starts):
    wide = np.random.default_rng(rest).uniform(size=(1, 8, 8 + rest, 3)).astype(np.float32)
    expected = (wide[:, :, start : start + 8] - reward.CLIP_MEAN) / reward.CLIP_STD
    np.testing.assert_allclose(reward.preprocess(wide, 8), expected, atol=1e-4)
    tall = np.swapaxes(wide, 1, 2)
    np.testing.assert_allclose(reward.preprocess(tall, 8), np.swapaxes(expected, 1, 2), atol=1e-4)


def test_preprocessing_of_the_right_size_only_normalises():
  pixels = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
  expected = (pixels - reward.CLIP_MEAN) / reward.CLIP_STD
  np.testing.assert_allclose(reward.preprocess(pixels, 8), expected, atol=1e-6)


# ----------------------------------------------------------------------------------- scoring
def test_shared_masked_image_gives_the_scores_of_repeated_ones(model, scored_images):
  images, masked = scored_images
  shared = model.score(images, masked)
  repeated = model.score(images, np.repeat(masked, 3, axis=0))
  for ours, expected in zip(shared, repeated, strict=True):
    np.testing.assert_allclose(ours, expected, atol=1e-5)
  assert shared[0].shape == (6,) and shared[1].shape == (6, 6)
  assert np.ptp(shared[0]) > 1e-3


def test_every_kind_of_image_gives_the_same_score(model, tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
  expected = model.score(pixels[:1] / np.float32(255), pixels[1:] / np.float32(255))[0]
  paths = [tmp_path / f"{i}.png" for i in range(2)]
  pictures = [Image.fromarray(x) for x in pixels]
  for path, picture in zip(paths, pictures, strict=True):
    picture.save(path)
  for one, masked in (pixels, pixels / 255.0, pictures, paths):
    np.testing.assert_array_equal(model.score(one, masked)[0], expected)
    np.testing.assert_array_equal(model.score([one], [masked])[0], expected)


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (lambda x: 255 * x, "values from 0 to 2"),
    (lambda x: x * np.nan, "values from"),
    (lambda x: x - 1, "values from -1"),
    (lambda x: x[:0], "images: the list is empty"),
    (lambda x: x[0, 0, 0], "the shape is"),
    (lambda x: x[None], "the shape is"),
    (lambda x: (x * 255).astype(int), "the dtype is int64"),
    (lambda x: [x[0], x[0, :4]], "give images of one size"),
  ],
)
def test_images_out_of_range_or_of_wrong_shapes_are_refused(model, change, reason):
  images = np.random.default_rng(0).random((2, 8, 8, 3))
  images[0, 0, 0] = 0
  with pytest.raises(ValueError, match=rf"\A(?=[^\n]*\Z).*{reason}"):
    model.score(change(images), images)


def test_reward_is_linear_in_the_features(model, scored_images):
  scores, features = model.score(*scored_images)
  head = model.params["mlp"]["last_layer"]["kernel"][:, 0]
  np.testing.assert_allclose(scores, features @ head, atol=1e-5)


def test_scores_are_deterministic(model, scored_images):
  first, again = model.score(*scored_images), model.score(*scored_images)
  np.testing.assert_array_equal(first[0], again[0])


def test_number_of_samples_that_is_no_multiple_raises_an_error(model, scored_images):
  images, masked = scored_images
  with pytest.raises(ValueError, match="5 samples of 2 masked images"):
    model.score(images[:5], masked)


# ----------------------------------------------------------------------------------- folders
def test_loaded_model_equals_the_saved_model(model, scored_images, tmp_path):
  model.save_pretrained(tmp_path)
  loaded = RewardModel.from_pretrained(tmp_path)
  assert loaded.network == model.network
  assert jax.tree.structure(loaded.params) == jax.tree.structure(model.params)
  assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, model.params))
  np.testing.assert_allclose(loaded.bound.matrix, model.bound.matrix, rtol=1e-12)
  for name in ("lam", "count", "noise_scale", "norm_bound"):
    assert getattr(loaded.bound, name) == getattr(model.bound, name)
  np.testing.assert_array_equal(loaded.score(*scored_images)[0], model.score(*scored_images)[0])


def test_model_without_a_bound_is_saved_without_one(model, tmp_path):
  RewardModel(model.network, model.params).save_pretrained(tmp_path)
  assert not (tmp_path / "bound.safetensors").exists()
  assert RewardModel.from_pretrained(tmp_path).bound is None


def test_given_bound_replaces_the_bound_of_the_folder(model, tmp_path):
  model.save_pretrained(tmp_path / "model")
  other = Bound.fit(np.eye(6), lam=3.0)
  save_bound(other, tmp_path / "other.safetensors")
  loaded = RewardModel.from_pretrained(tmp_path / "model", tmp_path / "other.safetensors")
  np.testing.assert_allclose(loaded.bound.matrix, 4 * np.eye(6))


def test_bound_of_another_width_raises_an_error(model, tmp_path):
  RewardModel(model.network, model.params, Bound.fit(np.eye(5), lam=1.0)).save_pretrained(tmp_path)
  with pytest.raises(ValueError, match=r"\Athe bound is for 5 features and .* has 6[^\n]*\Z"):
    RewardModel.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------ released files
@pytest.fixture(scope="module")
def released_inverse() -> np.ndarray:
  """Returns V⁻¹ [256, 256] float32 with one small eigenvalue and the others at 100."""
  direction = np.random.default_rng(0).normal(size=256)
  direction /= np.linalg.norm(direction)
  return np.linalg.inv(0.01 * np.eye(256) + 97.9 * np.outer(direction, direction)).astype("f4")


@pytest.mark.parametrize("named", [False, True], ids=["tensor", "state_dict"])
def test_released_inverse_of_v_becomes_a_bound(released_inverse, named, tmp_path):
  torch = pytest.importorskip("torch", reason="a .pt file needs torch: pip install torch")
  stored = torch.nn.Parameter(torch.tensor(released_inverse))  # a released file holds a Parameter
  torch.save({"V_inverse": stored} if named else stored, tmp_path / "V_inverse.pt")
  bound = reward_lib.read_bound(tmp_path / "V_inverse.pt")
  assert bound.lam == pytest.approx(0.01, rel=1e-3)
  z = np.random.default_rng(1).normal(size=(3, 256)).astype(np.float32)
  expected = np.sqrt(np.einsum("bi,ij,bj->b", z, released_inverse, z, dtype=np.float64))
  np.testing.assert_allclose(mahalanobis_norm(bound.whitening, z), expected, rtol=1e-3)


def test_file_of_several_tensors_raises_an_error(tmp_path):
  torch = pytest.importorskip("torch", reason="a .pt file needs torch: pip install torch")
  torch.save({"a": torch.eye(2), "b": torch.eye(2)}, tmp_path / "two.pt")
  with pytest.raises(ValueError, match=r"\A[^\n]*two.pt: holds 2 tensors[^\n]*\Z"):
    reward_lib.read_bound(tmp_path / "two.pt")


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda torch: torch.eye(5), "the bound is for 5 features and the reward model has 6"),
    (lambda torch: torch.ones(6, 5), r"V⁻¹ has shape \(6, 5\)"),
    (lambda torch: torch.full((6, 6), float("nan")), "V⁻¹ has entries that are not finite"),
    (lambda torch: -torch.eye(6), "V⁻¹ is not positive definite"),
    (lambda torch: [torch.eye(6)], r"V_inverse\.pt: holds 0 tensors"),
  ],
)
def test_inverse_that_is_no_bound_of_the_model_raises_one_line(model, make, message, tmp_path):
  torch = pytest.importorskip("torch", reason="a .pt file needs torch: pip install torch")
  model.save_pretrained(tmp_path)
  torch.save(make(torch), tmp_path / "V_inverse.pt")
  with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
    RewardModel.from_pretrained(tmp_path, bound=tmp_path / "V_inverse.pt")


@pytest.mark.parametrize("keep", [0, 10, 700, -5])
def test_truncated_inverse_raises_one_line_that_names_the_file(keep, tmp_path):
  torch = pytest.importorskip("torch", reason="a .pt file needs torch: pip install torch")
  file = tmp_path / "V_inverse.pt"
  torch.save(torch.eye(64), file)
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match=r"\A[^\n]*V_inverse\.pt: cannot be read[^\n]*\Z"):
    reward_lib.read_bound(file)
