"""Rewards on CLIP embeddings equal their definitions, computed by torch with stock models."""

import logging
import sys

import jax
import numpy as np
import pytest

from prefpaint_jax.models.reward import CLIP_STD, preprocess
from prefpaint_jax.rewards import load_reward
from prefpaint_jax.rewards.objective import open_objective, outline_objective

torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
transformers = pytest.importorskip("transformers")
import clip_world as world  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEXTS = ["a red tree", "Two cats", ""]
H, W = 20, 28


@pytest.fixture(scope="module")
def samples():
  """Returns 6 samples of 3 prompts, and their masked images."""
  images = np.random.default_rng(0).uniform(size=(6, H, W, 3)).astype(np.float32)
  return images, images[::2] * 0.5


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """Returns a tiny CLIPModel and its folder."""
  model, folder = world.clip_model(), tmp_path_factory.mktemp("clip")
  model.save_pretrained(folder)
  world.write_tokenizer(folder)
  return model, folder


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
  """Returns a tiny CLIPModel and the folder of its parameters in open_clip's layout."""
  model, folder = world.clip_model("gelu"), tmp_path_factory.mktemp("hps")
  half = {name: x.half() for name, x in world.open_clip_tensors(model).items()}
  torch.save({"epoch": 3, "state_dict": half}, folder / "HPS_v2.1_compressed.pt")
  (folder / "open_clip_config.json").write_text(world.OPEN_CLIP_CONFIG)
  world.write_tokenizer(folder)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(parameter.half())
  return model, folder


def heads() -> dict[str, torch.nn.Module]:
  """Makes the two published heads at random."""
  from parity import randomise

  linear, dropout = torch.nn.Linear, torch.nn.Dropout
  layers = torch.nn.Sequential(
    *(linear(world.WIDTH, 1024), dropout(0.2), linear(1024, 128), dropout(0.2)),
    *(linear(128, 64), dropout(0.1), linear(64, 16), linear(16, 1)),
  )
  v2 = torch.nn.Module()
  v2.layers = layers
  return {"aesthetic-v1": randomise(linear(world.WIDTH, 1)), "aesthetic-v2": randomise(v2)}


def check(name: str, samples, texts, expected, embeddings) -> None:
  """Asserts scores and features, and that the parameters have the outlined shapes."""
  images, known = samples
  reward = load_reward(name)
  tokens = reward.tokenize(texts) if reward.tokenize else None
  scores, features = jax.jit(reward.function)(reward.params, images, known, known[..., :1], tokens)
  np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(features, embeddings, atol=1e-5)
  assert scores.dtype == features.dtype == np.float32
  assert reward.feature_dim == world.WIDTH and reward.bound is None
  assert reward.source and reward.licence
  (outlined,) = outline_objective(name).rewards
  shapes = lambda tree: jax.tree.map(lambda x: (np.shape(x), np.dtype(x.dtype)), tree)
  assert shapes(outlined.params) == shapes(reward.params)
  assert outlined.feature_dim == reward.feature_dim


@torch.no_grad()
def cropped(images, width: int, left: int):
  """Returns normalised pixels of images resized to 16 x width, and cropped."""
  pixels = world.resized(images, 16, width)[..., left : left + 16]
  return world.normalised(pixels.clip(0, 1))


@torch.no_grad()
def test_cosine_rewards_equal_transformers(clip, samples):
  model, folder = clip
  images, texts = world.image_embeddings(model, cropped(samples[0], 22, 3)), TEXTS
  cosines = (images * world.text_embeddings(model, texts, 2)).sum(-1)
  assert (cosines < 0).any() and (cosines > 0).any()
  check(f"clip-score@{folder}", samples, texts, (100 * cosines).clip(0), images)
  check(f"pickscore@{folder}", samples, texts, model.logit_scale.exp() * cosines, images)


