"""Model folders on disk or on the Hugging Face hub: finds, reads and writes configs and tensors.

Stock diffusers and transformers open the files that this module writes.
"""

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefpaint_jax.runtime.ranges import Choice, check, shorten
from prefpaint_jax.runtime.text import first_line
from prefpaint_jax.weights import names
from prefpaint_jax.weights.file_names import WeightsFile, without_copies
from prefpaint_jax.weights.files import load_file, save_tensors

_PIPELINE_FILES = (
  "model_index.json",
  *(
    f"{part}/*.{kind}"
    for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    for kind in ("json", "safetensors", "bin")
  ),
  "tokenizer/*",
  "tokenizer_2/*",
  "scheduler/*.json",
)
_PIPELINE_CLASSES = r"(Flax)?StableDiffusion(XL)?(Inpaint|Img2Img)?Pipeline(Legacy)?"
_REWARD_FILES = ("config.json", "*.safetensors", "*.pt")
_REWARD_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")  # of files that `load_file` reads
SAVED_TYPES = Choice(("float32", "float16", "bfloat16"))


def local_path(name: str | os.PathLike[str], what: str = "model") -> Path:
  """Returns the path of a folder or file that a user names, with ~ replaced by the home folder.

  Raises:
    ValueError: `name` is no text and no path, or empty.
  """
  if not isinstance(name, str | os.PathLike) or not str(name).strip():
    raise ValueError(f"{what} is {shorten(name)}; expected a folder, file or hub name; give one")
  return Path(os.path.expanduser(name))  # `Path.expanduser` raises for a user that is unknown


def resolve_pipeline(name_or_folder: str | Path) -> Path:
  """Finds the folder of a diffusers pipeline, local or on the hub; returns a file unchanged.

  The class that its model_index.json names is checked before anything else is read or downloaded.

  Raises ValueError if the folder does not exist or is not a pipeline.
  """
  path = local_path(name_or_folder)
  if path.is_file():
    return path
  check_pipeline(resolve(name_or_folder, ("model_index.json",)))  # before anything else is read
  return resolve(name_or_folder, _PIPELINE_FILES)


def check_pipeline(folder: Path) -> None:
  """Raises ValueError, which says what a folder is, if it is not a pipeline of a known class."""
  if not (folder / "model_index.json").is_file():
    raise ValueError(
      f"{folder}: {_what_is(folder)}no model_index.json, so not a diffusers pipeline; give the "
      "folder that contains unet/, vae/ and text_encoder/"
    )
  name = read_config(folder, "model_index.json").get("_class_name")
  if name is not None and not re.fullmatch(_PIPELINE_CLASSES, str(name)):
    raise ValueError(
      f"{folder}: {name}: not supported yet; supported: StableDiffusionInpaintPipeline and "
      "StableDiffusionXLInpaintPipeline; give an inpainting checkpoint of Stable Diffusion"
    )


def _what_is(folder: Path) -> str:
  """Returns what the files of a folder that is no pipeline say it is, or nothing."""
  if (folder / "adapter_config.json").is_file() or list(folder.glob("*lora*.safetensors")):
    return "LoRA adapters; "
  with contextlib.suppress(ValueError):
    config = read_config(folder)
    name = config.get("_class_name") or config.get("architectures") or config.get("model_type")
    return f"{name[0] if isinstance(name, list) else name}; " if name else ""
  return ""


def resolve_reward(name_or_path: str | Path) -> Path:
  """Finds a reward model, local or on the hub: a folder with `config.json`, or a released `.pt`.

  Raises ValueError if the folder does not exist or is not a reward model.
  """
  path = local_path(name_or_path)
  if path.is_file():
    if path.suffix not in _REWARD_SUFFIXES:
      raise ValueError(
        f"{path}: a file that is no reward model; expected a folder, or a file that ends in "
        f"{', '.join(_REWARD_SUFFIXES)}; give one"
      )
    return path
  folder = resolve(name_or_path, _REWARD_FILES)
  if (folder / "config.json").is_file():
    return folder
  released = sorted(folder.glob("*.pt"))
  if len(released) != 1:
    raise ValueError(
      f"{folder}: contains {_listing(folder)}; expected config.json or one .pt file: give the"
      " folder or the file of a reward model"
    )
  return released[0]


def resolve(name_or_folder: str | Path, allow_patterns: Sequence[str]) -> Path:
  """Returns a local folder unchanged; downloads files of a hub model to the hub's cache.

  If the hub has several copies of the same weights, it downloads one: safetensors rather than
  `.bin`, full precision rather than a variant such as fp16.

  Args:
    name_or_folder: a folder, or a hub name "owner/name".
    allow_patterns: globs of the files to download.

  Raises:
    ValueError: the folder does not exist, or the download failed.
  """
  folder = local_path(name_or_folder)
  if folder.is_dir():
    return folder
  name = str(name_or_folder)
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
    raise ValueError(f"{name}: no such folder; give a folder, or a hub name owner/name")
  try:
    return Path(_fetch(name, list(allow_patterns)))
  except Exception as error:  # the hub's and the network's libraries raise many types
    raise ValueError(
      f"{name}: no such folder, and no download from the hub ({type(error).__name__}:"
      f" {first_line(error)}); check the name and the network, or give a downloaded folder"
    ) from error


