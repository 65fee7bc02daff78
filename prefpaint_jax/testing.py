"""Random models and made-up data in the real formats: tiny for tests, full-size to measure.

  python -m prefpaint_jax.testing --output=full_size   # Stable Diffusion 1.5's size, 5 GB

Every parameter is random, also those that start at zero or one, so that none can hide.
"""
# Shapes: N prompts, H W pixels.

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax.bound import Bound
from prefpaint_jax.data import images as image_io
from prefpaint_jax.data import masks as mask_io
from prefpaint_jax.data.prompts import SPLITS
from prefpaint_jax.inpainter import Inpainter, Params, make_modules
from prefpaint_jax.metrics import save_png
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.models.reward import RewardNetwork
from prefpaint_jax.pretrain import byte_tokenizer
from prefpaint_jax.reward import RewardModel, network_shapes

SIZE = 8  # pixels along each side of what the tiny pipeline paints
TINY_VISION = {
  "hidden_size": 8,
  "intermediate_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "image_size": SIZE,
  "patch_size": 4,
  "projection_dim": 8,
}


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


def tiny_inpainter(
  seed: int = 0, generation: int = 1, dtype: str = "float32", remat: bool = False
) -> Inpainter:
  """A pipeline of some ten thousand parameters for pictures of SIZE x SIZE; reads bytes as text."""
  configs = tiny_configs(generation)
  modules = make_modules(configs, dtype, remat)
  shapes = jax.eval_shape(modules.init, jax.random.key(0))
  return Inpainter(modules, random_params(shapes, seed), configs, byte_tokenizer())


def tiny_reward(seed: int = 1, dtype: str = "float32") -> RewardModel:
  """A reward model for pictures of any size, with a bound fitted to made-up features."""
  config = RewardConfig.from_dict(
    {
      "vision": TINY_VISION,
      "num_heads": 2,
      "feedforward_dim": 16,
      "hidden_dim": 12,
      "feature_dim": 6,
    }
  )
  params = random_params(network_shapes(config), seed)
  features = np.random.default_rng(seed).normal(size=(40, config.feature_dim))
  bound = Bound.fit(features, lam=0.1, noise_scale=0.5, norm_bound=2.0)
  return RewardModel(RewardNetwork(config, jnp.dtype(dtype)), params, bound)


def tiny_prompts(number: int, seed: int = 0, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
  """Smooth pictures [N, H, W, 3] and masks [N, H, W, 1] of both kinds in turn."""
  rng = np.random.default_rng(seed)
  coarse = rng.uniform(size=(number, 3, 3, 3))
  pictures = np.stack([image_io.resize_image(picture, (size, size)) for picture in coarse])
  draw = mask_io.outpainting_mask, mask_io.warping_mask
  return pictures, np.stack([draw[i % 2](rng, size, size) for i in range(number)])


def write_tiny_world(folder: str | Path, train: int = 16, test: int = 8) -> dict[str, str]:
  """Writes a policy, a reward with its bound, and prompts; returns their paths by these names."""
  return _write_world(Path(folder), tiny_inpainter(), tiny_reward(), (train, test), SIZE)


def write_full_size_world(folder: str | Path) -> dict[str, str]:
  """The same at the size of Stable Diffusion 1.5 inpainting and of the released reward."""
  configs = full_size_configs()
  modules = make_modules(configs)
  shapes = jax.eval_shape(modules.init, jax.random.key(0))
  policy = Inpainter(modules, random_params(shapes), configs, byte_tokenizer())
  config = RewardConfig()
  features = np.random.default_rng(0).normal(size=(1000, config.feature_dim))
  params = random_params(network_shapes(config))
  judge = RewardModel(RewardNetwork(config), params, Bound.fit(features, lam=0.01))
  return _write_world(Path(folder), policy, judge, (16, 8), modules.native_size)


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


def _write_world(
  folder: Path, policy: Inpainter, judge: RewardModel, numbers: tuple[int, int], size: int
) -> dict[str, str]:
  paths = {name: folder / name for name in ("policy", "reward", "prompts")}
  policy.save_pretrained(paths["policy"])
  judge.save_pretrained(paths["reward"])
  for split, number, seed in zip(SPLITS, numbers, (0, 1), strict=True):
    ids = [f"{split}_{i:03d}" for i in range(number)]
    for name, picture, mask in zip(ids, *tiny_prompts(number, seed, size), strict=True):
      to_bytes = lambda x: np.round(255 * x).astype(np.uint8)
      save_png(paths["prompts"] / "images" / f"{name}.png", to_bytes(picture))
      save_png(paths["prompts"] / "masks" / f"{name}_mask.png", to_bytes(mask[..., 0]))
    (paths["prompts"] / f"{split}.txt").write_text("\n".join(ids) + "\n")
  return {name: str(path) for name, path in paths.items()}


def tiny_training(world: dict[str, str]) -> dict[str, Any]:
  """Fields of `configs/rl.py` for a run of seconds in such a world, on up to eight devices.

  By dotted name, for `config.update_from_flattened_dict(...)`, or `--config.NAME=VALUE` each.
  """
  return world | {
    "size": SIZE,
    "dtype": "float32",
    "remat": False,
    "num_iterations": 4,
    "batch_size": 8,
    "samples_per_prompt": 2,
    "num_steps": 3,
    "train_timesteps": 2,
    "updates_per_iteration": 2,
    "decode_batch": 0,
    "learning_rate": 1e-3,
    "clip_range": 1e-2,
    "checkpoint_every": 2,
    "sample_every": 2,
    "num_samples": 8,
  }


if __name__ == "__main__":
  from absl import flags

  from prefpaint_jax import app

  _OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
  app.run(lambda: print(*write_full_size_world(_OUTPUT.value).values(), sep="\n"))
