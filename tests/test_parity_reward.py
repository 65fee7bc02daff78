"""The reward network, loaded from a checkpoint in the released layout, against torch's own layers.

The oracle is put together from transformers' CLIP, torch's TransformerEncoder and Linear layers
under the released attribute names; its CLIP tensors are then renamed to OpenAI's.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_parity, randomise, template_of

from prefpaint_jax.models.reward import RewardConfig, RewardNetwork
from prefpaint_jax.weights import folder, names

torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
transformers = pytest.importorskip("transformers")

SMALL = {
  "vision": {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "projection_dim": 10,
  },
  "num_heads": 4,
  "feedforward_dim": 18,
  "hidden_dim": 12,
  "feature_dim": 6,
}
RELEASED = {"vision": {}}


class ReleasedReward(torch.nn.Module):
  """The released network; `clip` stands for its `clip_model`."""

  def __init__(self, config: RewardConfig):
    super().__init__()
    vision = transformers.CLIPVisionConfig(**RewardConfig.to_dict(config)["vision"])
    self.clip = transformers.CLIPVisionModelWithProjection(vision)
    width = 2 * config.vision.projection_dim
    self.vit_block = torch.nn.Module()
    self.vit_block.encoder_layer = torch.nn.TransformerEncoderLayer(
      width, config.num_heads, config.feedforward_dim
    )
    self.vit_block.transformer_encoder = torch.nn.TransformerEncoder(
      self.vit_block.encoder_layer, num_layers=1, enable_nested_tensor=False
    )
    self.mlp = torch.nn.Module()
    self.mlp.layers = torch.nn.Sequential(
      torch.nn.Linear(width, config.hidden_dim),
      torch.nn.Dropout(0.2),
      torch.nn.Linear(config.hidden_dim, config.feature_dim),
    )
    self.mlp.last_layer = torch.nn.Linear(config.feature_dim, 1, bias=False)
    self.mlp.last_layer_weight = self.mlp.last_layer.weight

  def forward(self, images, masked_images):
    pair = [self.clip(pixels).image_embeds for pixels in (images, masked_images)]
    token = torch.cat(pair, dim=-1)[None]  # [L=1, B, 2P]: torch's default order
    z = self.mlp.layers(self.vit_block.transformer_encoder(token)[0])
    return self.mlp.last_layer(z)[:, 0], z

  def released_state_dict(self) -> dict[str, np.ndarray]:
    """Its tensors as the released file names them, with the parts of CLIP that are never used."""
    source = {name: tensor.numpy() for name, tensor in self.state_dict().items()}
    released = {}
    for name, tensor in source.items():
      if not name.startswith("clip."):
        released[name] = tensor
      elif match := re.fullmatch(r"(.*)\.q_proj\.(\w+)", name):
        fused = [source[f"{match[1]}.{part}_proj.{match[2]}"] for part in "qkv"]
        released[openai_name(f"{match[1]}.in_proj_{match[2]}")] = np.concatenate(fused)
      elif not re.search(r"\.[kv]_proj\.", name):
        name = openai_name(name)
        released[name] = tensor.T if name.endswith("visual.proj") else tensor
    released["clip_model.logit_scale"] = np.ones((), np.float32)
    released["clip_model.positional_embedding"] = np.ones((77, 8), np.float32)
    released["clip_model.token_embedding.weight"] = np.ones((9, 8), np.float32)
    released["clip_model.text_projection"] = np.ones((8, 8), np.float32)
    released["clip_model.ln_final.bias"] = np.ones(8, np.float32)
    released["clip_model.transformer.resblocks.0.attn.in_proj_bias"] = np.ones(24, np.float32)
    return released


def openai_name(name: str) -> str:
  """Name of a tensor of transformers' CLIP vision tower in OpenAI's own implementation."""
  parts = {
    "clip.visual_projection.weight": "clip_model.visual.proj",
    "clip.vision_model.": "clip_model.visual.",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn": "attn",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
  }
  for hugging_face, openai in parts.items():
    name = name.replace(hugging_face, openai)
  return name


def networks(config: dict):
  config = RewardConfig.from_dict(config)
  side = config.vision.image_size
  ours, pixels = RewardNetwork(config), jnp.zeros((1, side, side, 3))
  return randomise(ReleasedReward(config)), ours, template_of(ours, pixels, pixels)


def check_reward_and_features(config: dict, prefix: str = "") -> None:
  theirs, ours, template = networks(config)
  released = {prefix + name: tensor for name, tensor in theirs.released_state_dict().items()}
  converted = names.convert_released_reward(released)
  params = names.to_tree(converted, template, what="released reward")
  side = ours.config.vision.image_size
  images, masked = np.random.default_rng(0).normal(size=(2, 3, side, side, 3)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(*(torch.tensor(pixels).permute(0, 3, 1, 2) for pixels in (images, masked)))
  reward, z = jax.jit(ours.apply)({"params": params}, images, masked)
  assert_parity(reward * ours.config.scale + ours.config.shift, expected[0])
  assert_parity(z, expected[1])


def test_released_file_loads_as_its_state_dict_converts(tmp_path):
  theirs, _, template = networks(SMALL)
  released = theirs.released_state_dict()
  file = tmp_path / "prefpaintReward.pt"
  torch.save({f"module.{name}": torch.tensor(tensor) for name, tensor in released.items()}, file)
  loaded = folder.load_reward(folder.resolve_reward(tmp_path), template)
  expected = names.to_tree(names.convert_released_reward(released), template, what="released")
  assert jax.tree.all(jax.tree.map(np.array_equal, loaded, expected))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_reward_and_features_equal_torch(prefix):
  check_reward_and_features(SMALL, prefix)


def test_normalised_variant_shifts_and_scales_the_reward():
  check_reward_and_features(SMALL | {"shift": 0.4064, "scale": 2.3021})


@pytest.mark.slow
def test_reward_and_features_equal_torch_at_the_released_size():
  check_reward_and_features(RELEASED)


def test_several_inpaintings_share_one_masked_image():
  _, ours, template = networks(SMALL)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(leaf.dtype), template)
  images, masked = rng.normal(size=(2, 6, 24, 24, 3)).astype(np.float32)
  apply = jax.jit(ours.apply)
  shared = apply({"params": params}, images, masked[:2])
  repeated = apply({"params": params}, images, np.repeat(masked[:2], 3, axis=0))
  assert_parity(shared[0], repeated[0], tolerance=1e-5)
  assert_parity(shared[1], repeated[1], tolerance=1e-5)


def test_head_stored_twice_with_different_values_is_refused():
  theirs, _, _ = networks(SMALL)
  released = theirs.released_state_dict()
  released["mlp.last_layer_weight"] = released["mlp.last_layer.weight"] + 1
  with pytest.raises(ValueError, match="last_layer_weight differs"):
    names.convert_released_reward(released)


@pytest.mark.parametrize("name", ["clip_model.visual.ln_mid.weight", "vit_block.gate", "head.bias"])
def test_unknown_tensor_in_a_released_checkpoint_is_refused_by_name(name):
  theirs, _, _ = networks(SMALL)
  released = theirs.released_state_dict() | {name: np.zeros(3, np.float32)}
  with pytest.raises(ValueError, match=re.escape(name)):
    names.convert_released_reward(released)
