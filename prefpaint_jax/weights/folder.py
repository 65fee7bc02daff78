"""Model folders on disk or on the hub: find them, read configs and tensors, write them back.

What is written opens in stock diffusers and transformers.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prefpaint_jax.runtime.text import first_line
from prefpaint_jax.weights import names

_PIPELINE_FILES = (
  "model_index.json",
  *(
    f"{part}/*.{kind}"
    for part in ("unet", "vae", "text_encoder")
    for kind in ("json", "safetensors", "bin")
  ),
  "tokenizer/*",
  "scheduler/*.json",
)
_REWARD_FILES = ("config.json", "*.safetensors", "*.pt")


def resolve_pipeline(name_or_folder: str | Path) -> Path:
  """Folder of a diffusers pipeline, local or from the hub: configs, weights and tokenizer."""
  folder = resolve(name_or_folder, _PIPELINE_FILES)
  if not (folder / "model_index.json").is_file():
    raise ValueError(
      f"{folder}: no model_index.json, so not a diffusers pipeline; give the folder that has unet/,"
      " vae/ and text_encoder/ in it"
    )
  return folder


def resolve_reward(name_or_path: str | Path) -> Path:
  """A reward model, local or from the hub: a folder with `config.json`, or a released `.pt`."""
  path = Path(name_or_path).expanduser()
  if path.is_file():
    return path
  folder = resolve(name_or_path, _REWARD_FILES)
  if (folder / "config.json").is_file():
    return folder
  released = sorted(folder.glob("*.pt"))
  if len(released) != 1:
    raise ValueError(
      f"{folder}: neither config.json nor one .pt file, found {_listing(folder)}; give the folder"
      " or the file of a reward model"
    )
  return released[0]


def resolve(name_or_folder: str | Path, allow_patterns: Sequence[str]) -> Path:
  """The local folder itself, or the hub's files that match `allow_patterns`, fetched and cached.

  Of several copies of the same weights only the preferred one is fetched: safetensors before
  `.bin`, full precision before a variant such as fp16.
  """
  folder = Path(name_or_folder).expanduser()
  if folder.is_dir():
    return folder
  name = str(name_or_folder)
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
    raise ValueError(f"{name}: no such folder, nor a hub name of the form owner/name")
  try:
    return Path(_fetch(name, list(allow_patterns)))
  except Exception as error:  # of the hub's library or the network's: to the user one and the same
    raise ValueError(
      f"{name}: no such folder, nor a hub answer ({type(error).__name__}: {first_line(error)});"
      " check the name and the network, or download it and give the folder"
    ) from error


def _fetch(name: str, patterns: list[str]) -> str:
  """Folder in the hub's cache; without an answer from the hub, what was cached before."""
  from huggingface_hub import HfApi, snapshot_download
  from huggingface_hub.utils import filter_repo_objects

  try:
    listed = [file.rfilename for file in HfApi().model_info(name).siblings or ()]
  except Exception:
    with contextlib.suppress(Exception):
      return snapshot_download(name, allow_patterns=patterns, local_files_only=True)
    raise  # why there is no answer, not what the cache lacks
  wanted = list(filter_repo_objects(listed, allow_patterns=patterns))
  return snapshot_download(name, allow_patterns=_without_second_copies(wanted))


def read_config(folder: str | Path, file: str = "config.json") -> dict[str, Any]:
  """One JSON object, such as a component's `config.json`."""
  path = Path(folder) / file
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise ValueError(f"{path}: not found; give the folder of a model that has it") from error
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: not valid JSON ({first_line(error)}); download it again") from error
  if not isinstance(config, dict):
    raise ValueError(f"{path}: holds a {type(config).__name__}; give a JSON object")
  return config


def load_tensors(
  folder: str | Path, stem: str, variant: str | None = None
) -> dict[str, np.ndarray]:
  """All tensors of `{stem}.safetensors` in `folder`, whole or sharded, floats as float32.

  With `variant` the files of that variant ("fp16"). Without it the full-precision files, else fp16,
  else any other variant; torch's `.bin` files, in the same order, only where no safetensors are.
  """
  path = _weights_file(Path(folder), stem, variant)
  if path.suffix != ".json":
    return load_file(path)
  tensors: dict[str, np.ndarray] = {}
  shard_of = read_config(path.parent, path.name).get("weight_map", {})
  for shard in sorted(set(shard_of.values())):
    tensors |= load_file(path.parent / shard)
  if odd := sorted(tensors.keys() ^ shard_of.keys()):
    raise ValueError(
      f"{path}: index and shards differ in {len(odd)} tensors, {odd[0]} first; download them again"
    )
  return tensors


