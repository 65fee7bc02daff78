"""CLIP's text encoder and vision tower equal those of transformers, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_parity, params_of, randomise, template_of, tensors_of

from prefpaint_jax.models.clip import CLIPTextModel, CLIPVisionModelWithProjection
from prefpaint_jax.models.config import CLIPTextConfig, CLIPVisionConfig
from prefpaint_jax.weights import names

torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
pytestmark = pytest.mark.usefixtures("kernels")
transformers = pytest.importorskip("transformers")
TEXT = {
  "vocab_size": 50,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "max_position_embeddings": 11,
}
VISION = {
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "image_size": 24,
  "patch_size": 8,
  "projection_dim": 10,
}
ACTIVATIONS = ["quick_gelu", "gelu"]


def text_pair(activation: str = "quick_gelu"):
  config = TEXT | {"hidden_act": activation, "layer_norm_eps": 1e-4}
  theirs = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
  ours = CLIPTextModel(CLIPTextConfig.from_dict(theirs.config.to_dict()))
  template = template_of(ours, jnp.zeros((1, 4), jnp.int32))
  return theirs, ours, params_of(theirs, template)


def vision_pair(activation: str = "quick_gelu"):
  config = transformers.CLIPVisionConfig(**VISION, hidden_act=activation, layer_norm_eps=1e-4)
  theirs = randomise(transformers.CLIPVisionModelWithProjection(config))
  ours = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(theirs.config.to_dict()))
  template = template_of(ours, jnp.zeros((1, 24, 24, 3)))
  return theirs, ours, params_of(theirs, template)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("length", [11, 5])
def test_text_hidden_state_equals_transformers(activation, length):
  theirs, ours, params = text_pair(activation)
  input_ids = np.random.default_rng(0).integers(0, 50, (2, length))
  with torch.no_grad():
    expected = theirs(torch.tensor(input_ids)).last_hidden_state
  assert_parity(jax.jit(ours.apply)({"params": params}, input_ids), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_image_embedding_equals_transformers(activation):
  theirs, ours, params = vision_pair(activation)
  pixels = np.random.default_rng(0).normal(size=(3, 24, 24, 3)).astype(np.float32)
  with torch.no_grad():
    expected = theirs(torch.tensor(pixels).permute(0, 3, 1, 2)).image_embeds
  assert_parity(jax.jit(ours.apply)({"params": params}, pixels), expected)


@pytest.mark.slow
def test_both_towers_load_from_a_whole_clip_model():
  config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10)
  whole = randomise(transformers.CLIPModel(config))
  tensors = tensors_of(whole)
  vision = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(whole.config.to_dict()))
  text = CLIPTextModel(CLIPTextConfig.from_dict(whole.config.to_dict()))
  pixels = np.random.default_rng(0).normal(size=(1, 24, 24, 3)).astype(np.float32)
  input_ids = np.arange(7)[None]
  with torch.no_grad():
    images = torch.tensor(pixels).permute(0, 3, 1, 2)
    expected_image = whole.visual_projection(whole.vision_model(images).pooler_output)
    expected_text = whole.text_model(torch.tensor(input_ids)).last_hidden_state
  for module, argument, expected in (
    (vision, pixels, expected_image),
    (text, input_ids, expected_text),
  ):
    template = template_of(module, argument)
    params = names.to_tree(tensors, template, what="CLIP")
    assert_parity(module.apply({"params": params}, argument), expected)
