"""PrefPaint in JAX: align a Stable Diffusion inpainting model with human preference."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from prefpaint_jax.inpainter import Inpainter
  from prefpaint_jax.reward import RewardModel

# `python -m prefpaint_jax.NAME`: this process is a command.
if sys.argv[:1] == ["-m"] and any(x.partition(".")[0] == __name__ for x in sys.orig_argv):
  from prefpaint_jax.runtime import interrupts

  interrupts.exit_at_once()

__all__ = ["Inpainter", "RewardModel"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
  """Imports `Inpainter` and `RewardModel` when they are first used: they bring JAX along."""
  if name == "Inpainter":
    from prefpaint_jax.inpainter import Inpainter

    return Inpainter
  if name == "RewardModel":
    from prefpaint_jax.reward import RewardModel

    return RewardModel
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
