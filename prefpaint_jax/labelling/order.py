"""Puts the prompts first whose candidates the reward model knows least about."""
# Shapes: B samples, D features.

from collections import defaultdict
from pathlib import Path

import numpy as np

from prefpaint_jax.data.annotation_files import read_candidates, read_prompts
from prefpaint_jax.data.images import load_image, load_mask
from prefpaint_jax.preference.bound import mahalanobis_norm
from prefpaint_jax.rewards.objective import load_reward
from prefpaint_jax.runtime.files import check_is_folder

_BATCH = 32  # B; the last batch is filled, because XLA compiles for one batch size


def uncertain(folder: Path, reward: str) -> list[str]:
  """Orders the prompts by the mean ‖z‖_{V⁻¹} of their candidates, the largest first.

  Args:
    folder: the workdir of `prefpaint_jax.collect`.
    reward: name of a reward model with a bound.

  Returns:
    The image IDs of all prompts with candidates.

  Raises:
    ValueError: the reward has no bound, or an image or a line of the folder is damaged.
  """
  folder = Path(folder)
  check_is_folder(folder, "the --workdir of prefpaint_jax.collect")
  errors: list[str] = []
  prompts = read_prompts(folder, errors)
  candidates = read_candidates(folder, prompts, errors)
  if errors:
    raise ValueError(f"{folder}/{errors[0]}; correct the file or collect the candidates again")
  model = load_reward(reward)
  if model.bound is None:
    raise ValueError(
      f"reward {reward}: has no bound on its error; expected a reward model with "
      "bound.safetensors; give the reward folder of prefpaint_jax.train_reward, or mini"
    )
  names, features = list(candidates), []
  for first in range(0, len(names), _BATCH):
    batch = [names[min(i, len(names) - 1)] for i in range(first, first + _BATCH)]
    images = [load_image(folder / "inpaint" / f"{name}.png") for name in batch]
    masked_images = [_masked_image(folder, candidates[name].image_id) for name in batch]
    features.append(model.score(images, masked_images)[1])
  norms = defaultdict(list)
  if names:
    found = mahalanobis_norm(model.bound.whitening, np.concatenate(features)[: len(names)])
    for name, norm in zip(names, np.asarray(found).tolist(), strict=True):
      norms[candidates[name].image_id].append(norm)
  return sorted(norms, key=lambda image_id: -np.mean(norms[image_id]))


def _masked_image(folder: Path, image_id: str) -> np.ndarray:
  """Reads the image of a prompt, black in the hole."""
  whole = folder / "images" / f"{image_id}.png"
  masked = folder / "masks_color" / f"{image_id}_mask_color.png"
  mask = load_mask(folder / "masks" / f"{image_id}_mask.png")
  return load_image(whole if whole.exists() else masked) * (1 - mask)
