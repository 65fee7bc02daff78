"""Names of CLIP models in the layout of OpenAI and open_clip, as names of transformers.

A vision tower begins with `visual.`, a text tower has no prefix; both have fused projections to
queries, keys and values, and projections of the output that are stored as [I, O].
"""
# Shapes: O outputs, I inputs.

import re
from collections.abc import Mapping

import numpy as np

Rules = tuple[tuple[str, str], ...]  # (regex, replacement), applied in order by re.sub

_LAYERS: Rules = (
  (r"\.attn\.", ".self_attn."),
  (r"\.ln_([12])\.", r".layer_norm\1."),
  (r"\.mlp\.c_fc\.", ".mlp.fc1."),
  (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def vision_rules(found: str = "", wanted: str = "") -> Rules:
  """Returns the rules of a vision tower, after a prefix of the file and one of the result."""
  old, new = rf"^{re.escape(found)}visual\.", f"{wanted}vision_model."
  return (
    (rf"{old}conv1\.", f"{new}embeddings.patch_embedding."),
    (rf"{old}class_embedding$", f"{new}embeddings.class_embedding"),
    (rf"{old}positional_embedding$", f"{new}embeddings.position_embedding.weight"),
    (rf"{old}ln_pre\.", f"{new}pre_layrnorm."),  # transformers spells it so
    (rf"{old}ln_post\.", f"{new}post_layernorm."),
    (rf"{old}proj$", f"{wanted}visual_projection.weight"),
    (rf"{old}transformer\.resblocks\.", f"{new}encoder.layers."),
    *_LAYERS,
  )


def text_rules(found: str = "") -> Rules:
  """Returns the rules of a text tower, after a prefix of the file."""
  old, new = rf"^{re.escape(found)}", "text_model."
  return (
    (rf"{old}positional_embedding$", f"{new}embeddings.position_embedding.weight"),
    (rf"{old}token_embedding\.", f"{new}embeddings.token_embedding."),
    (rf"{old}ln_final\.", f"{new}final_layer_norm."),
    (rf"{old}text_projection$", "text_projection.weight"),
    (rf"{old}transformer\.resblocks\.", f"{new}encoder.layers."),
    *_LAYERS,
  )


def split_fused(name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
  """Splits a fused projection [3 O, I] to queries, keys and values; keeps any other tensor.

  If the tensor is not three equal parts, `to_tree` reports the parts of a wrong shape.
  """
  fused = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
  if fused is None:
    return {name: tensor}
  parts = zip("qkv", np.array_split(tensor, 3), strict=True)
  return {f"{fused[1]}.{part}_proj.{fused[2]}": values for part, values in parts}


def convert(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Converts a whole model to the names and shapes of transformers' CLIPModel.

  It drops the causal mask, which older versions of open_clip stored. An unknown name is kept.
  """
  rules = (*vision_rules(), *text_rules())
  converted: dict[str, np.ndarray] = {}
  for found, tensor in tensors.items():
    name = found = found.removeprefix("module.")  # of a model that several devices trained
    for pattern, replacement in rules:
      name = re.sub(pattern, replacement, name)
    if found in ("visual.proj", "text_projection"):
      tensor = tensor.T
    if found != "attn_mask":
      converted |= split_fused(name, tensor)
  return converted
