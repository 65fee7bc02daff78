"""ImageReward: a learned score of an image for a text (Xu et al. 2023, arXiv 2304.05977).

It reads the samples and texts, and neither masks nor masked images. Scores have mean 0 and standard
deviation 1 over the images of its training; higher is better. `preprocess` resizes as the original,
which uses PIL's bicubic filter, without PIL's rounding to bytes.
"""
# Shapes: P prompts, S samples of each, B = P S samples, L tokens, D features.

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax.models.blip import IMAGE_REWARD, ImageRewardNetwork, network_shapes
from prefpaint_jax.models.reward import preprocess
from prefpaint_jax.models.text import load_tokenizer, tokenize
from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.runtime.config_fields import DTYPE
from prefpaint_jax.runtime.ranges import check
from prefpaint_jax.weights.files import load_file
from prefpaint_jax.weights.folder import local_path, resolve
from prefpaint_jax.weights.names import Params, to_tree

PUBLISHED = "THUDM/ImageReward"
FILES = ("ImageReward.safetensors", "ImageReward.pt")
VOCABULARY = "google-bert/bert-base-uncased"
LENGTH = 35  # tokens of a text, with padding
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output, in its training


def load(name: str, weights: str = "", dtype: str = "float32") -> Reward:
  """Loads ImageReward.

  Args:
    name: of the reward.
    weights: a file, or a folder or hub name with `ImageReward.pt`; "": THUDM/ImageReward. If there
      is no vocab.txt beside the file, the vocabulary is that of google-bert/bert-base-uncased.
    dtype: compute dtype of the encoders.

  Raises:
    ValueError: a file is missing or damaged, or is not that of ImageReward.
  """
  check("dtype", str(dtype), DTYPE)
  file = _find_weights(weights or PUBLISHED)
  tokenizer = _load_tokenizer(file.parent)
  params = to_tree(load_file(file), network_shapes(IMAGE_REWARD), what=str(file))
  return _reward(name, dtype, params, functools.partial(tokenize, tokenizer, IMAGE_REWARD.text))


def outline(name: str, weights: str = "", dtype: str = "float32") -> Reward:
  """Makes ImageReward of shapes; its `tokenize` returns the ids and the mask of no text."""
  del weights  # the shapes do not depend on them
  return _reward(name, dtype, network_shapes(IMAGE_REWARD), _no_tokens)


def _reward(
  name: str, dtype: str, params: Params, tokenize: Callable[[Sequence[str]], Any]
) -> Reward:
  return Reward(
    name,
    functools.partial(_score, ImageRewardNetwork(IMAGE_REWARD, jnp.dtype(dtype))),
    params,
    tokenize,
    feature_dim=IMAGE_REWARD.text.hidden_size,
    source=f"https://huggingface.co/{PUBLISHED}",
    licence="Apache-2.0",
  )


def _score(
  network: ImageRewardNetwork,
  params: Params,
  images: jax.Array,
  masked_images: jax.Array,
  masks: jax.Array,
  texts: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  S = images.shape[0] // masked_images.shape[0]
  pixels = preprocess(images, network.config.vision.image_size)
  ids, mask = (jnp.repeat(rows, S, axis=0) for rows in texts)
  scores, z = network.apply({"params": params}, pixels, ids, mask)
  return (scores - MEAN) / STD, z


def _no_tokens(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  zeros = np.zeros((len(texts), LENGTH), np.int32)
  return zeros, zeros


def _find_weights(weights: str) -> Path:
  """Finds the file of the weights: a file, or in a local folder or one of the hub."""
  if (path := local_path(weights, "weights of image-reward")).is_file():
    return path
  folder = resolve(weights, FILES)
  if found := [folder / file for file in FILES if (folder / file).is_file()]:
    return found[0]
  raise ValueError(
    f"{folder}: has no {FILES[-1]}; give the file of ImageReward, or the folder that contains it"
  )


def _load_tokenizer(folder: Path) -> Any:
  """Makes BERT's tokenizer with the two tokens that BLIP adds, of which no text has one."""
  if not (folder / "vocab.txt").is_file():
    folder = resolve(VOCABULARY, ("vocab.txt",))
  file = folder / "vocab.txt"
  if not file.is_file():
    raise ValueError(f"{file}: not found; copy that of {VOCABULARY} to the folder of the weights")
  tokenizer = load_tokenizer({"vocab.txt": file.read_bytes()}, str(file), "BertTokenizer")
  tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
  if len(tokenizer) != IMAGE_REWARD.text.vocab_size:
    raise ValueError(
      f"{file}: has {len(tokenizer)} tokens with [DEC] and [ENC]; expected "
      f"{IMAGE_REWARD.text.vocab_size}; use that of {VOCABULARY}"
    )
  tokenizer.model_max_length = LENGTH
  return tokenizer
