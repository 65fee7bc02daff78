"""RewardModel: the learned preference, its parameters and the bound on its error.

Shapes: B inpaintings, M masked images (B = S M), H W pixels, D features.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax import mini
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.models.reward import RewardNetwork, apply, network_shapes
from prefpaint_jax.preference.bound import FILE_NAME, Bound, check_bound, load_bound, save_bound
from prefpaint_jax.runtime.compilation import apart
from prefpaint_jax.weights import folder as weights


@functools.partial(jax.jit, static_argnames="network")
def _apply(network, params, images, masked_images):
  return apply(network, params, images, masked_images)


class RewardModel:
  """A reward network, its parameters (float32) and, if known, the bound on its error."""

  def __init__(self, network: RewardNetwork, params: Any, bound: Bound | None = None):
    self.network, self.params, self.bound = network, params, bound

  @classmethod
  @apart()
  def from_pretrained(
    cls, name: str | Path, bound: str | Path | None = None, dtype: str = "float32"
  ) -> "RewardModel":
    """Loads a saved folder, the released checkpoint (a `.pt` file or hub name), or "mini".

    Args:
      name: a folder of `save_pretrained`, a released `.pt` (needs torch), a hub name, or "mini".
      bound: a `bound.safetensors`, or a released inverse of V; default: the folder's own.
      dtype: what the network computes in; parameters stay float32.
    """
    path = weights.resolve_reward(mini.locate(name, "reward"))
    config = {} if path.is_file() else weights.read_config(path)
    network = RewardNetwork(RewardConfig.from_dict(config), jnp.dtype(dtype))
    params = weights.load_reward(path, network_shapes(network.config))
    if not bound and (path / FILE_NAME).is_file():
      bound = path / FILE_NAME
    loaded = read_bound(bound) if bound else None
    if loaded is not None:
      check_bound(loaded, network.config.feature_dim)
    return cls(network, params, loaded)

  def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
    """Writes `config.json`, `model.safetensors` and, if there is a bound, `bound.safetensors`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(dataclasses.asdict(self.network.config), indent=2, sort_keys=True)
    (folder / "config.json").write_text(config + "\n")
    weights.save_params(folder, self.params, dtype)
    if self.bound is not None:
      save_bound(self.bound, folder)

  def score(self, images: Any, masked_images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Reward [B] and features [B, D] of inpaintings [B, H, W, 3] in [0, 1].

    `masked_images` [M, H, W, 3] have their hole black; B/M consecutive inpaintings share one.
    """
    images, masked_images = (np.asarray(x, np.float32) for x in (images, masked_images))
    if images.shape[0] % masked_images.shape[0]:
      raise ValueError(
        f"{images.shape[0]} inpaintings of {masked_images.shape[0]} masked images; give as many of "
        "each, or a multiple"
      )
    reward, features = _apply(self.network, self.params, images, masked_images)
    return np.asarray(reward), np.asarray(features)


def read_bound(path: str | Path) -> Bound:
  """A bound of ours (`bound.safetensors`), or a released inverse of V (`.pt`, needs torch)."""
  if Path(path).suffix not in (".pt", ".pth", ".bin"):
    return load_bound(path)
  torch, stored = weights.load_torch(path)
  values = stored.values() if isinstance(stored, dict) else [stored]
  tensors = [value for value in values if isinstance(value, torch.Tensor)]
  if len(tensors) != 1:
    raise ValueError(f"{path}: holds {len(tensors)} tensors; give the file of the inverse of V")
  return Bound.from_inverse(tensors[0].detach().double().numpy())
