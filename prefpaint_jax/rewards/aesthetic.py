"""LAION's aesthetic predictors: an affine function of the image embedding of CLIP ViT-L/14.

The head of v1 is one linear layer. That of v2 has five without activations between them
(github.com/christophschuhmann/improved-aesthetic-predictor), so they are multiplied on loading.
"""
# Shapes: B samples, H W pixels, E embedding.

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax.rewards import clip_files
from prefpaint_jax.rewards.clip_files import VIT_L
from prefpaint_jax.rewards.clip_towers import Towers, make_towers
from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.weights import folder as weights
from prefpaint_jax.weights.files import load_file
from prefpaint_jax.weights.names import Params, check_finite

_LAYERS = {
  "aesthetic-v1": ("",),
  "aesthetic-v2": tuple(f"layers.{i}." for i in (0, 2, 4, 6, 7)),
}
_SOURCES = {
  "aesthetic-v1": ("github.com/LAION-AI/aesthetic-predictor", "MIT"),
  "aesthetic-v2": ("github.com/christophschuhmann/improved-aesthetic-predictor", "Apache-2.0"),
}
# A copy of v2's head on the hub; v1's has none by its authors.
HEADS = {"aesthetic-v2": "trl-lib/ddpo-aesthetic-predictor"}
_SUFFIXES = (".pth", ".pt", ".safetensors")


def load(name: str, given: str = "", dtype: str = "float32") -> Reward:
  """Loads an aesthetic predictor.

  Args:
    name: "aesthetic-v1" or "aesthetic-v2", with or without @WEIGHTS.
    given: the file of the head, or a folder or hub name that has it. If the folder has the
      CLIP model too (config.json), that is read; else the published one. Default: both published.
    dtype: compute dtype of CLIP.

  Raises:
    ValueError: the files are missing, damaged or of another model.
  """
  kind = name.partition("@")[0]
  head = _resolve_head(kind, given)
  folder = head if given and clip_files.is_model(head) else clip_files.published(VIT_L)
  towers = clip_files.open_towers(folder, dtype, with_text=False)
  kernel, bias = _read_head(kind, head, towers.embedding_dim)
  params = {"clip": weights.load_params(folder, towers.shapes()), "kernel": kernel, "bias": bias}
  return _reward(name, towers, params)


def outline(name: str, given: str = "", dtype: str = "float32") -> Reward:
  """Makes the reward of shapes, of a local folder's config or, for other names, ViT-L/14's."""
  config = clip_files.config_of(given, clip_files.VIT_L_14)
  towers = make_towers(config, dtype, with_text=False)
  array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  params = {"clip": towers.shapes(), "kernel": array((towers.embedding_dim,)), "bias": array(())}
  return _reward(name, towers, params)


def _reward(name: str, towers: Towers, params: Params) -> Reward:
  kind = name.partition("@")[0]
  source, licence = _SOURCES[kind]
  return Reward(
    kind,
    functools.partial(_score, towers),
    params,
    feature_dim=towers.embedding_dim,
    source=source,
    licence=licence,
  )


def _score(
  towers: Towers,
  params: Params,
  images: jax.Array,
  masked_images: jax.Array,
  masks: jax.Array,
  texts: Any,
) -> tuple[jax.Array, jax.Array]:
  """Computes scores [B] and the embeddings [B, E] in which they are affine."""
  z = towers.embed_images(params["clip"], towers.centre(images, round))
  return jnp.sum(z * params["kernel"], axis=-1) + params["bias"], z


# -------------------------------------------------------------------------------------- the head


def _resolve_head(name: str, given: str) -> Path:
  """Finds the file of a head, or the folder that has it."""
  if not (given or name in HEADS):
    raise ValueError(
      f"{name}: its head is not on the hub; download sa_0_4_vit_l_14_linear.pth from "
      f"{_SOURCES[name][0]} and give {name}@FILE"
    )
  path = weights.local_path(given or HEADS[name], name)
  if path.is_file():
    return path
  patterns = ("config.json", *(f"*{suffix}" for suffix in (*_SUFFIXES, ".bin")))
  return weights.resolve(given or HEADS[name], patterns)


def _read_head(name: str, path: Path, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Reads the head of `name` from a file, or from the one file of a folder that has its names."""
  files = [path] if path.is_file() else _small_files(path)
  wanted = {f"{layer}{leaf}" for layer in _LAYERS[name] for leaf in ("weight", "bias")}
  found = {file: tensors for file in files if (tensors := load_file(file)).keys() == wanted}
  if len(found) != 1:
    raise ValueError(
      f"{path}: has {len(found)} files of the head of {name}; expected one, with the tensors "
      f"{', '.join(sorted(wanted)[:2])}, ...; give {name}@FILE or {name}@FOLDER"
    )
  ((file, tensors),) = found.items()
  return _multiplied(file, tensors, _LAYERS[name], width)


def _small_files(folder: Path) -> list[Path]:
  """Lists the files that may be a head, which has 4 MB; those of CLIP models are larger."""
  files = (file for file in folder.iterdir() if file.suffix in _SUFFIXES)
  return sorted(file for file in files if file.stat().st_size < 2**25)


def _multiplied(
  file: Path, tensors: Mapping[str, np.ndarray], layers: Sequence[str], width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Makes one kernel [E] and bias [] of linear layers that follow each other."""
  kernel, bias = np.eye(width), np.zeros(width)
  for layer in layers:
    weight, shift = tensors[f"{layer}weight"], tensors[f"{layer}bias"]
    if weight.shape[1:] != kernel.shape[:1] or shift.shape != weight.shape[:1]:
      raise ValueError(
        f"{file}: {layer}weight is {list(weight.shape)}; expected a layer of {len(kernel)} inputs; "
        "give the head of this CLIP model"
      )
    for leaf in ("weight", "bias"):
      check_finite(f"{layer}{leaf}", tensors[f"{layer}{leaf}"], str(file))
    kernel, bias = weight @ kernel, weight @ bias + shift
  if len(kernel) != 1:
    raise ValueError(f"{file}: has {len(kernel)} outputs; expected 1; give the head of a predictor")
  return kernel[0].astype(np.float32), np.float32(bias[0])