def _fetch(name: str, patterns: list[str]) -> str:
  """Downloads a hub model to the cache and returns its folder; offline, uses the cached files."""
  from huggingface_hub import HfApi, snapshot_download
  from huggingface_hub.utils import filter_repo_objects

  try:
    listed = [file.rfilename for file in HfApi().model_info(name).siblings or ()]
  except Exception:
    with contextlib.suppress(Exception):
      return snapshot_download(name, allow_patterns=patterns, local_files_only=True)
    raise  # the error of the hub, which says more than the error of the cache
  wanted = list(filter_repo_objects(listed, allow_patterns=patterns))
  return snapshot_download(name, allow_patterns=without_copies(wanted))


def read_config(folder: str | Path, file: str = "config.json") -> dict[str, Any]:
  """Reads a file with one JSON object, such as a network's `config.json`.

  Raises:
    ValueError: the file is missing or is not a JSON object.
  """
  path = Path(folder) / file
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise ValueError(f"{path}: not found; give the folder of a model that has it") from error
  except OSError as error:
    raise ValueError(f"{path}: cannot be read ({error.strerror}); check the file") from error
  except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(f"{path}: not valid JSON ({first_line(error)}); download it again") from error
  if not isinstance(config, dict):
    raise ValueError(
      f"{path}: contains a {type(config).__name__}; expected a JSON object; download it again"
    )
  return config


def load_tensors(
  folder: str | Path, stem: str, variant: str | None = None
) -> dict[str, np.ndarray]:
  """Reads the tensors of `{stem}.safetensors`, in one file or in shards; floats as float32.

  Args:
    folder: the folder of the files.
    stem: file name without extensions.
    variant: variant of the files, such as "fp16". None: full precision if present, else fp16, else
      any variant. Torch's `.bin` files are read only if there are no safetensors.
  """
  path = _weights_file(Path(folder), stem, variant)
  if path.suffix != ".json":
    return load_file(path)
  shard_of = read_config(path.parent, path.name).get("weight_map")
  if not isinstance(shard_of, dict) or not all(
    isinstance(shard, str) and re.fullmatch(r"[^/\\]+\.(safetensors|bin)", shard)
    for shard in shard_of.values()
  ):
    raise ValueError(
      f"{path}: weight_map is not an object of names of files in this folder; download it again"
    )
  tensors: dict[str, np.ndarray] = {}
  for shard in sorted(set(shard_of.values())):
    found = load_file(path.parent / shard)
    listed = {name for name, file in shard_of.items() if file == shard}
    if differing := sorted(found.keys() ^ listed):
      raise ValueError(
        f"{path}: index and shards differ in {len(differing)} tensors, such as {differing[0]};"
        " download them again"
      )
    tensors |= found
  return tensors


def load_params(
  folder: str | Path, template: names.Params, variant: str | None = None
) -> names.Params:
  """Loads the parameters of a network.

  Args:
    folder: the network's folder, such as `pipeline / "unet"`.
    template: tree of arrays or shapes with the structure, shapes and dtypes of the parameters.
    variant: variant of the weights files; see `load_tensors`.

  Raises:
    ValueError: a file is missing or damaged, or its tensors do not match `template`.
  """
  stem = names.kind_of(template).stem
  return names.to_tree(load_tensors(folder, stem, variant), template, what=str(folder))


def save_params(folder: str | Path, params: names.Params, dtype: str = "float32") -> None:
  """Writes a network's parameters under names that all versions of the stock libraries read.

  Raises:
    ValueError: a parameter is not finite as `dtype`, and the first is named; or `dtype` is no type
      of weights.
  """
  check("dtype", str(dtype), SAVED_TYPES)
  stem = names.kind_of(params).stem
  tensors = {}
  for name, tensor in names.to_torch(params).items():
    with np.errstate(over="ignore"):  # reported below
      tensors[name] = tensor.astype(dtype, copy=False)
    names.check_finite(name, tensors[name], f"{folder}: not written")
  save_tensors(Path(folder) / f"{stem}.safetensors", tensors)


def load_reward(path: str | Path, template: names.Params) -> names.Params:
  """Loads the parameters of a reward network.

  Args:
    path: a folder that `save_params` wrote, or a released checkpoint file.
    template: tree of arrays or shapes with the structure, shapes and dtypes of the parameters.

  Raises:
    ValueError: a file is missing or damaged, or its tensors do not match `template`.
  """
  if Path(path).is_dir():
    return load_params(path, template)
  tensors = names.convert_released_reward(load_file(path), what=str(path))
  return names.to_tree(tensors, template, what=str(path))


def _weights_file(folder: Path, stem: str, variant: str | None) -> Path:
  """Finds the preferred weights file, or the index of its shards."""
  stems = (stem, "pytorch_model") if stem == "model" else (stem,)  # transformers' stem of .bin
  present = sorted(path.name for path in folder.glob("*"))
  candidates = [
    (parsed.generation, parsed.is_index, name)
    for name in present
    if (parsed := WeightsFile.parse(name)) and parsed.stem in stems and not parsed.is_shard
    if variant in (None, parsed.generation[-1])
  ]
  if not candidates:
    wanted = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    raise ValueError(
      f"{folder}: no {wanted}, found {_listing(folder)}; give a folder that contains it"
    )
  return folder / min(candidates)[-1]


def _listing(folder: Path) -> str:
  """Names the first files of a folder, and counts the others."""
  names = sorted(path.name for path in folder.glob("*"))
  more = [f"{len(names) - 5} more"] if len(names) > 6 else []
  return ", ".join([*names[: 5 if more else 6], *more]) or "nothing"
