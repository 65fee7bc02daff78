"""PyTorch tensor names <-> our parameter trees: one renaming rule, one leaf rule, total and strict.

Linen attributes carry the names that diffusers and transformers use, with ".N" written "_N":
`down_blocks.0.resnets.1.conv1.weight` is the leaf `down_blocks_0/resnets_1/conv1/kernel`, and no
table per model is needed. Names of an older generation are first brought to today's by short
ordered lists of (regex, replacement).
"""
# Shapes: O outputs, I inputs, H W kernel height and width.

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[str, Any]
Upgrade = Sequence[tuple[str, str]]  # (regex, replacement), each applied in turn by re.sub

# The only module names that end in a number of their own, not in a list index.
_LITERAL_MODULES = frozenset({"linear_1", "linear_2"})
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

# Where torch's axes lie in our kernels, by rank: OIHW in HWIO, OI in IO.
_KERNEL_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}


class Kind(NamedTuple):
  """How files hold one kind of model: stem of their name, older names, names knowingly left out."""

  stem: str
  upgrade: Upgrade = ()
  drop: tuple[str, ...] = ()


# Kinds by a module that no other kind has at the root of its tree.
_KINDS = {
  "conv_in": Kind("diffusion_pytorch_model"),  # UNet
  # Diffusers' first attention block: most Stable Diffusion 1 and 2 folders still have its names.
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
  # transformers 5 saves a text encoder without the prefix that all earlier versions wrote. Besides
  # `position_ids` (0, 1, 2, ...) the other half of a whole CLIP model is left out.
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
}


def kind_of(tree: Params) -> Kind:
  """The kind of model that a parameter tree, or its template, belongs to."""
  for root, kind in _KINDS.items():
    if root in tree:
      return kind
  raise ValueError(f"parameters: {', '.join(tree)} at the root; no kind of model known has these")


def torch_name(path: Sequence[str]) -> str:
  """("down_blocks_0", "conv", "kernel") -> "down_blocks.0.conv.weight"."""
  *modules, leaf = path
  dotted = (m if m in _LITERAL_MODULES else re.sub(r"_(\d+)$", r".\1", m) for m in modules)
  return ".".join((*dotted, _LEAF_NAMES.get(leaf, leaf)))


def to_tree(tensors: Mapping[str, np.ndarray], template: Params, *, what: str) -> Params:
  """Parameter tree from torch-named tensors, with the shapes and dtypes of `template`'s leaves.

  Every tensor is used exactly once, or known not to be needed by models of this kind; every leaf is
  filled exactly once. Anything else is one ValueError that begins with `what` (the file or folder)
  and names the tensors. Where the dtype allows, leaves are views of the tensors.
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
      tensor = tensor[..., 0, 0]  # the oldest files write a Dense as a 1x1 convolution
    if path in filled:
      repeated.append(found_name)
    filled[path] = tensor
    if tensor.shape != expected:
      misshapen.append(f"{found_name} is {list(tensor.shape)}, not {list(expected)}")
    else:
      filled[path] = tensor.transpose(np.argsort(axes)).astype(leaf.dtype, copy=False)
  missing = [name for name, (path, _) in leaves.items() if path not in filled]
  faults = {
    "missing": missing,
    "unexpected": unexpected,
    "present under two names": repeated,
    "of another shape": misshapen,
  }
  if any(faults.values()):
    report = "; ".join(
      f"{len(found)} {fault}: {_first(found)}" for fault, found in faults.items() if found
    )
    raise ValueError(f"{what}: tensors {report}; check that weights and config belong together")
  return unflatten_dict(filled)


def to_torch(params: Params) -> dict[str, np.ndarray]:
  """Torch-named contiguous tensors of a parameter tree; the exact inverse of `to_tree`."""
  tensors = {}
  for path, leaf in flatten_dict(params).items():
    axes = _kernel_axes(path[-1], leaf.ndim)
    tensors[torch_name(path)] = np.ascontiguousarray(np.asarray(leaf).transpose(axes))
  return tensors


def _kernel_axes(leaf_name: str, rank: int) -> tuple[int, ...]:
  return _KERNEL_AXES[rank] if leaf_name == "kernel" else tuple(range(rank))


def _first(names: Sequence[str], count: int = 4) -> str:
  return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# The released reward: OpenAI's CLIP, the fusion layer (`vit_block`) and the head (`mlp`).
_VISION = "clip.vision_model"
_RELEASED_RENAMES: Upgrade = (
  (r"^clip_model\.visual\.conv1\.", f"{_VISION}.embeddings.patch_embedding."),
  (r"^clip_model\.visual\.class_embedding$", f"{_VISION}.embeddings.class_embedding"),
  (
    r"^clip_model\.visual\.positional_embedding$",
    f"{_VISION}.embeddings.position_embedding.weight",
  ),
  (r"^clip_model\.visual\.ln_pre\.", f"{_VISION}.pre_layrnorm."),
  (r"^clip_model\.visual\.ln_post\.", f"{_VISION}.post_layernorm."),
  (r"^clip_model\.visual\.proj$", "clip.visual_projection.weight"),
  (r"^clip_model\.visual\.transformer\.resblocks\.", f"{_VISION}.encoder.layers."),
  (r"\.attn\.", ".self_attn."),
  (r"\.ln_([12])\.", r".layer_norm\1."),
  (r"\.mlp\.c_fc\.", ".mlp.fc1."),
  (r"\.mlp\.c_proj\.", ".mlp.fc2."),
  (r"^vit_block\.transformer_encoder\.layers\.0\.", "encoder_layer."),
)
_RELEASED_UNUSED = re.compile(
  r"clip_model\.(transformer|token_embedding|ln_final)\..*"
  r"|clip_model\.(positional_embedding|text_projection|logit_scale)"
  r"|vit_block\.encoder_layer\..*"  # what torch's TransformerEncoder copied its layers from
  r"|mlp\.last_layer_weight"
)
_REWARD_NAMES = re.compile(
  r"(clip\.vision_model|clip\.visual_projection|encoder_layer|mlp\.layers\.[02]|mlp\.last_layer)\..+"
)


def convert_released_reward(
  state_dict: Mapping[str, np.ndarray], *, what: str = "reward checkpoint"
) -> dict[str, np.ndarray]:
  """The released reward checkpoint's tensors under the names of our reward network, float32.

  Splits the fused query-key-value projections [3·O, I] and transposes CLIP's visual projection to
  [O, I]. Leaves out the text tower, the unused copy of the fusion layer and the alias of the head;
  any other unknown name is a ValueError.
  """
  if twice := [name for name in state_dict if f"module.{name}" in state_dict]:
    raise ValueError(
      f"{what}: {len(twice)} tensors with and without the prefix 'module.': {_first(twice)};"
      " give one of each"
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
    elif fused := re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name):
      # One that is not of three equal parts is left to `to_tree`, which names it.
      for part, values in zip("qkv", np.array_split(tensor, 3), strict=True):
        converted[f"{fused[1]}.{part}_proj.{fused[2]}"] = values
    else:
      converted[name] = tensor
  if unknown:
    raise ValueError(
      f"{what}: {len(unknown)} unknown tensors: {_first(unknown)};"
      " give the state dict of the released reward network"
    )
  return converted
