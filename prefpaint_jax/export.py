"""Writes the aligned model of a run as a diffusers folder.

  python -m prefpaint_jax.export --workdir=runs/mini --output=aligned

Takes the latest checkpoint, that of --step=40, or --step=best, which `keep_best` kept (in each the
moving average of the parameters where the run has one), and from the base model everything that
alignment does not change.
"""

from pathlib import Path

from absl import flags

from prefpaint_jax import inpainter
from prefpaint_jax.runtime import cli, workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_STEP = flags.DEFINE_string("step", None, "Iteration of the checkpoint, or best; default: latest.")


def main() -> None:
  output = Path(_OUTPUT.value)
  if output.exists() and any(output.iterdir()):
    raise ValueError(f"{output} is not empty: name a new folder")
  workdir.read_workdir(Path(_WORKDIR.value))  # a model's folder is no run
  inpainter.open_policy(_WORKDIR.value, step=_STEP.value).save_pretrained(output)
  print(f"{output}: open with diffusers' AutoPipelineForInpainting or Inpainter.from_pretrained")


if __name__ == "__main__":
  cli.run(main)
