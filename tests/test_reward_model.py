"""RewardModel: what a user holds; preprocessing against transformers, released files with torch."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import prefpaint_jax
from prefpaint_jax import reward, testing
from prefpaint_jax.bound import Bound, mahalanobis_norm, save_bound
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.reward import RewardModel

PHOTOS = Path(prefpaint_jax.__file__).parent / "mini" / "photos"


@pytest.fixture(scope="module")
def model() -> RewardModel:
  return testing.tiny_reward()


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
  """Six inpaintings [6, 8, 8, 3] of two masked images [2, 8, 8, 3]."""
  images, masks = testing.tiny_prompts(2)
  noise = np.random.default_rng(0).uniform(size=(6, 8, 8, 3))
  known = np.repeat(images * (1 - masks), 3, axis=0)
  return (known + noise * np.repeat(masks, 3, axis=0)).astype(np.float32), images * (1 - masks)


# ------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize(
  ("name", "crop"),
  [
    ("coffee.jpg", None),  # wider than high
    ("rocket.jpg", None),
    ("cat.jpg", (300, 180)),  # higher than wide
    ("astronaut.jpg", (224, 224)),  # nothing to do
    ("raccoon.jpg", (224, 301)),  # only to crop, an odd rest
    ("coffee.jpg", (90, 133)),  # smaller than the target
  ],
)
def test_preprocessing_equals_that_of_clip(name, crop):
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  transformers = pytest.importorskip("transformers")
  photo = Image.open(PHOTOS / name).convert("RGB")
  if crop is not None:
    assert photo.height >= crop[0] and photo.width >= crop[1]
    photo = photo.crop((0, 0, crop[1], crop[0]))
  pixels = np.asarray(photo, np.float32) / 255
  ours = np.asarray(reward.preprocess(pixels[None], 224))
  expected = transformers.CLIPImageProcessor()(photo, return_tensors="np")["pixel_values"]
  # In units of pixel values in [0, 1]: transformers rounds to bytes after the resize.
  error = np.abs(ours - np.moveaxis(np.asarray(expected), 1, -1)) * reward.CLIP_STD
  assert ours.shape == (1, 224, 224, 3)
  assert error.mean() < 1 / 255
  assert error.max() < 8 / 255


def test_preprocessing_of_the_right_size_is_the_normalisation_alone():
  pixels = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
  expected = (pixels - reward.CLIP_MEAN) / reward.CLIP_STD
  np.testing.assert_allclose(reward.preprocess(pixels, 8), expected, atol=1e-6)


# ----------------------------------------------------------------------------------- scoring


def test_samples_that_share_a_masked_image_score_as_with_a_copy_each(model, pictures):
  images, masked = pictures
  shared = model.score(images, masked)
  repeated = model.score(images, np.repeat(masked, 3, axis=0))
  for ours, expected in zip(shared, repeated, strict=True):
    np.testing.assert_allclose(ours, expected, atol=1e-5)
  assert shared[0].shape == (6,) and shared[1].shape == (6, 6)
  assert np.ptp(shared[0]) > 1e-3


def test_reward_is_linear_in_the_features(model, pictures):
  scores, features = model.score(*pictures)
  head = model.params["mlp"]["last_layer"]["kernel"][:, 0]
  np.testing.assert_allclose(scores, features @ head, atol=1e-5)


def test_the_same_pictures_score_the_same_every_time(model, pictures):
  first, again = model.score(*pictures), model.score(*pictures)
  np.testing.assert_array_equal(first[0], again[0])


def test_inpaintings_that_no_masked_image_fits_are_refused(model, pictures):
  images, masked = pictures
  with pytest.raises(ValueError, match="5 inpaintings of 2 masked images"):
    model.score(images[:5], masked)


# ----------------------------------------------------------------------------------- folders


def test_loaded_equals_saved(model, pictures, tmp_path):
  model.save_pretrained(tmp_path)
  loaded = RewardModel.from_pretrained(tmp_path)
  assert loaded.network == model.network
  assert jax.tree.structure(loaded.params) == jax.tree.structure(model.params)
  assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, model.params))
  np.testing.assert_allclose(loaded.bound.matrix, model.bound.matrix, rtol=1e-12)
  for name in ("lam", "count", "noise_scale", "norm_bound"):
    assert getattr(loaded.bound, name) == getattr(model.bound, name)
  np.testing.assert_array_equal(loaded.score(*pictures)[0], model.score(*pictures)[0])


def test_model_without_a_bound_is_saved_without_one(model, tmp_path):
  RewardModel(model.network, model.params).save_pretrained(tmp_path)
  assert not (tmp_path / "bound.safetensors").exists()
  assert RewardModel.from_pretrained(tmp_path).bound is None


def test_another_bound_replaces_that_of_the_folder(model, tmp_path):
  model.save_pretrained(tmp_path / "model")
  other = Bound.fit(np.eye(6), lam=3.0)
  save_bound(other, tmp_path / "other.safetensors")
  loaded = RewardModel.from_pretrained(tmp_path / "model", tmp_path / "other.safetensors")
  np.testing.assert_allclose(loaded.bound.matrix, 4 * np.eye(6))


def test_bound_of_another_width_is_refused(model, tmp_path):
  RewardModel(model.network, model.params, Bound.fit(np.eye(5), lam=1.0)).save_pretrained(tmp_path)
  with pytest.raises(ValueError, match=r"\Athe bound is for 5 features and .* has 6[^\n]*\Z"):
    RewardModel.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------ released files


@pytest.fixture(scope="module")
def released_inverse() -> np.ndarray:
  """V⁻¹ [256, 256] float32 like the released one: one small eigenvalue, the others about 100."""
  direction = np.random.default_rng(0).normal(size=256)
  direction /= np.linalg.norm(direction)
  return np.linalg.inv(0.01 * np.eye(256) + 97.9 * np.outer(direction, direction)).astype("f4")


@pytest.mark.parametrize("named", [False, True], ids=["tensor", "state_dict"])
def test_released_inverse_of_v_becomes_a_bound(released_inverse, named, tmp_path):
  torch = pytest.importorskip("torch", reason="a .pt file needs torch: pip install torch")
  stored = torch.tensor(released_inverse)
  torch.save({"V_inverse": stored} if named else stored, tmp_path / "V_inverse.pt")
  bound = reward.read_bound(tmp_path / "V_inverse.pt")
  assert bound.lam == pytest.approx(0.01, rel=1e-3)
  z = np.random.default_rng(1).normal(size=(3, 256)).astype(np.float32)
  expected = np.sqrt(np.einsum("bi,ij,bj->b", z, released_inverse, z, dtype=np.float64))
  np.testing.assert_allclose(mahalanobis_norm(bound.chol, z), expected, rtol=1e-3)


def test_file_of_several_tensors_is_no_bound(tmp_path):
  torch = pytest.importorskip("torch", reason="a .pt file needs torch: pip install torch")
  torch.save({"a": torch.eye(2), "b": torch.eye(2)}, tmp_path / "two.pt")
  with pytest.raises(ValueError, match=r"\A[^\n]*two.pt: holds 2 tensors[^\n]*\Z"):
    reward.read_bound(tmp_path / "two.pt")


@pytest.mark.slow
def test_released_checkpoint_and_bound_load_and_score_as_torch(released_inverse, tmp_path):
  """At the released size: its file has no config, so no other can be loaded."""
  torch = pytest.importorskip("torch", reason="a .pt file needs torch: pip install torch")
  from parity import randomise
  from test_parity_reward import ReleasedReward

  theirs = randomise(ReleasedReward(RewardConfig()))
  file = tmp_path / "prefpaintReward.pt"
  state = {f"module.{k}": torch.tensor(v) for k, v in theirs.released_state_dict().items()}
  torch.save(state, file)
  torch.save(torch.tensor(released_inverse), tmp_path / "V_inverse.pt")
  model = RewardModel.from_pretrained(file, bound=tmp_path / "V_inverse.pt")
  assert model.bound.width == model.network.config.feature_dim == 256

  images, masked = np.random.default_rng(0).uniform(size=(2, 1, 224, 224, 3)).astype(np.float32)
  normalised = [(x - reward.CLIP_MEAN) / reward.CLIP_STD for x in (images, masked)]
  with torch.no_grad():
    expected = theirs(*(torch.tensor(x).permute(0, 3, 1, 2) for x in normalised))
  scores, features = model.score(images, masked)
  np.testing.assert_allclose(features, expected[1].numpy(), atol=1e-3)
  np.testing.assert_allclose(scores, expected[0].numpy(), atol=1e-3)

  # And it can be kept in our own format.
  model.save_pretrained(tmp_path / "ours")
  again = RewardModel.from_pretrained(tmp_path / "ours")
  np.testing.assert_array_equal(again.score(images, masked)[0], scores)
