"""ImageReward equals its network of transformers' BLIP, and reads files of the original layout."""

import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest
from parity import assert_parity, randomise

from prefpaint_jax.models.blip import IMAGE_REWARD, BlipConfig, network_shapes
from prefpaint_jax.models.reward import CLIP_MEAN, CLIP_STD
from prefpaint_jax.rewards import image_reward, load_reward
from prefpaint_jax.rewards.objective import outline_objective
from prefpaint_jax.weights.names import to_tree

torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "chair", "house", "##s", "."]
TINY = BlipConfig(
  dataclasses.replace(
    IMAGE_REWARD.vision,
    hidden_size=24,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=3,
    image_size=32,
    patch_size=8,
  ),
  dataclasses.replace(
    IMAGE_REWARD.text,
    vocab_size=len(WORDS) + 2,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=40,
  ),
)
TEXTS = ["The red chairs, the HOUSE.", "", "the red chairs " * 20]  # the last has 82 tokens
# Names of transformers -> names of the original, the inverse of transformers' conversion of BLIP.
ORIGINAL = (
  (r"embeddings\.class_embedding", "cls_token"),
  (r"embeddings\.position_embedding", "pos_embed"),
  (r"embeddings\.patch_embedding", "patch_embed.proj"),
  (r"encoder\.layers", "blocks"),
  (r"self_attn\.projection", "attn.proj"),
  (r"self_attn", "attn"),
  (r"layer_norm(\d)", r"norm\1"),
  (r"post_layernorm", "norm"),
)


