"""Writes the aligned model of a run as a diffusers folder.

  python -m prefpaint_jax.export --workdir=runs/mini --output=aligned

Takes the latest checkpoint (the moving average of the parameters where the run kept one), and
everything that alignment does not change from the base model.
"""

from pathlib import Path

from absl import flags

from prefpaint_jax import app
from prefpaint_jax.checkpoint import Checkpoints
from prefpaint_jax.inpainter import Inpainter

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Iteration of the checkpoint; default: the latest.")


def load_policy(workdir: Path, step: int | None = None) -> Inpainter:
  """The policy of a run at a checkpoint."""
  config = app.read_workdir(workdir)
  inpainter = Inpainter.from_pretrained(config.policy, config.dtype)
  name = "ema" if config.ema_decay else "params"
  inpainter.params["unet"] = Checkpoints(workdir / "checkpoints").load(name, step)
  return inpainter


def main() -> None:
  output = Path(_OUTPUT.value)
  if output.exists() and any(output.iterdir()):
    raise ValueError(f"{output} is not empty: name a new folder")
  load_policy(Path(_WORKDIR.value), _STEP.value).save_pretrained(output)
  print(f"{output}: open with diffusers' AutoPipelineForInpainting or Inpainter.from_pretrained")


if __name__ == "__main__":
  app.run(main)
