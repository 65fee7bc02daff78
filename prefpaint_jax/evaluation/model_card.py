"""Model card of an exported policy, and its upload to the Hugging Face hub."""

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from prefpaint_jax.evaluation import tables
from prefpaint_jax.runtime import files, workdir
from prefpaint_jax.runtime.runs import base_of, is_dpo
from prefpaint_jax.runtime.text import first_line

CARD, SAMPLES = "README.md", "samples.png"

# Fields of the run in the card. A card is published, so it has no path of this machine: of the
# names of models and data it has the last part.
_SETTINGS = (
  *("size", "num_iterations", "batch_size", "samples_per_prompt", "num_steps", "train_timesteps"),
  *("eta", "guidance_scale", "learning_rate", "clip_range", "behaviour_refresh", "ema_decay"),
  *("loss", "beta", "region", "pairs", "gradient_accumulation"),
  *("trust.norm", "trust.k", "trust.b", "lora.rank", "dtype", "seed"),
)
_HUB_NAME = r"[\w.-]+/[\w.-]+"

_PAGE = """\
# {title}

Stable Diffusion inpainting, aligned with human preference: `{base}` after {iteration} iterations of
{method} in `prefpaint_jax`.
{samples}
## Use

```python
from diffusers import AutoPipelineForInpainting
from diffusers.utils import load_image

pipeline = AutoPipelineForInpainting.from_pretrained("{title}")
image = pipeline(
  "",  # the text
  image=load_image("photo.png"),
  mask_image=load_image("mask.png"),  # white = missing
  num_inference_steps={num_steps},
  eta={eta},
  guidance_scale={guidance_scale},
).images[0]
```

{sampler}

## Training

| | |
|---|---|
| base model | `{base}` |
{data}
| iteration | {iteration} |
{settings}

## Evaluation

{evaluation}

## Licence

{licence}
"""


class Source(NamedTuple):
  """A run whose policy is exported."""

  workdir: Path
  config: ConfigDict
  iteration: int  # of the checkpoint


def write_card(
  folder: Path, source: Source, title: str, evaluation: dict[str, Any] | None = None
) -> None:
  """Writes README.md, and samples.png if the run has written samples by this iteration.

  Args:
    folder: the exported folder.
    source: the run.
    title: name under which the folder is opened.
    evaluation: content of the eval.json of `evaluate`; None: the card has no figures.

  Raises:
    ValueError: `evaluation` has other content.
  """
  from huggingface_hub import ModelCardData  # slow to import

  config = source.config
  base = base_of(config.policy)
  licence = _licence(Path(base))
  data = ModelCardData(
    base_model=base if _is_hub_name(base) else None,
    library_name="diffusers",
    pipeline_tag="image-to-image",
    tags=["inpainting", "stable-diffusion", "prefpaint"],
    license=licence or "other",
  )
  grids = sorted(path for path in (source.workdir / "samples").glob("*.png") if path.stem.isdigit())
  grids = [path for path in grids if int(path.stem) <= source.iteration]
  samples = ""
  if grids:
    shutil.copyfile(grids[-1], folder / SAMPLES)
    samples = (
      f"\n![samples]({SAMPLES})\n\nHeld-out prompts at iteration {int(grids[-1].stem)}: "
      "incomplete, base model, this model, from the same noise.\n"
    )
  fields = workdir.flatten(config.to_dict())
  rows = [f"| {name} | {fields[name]} |" for name in _SETTINGS if name in fields]
  page = _PAGE.format(
    title=title,
    base=_public(base),
    iteration=source.iteration,
    samples=samples,
    num_steps=config.get("num_steps", 50),
    eta=config.get("eta", 1.0),
    guidance_scale=config.get("guidance_scale", 1.0),
    **_method(config),
    settings="\n".join(rows),
    evaluation=_figures(evaluation, source.iteration) if evaluation else "Not evaluated.",
    licence=f"`{licence}`, that of the base model."
    if licence
    else "The licence of the base model was not found beside it: fill it in, here and at the top "
    "of this file.",
  )
  files.write_text(folder / CARD, f"---\n{data.to_yaml()}\n---\n\n{page}")


