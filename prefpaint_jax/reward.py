"""RewardModel: loads, runs and saves a reward network and the bound on its error."""
# Shapes: M masked images, S samples of each, B = S M samples, H W pixels, D features.

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prefpaint_jax.data.images import load_images
from prefpaint_jax.models.reward import RewardNetwork, apply
from prefpaint_jax.preference.bound import FILE_NAME, Bound, save_bound
from prefpaint_jax.rewards.prefpaint import open_network
from prefpaint_jax.rewards.prefpaint import read_bound as read_bound
from prefpaint_jax.runtime import files
from prefpaint_jax.runtime.compilation import enable_cache
from prefpaint_jax.weights import folder as weights
from prefpaint_jax.weights.names import Params


@functools.partial(jax.jit, static_argnames="network")
def _apply(
  network: RewardNetwork, params: Params, images: jax.Array, masked_images: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return apply(network, params, images, masked_images)


class RewardModel:
  """A reward model: `RewardModel.from_pretrained(name).score(images, masked_images)`.

  Attributes:
    network: the reward network.
    params: its parameters, a tree of float32 arrays.
    bound: the bound on its error, or None.
  """

  def __init__(self, network: RewardNetwork, params: Params, bound: Bound | None = None):
    self.network, self.params, self.bound = network, params, bound

  @classmethod
  def from_pretrained(
    cls,
    name: str | Path,
    bound: str | Path | None = None,
    dtype: str = "float32",
    shift: float | None = None,
    scale: float | None = None,
  ) -> "RewardModel":
    """Loads a reward model, and enables JAX's compilation cache as `Inpainter` does.

    Args:
      name: a folder of `save_pretrained`, a released `.pt` file, a hub name, or
        "mini", the model inside this package.
      bound: a `bound.safetensors` file, or a released inverse of V; default: the
        `bound.safetensors` of the folder, if it has one.
      dtype: compute dtype of the network; parameters stay float32.
      shift: the reward is (output of the head − shift) / scale; default: that of the folder's
        config.json, or 0. The released code uses 0.4064 for prompts of several samples.
      scale: see `shift`; default: that of the folder's config.json, or 1. Released: 2.3021.

    Raises:
      ValueError: a file is missing or damaged, or does not fit the network.
    """
    enable_cache()
    return cls(*open_network(name, bound, dtype, shift, scale))

  def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
    """Writes config.json, model.safetensors (as `dtype`) and, with a bound, bound.safetensors.

    The folder changes as a whole or not at all; an earlier reward model in it is replaced.

    Raises:
      ValueError: a parameter is not finite, or the folder has other files.
    """
    names = ("config.json", "model.safetensors", FILE_NAME)
    with files.atomic_folder(folder, replaces=names) as temporary:
      files.write_json(temporary / "config.json", self.network.config.to_dict(), sort_keys=True)
      weights.save_params(temporary, self.params, dtype)
      if self.bound is not None:
        save_bound(self.bound, temporary)

  def score(self, images: Any, masked_images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Computes rewards [B] and features [B, D] of samples.

    Args:
      images: B samples of one size: PIL images, paths or arrays (uint8, or float in [0, 1]); a list
        or an array [B, H, W, 3] of them, or one.
      masked_images: M of the same, black in the hole; S = B/M consecutive samples share one.

    Raises:
      ValueError: images cannot be read, differ in size, or B is not a multiple of M.
    """
    images, masked_images = load_images(images), load_images(masked_images, "masked_images")
    if images.shape[0] % masked_images.shape[0]:
      raise ValueError(
        f"{images.shape[0]} samples of {masked_images.shape[0]} masked images; give the same "
        "number of samples for each masked image"
      )
    reward, features = _apply(self.network, self.params, images, masked_images)
    return np.asarray(reward), np.asarray(features)
