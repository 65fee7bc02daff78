"""Checks that losses and states are finite, so that no run saves NaN or infinity."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

LARGEST = 1e18  # the square of a larger number can overflow float32
ADVICE = "nothing was saved since; lower the learning rate, and start from the last checkpoint"


def check_metrics(iteration: int, metrics: Mapping[str, float], names: Iterable[str]) -> None:
  """Raises ValueError if one of the metrics `names` is there and is not finite."""
  for name in names:
    if not math.isfinite(metrics.get(name, 0.0)):
      raise ValueError(
        f"iteration {iteration}: {name} is {metrics[name]}; expected a finite number; {ADVICE}"
      )


@jax.jit
def _is_sound(leaves: list[jax.Array]) -> list[jax.Array]:
  return [jnp.all(jnp.abs(x) < LARGEST) for x in leaves]  # false for NaN


def check_state(iteration: int, state: Any) -> None:
  """Raises ValueError if an array of a state has NaN, or a number of 1e18 or more."""
  floats = [
    (path, x)
    for path, x in jax.tree_util.tree_leaves_with_path(state)
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  sound = jax.device_get(_is_sound([x for _, x in floats]))
  wrong = [path for (path, _), good in zip(floats, sound, strict=True) if not good]
  if wrong:
    name = jax.tree_util.keystr(wrong[0], simple=True, separator="/")
    raise ValueError(
      f"iteration {iteration}: {name} has numbers that are not finite or beyond {LARGEST:.0e}, as "
      f"{len(wrong)} of {len(floats)} arrays; {ADVICE}"
    )
