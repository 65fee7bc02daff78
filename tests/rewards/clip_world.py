"""Tiny CLIP models in the published layouts, and their scores by torch and transformers."""
# Shapes: P prompts, S samples of each, B = P S samples.

import json

import numpy as np
from parity import randomise

from prefpaint_jax.models.tokenizer import byte_tokenizer

TEXT = {
  "vocab_size": 514,
  "hidden_size": 16,
  "intermediate_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 12,
}
VISION = {
  "hidden_size": 24,
  "intermediate_size": 96,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "image_size": 16,
  "patch_size": 4,
}
WIDTH = 10  # of the embeddings


def clip_model(activation: str = "quick_gelu", eos: int = 2):
  """Makes a random CLIPModel of transformers."""
  import transformers

  config = transformers.CLIPConfig(
    text_config=TEXT | {"hidden_act": activation, "eos_token_id": eos},
    vision_config=VISION | {"hidden_act": activation},
    projection_dim=WIDTH,
  )
  model = randomise(transformers.CLIPModel(config))
  model.logit_scale.data.fill_(1.5)
  return model


def write_tokenizer(folder) -> None:
  for file, data in byte_tokenizer(TEXT["max_position_embeddings"]).items():
    (folder / file).write_bytes(data)


def open_clip_tensors(model) -> dict:
  """Returns a CLIPModel's tensors under the names of open_clip, with its fused projections."""
  import torch

  tensors, state = {}, model.state_dict()
  names = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "logit_scale": "logit_scale",
  }
  for leaf in ("weight", "bias"):
    names[f"vision_model.pre_layrnorm.{leaf}"] = f"visual.ln_pre.{leaf}"
    names[f"vision_model.post_layernorm.{leaf}"] = f"visual.ln_post.{leaf}"
    names[f"text_model.final_layer_norm.{leaf}"] = f"ln_final.{leaf}"
  for old, new in names.items():
    tensors[new] = state[old]
  tensors["visual.proj"] = state["visual_projection.weight"].T.contiguous()
  tensors["text_projection"] = state["text_projection.weight"].T.contiguous()
  for side, prefix in (("vision_model", "visual."), ("text_model", "")):
    for i in range(len(model.get_submodule(f"{side}.encoder.layers"))):
      old, new = f"{side}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
      for leaf in ("weight", "bias"):
        get = lambda name, old=old, leaf=leaf: state[f"{old}.{name}.{leaf}"]
        fused = torch.cat([get(f"self_attn.{x}_proj") for x in "qkv"])
        tensors[f"{new}.attn.in_proj_{leaf}"] = fused
        tensors[f"{new}.attn.out_proj.{leaf}"] = get("self_attn.out_proj")
        tensors[f"{new}.ln_1.{leaf}"] = get("layer_norm1")
        tensors[f"{new}.ln_2.{leaf}"] = get("layer_norm2")
        tensors[f"{new}.mlp.c_fc.{leaf}"] = get("mlp.fc1")
        tensors[f"{new}.mlp.c_proj.{leaf}"] = get("mlp.fc2")
  return tensors


OPEN_CLIP_CONFIG = json.dumps(
  {
    "model_cfg": {
      "embed_dim": WIDTH,
      "vision_cfg": {
        "image_size": 16,
        "layers": 2,
        "width": 24,
        "head_width": 8,
        "patch_size": 4,
      },
      "text_cfg": {
        "context_length": 12,
        "vocab_size": 514,
        "width": 16,
        "heads": 4,
        "layers": 2,
      },
    }
  }
)


def resized(images: np.ndarray, height: int, width: int):
  """Resizes [B, H, W, 3] as torchvision does float tensors: antialiased bicubic; channels first."""
  import torch

  tensor = torch.tensor(images).permute(0, 3, 1, 2)
  return torch.nn.functional.interpolate(
    tensor, (height, width), mode="bicubic", antialias=True, align_corners=False
  )


def normalised(tensor):
  """Normalises [B, 3, H, W] with the constants of transformers."""
  import torch
  from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

  constants = (torch.tensor(x)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
  mean, std = constants
  return (tensor - mean) / std


def unit(x):
  return x / x.norm(dim=-1, keepdim=True)


def image_embeddings(model, pixels):
  """Returns embeddings of unit length of normalised pixels [B, 3, H, W]."""
  return unit(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))


def text_embeddings(model, texts, samples: int):
  """Returns embeddings of unit length of texts, each repeated for its samples."""
  import torch

  ids = torch.tensor([list(np.pad(row, (0, 12 - len(row)))) for row in map(token_ids, texts)])
  found = unit(model.text_projection(model.text_model(input_ids=ids).pooler_output))
  return found.repeat_interleave(samples, 0)


def token_ids(text: str) -> list[int]:
  """Computes the byte tokens of words of ASCII letters, cut to 12, with begin and end."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  ids = []
  for word in text.lower().split():
    letters = [printable.index(ord(letter)) for letter in word]
    ids += [*letters[:-1], letters[-1] + 256]
  return [512, *ids[:10], 513]
