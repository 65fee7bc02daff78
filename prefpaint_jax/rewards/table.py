"""The rewards that have names.

A module of the table has `load` and, if it has weights, `outline`. Both take the name, the weights
and the dtype.
"""

import importlib
from types import ModuleType

# Name of a reward -> its module in this room.
TABLE = {
  "prefpaint": "prefpaint",
  "aesthetic-v1": "aesthetic",
  "aesthetic-v2": "aesthetic",
  "clip-score": "clip_score",
  "pickscore": "pickscore",
  "hps-v2.1": "hps",
  "image-reward": "image_reward",
  "seam": "seam",
  "known-colour": "known_colour",
}


def find(name: str) -> tuple[ModuleType, str] | None:
  """Returns the module of a reward's name and the weights that it names; None for other names.

  Args:
    name: a name of TABLE, or NAME@WEIGHTS with a folder, a file or a hub name in the place of the
      published weights.
  """
  head, _, weights = name.partition("@")
  if head not in TABLE:
    return None
  return importlib.import_module(f"prefpaint_jax.rewards.{TABLE[head]}"), weights
