"""Single-file checkpoints of Stable Diffusion 1 and 2, in the layout of CompVis.

One file holds all networks. Ordered lists of (regex, replacement) convert its names to those of
diffusers and transformers. A UNet of CompVis numbers its blocks across levels, so its list depends
on the number of levels and of residual blocks in each.
"""
# Shapes: D text width.

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prefpaint_jax.runtime.text import first_line
from prefpaint_jax.weights import open_clip
from prefpaint_jax.weights.files import load_file
from prefpaint_jax.weights.names import Upgrade

Tensors = dict[str, np.ndarray]

SUFFIXES = (".safetensors", ".ckpt")
PREFIXES = {
  "unet": "model.diffusion_model.",
  "vae": "first_stage_model.",
  "text_encoder": "cond_stage_model.",
}
OPEN_CLIP = "model."  # prefix of Stable Diffusion 2's text encoder after that of PREFIXES

# Tensors that no network uses: the noise schedule, the loss of the VAE's training, and the moving
# average of the parameters, which diffusers does not read either. Of OpenCLIP: the causal mask, the
# projection of the pooled output, and the last of 24 layers; layer 23 conditions the UNet.
_UNUSED = re.compile(
  r"(first_stage_model\.)?model_ema\..*|first_stage_model\.loss\..*"
  r"|(sqrt_|log_)?(one_minus_)?(recip(m1)?_)?(alphas|betas)(_cumprod)?(_prev)?"
  r"|posterior_(variance|log_variance_clipped|mean_coef[12])|logvar|scale_factor|lvlb_weights"
  r"|cond_stage_model\.model\.(text_projection|logit_scale|attn_mask)"
  r"|cond_stage_model\.model\.transformer\.resblocks\.23\..*|cond_stage_model\.logit_scale"
)