def _method(config: ConfigDict) -> dict[str, str]:
  """Returns the texts of the card that depend on the command that trained the policy."""
  names = ("preferences",) if is_dpo(config) else ("reward", "prompts")
  texts = {"data": "\n".join(f"| {name} | `{_public(config[name])}` |" for name in names)}
  if is_dpo(config):
    loss = {"dpo": "Diffusion-DPO", "capo": "CaPO"}[config.loss]
    return texts | {
      "method": f"{loss} on the preferences `{_public(config.preferences)}`",
      "sampler": "The training has no sampler: choose the steps, the noise and the guidance.",
    }
  return texts | {
    "method": f"reinforcement learning from the reward model `{_public(config.reward)}`, by the\n"
    "method of PrefPaint",
    "sampler": "These are the steps, the noise and the guidance of the training.",
  }


def read_evaluation(path: str | None, run: Path) -> dict[str, Any] | None:
  """Reads the eval.json of `evaluate`.

  Args:
    path: the file or its folder; None: that of the run's workdir, if there is one.
    run: workdir of the run.

  Raises:
    ValueError: there is no such file, or it is not an evaluation.
  """
  file = Path(path or run)
  file = file / "eval.json" if file.is_dir() else file
  if path is None and not file.is_file():
    return None
  if not file.is_file():
    raise ValueError(f"{file}: no such file; give the --workdir of evaluate, or its eval.json")
  evaluation = files.read_json(file)
  try:
    _figures(evaluation, 0)
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise ValueError(
      f"{file}: not an evaluation ({first_line(error)}); give the eval.json of evaluate"
    ) from error
  return evaluation


def check_hub_name(name: str) -> None:
  """Raises ValueError unless `name` is owner/name."""
  if not re.fullmatch(_HUB_NAME, name) or name.startswith((".", "-")):
    raise ValueError(f"--push_to is {name!r}; expected a hub name owner/name; give one")


def push(folder: Path, name: str) -> str:
  """Uploads a folder to the hub, to a new or an existing model; returns its address.

  Raises:
    ValueError: the hub refused, or cannot be reached.
  """
  from huggingface_hub import HfApi

  try:
    api = HfApi()
    address = api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of prefpaint_jax")
  except Exception as error:  # the hub's and the network's libraries raise many types
    raise ValueError(
      f"{name}: not uploaded ({type(error).__name__}: {first_line(error)}); {folder} is written; "
      "check the name, the token (hf auth login) and the network, and upload the folder"
    ) from error
  return str(address)


def _figures(evaluation: dict[str, Any], iteration: int) -> str:
  """Formats the statistics of all prompts by judge."""
  about = evaluation["about"]
  named = evaluation["judges"].items()
  blocks = [tables.describe_table(_public(name), {"all": group["all"]}) for name, group in named]
  seen = about.get("policy_iteration", iteration)
  checkpoint = f" of the checkpoint of iteration {seen}" if seen != iteration else ""
  number, _, prompts = about["prompts"].partition(" of ")
  policy, baseline = (f"`{_public(about[side])}`" for side in ("policy", "baseline"))
  heading = (
    f"`evaluate` of {policy}{checkpoint} against {baseline}, {number} prompts "
    f"({_public(prompts)}), {about['samples_per_prompt']} samples of each, {about['sampler']}.\n"
    "In brackets: 95 % bootstrap intervals over prompts."
  )
  return "\n\n".join([heading, *(f"```\n{block}\n```" for block in blocks)])


def _is_hub_name(name: str) -> bool:
  return bool(re.fullmatch(_HUB_NAME, name)) and not Path(name).exists()


def _public(name: str) -> str:
  """Replaces the paths in a list of names by their last parts; hub names stay whole."""
  parts = (part.strip().rpartition("@") for part in str(name).split(","))
  kept = lambda path: path if _is_hub_name(path.split("*")[0]) else Path(path).name
  return ", ".join(f"{head}{at}{kept(path)}" for head, at, path in parts)


def _licence(base: Path) -> str | None:
  """Returns the licence that the model card in a folder names."""
  from huggingface_hub import ModelCard

  card = base / CARD
  if not card.is_file():
    return None
  try:
    return ModelCard.load(card, ignore_metadata_errors=True).data.license
  except Exception:  # a card without valid YAML, of which PyYAML raises many types
    return None