class StockImageReward(torch.nn.Module):
  """ImageReward of transformers' encoders and torch's layers, without its dropout layers."""

  def __init__(self, config: BlipConfig):
    super().__init__()
    # The defaults of transformers are those of BLIP's text model, but for the width of the image.
    vision = dataclasses.asdict(config.vision)
    text = dataclasses.asdict(config.text) | {"encoder_hidden_size": vision["hidden_size"]}
    text |= {"is_decoder": True}  # transformers' name for a model with cross-attention
    for unused in ("projection_dim", "eos_token_id", "use_attention_mask"):
      vision.pop(unused, None), text.pop(unused)
    self.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision))
    text_config = transformers.BlipTextConfig(**text)
    self.text = transformers.models.blip.modeling_blip_text.BlipTextModel(text_config, False)
    widths = text["hidden_size"], 1024, 128, 64, 16, 1
    layers = [torch.nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    self.layers = torch.nn.ModuleDict(dict(zip("02467", layers, strict=True)))

  def forward(self, pixels, input_ids, attention_mask):
    tokens = self.vision(pixels).last_hidden_state
    feature = z = self.text(
      input_ids=input_ids,
      attention_mask=attention_mask,
      encoder_hidden_states=tokens,
      encoder_attention_mask=torch.ones(tokens.shape[:2]),
    ).last_hidden_state[:, 0]
    for layer in self.layers.values():
      z = layer(z)
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072, feature

  def original_tensors(self) -> dict[str, torch.Tensor]:
    """Returns the tensors of `ImageReward.pt` by name."""
    tensors = {f"mlp.layers.{name}": x for name, x in self.layers.state_dict().items()}
    tensors |= {f"blip.text_encoder.{name}": x for name, x in self.text.state_dict().items()}
    for name, tensor in self.vision.state_dict().items():
      name = functools.reduce(lambda name, pair: re.sub(*pair, name), ORIGINAL, name)
      tensors[f"blip.visual_encoder.{name}"] = tensor
    positions = torch.arange(self.text.config.max_position_embeddings)[None]
    tensors["blip.text_encoder.embeddings.position_ids"] = positions
    for part, encoder in (("vision", self.vision), ("text", self.text)):
      projection = torch.nn.Linear(encoder.config.hidden_size, 256)
      for name, tensor in projection.state_dict().items():
        tensors[f"blip.{part}_proj.{name}"] = tensor
    return tensors


@pytest.fixture(scope="module")
def stock():
  return randomise(StockImageReward(TINY))


@pytest.fixture(scope="module")
def folder(stock, tmp_path_factory):
  """A folder with the weights and the vocabulary of a small ImageReward."""
  folder = tmp_path_factory.mktemp("image_reward")
  torch.save(stock.original_tensors(), folder / "ImageReward.pt")
  (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
  return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  monkeypatch.setattr(image_reward, "IMAGE_REWARD", TINY)


def test_score_and_feature_equal_transformers(stock, folder):
  images = np.random.default_rng(0).uniform(size=(6, 32, 47, 3)).astype(np.float32)
  tokenizer = transformers.BertTokenizer.from_pretrained(folder)
  options = {"padding": "max_length", "truncation": True, "max_length": 35}
  tokens = tokenizer(TEXTS, **options, return_tensors="pt")
  assert tokens["attention_mask"].sum(1).tolist() == [10, 2, 35]
  # torchvision's crop, which the original uses, starts at round(7.5) = 8; transformers' at 7.
  cropped = np.moveaxis((images[:, :, 8:40] - CLIP_MEAN) / CLIP_STD, -1, 1)
  with torch.no_grad():
    pair = [tokens[name].repeat_interleave(2, 0) for name in ("input_ids", "attention_mask")]
    expected, features = stock(torch.tensor(cropped), *pair)
  assert expected.std() > 0.01
  reward = load_reward(f"image-reward@{folder}")
  assert reward.feature_dim == 16
  tokens = reward.tokenize(TEXTS)
  found = jax.jit(reward.function)(reward.params, images, images[:3], None, tokens)
  assert_parity(found[0], expected)
  assert_parity(found[1], features)


def test_without_a_folder_the_files_are_those_of_the_hub(folder, tmp_path, monkeypatch):
  local = load_reward(f"image-reward@{folder}")
  (tmp_path / "ImageReward.pt").write_bytes((folder / "ImageReward.pt").read_bytes())
  hub = {"THUDM/ImageReward": tmp_path, "google-bert/bert-base-uncased": folder}
  monkeypatch.setattr(image_reward, "resolve", lambda name, files: hub[name])
  published = load_reward("image-reward")
  jax.tree.map(np.testing.assert_array_equal, published.params, local.params)
  pairs = zip(published.tokenize(TEXTS), local.tokenize(TEXTS), strict=True)
  assert all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.slow
def test_bfloat16_scores_are_float32_and_near(folder):
  images = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
  exact, near = (
    load_reward(f"image-reward@{folder / 'ImageReward.pt'}", dtype)(images, images, texts=TEXTS[:1])
    for dtype in ("float32", "bfloat16")
  )
  assert near.dtype == np.float32
  assert 0 < np.abs(near - exact).max() < 0.05


def test_outline_has_the_shapes_of_the_loaded_reward_and_reads_nothing(folder):
  loaded = load_reward(f"image-reward@{folder}")
  (outline,) = outline_objective("image-reward@/none").rewards
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
  assert shapes(outline.params) == shapes(loaded.params)
  assert shapes(outline.tokenize([""])) == shapes(loaded.tokenize([""]))
  assert (outline.feature_dim, outline.licence) == (loaded.feature_dim, loaded.licence)


@pytest.mark.slow
def test_full_size_tensors_of_transformers_fill_the_network():
  with torch.device("meta"):
    stock = StockImageReward(IMAGE_REWARD)
    tensors = stock.original_tensors()
  sizes = [sum(x.numel() for x in part.parameters()) for part in (stock.vision, stock.text)]
  assert [round(size / 1e6, 1) for size in sizes] == [303.3, 142.0]
  # Each tensor is a view of one zero, so that it takes no memory.
  zeros = {name: np.broadcast_to(np.float32(0), x.shape) for name, x in tensors.items()}
  params = to_tree(zeros, network_shapes(IMAGE_REWARD), what="ImageReward.pt")
  found = sum(x.size for x in jax.tree.leaves(params))
  assert found == sum(x.numel() for x in stock.parameters())


def remove_bias(tensors, words):
  del tensors["mlp.layers.7.bias"]


def add_tower(tensors, words):
  tensors["blip.visual_encoder_m.cls_token"] = torch.zeros(1)


def cut_words(tensors, words):
  del words[-1]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (remove_bias, "ImageReward.pt: tensors 1 missing: mlp.layers.7.bias; give"),
    (add_tower, "ImageReward.pt: tensors 1 unexpected: blip.visual_encoder_m.cls_token; give"),
    (cut_words, r"vocab.txt: has 12 tokens with \[DEC\] and \[ENC\]; expected 13; use that of"),
  ],
)
def test_other_files_are_refused_in_one_line(stock, tmp_path, change, message):
  tensors, words = stock.original_tensors(), list(WORDS)
  change(tensors, words)
  torch.save(tensors, tmp_path / "ImageReward.pt")
  (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
  with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
    load_reward(f"image-reward@{tmp_path}")


def test_folder_without_weights_is_refused_in_one_line(tmp_path):
  with pytest.raises(ValueError, match=r"\A[^\n]*has no ImageReward.pt; give the file[^\n]*\Z"):
    load_reward(f"image-reward@{tmp_path}")