@pytest.mark.parametrize("name", ["aesthetic-v1", "aesthetic-v2"])
@torch.no_grad()
def test_aesthetic_scores_equal_the_published_heads(clip, samples, name, tmp_path):
  model, folder = clip
  for file in folder.iterdir():
    (tmp_path / file.name).symlink_to(file)
  for one, head in heads().items():  # both beside CLIP, told apart by their tensors
    torch.save(head.state_dict(), tmp_path / f"{one}.pth")
  head = heads()[name]
  images = world.image_embeddings(model, cropped(samples[0], 22, 3))
  expected = getattr(head, "layers", head)(images)[:, 0]
  check(f"{name}@{tmp_path}", samples, None, expected, images)


@torch.no_grad()
def test_hps_equals_open_clip_of_letterboxed_images(hps, samples):
  model, folder = hps
  pixels = world.resized(samples[0], 11, 16)  # round(20 * 16 / 28)
  pixels = torch.nn.functional.pad(pixels, (0, 0, 2, 3))
  images = world.image_embeddings(model, world.normalised(pixels))
  expected = (images * world.text_embeddings(model, TEXTS, 2)).sum(-1)
  check(f"hps-v2.1@{folder}", samples, TEXTS, expected, images)
  whole, file = (load_reward(f"hps-v2.1@{folder}{x}") for x in ("", "/HPS_v2.1_compressed.pt"))
  jax.tree.map(np.testing.assert_array_equal, whole.params, file.params)


@pytest.mark.slow
@torch.no_grad()
def test_samples_of_the_working_size_are_not_resized(clip, hps):
  images = np.random.default_rng(1).uniform(size=(2, 16, 16, 3)).astype(np.float32)
  pixels = world.normalised(torch.tensor(images).permute(0, 3, 1, 2))
  for (model, folder), name, factor in ((clip, "pickscore", np.exp(1.5)), (hps, "hps-v2.1", 1.0)):
    texts = world.text_embeddings(model, ["sky"], 2)
    expected = factor * (world.image_embeddings(model, pixels) * texts).sum(-1)
    found = load_reward(f"{name}@{folder}")(images, images[:1], texts="sky")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("longer", [26, 29, 37])  # the crop leaves 4, 7 (3 modulo 4), 13
def test_crop_and_resize_are_those_of_transformers(longer):
  """PIL rounds to bytes after each axis, which changes a pixel by less than 2."""
  processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil
  processor = processor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
  images = np.random.default_rng(0).integers(80, 176, (2, 20, longer, 3), np.uint8)
  expected = np.stack(processor(list(images))["pixel_values"]).transpose(0, 2, 3, 1)
  found = preprocess(images.astype(np.float32) / 255, 16, int)
  assert np.abs((found - expected) * CLIP_STD * 255).max() < 2
  if longer == 29:  # OpenAI's transform crops the next column
    other = preprocess(images.astype(np.float32) / 255, 16)
    assert np.abs((other - expected) * CLIP_STD * 255).max() > 20


def test_long_texts_are_cut_before_the_end_with_one_warning(clip, samples, caplog):
  _, folder = clip
  reward = load_reward(f"clip-score@{folder}")
  with caplog.at_level(logging.WARNING, logger="absl"):
    ids = reward.tokenize(["wordwordwordword"])
  assert ids.tolist() == [world.token_ids("wordwordwordword")] and len(caplog.records) == 1


def test_hps_resolves_html_entities_as_open_clip(hps):
  reward = load_reward(f"hps-v2.1@{hps[1]}")
  found, expected = reward.tokenize(["a&amp;amp;b  "]), reward.tokenize(["a&b"])
  np.testing.assert_array_equal(found, expected)


def test_hps_refuses_texts_that_only_ftfy_repairs_without_it(hps, monkeypatch):
  monkeypatch.setitem(sys.modules, "ftfy", None)
  reward = load_reward(f"hps-v2.1@{hps[1]}")
  with pytest.raises(ValueError, match=r"\Atext 'café': not ASCII, and ftfy"):
    reward.tokenize(["café"])