_RESNET: Upgrade = (
  (r"\.in_layers\.0\.", ".norm1."),
  (r"\.in_layers\.2\.", ".conv1."),
  (r"\.emb_layers\.1\.", ".time_emb_proj."),
  (r"\.out_layers\.0\.", ".norm2."),
  (r"\.out_layers\.3\.", ".conv2."),
  (r"\.skip_connection\.", ".conv_shortcut."),
)
_UNET_ENDS: Upgrade = (
  (r"^time_embed\.0\.", "time_embedding.linear_1."),
  (r"^time_embed\.2\.", "time_embedding.linear_2."),
  (r"^input_blocks\.0\.0\.", "conv_in."),
  (r"^out\.0\.", "conv_norm_out."),
  (r"^out\.2\.", "conv_out."),
  (r"^middle_block\.0\.", "mid_block.resnets.0."),
  (r"^middle_block\.1\.", "mid_block.attentions.0."),
  (r"^middle_block\.2\.", "mid_block.resnets.1."),
)
_VAE: Upgrade = (
  (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
  (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
  (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
  (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
  (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
  (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
  (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
  (r"\.nin_shortcut\.", ".conv_shortcut."),
  (r"\.norm_out\.", ".conv_norm_out."),
)
_CLIP: Upgrade = ((r"^transformer\.", ""),)
_OPEN_CLIP: Upgrade = open_clip.text_rules(OPEN_CLIP)


class UNetBlocks(NamedTuple):
  """The numbers that place a UNet's blocks."""

  levels: int
  layers: int  # residual blocks of each level of the encoder; the decoder has one more

  @classmethod
  def of(cls, tensors: Mapping[str, np.ndarray]) -> "UNetBlocks":
    """Reads them from CompVis' names without their prefix."""
    blocks = [int(m[1]) for name in tensors if (m := re.match(r"input_blocks\.(\d+)\.", name))]
    halving = sorted(n for n in set(blocks) if f"input_blocks.{n}.0.op.weight" in tensors)
    return cls(len(halving) + 1, halving[0] - 1 if halving else max(blocks, default=0))


def read(path: Path) -> dict[str, Tensors]:
  """Reads a checkpoint's tensors by network, in float32, with CompVis' names without prefixes.

  Raises:
    ValueError: the file is damaged, of another kind, or lacks a network.
  """
  if path.suffix not in SUFFIXES:
    raise ValueError(
      f"{path}: a file that ends in {path.suffix or 'no suffix'}; expected a checkpoint of Stable "
      f"Diffusion that ends in {' or '.join(SUFFIXES)}, or a diffusers folder; give one"
    )
  tensors = load_file(path)
  if any(name.startswith("conditioner.embedders.") for name in tensors):
    raise ValueError(
      f"{path}: a single file of Stable Diffusion XL, which is not supported; expected Stable "
      "Diffusion 1 or 2; give the diffusers folder of the model"
    )
  parts: dict[str, Tensors] = {part: {} for part in PREFIXES}
  unknown = []
  for name, tensor in tensors.items():
    if _UNUSED.fullmatch(name):
      continue
    part = next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)
    if part is None:
      unknown.append(name)
    else:
      parts[part][name.removeprefix(PREFIXES[part])] = tensor
  if lacking := [PREFIXES[part] for part, found in parts.items() if not found]:
    found = first_line(next(iter(tensors), "nothing"))
    wanted = ", ".join(f"{prefix}*" for prefix in lacking)
    raise ValueError(
      f"{path}: no tensors {wanted}, found {found}; expected a whole checkpoint of Stable "
      "Diffusion, not one network or adapters; give a whole one, or a diffusers folder"
    )
  if unknown:
    raise ValueError(
      f"{path}: {len(unknown)} unknown tensors, such as {first_line(unknown[0])}; expected a "
      "checkpoint of Stable Diffusion 1 or 2; give another one"
    )
  return parts


def convert(part: str, tensors: Tensors, what: str) -> Tensors:
  """Converts a network's tensors to the names and shapes of diffusers and transformers.

  It splits OpenCLIP's fused query-key-value projections [3 D, D], and makes linear kernels of the
  1x1 convolutions of the VAE's attention.

  Args:
    part: "unet", "vae" or "text_encoder".
    tensors: those that `read` returns for it.
    what: the file, with which an error begins.

  Raises:
    ValueError: two tensors have one name.
  """
  rules = _rules(part, tensors)
  converted: Tensors = {}
  for found_name, tensor in tensors.items():
    name = found_name
    for pattern, replacement in rules:
      name = re.sub(pattern, replacement, name)
    if part == "vae" and re.search(r"attentions\.0\.to_.*weight$", name) and tensor.ndim == 4:
      new = {name: tensor[..., 0, 0]}
    else:
      new = open_clip.split_fused(name, tensor) if part == "text_encoder" else {name: tensor}
    if twice := converted.keys() & new:
      raise ValueError(
        f"{what}: {PREFIXES[part]}{found_name} is a second {min(twice)} of the {part}; download "
        "the file again"
      )
    converted |= new
  return converted


def _rules(part: str, tensors: Tensors) -> Upgrade:
  """Returns the (regex, replacement) of a network."""
  if part == "vae":
    last = max(
      (int(m[1]) for n in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", n))), default=0
    )
    up = [
      (rf"^decoder\.up\.{i}\.{old}", f"decoder.up_blocks.{last - i}.{new}")
      for i in range(last + 1)
      for old, new in ((r"block\.(\d+)\.", r"resnets.\1."), (r"upsample\.", "upsamplers.0."))
    ]
    return (*_VAE, *up)
  if part == "text_encoder":
    return _OPEN_CLIP if any(name.startswith(OPEN_CLIP) for name in tensors) else _CLIP
  levels, layers = UNetBlocks.of(tensors)
  rules = list(_UNET_ENDS)
  for level in range(levels):
    for layer in range(layers + 1):
      down = rf"^input_blocks\.{1 + level * (layers + 1) + layer}"
      up = rf"^output_blocks\.{level * (layers + 1) + layer}"
      rules += [
        (rf"{down}\.0\.op\.", f"down_blocks.{level}.downsamplers.0.conv."),
        (rf"{down}\.0\.", f"down_blocks.{level}.resnets.{layer}."),
        (rf"{down}\.1\.", f"down_blocks.{level}.attentions.{layer}."),
        (rf"{up}\.[12]\.conv\.", f"up_blocks.{level}.upsamplers.0.conv."),
        (rf"{up}\.0\.", f"up_blocks.{level}.resnets.{layer}."),
        (rf"{up}\.1\.", f"up_blocks.{level}.attentions.{layer}."),
      ]
  return (*rules, *_RESNET)
