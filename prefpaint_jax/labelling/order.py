"""Puts the prompts first whose candidates the reward model knows least about."""
# Shapes: B samples, D features.

from collections import defaultdict
from pathlib import Path

import numpy as np

from prefpaint_jax.data.images import load_image, load_mask
from prefpaint_jax.labelling.store import Shown, read_shown
from prefpaint_jax.preference.bound import mahalanobis_norm
from prefpaint_jax.rewards.objective import load_reward

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
  shown = read_shown(Path(folder), "scores")
  model = load_reward(reward)
  if model.bound is None:
    raise ValueError(
      f"reward {reward}: has no bound on its error; expected a reward model with "
      "bound.safetensors; give the reward folder of prefpaint_jax.train_reward, or mini"
    )
  listed = [(unit.image_id, name) for unit in shown.units for name in unit.candidates]
  features = []
  for first in range(0, len(listed), _BATCH):
    batch = [listed[min(i, len(listed) - 1)] for i in range(first, first + _BATCH)]
    images = [load_image(shown.files["candidate", name]) for _, name in batch]
    masked_images = [_masked_image(shown, image_id) for image_id, _ in batch]
    features.append(model.score(images, masked_images)[1])
  found = mahalanobis_norm(model.bound.whitening, np.concatenate(features)[: len(listed)])
  norms = defaultdict(list)
  for (image_id, _), norm in zip(listed, np.asarray(found).tolist(), strict=True):
    norms[image_id].append(norm)
  return sorted(norms, key=lambda image_id: -np.mean(norms[image_id]))


def _masked_image(shown: Shown, image_id: str) -> np.ndarray:
  """Reads the image of a prompt, black in the hole."""
  mask = load_mask(shown.files["mask", image_id])
  return load_image(shown.files["known", image_id]) * (1 - mask)
