"""Exports the aligned policy of a run as a diffusers folder.

  python -m prefpaint_jax.export --workdir=runs/mini --output=aligned

The UNet is that of the latest checkpoint, of iteration 40 with --step=40, or of the checkpoint that
`keep_best` keeps with --step=best; from each, the moving average of the parameters if the run has
one. VAE, text encoder, tokenizer and scheduler are those of the base policy.
"""

from pathlib import Path

from absl import flags

from prefpaint_jax import inpainter
from prefpaint_jax.runtime import cli, files, workdir
from prefpaint_jax.runtime.cli import within
from prefpaint_jax.runtime.ranges import Step, Text

_WORKDIR = flags.DEFINE(
  within(Text(empty=False)), "workdir", None, "Folder of the run.", required=True
)
_OUTPUT = flags.DEFINE(within(Text(empty=False)), "output", None, "Folder to write.", required=True)
_STEP = flags.DEFINE(
  within(Step()), "step", None, "Iteration of the checkpoint, or best; default: latest."
)


def main() -> None:
  """Exports the policy that the flags name."""
  output = Path(_OUTPUT.value)
  files.check_output_folder(output)
  workdir.read_workdir(Path(_WORKDIR.value))  # raises ValueError for a folder that is not a run
  inpainter.open_policy(_WORKDIR.value, step=_STEP.value).save_pretrained(output)
  print(f"{output}: open with diffusers' AutoPipelineForInpainting or Inpainter.from_pretrained")


if __name__ == "__main__":
  cli.run(main)
