"""The config, weights and inputs that both sides of a benchmark read.

`write` needs JAX. `read` does not, so that the PyTorch side does not import JAX.
"""
# Shapes: P prompts, S samples of each, B = P S samples, T rollout steps, U updates of k steps each,
# H W pixels, h w latents, L text tokens, D text width, F features.

import json
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[2]
SIZES = ("tiny", "mini", "medium", "sd15")

# Changes of the config for every size, and for each size. Neither side rematerialises; the rollout
# samples with the current policy; and no loss term is on that only one side implements. The
# learning rate makes an optimiser step much larger than the rounding error of a parameter, so that
# `check` can compare the steps.
_COMMON = {"remat": False, "behaviour_refresh": 1, "learning_rate": 1e-4, "kl_weight": 0.0}
_CHANGES: dict[str, dict[str, Any]] = {
  "tiny": {"batch_size": 2, "samples_per_prompt": 2, "updates_per_iteration": 1},
  "mini": {},
  "medium": {
    "size": 256,
    "dtype": "float32",
    "batch_size": 2,
    "num_steps": 4,
    "train_timesteps": 2,
    "updates_per_iteration": 2,
  },
  "sd15": {
    "batch_size": 8,
    "num_steps": 10,
    "train_timesteps": 2,
    "updates_per_iteration": 2,
  },
}


class World(NamedTuple):
  """The contents of the folder that `write` makes."""

  config: ConfigDict  # of configs/rl.py; its policy and reward are folders
  images: np.ndarray  # [P, H, W, 3] in [0, 1]
  masks: np.ndarray  # [P, H, W, 1]
  samples: np.ndarray  # [B, H, W, 3] in [0, 1], for the stage `score`
  context: np.ndarray  # [1, L, D], of the empty text
  chol: np.ndarray  # [F, F], of the reward's bound
  noise: np.ndarray  # [T+1, B, h, w, 4]: initial noise and noise of each step, of `rollout_key`
  indices: np.ndarray  # [U, k], the steps that `timestep_key` draws
  latents: np.ndarray  # [B, h, w, 4]
  cotangent: np.ndarray  # [B, h, w, 4], of the UNet's output


TIMESTEP = 501  # of `latents`
SMALL = 4096  # elements of the largest parameter that `check` compares


def rollout_key():
  """Returns the key of every rollout."""
  import jax

  return jax.random.key(0)


def timestep_key():
  """Returns the key that draws the trained timesteps."""
  import jax

  return jax.random.key(1)


def make_config(size: str, dtype: str = "", folder: Path | None = None) -> ConfigDict:
  """Makes the config of a size.

  Args:
    dtype: "": the default of the size.
    folder: holds the policy and the reward model.
  """
  get_config = runpy.run_path(str(ROOT / "configs" / "rl.py"))["get_config"]
  config = get_config("mini" if size == "mini" else "")
  if size == "tiny":
    from prefpaint_jax import testing

    config.update_from_flattened_dict(testing.tiny_training({}))
  config.update(_COMMON | _CHANGES[size] | ({"dtype": dtype} if dtype else {}))
  if folder is not None:
    config.update(policy=str(folder / "policy"), reward=str(folder / "reward"))
  return config


def _models(size: str):
  """Returns (Inpainter, RewardModel) in float32: the embedded models, or random ones of a size."""

  from prefpaint_jax import testing
  from prefpaint_jax.inpainter import Inpainter
  from prefpaint_jax.models.architectures import full_size_configs, random_params
  from prefpaint_jax.models.assembly import make_modules
  from prefpaint_jax.models.config import RewardConfig
  from prefpaint_jax.models.reward import RewardNetwork, network_shapes
  from prefpaint_jax.models.tokenizer import byte_tokenizer
  from prefpaint_jax.preference.bound import Bound
  from prefpaint_jax.reward import RewardModel

  if size == "tiny":
    return testing.tiny_inpainter(), testing.tiny_reward()
  if size == "mini":
    return Inpainter.from_pretrained("mini"), RewardModel.from_pretrained("mini")
  configs = full_size_configs()
  if size == "medium":
    configs["unet"] |= {"sample_size": 32, "block_out_channels": [96, 192, 384, 384]}
    configs["vae"] |= {"sample_size": 256, "block_out_channels": [64, 128, 256, 256]}
  modules = make_modules(configs)
  shapes = modules.shapes()
  policy = Inpainter(modules, random_params(shapes), configs, {"tokenizer": byte_tokenizer()})
  config = RewardConfig()
  features = np.random.default_rng(0).normal(size=(1000, config.feature_dim))
  params = random_params(network_shapes(config))
  return policy, RewardModel(RewardNetwork(config), params, Bound.fit(features, lam=0.01))


def write(size: str, dtype: str, folder: Path) -> None:
  """Writes the policy, the reward model, the config and the inputs of a size."""
  import jax

  from prefpaint_jax import testing
  from prefpaint_jax.align import ppo

  config = make_config(size, dtype, folder)
  policy, reward_model = _models(size)
  policy.save_pretrained(folder / "policy")
  reward_model.save_pretrained(folder / "reward")

  batch = config.batch_size * config.samples_per_prompt
  shape = policy.modules.latent_shape(batch, config.size, config.size)
  # Split the key as `align.rollout` and `ddim.rollout` do; `check` fails if they change.
  first, chain = jax.random.split(rollout_key())
  steps = [jax.random.fold_in(chain, i) for i in range(config.num_steps)]
  noise = [jax.random.normal(key, shape) for key in (first, *steps)]
  skipped, last = config.skip_steps
  indices = ppo.draw_timesteps(
    timestep_key(), config.num_steps, config.train_timesteps, skipped, config.num_steps - last
  )
  rng = np.random.default_rng(0)
  images, masks = testing.tiny_prompts(config.batch_size, size=config.size)
  inputs = {
    "images": images,
    "masks": masks,
    "samples": rng.uniform(size=(batch, config.size, config.size, 3)),
    "context": policy.empty_context.tokens,
    "chol": reward_model.bound.chol,
    "noise": noise,
    "latents": rng.normal(size=shape),
    "cotangent": rng.normal(size=shape) / np.prod(shape),
  }
  inputs = {name: np.asarray(value, np.float32) for name, value in inputs.items()}
  indices = np.asarray(indices).reshape(config.updates_per_iteration, -1)
  np.savez(folder / "inputs.npz", indices=indices, **inputs)
  (folder / "config.json").write_text(json.dumps(config.to_dict()))


def read(folder: Path) -> World:
  """Reads the folder that `write` makes."""
  config = ConfigDict(json.loads((folder / "config.json").read_text()))
  return World(config, **np.load(folder / "inputs.npz"))


def join_small(tensors: dict[str, np.ndarray]) -> np.ndarray:
  """Joins the tensors of at most SMALL elements to one vector, in the order of their names.

  Every layer has such tensors, and in a large network they are a small part.
  """
  chosen = (np.ravel(tensors[name]) for name in sorted(tensors) if tensors[name].size <= SMALL)
  return np.concatenate(list(chosen)).astype(np.float32)
