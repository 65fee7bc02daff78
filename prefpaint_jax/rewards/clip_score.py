"""CLIPScore (Hessel et al. 2021): the cosine of the embeddings of a sample and its text."""
# Shapes: P prompts, S samples of each, B = P S samples, L tokens, E embedding.

from typing import Any

import jax
import jax.numpy as jnp

from prefpaint_jax.rewards import clip_files
from prefpaint_jax.rewards.clip_files import VIT_L, VIT_L_14
from prefpaint_jax.rewards.clip_towers import Towers
from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.weights.names import Params

LICENCE = "MIT"


def load(name: str, given: str = "", dtype: str = "float32") -> Reward:
  """Loads CLIPScore of a CLIP model in the layout of transformers; see `clip_files.load`."""
  return clip_files.load(name, _score, given or VIT_L, VIT_L, LICENCE, dtype)


def outline(name: str, given: str = "", dtype: str = "float32") -> Reward:
  """Makes the reward of shapes, of a local folder's config or, for other names, ViT-L/14's."""
  config = clip_files.config_of(given, VIT_L_14)
  return clip_files.outline(name, _score, config, given or VIT_L, LICENCE, dtype)


def _score(
  towers: Towers,
  params: Params,
  images: jax.Array,
  masked_images: jax.Array,
  masks: jax.Array,
  texts: Any,
) -> tuple[jax.Array, jax.Array]:
  """Computes max(100 cos, 0) [B], as torchmetrics of one sample, and embeddings [B, E]."""
  cosines, z = towers.cosines(params, towers.centre(images, int), texts)
  return jnp.maximum(100.0 * cosines, 0.0), z
