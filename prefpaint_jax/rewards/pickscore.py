"""PickScore (Kirstain et al. 2023): a CLIP ViT-H/14 that was trained on choices of people."""
# Shapes: P prompts, S samples of each, B = P S samples, L tokens, E embedding.

from typing import Any

import jax
import jax.numpy as jnp

from prefpaint_jax.rewards import clip_files
from prefpaint_jax.rewards.clip_files import VIT_H
from prefpaint_jax.rewards.clip_towers import Towers
from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.weights.names import Params

PUBLISHED, LICENCE = "yuvalkirstain/PickScore_v1", "MIT"


def load(name: str, given: str = "", dtype: str = "float32") -> Reward:
  """Loads PickScore, in the layout of transformers; see `clip_files.load`."""
  return clip_files.load(name, _score, given or PUBLISHED, VIT_H, LICENCE, dtype)


def outline(name: str, given: str = "", dtype: str = "float32") -> Reward:
  """Makes the reward of shapes, of a local folder's config or, for other names, ViT-H/14's."""
  config = clip_files.config_of(given, clip_files.from_open_clip(clip_files.VIT_H_14))
  return clip_files.outline(name, _score, config, given or PUBLISHED, LICENCE, dtype)


def _score(
  towers: Towers,
  params: Params,
  images: jax.Array,
  masked_images: jax.Array,
  masks: jax.Array,
  texts: Any,
) -> tuple[jax.Array, jax.Array]:
  """Computes exp(logit_scale) cos [B] and embeddings [B, E]."""
  cosines, z = towers.cosines(params, towers.centre(images, int), texts)
  return jnp.exp(params["logit_scale"]) * cosines, z