def load_file(path: str | Path) -> dict[str, np.ndarray]:
  """All tensors of one `.safetensors` file, or a torch file (`.bin`, `.pt`); floats as float32."""
  path = Path(path)
  if not path.is_file():
    raise ValueError(f"{path}: not found; download the folder again")
  if path.suffix == ".safetensors":
    try:
      with safe_open(path, framework="numpy") as file:
        return {name: _float32(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
      raise _unreadable(path, error) from error
  torch, tensors = load_torch(path)
  if not isinstance(tensors, dict) or not all(
    isinstance(t, torch.Tensor) for t in tensors.values()
  ):
    raise ValueError(f"{path}: not a dict of tensors; give a file with a state_dict alone")
  return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}


def load_torch(path: str | Path) -> tuple[Any, Any]:
  """The torch module, and what a torch file holds; pickled code is never run."""
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f"{path}: a torch file; install torch to read it, or give its safetensors form"
    ) from error
  try:
    return torch, torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch's readers raise whatever a damaged file makes of them
    raise _unreadable(Path(path), error) from error


def save_tensors(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a safetensors file that diffusers and transformers open; makes its folder if need be."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  save_file(dict(tensors), path, metadata={"format": "pt"})


def load_params(
  folder: str | Path, template: names.Params, variant: str | None = None
) -> names.Params:
  """Parameters of one network's folder (`pipeline / "unet"`), as `names.to_tree` gives them."""
  stem = names.kind_of(template).stem
  return names.to_tree(load_tensors(folder, stem, variant), template, what=str(folder))


def save_params(folder: str | Path, params: names.Params, dtype: str = "float32") -> None:
  """Writes one network's parameters, under names that old and new stock libraries know."""
  stem = names.kind_of(params).stem
  tensors = {
    name: tensor.astype(dtype, copy=False) for name, tensor in names.to_torch(params).items()
  }
  save_tensors(Path(folder) / f"{stem}.safetensors", tensors)


def load_reward(path: str | Path, template: names.Params) -> names.Params:
  """Parameters of a reward network: of a folder written here, or of a released checkpoint file."""
  if Path(path).is_dir():
    return load_params(path, template)
  tensors = names.convert_released_reward(load_file(path), what=str(path))
  return names.to_tree(tensors, template, what=str(path))


# model.safetensors, model.fp16.safetensors, their shards in the old and the new order of the name's
# parts, the indices of those, and all of these for .bin.
_WEIGHTS = re.compile(
  r"(?P<stem>[^./]+?)(?P<shard>-\d+-of-\d+)?(\.(?P<variant>\w+)(?P<variant_shard>-\d+-of-\d+)?)?"
  r"\.(?P<kind>safetensors|bin)(?P<index>\.index(\.(?P<index_variant>\w+))?\.json)?"
)


class _WeightsFile(NamedTuple):
  """What a weights file's name says; of several copies the least `generation` is best."""

  stem: str
  generation: tuple[bool, bool, bool, str]  # (.bin, a variant, not fp16, the variant)
  is_shard: bool
  is_index: bool

  @classmethod
  def parse(cls, file_name: str) -> "_WeightsFile | None":
    match = _WEIGHTS.fullmatch(file_name)
    if match is None:
      return None
    variant = match["variant"] or match["index_variant"] or ""
    generation = (match["kind"] == "bin", variant != "", variant != "fp16", variant)
    is_shard = bool(match["shard"] or match["variant_shard"])
    return cls(match["stem"], generation, is_shard, bool(match["index"]))


def _weights_file(folder: Path, stem: str, variant: str | None) -> Path:
  """The file with `stem`'s weights, or the index of its shards."""
  stems = (stem, "pytorch_model") if stem == "model" else (stem,)  # transformers' name of a .bin
  present = sorted(path.name for path in folder.glob("*"))
  candidates = [
    (parsed.generation, parsed.is_index, name)
    for name in present
    if (parsed := _WeightsFile.parse(name)) and parsed.stem in stems and not parsed.is_shard
    if variant in (None, parsed.generation[-1])
  ]
  if not candidates:
    wanted = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    raise ValueError(f"{folder}: no {wanted}, found {_listing(folder)}; give a folder that has it")
  return folder / min(candidates)[-1]


def _without_second_copies(files: Sequence[str]) -> list[str]:
  """Leaves out, folder by folder, the weights files of every generation but the preferred one."""
  parsed = {file: _WeightsFile.parse(PurePosixPath(file).name) for file in files}
  best: dict[PurePosixPath, tuple] = {}
  for file, weights in parsed.items():
    if weights:
      parent = PurePosixPath(file).parent
      best[parent] = min(weights.generation, best.get(parent, weights.generation))
  return [
    file
    for file, weights in parsed.items()
    if weights is None or weights.generation == best[PurePosixPath(file).parent]
  ]


def _float32(tensor: np.ndarray) -> np.ndarray:
  return tensor if tensor.dtype.kind in "iub" else tensor.astype(np.float32, copy=False)


def _unreadable(path: Path, error: Exception) -> ValueError:
  return ValueError(
    f"{path}: cannot be read at {path.stat().st_size} bytes ({first_line(error)});"
    " it is truncated or no weights file, get it again"
  )


def _listing(folder: Path) -> str:
  return ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
