"""Files of LoRA adapters: the layout of PEFT and diffusers, and that of kohya's scripts.

A module of the UNet has two matrices, "down" A [r, I] and "up" B [O, r]; the merged kernel is
W + scale * alpha/r * B A. Names of earlier versions of diffusers are read too.
"""
# Shapes: I inputs, O outputs, H W kernel height and width, r rank.

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from prefpaint_jax.runtime.files import atomic_path, parse_json
from prefpaint_jax.runtime.ranges import Number, shorten
from prefpaint_jax.weights.adapter_names import COMPVIS, LAYOUTS, modules, torch_module
from prefpaint_jax.weights.files import load_file, save_tensors
from prefpaint_jax.weights.folder import local_path
from prefpaint_jax.weights.names import Params, check_finite, first_names

FILE_NAME = "pytorch_lora_weights.safetensors"  # in a folder
SCALE = Number(-1000, 1000)

# What follows a module in the name of a tensor. The names of the first attention processors of
# diffusers are `attn1.processor.to_q_lora.down.weight`, later `attn1.to_q.lora.down.weight`.
_ENDINGS = {
  ".lora_A.weight": "down",
  ".lora_B.weight": "up",
  ".lora_down.weight": "down",
  ".lora_up.weight": "up",
  ".lora.down.weight": "down",
  ".lora.up.weight": "up",
  "_lora.down.weight": "down",
  "_lora.up.weight": "up",
}
_ALPHA = ".alpha"  # of kohya's layout
# Parts of names of adapters that are not W + B A.
_OTHER_KINDS = {
  "dora_scale": "DoRA",
  "lora_magnitude_vector": "DoRA",
  "hada_": "LoHa",
  "lokr_": "LoKr",
  "lora_mid": "LoCon with a core tensor",
  "oft_": "OFT",
}
_TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")

# diffusers' metadata of a file: the config of PEFT. Of its other fields, those that are set and not
# listed here change the result.
_METADATA = "lora_adapter_metadata"
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_HARMLESS = {  # of training, of the choice of modules, or read only where another field is set
  *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
  *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config"),
  *("lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision"),
  *("target_modules", "task_type"),
}
_VALUES = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian")}


def save(path: Path, adapters: Params, base: Params, layout: str) -> None:
  """Writes adapters to a safetensors file, whole or not at all.

  Args:
    path: the file.
    adapters: tree with {"down": [H W I, r], "up": [r, O]} at the paths of kernels of `base`.
    base: arrays or shapes of the UNet's parameters.
    layout: "diffusers" or "kohya". Alpha is r, so that the merged kernel is W + B A.

  Raises:
    ValueError: a number is not finite, and its tensor is named.
  """
  pairs, kernels = flatten_dict(adapters), flatten_dict(base)
  names = {kernel: module for module, kernel in modules(base, layout).items()}
  tensors = {}
  for kernel in sorted({path[:-1] for path in pairs}):
    module = names[kernel]
    down, up = (np.asarray(pairs[*kernel, part]) for part in ("down", "up"))
    *spatial, inputs, _ = kernels[kernel].shape
    rank = len(up)
    down = np.moveaxis(down.reshape(*spatial, inputs, rank), (-1, -2), (0, 1))
    up = up.T.reshape(-1, rank, *(1 for _ in spatial))
    ends = ("lora_A", "lora_B") if layout == "diffusers" else ("lora_down", "lora_up")
    for end, tensor in zip(ends, (down, up), strict=True):
      name = f"{module}.{end}.weight"
      check_finite(name, tensor, f"{path}: not written")
      tensors[name] = np.ascontiguousarray(tensor)
    if layout == "kohya":
      tensors[module + _ALPHA] = np.array(rank, np.float32)
  with atomic_path(path) as temporary:
    save_tensors(temporary, tensors)


def parse(name: str | Path) -> tuple[Path, float]:
  """Splits "FILE" or "FILE:SCALE" into a file and a scale; a folder gives its standard file.

  Raises:
    ValueError: there is no such file, or the scale is no number in its range.
  """
  path, scale = local_path(name, "lora"), 1.0
  if not path.exists() and ":" in str(name):
    file, _, text = str(name).rpartition(":")
    path = local_path(file, "lora")
    try:
      scale = float(text)
    except ValueError:
      scale = math.nan
    if not SCALE.contains(scale):
      raise ValueError(f"lora is {name}: its scale is {text!r}; expected {SCALE}; give FILE:0.8")
  file = path / FILE_NAME if path.is_dir() else path
  if not file.is_file():
    raise ValueError(
      f"{file}: not found; give a file of LoRA adapters, or a folder with {FILE_NAME}"
    )
  return file, scale


