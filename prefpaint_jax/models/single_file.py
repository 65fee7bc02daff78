"""Pipelines in a single file, as `StableDiffusionInpaintPipeline.from_single_file` reads them.

Such a file has tensors alone. The sizes come from the shapes of the tensors; the numbers of heads,
the scheduler and the tokenizer are those of Stable Diffusion 1.5 or 2 inpainting.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefpaint_jax.runtime.text import first_line
from prefpaint_jax.weights import compvis
from prefpaint_jax.weights import folder as weights
from prefpaint_jax.weights.names import Params, to_tree

# Pipelines whose tokenizer stock takes, by the version of Stable Diffusion.
_HUB = {
  1: "stable-diffusion-v1-5/stable-diffusion-inpainting",
  2: "stabilityai/stable-diffusion-2-inpainting",
}
_HEAD_DIM = 64  # of CLIP, and of the UNet of version 2
SCHEDULER = {
  "_class_name": "DDIMScheduler",
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "clip_sample": False,
  "set_alpha_to_one": False,
  "steps_offset": 1,
  "prediction_type": "epsilon",
}


class SingleFile(NamedTuple):
  """The content of a single file, by network."""

  configs: dict[str, dict[str, Any]]  # with "scheduler"
  tensors: dict[str, compvis.Tensors]  # with the names of diffusers and transformers
  tokenizers: Path  # the folder that has a folder "tokenizer"
  path: Path

  def params(self, shapes: dict[str, Params]) -> dict[str, Params]:
    """Converts the tensors to the parameters of the networks, of these shapes; frees the tensors.

    Raises:
      ValueError: the tensors of a network do not match its shapes.
    """
    what = f"{self.path}, {{}}".format
    return {part: to_tree(self.tensors.pop(part), shapes[part], what=what(part)) for part in shapes}


def read_configs(path: Path) -> dict[str, dict[str, Any]]:
  """Reads the configs of a single file's networks, with "scheduler".

  Raises:
    ValueError: the file cannot be read, or is no checkpoint of Stable Diffusion 1 or 2.
  """
  return _configs(compvis.read(path), path)[1]


def read(path: Path, variant: str | None = None) -> SingleFile:
  """Reads a single file, and finds its tokenizer: a folder beside it, or that of the hub's model.

  Raises:
    ValueError: the file cannot be read, is no checkpoint of Stable Diffusion 1 or 2, there is no
      tokenizer, or a variant is asked for.
  """
  if variant:
    raise ValueError(f"variant is {variant!r}; {path} is a single file without variants: leave it")
  parts = compvis.read(path)
  version, configs = _configs(parts, path)
  folder = path.parent
  if not (folder / "tokenizer").is_dir():
    try:
      folder = weights.resolve(_HUB[version], ("tokenizer/*",))
    except ValueError as error:
      raise ValueError(
        f"{path}: a single file has no tokenizer, and that of {first_line(error)}; or copy the "
        f"tokenizer of the base model to {folder / 'tokenizer'}"
      ) from error
  tensors = {part: compvis.convert(part, found, str(path)) for part, found in parts.items()}
  return SingleFile(configs, tensors, folder, path)


def _configs(parts: dict[str, compvis.Tensors], path: Path) -> tuple[int, dict[str, dict]]:
  """Returns the version of Stable Diffusion and the configs that the shapes of the tensors give."""
  second = any(name.startswith(compvis.OPEN_CLIP) for name in parts["text_encoder"])
  try:
    configs = {
      "unet": _unet_config(parts["unet"], second),
      "vae": _vae_config(parts["vae"]),
      "text_encoder": _text_config(parts["text_encoder"], second),
      "scheduler": dict(SCHEDULER),
    }
  except (KeyError, IndexError) as error:  # a missing tensor, or one of fewer dimensions
    raise ValueError(
      f"{path}: its shapes are not those of Stable Diffusion 1 or 2 ({first_line(error)}); give "
      "another checkpoint"
    ) from error
  return 2 if second else 1, configs


def _unet_config(tensors: dict[str, np.ndarray], second: bool) -> dict[str, Any]:
  levels, layers = compvis.UNetBlocks.of(tensors)
  first = [1 + level * (layers + 1) for level in range(levels)]  # the first block of each level
  widths = [tensors[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0] for n in first]
  attends = [f"input_blocks.{n}.1.norm.weight" in tensors for n in first]
  cross = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
  depths = {int(m[1]) for n in tensors if (m := re.search(r"transformer_blocks\.(\d+)\.", n))}
  return {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
    "out_channels": tensors["out.2.weight"].shape[0],
    "block_out_channels": widths,
    "layers_per_block": layers,
    "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
    "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
    "cross_attention_dim": tensors[cross].shape[1],
    "attention_head_dim": [width // _HEAD_DIM for width in widths] if second else 8,
    "transformer_layers_per_block": max(depths) + 1,
    "use_linear_projection": tensors["middle_block.1.proj_in.weight"].ndim == 2,
  }


def _vae_config(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
  found = [re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.", name) for name in tensors]
  blocks = {(int(match[1]), int(match[2])) for match in found if match}
  levels, layers = (1 + max((block[i] for block in blocks), default=0) for i in (0, 1))
  conv = "encoder.down.{}.block.0.conv1.weight"
  return {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "in_channels": tensors["encoder.conv_in.weight"].shape[1],
    "out_channels": tensors["decoder.conv_out.weight"].shape[0],
    "block_out_channels": [tensors[conv.format(level)].shape[0] for level in range(levels)],
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "layers_per_block": layers,
    "latent_channels": tensors["post_quant_conv.weight"].shape[0],
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
  }


def _text_config(tensors: dict[str, np.ndarray], second: bool) -> dict[str, Any]:
  named = compvis.convert("text_encoder", tensors, "")
  named = {re.sub(r"^text_model\.", "", name): tensor for name, tensor in named.items()}
  vocabulary, width = named["embeddings.token_embedding.weight"].shape[:2]
  found = [re.match(r"encoder\.layers\.(\d+)\.", name) for name in named]
  return {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": vocabulary,
    "hidden_size": width,
    "intermediate_size": named["encoder.layers.0.mlp.fc1.weight"].shape[0],
    "num_hidden_layers": 1 + max(int(match[1]) for match in found if match),
    "num_attention_heads": width // _HEAD_DIM,
    "max_position_embeddings": named["embeddings.position_embedding.weight"].shape[0],
    "hidden_act": "gelu" if second else "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512 if second else 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
  }
