"""Configs of known and tiny models, and random parameters for them, without downloads."""

from typing import Any, Literal

import jax
import numpy as np

from prefpaint_jax import mini
from prefpaint_jax.models import single_file
from prefpaint_jax.runtime.runs import base_of
from prefpaint_jax.weights import folder as weights
from prefpaint_jax.weights.names import Params
from prefpaint_jax.weights.pipeline_parts import read_pipeline_configs

Generation = Literal[1, 2, "xl"]  # of Stable Diffusion

# Hub name -> version of Stable Diffusion whose architecture the pipeline has.
KNOWN: dict[str, Generation] = {
  "stable-diffusion-v1-5/stable-diffusion-inpainting": 1,
  "kd5678/prefpaint-v1.0": 1,
  "stabilityai/stable-diffusion-2-inpainting": 2,
  "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "xl",
}


def read_architecture(policy: str) -> tuple[dict[str, dict], str]:
  """Reads the configs of a policy's networks without its weights.

  Args:
    policy: folder or single file of a pipeline, workdir of a run, "mini", or a hub name in KNOWN,
      for which nothing is downloaded.

  Returns:
    The configs by network, with "scheduler", and a phrase that says where they come from.

  Raises:
    ValueError: the policy is neither a folder nor a known hub name.
  """
  path = weights.local_path(mini.locate(base_of(policy), "policy"), "config.policy")
  if path.is_file():
    return single_file.read_configs(path), "read from the shapes of its tensors"
  if path.exists():
    return read_pipeline_configs(path), "read from its folder"
  if policy not in KNOWN:
    raise ValueError(
      f"config.policy {policy}: not a pipeline folder, nor a hub name with a known architecture; "
      f"give a folder, or one of {', '.join(KNOWN)}"
    )
  names = {1: "1.5", 2: "2", "xl": "XL"}
  generation = KNOWN[policy]
  configs = full_size_configs(generation)
  return configs, f"that of Stable Diffusion {names[generation]} inpainting"


SIZE = 8  # pixels along each side of the tiny pipeline's images


def tiny_configs(generation: Generation = 1) -> dict[str, dict[str, Any]]:
  """Makes the configs of a tiny pipeline: "unet", "vae", "text_encoder" and "scheduler".

  Args:
    generation: version of Stable Diffusion. Version 2 has linear projections, a number of heads per
      level, GELU in the text encoder, and predicts v; its tiny UNet has a second level. XL has a
      second text encoder, and "model_index" in the configs.
  """
  second = generation == 2
  levels = 1 if generation == 1 else 2
  unet = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": SIZE // 2,
    "in_channels": 9,
    "out_channels": 4,
    "block_out_channels": [8, 16][:levels],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"][:levels],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"][-levels:],
    "cross_attention_dim": 12,
    "attention_head_dim": [2, 4] if second else 2,
    "use_linear_projection": second,
    "norm_num_groups": 4,
  }
  vae = {
    "_class_name": "AutoencoderKL",
    "sample_size": SIZE,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
  }
  text_encoder = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 514,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "gelu" if second else "quick_gelu",
    "projection_dim": 12,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
  }
  scheduler = single_file.SCHEDULER | {"prediction_type": "v_prediction" if second else "epsilon"}
  configs = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "scheduler": scheduler}
  return configs | (_xl_changes(configs, _TINY_XL) if generation == "xl" else {})


# Of the second text encoder and of the UNet.
_TINY_XL = {
  "text": {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3},
  "projection_dim": 10,
  "unet": {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "addition_time_embed_dim": 4,
    "use_linear_projection": True,
  },
}


def _xl_changes(configs: dict[str, dict], sizes: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the configs in which SDXL differs from a pipeline with one text encoder."""
  first, width = configs["text_encoder"], sizes["projection_dim"]
  second = first | sizes["text"] | {"projection_dim": width, "hidden_act": "gelu"}
  second |= {"architectures": ["CLIPTextModelWithProjection"], "eos_token_id": 2}
  unet = configs["unet"] | sizes["unet"] | {"addition_embed_type": "text_time"}
  unet["cross_attention_dim"] = first["hidden_size"] + second["hidden_size"]
  unet["projection_class_embeddings_input_dim"] = width + 6 * unet["addition_time_embed_dim"]
  index = {"_class_name": "StableDiffusionXLInpaintPipeline", "force_zeros_for_empty_prompt": True}
  return {"unet": unet, "text_encoder_2": second, "model_index": index}


def random_params(shapes: Params, seed: int = 0) -> Params:
  """Draws parameters for a tree of shapes, scaled to keep activations of similar size."""
  rng = np.random.default_rng(seed)

  def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    name, noise = path[-1].key, rng.normal(size=leaf.shape)
    if name == "kernel":
      noise /= np.sqrt(np.prod(leaf.shape[:-1]))
    else:
      noise = 0.2 * noise + (name == "scale")
    return noise.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def full_size_configs(generation: Generation = 1) -> dict[str, dict[str, Any]]:
  """Makes the configs of Stable Diffusion inpainting, with a vocabulary of single bytes.

  Version 1 is 1.5.
  """
  configs = tiny_configs()
  configs["unet"] |= {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
  }
  configs["vae"] |= {
    "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
  }
  configs["text_encoder"] |= {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
  }
  if generation == 2:
    configs["unet"] |= {
      "cross_attention_dim": 1024,
      "attention_head_dim": [5, 10, 20, 20],
      "use_linear_projection": True,
    }
    configs["text_encoder"] |= {
      "hidden_size": 1024,
      "intermediate_size": 4096,
      "num_hidden_layers": 23,
      "num_attention_heads": 16,
      "hidden_act": "gelu",
    }
  elif generation == "xl":
    configs["vae"] |= {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": False}
    configs |= _xl_changes(configs, _FULL_XL)
  return configs


_FULL_XL = {
  "text": {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
  },
  "projection_dim": 1280,
  "unet": {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_time_embed_dim": 256,
    "use_linear_projection": True,
  },
}
