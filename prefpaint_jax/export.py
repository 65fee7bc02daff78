"""Exports the aligned policy of a run as a diffusers folder, or its LoRA adapters as a file.

  python -m prefpaint_jax.export --workdir=runs/mini --output=aligned
  python -m prefpaint_jax.export --workdir=runs/lora --lora=kohya --output=aligned.safetensors

The UNet is that of the latest checkpoint, of iteration 40 with --step=40, or of the checkpoint that
`keep_best` keeps with --step=best; from each, the moving average of the parameters if the run has
one. VAE, text encoder, tokenizer and scheduler are those of the base policy.

The folder has a model card with samples, settings and the figures of an evaluation. --push_to
uploads it to the Hugging Face hub.

--lora writes the adapters of a run with lora.rank above 0: for diffusers, or in the layout of
kohya's scripts, which ComfyUI, A1111 and diffusers read. An --output that does not end in
.safetensors is a folder, in which the file is pytorch_lora_weights.safetensors.
"""

from pathlib import Path

from absl import flags

from prefpaint_jax import inpainter
from prefpaint_jax.evaluation import model_card
from prefpaint_jax.runtime import cli, files, workdir
from prefpaint_jax.runtime.cli import within
from prefpaint_jax.runtime.ranges import Step, Text
from prefpaint_jax.runtime.runs import open_run, trained_tree
from prefpaint_jax.weights import adapters
from prefpaint_jax.weights.adapter_names import LAYOUTS
from prefpaint_jax.weights.folder import SAVED_TYPES

_WORKDIR = flags.DEFINE(
  within(Text(empty=False)), "workdir", None, "Folder of the run.", required=True
)
_OUTPUT = flags.DEFINE(
  within(Text(empty=False)),
  "output",
  None,
  "Folder to write; with --lora also a .safetensors file.",
  required=True,
)
_STEP = flags.DEFINE(
  within(Step()), "step", None, "Iteration of the checkpoint, or best; default: latest."
)
_LORA = flags.DEFINE_enum("lora", None, LAYOUTS, "Write the LoRA adapters alone, in this layout.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", SAVED_TYPES.choices, "Type of the stored weights.")
_EVALUATION = flags.DEFINE_string(
  "evaluation",
  None,
  "Workdir of evaluate, or its eval.json, for the model card; default: that of --workdir.",
)
_PUSH_TO = flags.DEFINE_string("push_to", None, "Hub name owner/name: upload the folder there.")


def main() -> None:
  """Exports the policy that the flags name, or its adapters."""
  output = Path(_OUTPUT.value)
  if _LORA.value:
    given = {"dtype": _DTYPE.value != "float32", "evaluation": _EVALUATION.value}
    for name in (name for name, value in (given | {"push_to": _PUSH_TO.value}).items() if value):
      raise ValueError(f"--{name} applies to whole policies; leave it out, or leave out --lora")
    _export_adapters(output if output.suffix == ".safetensors" else output / adapters.FILE_NAME)
    return
  files.check_output_folder(output)
  if _PUSH_TO.value is not None:
    model_card.check_hub_name(_PUSH_TO.value)
  run = Path(_WORKDIR.value)
  workdir.read_workdir(run)  # raises ValueError for a folder that is not a run
  evaluation = model_card.read_evaluation(_EVALUATION.value, run)
  opened = open_run(_WORKDIR.value)
  if opened is None:
    raise ValueError(f"{run}: a diffusers folder, not a run; give the --workdir of a run")
  config, checkpoints = opened
  step = checkpoints.resolve(_STEP.value)  # now: a run in progress adds checkpoints
  policy = inpainter.open_policy(_WORKDIR.value, step=step)
  source = model_card.Source(run, config, step)
  with files.atomic_folder(output) as folder:
    policy.save_pretrained(folder, _DTYPE.value)
    model_card.write_card(folder, source, _PUSH_TO.value or output.name, evaluation)
  print(f"{output}: open with diffusers' AutoPipelineForInpainting or Inpainter.from_pretrained")
  if _PUSH_TO.value:
    print(model_card.push(output, _PUSH_TO.value))


def _export_adapters(file: Path) -> None:
  """Writes the adapters of a run."""
  if file.exists():
    raise ValueError(f"{file} exists; exports replace no file; name a new one")
  files.check_output(file)
  workdir.read_workdir(Path(_WORKDIR.value))
  config, checkpoints = open_run(_WORKDIR.value)
  if not config.get("lora", {}).get("rank", 0):
    raise ValueError(
      f"{_WORKDIR.value}: a run without LoRA adapters (lora.rank is 0); expected one with them; "
      "leave out --lora to export the whole policy"
    )
  trained = checkpoints.load(trained_tree(config), _STEP.value)
  base = inpainter.open_policy(config.policy).params["unet"]
  adapters.save(file, trained, base, _LORA.value)
  print(f"{file}: adapters of {config.policy}; open with diffusers' load_lora_weights or --lora")


if __name__ == "__main__":
  cli.run(main)