@pytest.mark.slow
def test_bfloat16_scores_are_float32_and_close(clip, samples):
  name = f"pickscore@{clip[1]}"
  half = load_reward(name, "bfloat16")(*samples, texts=TEXTS)
  assert half.dtype == np.float32
  np.testing.assert_allclose(half, load_reward(name)(*samples, texts=TEXTS), atol=0.1)


def test_weights_in_a_name_of_a_file_are_split_from_the_weight(clip):
  objective = open_objective(f"clip-score@{clip[1]}*0.5,pickscore@{clip[1]}*2", "gdpo")
  assert [reward.name for reward in objective.rewards] == ["clip-score", "pickscore"]
  assert objective.weights == (0.5, 2.0)


# --------------------------------------------------------------------------------------- bad files


@pytest.fixture
def offline(monkeypatch):
  """Refuses downloads."""
  from prefpaint_jax.weights import folder

  def refuse(name, patterns):
    raise OSError("no network")

  monkeypatch.setattr(folder, "_fetch", refuse)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("aesthetic-v1", "its head is not on the hub; download sa_0_4_vit_l_14_linear.pth from github"),
    ("aesthetic-v2", "trl-lib/ddpo-aesthetic-predictor: no such folder, and no download"),
    ("clip-score", "openai/clip-vit-large-patch14: no such folder, and no download"),
    ("pickscore", "yuvalkirstain/PickScore_v1: no such folder, and no download"),
    ("hps-v2.1", "xswu/HPSv2: no such folder, and no download"),
    ("clip-score@nowhere", "nowhere: no such folder; give a folder, or a hub name"),
    ("aesthetic-v2@{clip}", "has 0 files of the head of aesthetic-v2; expected one, with the"),
    ("hps-v2.1@{clip}", "no HPS_v2.1_compressed.pt; download it from xswu"),
    ("pickscore@{hps}", "config.json: not found"),
    pytest.param(
      *("hps-v2.1@{clip}/model.safetensors", "tensors .* missing"), marks=pytest.mark.slow
    ),
  ],
)
@pytest.mark.usefixtures("offline")
def test_missing_and_wrong_files_are_refused_in_one_line(clip, hps, name, message):
  with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
    load_reward(name.format(clip=clip[1], hps=hps[1]))


@pytest.mark.usefixtures("offline")
def test_head_of_another_width_is_refused(clip, tmp_path):
  _, folder = clip
  for file in folder.iterdir():
    (tmp_path / file.name).symlink_to(file)
  torch.save(torch.nn.Linear(world.WIDTH + 1, 1).state_dict(), tmp_path / "head.pth")
  with pytest.raises(ValueError, match=r"head.pth: weight is \[1, 11\]; expected a layer of 10"):
    load_reward(f"aesthetic-v1@{tmp_path}")


@pytest.mark.usefixtures("offline")
def test_layers_that_the_config_lacks_are_refused(clip, tmp_path):
  _, folder = clip
  for file in folder.iterdir():
    (tmp_path / file.name).symlink_to(file)
  config = (
    (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1')
  )
  (tmp_path / "config.json").unlink()
  (tmp_path / "config.json").write_text(config)
  with pytest.raises(ValueError, match=r"32 unexpected"):
    load_reward(f"clip-score@{tmp_path}")


@pytest.mark.parametrize(
  ("name", "parameters"),
  [
    ("aesthetic-v1", 303_966_208 + 769),
    ("clip-score", 427_616_513),
    ("pickscore", 986_109_441),
    ("hps-v2.1", 986_109_441),
  ],
)
@pytest.mark.slow
def test_published_sizes(name, parameters):
  (reward,) = outline_objective(name).rewards
  assert sum(x.size for x in jax.tree.leaves(reward.params)) == parameters
