"""Architectures by name, as shapes or with random parameters: nothing is downloaded."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from prefpaint_jax import mini
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.models.pipeline import NETWORKS, Params
from prefpaint_jax.weights import folder as weights

### The programs of a config, from shapes.

# Architectures of hub names, so that nothing is fetched: the generation of Stable Diffusion.
KNOWN = {
  "stable-diffusion-v1-5/stable-diffusion-inpainting": 1,
  "kd5678/prefpaint-v1.0": 1,
  "stabilityai/stable-diffusion-2-inpainting": 2,
}


def read_architecture(policy: str) -> tuple[dict[str, dict], str]:
  """The configs of a policy's networks, and a word on where they come from."""
  path = Path(mini.locate(policy, "policy")).expanduser()
  if (path / "model_index.json").is_file():
    configs = {part: weights.read_config(path / part) for part in NETWORKS}
    configs["scheduler"] = weights.read_config(path / "scheduler", "scheduler_config.json")
    return configs, "read from its folder"
  if policy not in KNOWN:
    raise ValueError(
      f"config.policy {policy}: no such pipeline folder, and not a hub name of known architecture; "
      f"give a folder, or one of {', '.join(KNOWN)}"
    )
  configs = full_size_configs()
  if KNOWN[policy] == 1:
    return configs, "that of Stable Diffusion 1.5 inpainting"
  configs["unet"] |= {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
  }
  configs["text_encoder"] |= {"hidden_size": 1024, "num_attention_heads": 16}
  return configs, "that of Stable Diffusion 2 inpainting"


def read_reward(reward: str) -> RewardConfig:
  """The config of a reward folder; of any other name, the released reward's."""
  path = Path(mini.locate(reward, "reward")).expanduser()
  return RewardConfig.from_dict(weights.read_config(path) if path.is_dir() else {})


SIZE = 8  # pixels along each side of what the tiny pipeline paints


def tiny_configs(generation: int = 1) -> dict[str, dict[str, Any]]:
  """What a pipeline's folder says of unet, vae, text_encoder and scheduler.

  `generation` is that of Stable Diffusion: 2 has linear projections, heads by level, another
  activation in its text encoder, and predicts v; here it also has a second level.
  """
  second = generation == 2
  levels = 2 if second else 1
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
  scheduler = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction" if second else "epsilon",
  }
  return {"unet": unet, "vae": vae, "text_encoder": text_encoder, "scheduler": scheduler}


def random_params(shapes: Params, seed: int = 0) -> Params:
  """Parameters for a tree of shapes: layers that keep the size of what passes through them."""
  rng = np.random.default_rng(seed)

  def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    name, noise = path[-1].key, rng.normal(size=leaf.shape)
    if name == "kernel":
      noise /= np.sqrt(np.prod(leaf.shape[:-1]))
    else:
      noise = 0.2 * noise + (name == "scale")
    return noise.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def full_size_configs() -> dict[str, dict[str, Any]]:
  """Stable Diffusion 1.5 inpainting, but for the vocabulary, which is that of single bytes."""
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
  return configs
