"""Makes random models and data in the real formats: tiny for tests, full-size for timing.

  python -m prefpaint_jax.testing --output=full_size   # Stable Diffusion 1.5's size, 5 GB

Writes the pipeline of Stable Diffusion 1.5's size to the folder. Every parameter is random,
including those that are initialised to zero or one, so that a test detects an unused parameter.
"""
# Shapes: N prompts, H W pixels.

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from prefpaint_jax.data import images as image_io
from prefpaint_jax.data import masks as mask_io
from prefpaint_jax.data.examples import SPLITS
from prefpaint_jax.data.images import save_png, to_bytes
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models.architectures import (
  SIZE,
  Generation,
  full_size_configs,
  random_params,
  tiny_configs,
)
from prefpaint_jax.models.assembly import make_modules
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.models.reward import RewardNetwork, network_shapes
from prefpaint_jax.models.tokenizer import byte_tokenizer
from prefpaint_jax.preference.bound import Bound
from prefpaint_jax.reward import RewardModel

TINY_VISION = {
  "hidden_size": 8,
  "intermediate_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "image_size": SIZE,
  "patch_size": 4,
  "projection_dim": 8,
}


def tiny_inpainter(
  seed: int = 0, generation: Generation = 1, dtype: str = "float32", remat: bool = False
) -> Inpainter:
  """Makes a random pipeline of about ten thousand parameters for images of SIZE x SIZE.

  Args:
    seed: seed of the parameters.
    generation: version of Stable Diffusion: 1, 2 or "xl".
    dtype: compute dtype of the networks; parameters stay float32.
    remat: rematerialise the UNet's blocks in the backward pass.
  """
  configs = tiny_configs(generation)
  modules = make_modules(configs, dtype, remat)
  shapes = modules.shapes()
  tokenizers = {"tokenizer": byte_tokenizer()}
  if generation == "xl":
    tokenizers["tokenizer_2"] = byte_tokenizer(pad_token="!")
  return Inpainter(modules, random_params(shapes, seed), configs, tokenizers)


def tiny_reward(seed: int = 1, dtype: str = "float32") -> RewardModel:
  """Makes a random reward model for images of any size, with a bound fitted to random features."""
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
  """Draws smooth images [N, H, W, 3] and masks [N, H, W, 1], outpainting and warping in turn."""
  rng = np.random.default_rng(seed)
  coarse = rng.uniform(size=(number, 3, 3, 3))
  images = np.stack([image_io.resize_image(image, (size, size)) for image in coarse])
  draw = mask_io.outpainting_mask, mask_io.warping_mask
  return images, np.stack([draw[i % 2](rng, size, size) for i in range(number)])


def write_tiny_world(
  folder: str | Path, train: int = 16, test: int = 8, generation: Generation = 1
) -> dict[str, str]:
  """Writes a tiny policy, a reward model with its bound, and prompts.

  Args:
    folder: where to write.
    train: number of training prompts.
    test: number of test prompts.
    generation: version of Stable Diffusion: 1, 2 or "xl".

  Returns:
    The paths of "policy", "reward" and "prompts".
  """
  return _write_world(
    Path(folder), tiny_inpainter(generation=generation), tiny_reward(), (train, test), SIZE
  )


def write_full_size_world(folder: str | Path) -> dict[str, str]:
  """Writes a world like `write_tiny_world`, with models of the released sizes."""
  configs = full_size_configs()
  modules = make_modules(configs)
  shapes = modules.shapes()
  policy = Inpainter(modules, random_params(shapes), configs, {"tokenizer": byte_tokenizer()})
  config = RewardConfig()
  features = np.random.default_rng(0).normal(size=(1000, config.feature_dim))
  params = random_params(network_shapes(config))
  reward_model = RewardModel(RewardNetwork(config), params, Bound.fit(features, lam=0.01))
  return _write_world(Path(folder), policy, reward_model, (16, 8), modules.native_size)


def _write_world(
  folder: Path,
  policy: Inpainter,
  reward_model: RewardModel,
  numbers: tuple[int, int],
  size: int,
) -> dict[str, str]:
  """Writes two models and as many prompts of each split as `numbers` says; returns the paths."""
  paths = {name: folder / name for name in ("policy", "reward", "prompts")}
  policy.save_pretrained(paths["policy"])
  reward_model.save_pretrained(paths["reward"])
  for split, number, seed in zip(SPLITS, numbers, (0, 1), strict=True):
    ids = [f"{split}_{i:03d}" for i in range(number)]
    for name, image, mask in zip(ids, *tiny_prompts(number, seed, size), strict=True):
      save_png(paths["prompts"] / "images" / f"{name}.png", to_bytes(image))
      save_png(paths["prompts"] / "masks" / f"{name}_mask.png", to_bytes(mask[..., 0]))
    (paths["prompts"] / f"{split}.txt").write_text("\n".join(ids) + "\n")
  return {name: str(path) for name, path in paths.items()}


def tiny_training(world: dict[str, str]) -> dict[str, Any]:
  """Returns fields of `configs/rl.py` for a run of seconds on up to eight devices.

  Args:
    world: the paths that `write_tiny_world` returns.

  Returns:
    Values by dotted name, for `config.update_from_flattened_dict` or `--config.NAME=VALUE`.
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

  from prefpaint_jax.runtime import cli
  from prefpaint_jax.runtime.files import check_folder
  from prefpaint_jax.runtime.ranges import Text

  _OUTPUT = flags.DEFINE(
    cli.within(Text(empty=False)), "output", None, "Folder to write.", required=True
  )

  def main() -> None:
    check_folder(_OUTPUT.value)
    print(*write_full_size_world(_OUTPUT.value).values(), sep="\n")

  cli.run(main)
