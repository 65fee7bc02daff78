"""Conversion of PyTorch tensors by name to Flax parameter trees and back.

Linen modules have the names of diffusers and transformers, with ".N" written "_N": the tensor
`down_blocks.0.resnets.1.conv1.weight` is the leaf `down_blocks_0/resnets_1/conv1/kernel`. One rule
therefore converts the names of all models. Short ordered lists of (regex, replacement) first
convert names of older library versions to current names.
"""
# Shapes: O outputs, I inputs, H W kernel height and width.

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from prefpaint_jax.weights import open_clip

Params = dict[str, Any]  # a tree of arrays, as nested dictionaries
Upgrade = Sequence[tuple[str, str]]  # (regex, replacement), applied in order by re.sub

# The only module names whose final number is part of the name and not a list index.
_LITERAL_MODULES = frozenset({"linear_1", "linear_2"})
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

# Axes of a Flax kernel in the order of torch's, by rank: HWIO to OIHW, IO to OI.
_KERNEL_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}


class Kind(NamedTuple):
  """How weights files store one kind of model."""

  stem: str  # file name without extensions
  upgrade: Upgrade = ()  # from older names to current names
  drop: tuple[str, ...] = ()  # regexes of tensors in files that the model does not use


# Kinds, by a module at the root of the tree that no other kind has.
_KINDS = {
  "conv_in": Kind("diffusion_pytorch_model"),  # UNet
  # VAE. Most Stable Diffusion 1 and 2 folders have the names of diffusers' first attention block.
  "decoder": Kind(
    "diffusion_pytorch_model",
    upgrade=tuple(
      (rf"(\.mid_block\.attentions\.\d+)\.{old}\.", rf"\1.{new}.")
      for old, new in (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
      )
    ),
  ),
  # A whole CLIP model: both towers, their projections and the scale of the cosine.
  "logit_scale": Kind("model", drop=(r"(text|vision)_model\.embeddings\.position_ids",)),
  # Text encoder. transformers 5 saves it without the prefix "text_model." of earlier versions. The
  # model does not use `position_ids` (0, 1, 2, ...), or the vision half of a whole CLIP model.
  "text_model": Kind(
    "model",
    upgrade=((r"^(?=(embeddings|encoder|final_layer_norm)\.)", "text_model."),),
    drop=(
      r"text_model\.embeddings\.position_ids",
      r"vision_model\..*|visual_projection\.weight|text_projection\.weight|logit_scale",
    ),
  ),
  "vision_model": Kind(
    "model",
    drop=(
      r"vision_model\.embeddings\.position_ids",
      r"text_model\..*|text_projection\.weight|logit_scale",
    ),
  ),
  "encoder_layer": Kind("model"),  # reward network
  # ImageReward. The projections are those of BLIP's contrastive loss.
  "blip": Kind(
    "ImageReward",
    drop=(
      r"blip\.text_encoder\.embeddings\.position_ids",
      r"blip\.(vision|text)_proj\.(weight|bias)",
    ),
  ),
  "lin0": Kind("lpips", drop=(r"classifier\..*",)),  # the classifier's last layers
}


def kind_of(tree: Params) -> Kind:
  """Returns the kind of model of a parameter tree or template.

  Raises:
    ValueError: no kind has such a tree.
  """
  for root, kind in _KINDS.items():
    if root in tree:
      return kind
  raise ValueError(
    f"parameters have {', '.join(tree)} at the root; expected one of {', '.join(_KINDS)}: give the"
    " parameters of one network"
  )


def torch_name(path: Sequence[str]) -> str:
  """Converts ("down_blocks_0", "conv", "kernel") to "down_blocks.0.conv.weight"."""
  *modules, leaf = path
  dotted = (m if m in _LITERAL_MODULES else re.sub(r"_(\d+)$", r".\1", m) for m in modules)
  return ".".join((*dotted, _LEAF_NAMES.get(leaf, leaf)))


def to_tree(tensors: Mapping[str, np.ndarray], template: Params, *, what: str) -> Params:
  """Converts tensors by torch name to a parameter tree.

  Each tensor fills one leaf, or is listed as unused by this kind of model; each leaf is filled by
  one tensor. A leaf is a view of its tensor if their dtypes are equal.

  Args:
    tensors: torch name -> tensor.
    template: tree of arrays or shapes with the structure, shapes and dtypes of the result.
    what: the file or folder, with which an error begins.

  Raises:
    ValueError: tensors are missing, unexpected, repeated, or of another shape (it names them all),
      or one is not finite or not floating-point.
  """
  leaves = {torch_name(path): (path, leaf) for path, leaf in flatten_dict(template).items()}
  kind = kind_of(template)
  filled: dict[tuple[str, ...], np.ndarray] = {}
  unexpected, repeated, misshapen = [], [], []
  for found_name, tensor in tensors.items():
    name = found_name
    for pattern, replacement in kind.upgrade:
      name = re.sub(pattern, replacement, name)
    if name not in leaves:
      if not any(re.fullmatch(pattern, name) for pattern in kind.drop):
        unexpected.append(found_name)
      continue
    path, leaf = leaves[name]
    axes = _kernel_axes(path[-1], len(leaf.shape))
    expected = tuple(leaf.shape[axis] for axis in axes)
    if name != found_name and tensor.shape == (*expected, 1, 1):
      tensor = tensor[..., 0, 0]  # the oldest files store a dense kernel as a 1x1 convolution
    if tensor.dtype.kind in "iubc":
      raise ValueError(
        f"{what}: {found_name} is {tensor.dtype}; expected floating-point numbers; quantised "
        "weights are not supported, download the full-precision files"
      )
    check_finite(found_name, tensor, what)
    if path in filled:
      repeated.append(found_name)
    filled[path] = tensor
    if tensor.shape != expected:
      misshapen.append(f"{found_name} is {list(tensor.shape)}, not {list(expected)}")
    else:
      filled[path] = tensor.transpose(np.argsort(axes)).astype(leaf.dtype, copy=False)
  missing = [name for name, (path, _) in leaves.items() if path not in filled]
  errors = {
    "missing": missing,
    "unexpected": unexpected,
    "present under two names": repeated,
    "of another shape": misshapen,
  }
  if any(errors.values()):
    report = "; ".join(
      f"{len(found)} {error}: {first_names(found)}" for error, found in errors.items() if found
    )
    raise ValueError(f"{what}: tensors {report}; give weights and config of the same model")
  return unflatten_dict(filled)


