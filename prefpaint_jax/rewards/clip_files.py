"""Files of CLIP models in the layouts of transformers and open_clip, and their tokenizers.

`load` and `outline` make a reward of a whole model in the layout of transformers.
"""
# Shapes: P prompts, B samples, L tokens, E embedding.

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefpaint_jax.models.text import load_tokenizer, tokenize
from prefpaint_jax.rewards.clip_towers import Towers, make_towers
from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.weights import folder as weights
from prefpaint_jax.weights import open_clip
from prefpaint_jax.weights.files import load_file, load_torch
from prefpaint_jax.weights.names import Params, to_tree

# The tokenizer of all CLIP models of OpenAI and LAION, for weights that come without it.
VIT_L, VIT_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_TOKENIZER_FILES = (
  "vocab.json",
  "merges.txt",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
)
_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")

# Sizes of OpenAI's ViT-L/14, as transformers has them, and of open_clip's ViT-H-14.
VIT_L_14 = {
  "projection_dim": 768,
  "vision_config": {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
  },
  "text_config": {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "eos_token_id": 2,
  },
}
VIT_H_14 = {
  "embed_dim": 1024,
  "vision_cfg": {
    "image_size": 224,
    "layers": 32,
    "width": 1280,
    "head_width": 80,
    "patch_size": 14,
  },
  "text_cfg": {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 1024,
    "heads": 16,
    "layers": 24,
  },
}


# ---------------------------------------------------------------------------- transformers' layout


def published(name: str) -> Path:
  """Finds the folder of a CLIP model, local or on the hub."""
  return weights.resolve(name, (*_FILES, *_TOKENIZER_FILES))


def is_model(path: Path) -> bool:
  """Returns whether a local path is a folder in the layout of transformers."""
  return (path / "config.json").is_file()


def open_towers(folder: Path, dtype: str, *, with_text: bool) -> Towers:
  """Makes the towers of a folder's config, in the compute dtype."""
  return make_towers(weights.read_config(folder), dtype, with_text=with_text)


def config_of(given: str, published: dict[str, Any]) -> dict[str, Any]:
  """Returns the config of a local folder, or the published one, for any other name."""
  path = weights.local_path(given or "published")
  return weights.read_config(path) if is_model(path) else published


# ------------------------------------------------------------------------------ open_clip's layout


def from_open_clip(model: dict[str, Any]) -> dict[str, Any]:
  """Converts a `model_cfg` of open_clip to a config of transformers' CLIPModel.

  Raises:
    ValueError: a field is missing or no number.
  """
  try:
    vision, text = model["vision_cfg"], model["text_cfg"]
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return {
      "projection_dim": model["embed_dim"],
      "vision_config": {
        "hidden_size": vision["width"],
        "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4)),
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision.get("head_width", 64),
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "hidden_act": act,
      },
      "text_config": {
        "hidden_size": text["width"],
        "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4)),
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "vocab_size": text["vocab_size"],
        "hidden_act": act,
        "eos_token_id": 2,  # open_clip pools the token of the largest id
      },
    }
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"open_clip_config.json: model_cfg has no {error}; expected embed_dim, vision_cfg and "
      "text_cfg of a ViT; download the file again"
    ) from error


def load_open_clip(path: Path, template: Params) -> Params:
  """Loads the parameters of a file in the layout of open_clip.

  A torch file may have them under "state_dict", beside those of the training.

  Raises:
    ValueError: the file is damaged, or is of another model than `template`.
  """
  found = {} if path.suffix == ".safetensors" else load_torch(path)
  if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
    tensors = {k: x for k, x in found["state_dict"].items() if isinstance(x, np.ndarray)}
  else:
    tensors = load_file(path)
  tensors = {name: np.asarray(x, np.float32) for name, x in open_clip.convert(tensors).items()}
  return to_tree(tensors, template, what=str(path))


# ------------------------------------------------------------------------------------------- texts


def tokenizer_of(
  path: Path, published_as: str, towers: Towers, clean: Callable[[str], str] = str
) -> Callable[[Sequence[str]], np.ndarray]:
  """Makes a function of P texts that returns token ids [P, L].

  Args:
    path: the folder of the weights; if it lacks the vocabulary, that of `published_as` is read.
    clean: a function that each text goes through first.
  """
  if not any((path / file).is_file() for file in ("vocab.json", "tokenizer.json")):
    path = weights.resolve(published_as, _TOKENIZER_FILES)
  found = [path / file for file in _TOKENIZER_FILES if (path / file).is_file()]
  content = {file.name: file.read_bytes() for file in found}
  tokenizer = load_tokenizer(content, str(path))
  return lambda texts: tokenize(tokenizer, towers.text.config, [clean(x) for x in texts])[0]


# ---------------------------------------------------------------------------------------- rewards


def load(
  name: str, score: Callable[..., Any], folder: str, tokenizer: str, licence: str, dtype: str
) -> Reward:
  """Loads a reward that is a function of the cosine of a sample and its text.

  Args:
    score: `(towers, params, images, masked_images, masks, ids)` -> scores [B], features [B, E].
    folder: a folder or hub name of a CLIP model in the layout of transformers.
    tokenizer: hub name of the tokenizer, for a folder without one.

  Raises:
    ValueError: files are missing, damaged or of another model.
  """
  path = published(folder)
  towers = open_towers(path, dtype, with_text=True)
  params = weights.load_params(path, towers.shapes())
  tokenize = tokenizer_of(path, tokenizer, towers)
  return as_reward(name, score, towers, params, tokenize, folder, licence)


def outline(
  name: str,
  score: Callable[..., Any],
  config: dict[str, Any],
  source: str,
  licence: str,
  dtype: str,
) -> Reward:
  """Makes the same of a config of transformers' CLIPModel, with shapes instead of parameters."""
  towers = make_towers(config, dtype, with_text=True)
  L = towers.text.config.max_position_embeddings
  tokenize = lambda texts: np.zeros((len(texts), L), np.int32)
  return as_reward(name, score, towers, towers.shapes(), tokenize, source, licence)


def as_reward(
  name: str,
  score: Callable[..., Any],
  towers: Towers,
  params: Params,
  tokenize: Callable[[Sequence[str]], np.ndarray],
  source: str,
  licence: str,
) -> Reward:
  """Makes a reward of two towers; its features are the images' embeddings."""
  return Reward(
    name.partition("@")[0],
    functools.partial(score, towers),
    params,
    tokenize=tokenize,
    feature_dim=towers.embedding_dim,
    source=source,
    licence=licence,
  )
