"""The learned reward of PrefPaint: a reward network and the bound on its error."""
# Shapes: B samples, D features.

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax import mini
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.models.reward import RewardNetwork, apply, network_shapes
from prefpaint_jax.preference.bound import FILE_NAME, Bound, check_bound, load_bound
from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.runtime.config_fields import DTYPE
from prefpaint_jax.runtime.ranges import check
from prefpaint_jax.weights import folder as weights
from prefpaint_jax.weights.files import load_torch
from prefpaint_jax.weights.names import Params

RELEASED = "kd5678/prefpaintReward"


def load(name: str | Path, dtype: str = "float32", bound: str | Path | None = None) -> Reward:
  """Loads a reward model as a reward; see `open_network`."""
  return as_reward(str(name), *open_network(name, bound, dtype))


def outline(name: str, dtype: str = "float32") -> Reward:
  """Makes the reward of shapes, of a folder's config or, for other names, the released one."""
  path = weights.local_path(mini.locate(name, "reward"), "config.reward")
  config = RewardConfig.from_dict(weights.read_config(path) if path.is_dir() else {})
  network = RewardNetwork(config, jnp.dtype(dtype))
  return as_reward(name, network, network_shapes(config))


def as_reward(
  name: str, network: RewardNetwork, params: Params, bound: Bound | None = None
) -> Reward:
  """Makes a reward of a network and its parameters."""
  function = functools.partial(_score, network)
  return Reward(name, function, params, feature_dim=network.config.feature_dim, bound=bound)


def _score(
  network: RewardNetwork,
  params: Params,
  images: jax.Array,
  masked_images: jax.Array,
  masks: jax.Array,
  texts: None,
) -> tuple[jax.Array, jax.Array]:
  return apply(network, params, images, masked_images)


def open_network(
  name: str | Path,
  bound: str | Path | None = None,
  dtype: str = "float32",
  shift: float | None = None,
  scale: float | None = None,
) -> tuple[RewardNetwork, Params, Bound | None]:
  """Loads a reward network, its parameters and its bound; see `RewardModel.from_pretrained`."""
  check("dtype", str(dtype), DTYPE)
  path = weights.resolve_reward(mini.locate(name, "reward"))
  config = {} if path.is_file() else weights.read_config(path)
  given = {"shift": shift, "scale": scale}
  config |= {field: value for field, value in given.items() if value is not None}
  network = RewardNetwork(RewardConfig.from_dict(config), jnp.dtype(dtype))
  if not bound and (path / FILE_NAME).is_file():
    bound = path / FILE_NAME
  loaded = read_bound(bound) if bound else None
  if loaded is not None:
    check_bound(loaded, network.config.feature_dim)
  return network, weights.load_reward(path, network_shapes(network.config)), loaded


def read_bound(path: str | Path) -> Bound:
  """Reads a bound from `bound.safetensors`, or from a released inverse of V (`.pt`).

  Raises:
    ValueError: the file cannot be read, or does not hold one matrix.
  """
  file = weights.local_path(path, "bound")
  if file.is_file() and file.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
    raise ValueError(
      f"bound {path}: a file that is no bound; expected bound.safetensors of a reward model, or a "
      "released inverse of V (.pt); give one of them"
    )
  if file.suffix not in (".pt", ".pth", ".bin"):
    return load_bound(path)
  stored = load_torch(path)
  values = stored.values() if isinstance(stored, dict) else [stored]
  tensors = [value for value in values if isinstance(value, np.ndarray)]
  if len(tensors) != 1:
    raise ValueError(
      f"{path}: holds {len(tensors)} tensors; expected 1; give the file of the inverse of V"
    )
  return Bound.from_inverse(tensors[0].astype(np.float64))