def check_finite(name: str, tensor: np.ndarray, what: str) -> None:
  """Raises ValueError if a tensor is not finite; takes no memory, a NaN is its own extreme."""
  if tensor.size and not (np.isfinite(np.min(tensor)) and np.isfinite(np.max(tensor))):
    raise ValueError(
      f"{what}: {name} of {list(tensor.shape)} has values that are not finite in {tensor.dtype}; "
      "use weights that are"
    )


def to_torch(params: Params) -> dict[str, np.ndarray]:
  """Converts a parameter tree to contiguous tensors by torch name; the inverse of `to_tree`."""
  tensors = {}
  for path, leaf in flatten_dict(params).items():
    axes = _kernel_axes(path[-1], leaf.ndim)
    tensors[torch_name(path)] = np.ascontiguousarray(np.asarray(leaf).transpose(axes))
  return tensors


def _kernel_axes(leaf_name: str, rank: int) -> tuple[int, ...]:
  """Returns the axes of a leaf in the order of torch's tensor."""
  return _KERNEL_AXES[rank] if leaf_name == "kernel" else tuple(range(rank))


def first_names(names: Sequence[str], count: int = 4) -> str:
  return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# The released reward: OpenAI's CLIP, the fusion layer (`vit_block`) and the head (`mlp`).
_RELEASED_RENAMES: Upgrade = (
  *open_clip.vision_rules("clip_model.", "clip."),
  (r"^vit_block\.transformer_encoder\.layers\.0\.", "encoder_layer."),
)
_RELEASED_UNUSED = re.compile(
  r"clip_model\.(transformer|token_embedding|ln_final)\..*"
  r"|clip_model\.(positional_embedding|text_projection|logit_scale)"
  r"|vit_block\.encoder_layer\..*"  # the layer that torch's TransformerEncoder copied
  r"|mlp\.last_layer_weight"
)
_REWARD_NAMES = re.compile(
  r"(clip\.vision_model|clip\.visual_projection|encoder_layer|mlp\.layers\.[02]|mlp\.last_layer)\..+"
)


def convert_released_reward(
  state_dict: Mapping[str, np.ndarray], *, what: str = "reward checkpoint"
) -> dict[str, np.ndarray]:
  """Converts the released reward checkpoint to float32 tensors with the names of `RewardNetwork`.

  It splits the fused query-key-value projections [3·O, I] and transposes CLIP's visual projection
  to [O, I]. It drops the text tower, the unused copy of the fusion layer and the alias of the head.

  Args:
    state_dict: tensors by their released names.
    what: the file, with which an error begins.

  Raises:
    ValueError: a name is unknown or occurs twice, or the alias differs from the head.
  """
  if twice := [name for name in state_dict if f"module.{name}" in state_dict]:
    raise ValueError(
      f"{what}: {len(twice)} tensors with and without the prefix 'module.': {first_names(twice)};"
      " remove one of each pair"
    )
  source = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
  alias, head = source.get("mlp.last_layer_weight"), source.get("mlp.last_layer.weight")
  if alias is not None and head is not None and not np.array_equal(alias.ravel(), head.ravel()):
    raise ValueError(
      f"{what}: mlp.last_layer_weight differs from mlp.last_layer.weight, an alias in the"
      " released network; give a checkpoint with one head"
    )
  converted, unknown = {}, []
  for old_name, tensor in source.items():
    if _RELEASED_UNUSED.fullmatch(old_name):
      continue
    name = old_name
    for pattern, replacement in _RELEASED_RENAMES:
      name = re.sub(pattern, replacement, name)
    tensor = np.asarray(tensor, np.float32)
    if old_name == "clip_model.visual.proj":
      tensor = tensor.T
    if not _REWARD_NAMES.fullmatch(name):
      unknown.append(old_name)
    else:
      converted |= open_clip.split_fused(name, tensor)
  if unknown:
    raise ValueError(
      f"{what}: {len(unknown)} unknown tensors: {first_names(unknown)};"
      " give the state dict of the released reward network"
    )
  return converted