def load(path: Path, base: Params, scale: float = 1.0) -> Params:
  """Reads the adapters of a UNet; `up` includes scale * alpha/r.

  Args:
    path: the file.
    base: arrays or shapes of the UNet's parameters.
    scale: factor of the adapters.

  Returns:
    Tree with {"down": [H W I, r], "up": [r, O]} at the path of each kernel that has adapters.

  Raises:
    ValueError: the file has adapters of another kind, model or network, half of a pair, or numbers
      that are not finite.
  """
  pairs, alphas = _group(path, load_file(path))
  config = _read_metadata(path)
  kernels = flatten_dict(base)
  known = max((modules(base, x) for x in (*LAYOUTS, COMPVIS)), key=lambda x: len(pairs & x.keys()))
  if unknown := [module for module in pairs if module not in known]:
    raise ValueError(
      f"{path}: adapters of {len(unknown)} modules that the UNet does not have: "
      f"{first_names(unknown)}; give adapters of this model, in one layout"
    )
  if half := [module for module, pair in pairs.items() if len(pair) < 2]:
    raise ValueError(
      f"{path}: only the half {next(iter(pairs[half[0]]))!r} of {len(half)} pairs, such as "
      f"{half[0]}; download the file again"
    )
  if alphas and (config is not None or alphas.keys() != pairs.keys()):
    raise ValueError(
      f"{path}: alpha of {len(alphas)} of {len(pairs)} modules"
      f"{'' if config is None else ' and in its metadata'}; expected all or none; write it again"
    )
  adapters = {}
  for module, pair in pairs.items():
    kernel = known[module]
    *spatial, inputs, outputs = kernels[kernel].shape
    down, up = pair["down"], pair["up"]
    rank, *_ = (*down.shape, 0)
    expected = (rank, inputs, *spatial), (outputs, rank, *(1,) * len(spatial))
    if (down.shape, up.shape) != expected or not rank:
      raise ValueError(
        f"{path}: {module} has a pair of {list(down.shape)} and {list(up.shape)}; expected "
        f"[rank, {', '.join(map(str, expected[0][1:]))}] and [{outputs}, rank"
        f"{', 1, 1' if spatial else ''}]; give adapters of this model"
      )
    alpha = alphas.get(module, rank)
    factor = alpha / rank if config is None else _factor(config, torch_module(kernel), rank, path)
    with np.errstate(over="ignore"):  # reported below
      up = up.reshape(outputs, rank).T * np.float32(scale * factor)
    check_finite(module, up, str(path))
    down = np.moveaxis(down, (0, 1), (-1, -2)).reshape(-1, rank)
    adapters[*kernel, "down"], adapters[*kernel, "up"] = map(np.ascontiguousarray, (down, up))
  return unflatten_dict(adapters)


def _group(
  path: Path, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
  """Sorts the tensors of a file into {module: {"down", "up"}} and {module: alpha}."""
  pairs: dict[str, dict[str, np.ndarray]] = {}
  alphas: dict[str, float] = {}
  others, texts = [], []
  for name, tensor in tensors.items():
    for part, kind in _OTHER_KINDS.items():
      if part in name:
        raise ValueError(
          f"{path}: {name} is of {kind}; expected pairs of matrices of LoRA; give such a file"
        )
    ending = next((end for end in _ENDINGS if name.endswith(end)), None)
    if name.startswith(_TEXT_ENCODERS):
      if _ENDINGS.get(ending) != "down" and not name.endswith(_ALPHA) and tensor.any():
        texts.append(name)
    elif ending:
      if tensor.dtype.kind != "f":
        raise ValueError(
          f"{path}: {name} is {tensor.dtype}; expected floating-point numbers; give adapters that "
          "are not quantised"
        )
      check_finite(name, tensor, str(path))
      module = name.removesuffix(ending).replace(".processor.", ".")
      if ending.startswith("_"):
        module = re.sub(r"\.to_out$", ".to_out.0", module)
      pair = pairs.setdefault(module, {})
      if _ENDINGS[ending] in pair:
        raise ValueError(f"{path}: two tensors of {module}, such as {name}; remove one of them")
      pair[_ENDINGS[ending]] = tensor
    elif name.startswith("lora_unet_") and name.endswith(_ALPHA) and tensor.size == 1:
      check_finite(name, tensor, str(path))
      alphas[name.removesuffix(_ALPHA)] = float(tensor.item())
    else:
      others.append(name)
  if others or not (pairs or texts):
    found = (
      f"{len(others)} tensors of another kind, such as {first_names(others)}" if others else "none"
    )
    raise ValueError(
      f"{path}: expected LoRA adapters of a UNet, has {found}; give the file of a LoRA"
    )
  if texts:
    raise ValueError(
      f"{path}: adapters of a text encoder, {len(texts)} tensors such as {texts[0]}; expected "
      "those of the UNet, the only network that takes them; give a file without the others"
    )
  return pairs, alphas


# ---------------------------------------------------------------------------------------- metadata
def _read_metadata(path: Path) -> dict[str, Any] | None:
  """Returns PEFT's config of the UNet's adapters, which diffusers stores in a file; None: none.

  Raises:
    ValueError: a field is set that would change the result.
  """
  if path.suffix != ".safetensors":
    return None
  with safe_open(path, framework="numpy") as file:
    text = (file.metadata() or {}).get(_METADATA)
  if not text:
    return None
  stored = parse_json(text, f"{path}: {_METADATA}")
  config = {name.removeprefix("unet."): x for name, x in stored.items() if name.startswith("unet.")}
  for name, value in config.items():
    if value and name not in _READ | _HARMLESS and value not in _VALUES.get(name, ()):
      raise ValueError(
        f"{path}: {_METADATA} has {name} {shorten(value)}, which is not supported; expected "
        f"{' or '.join(map(repr, _VALUES.get(name, (None,))))}; give plain LoRA adapters"
      )
  return config


def _factor(config: Mapping[str, Any], module: str, rank: int, path: Path) -> float:
  """Returns alpha/r of a module as PEFT computes it from its config, or alpha/√r for rsLoRA.

  Raises:
    ValueError: r is not the rank of the tensors, or alpha is no number.
  """

  def value(field: str, patterns: str) -> Any:
    table = config.get(patterns) or {}
    try:
      matches = (x for key, x in table.items() if re.match(rf"(.*\.)?({key})$", module))
      return next(matches, config.get(field, 8))
    except (AttributeError, re.error):
      return None

  r, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
  if r != rank or not Number(-1e6, 1e6).contains(alpha):
    raise ValueError(
      f"{path}: {_METADATA} gives {module} the rank {shorten(r)} and alpha {shorten(alpha)}; "
      f"expected {rank}, that of the tensors, and a number; write the file again"
    )
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
