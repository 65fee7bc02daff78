"""The parts of a pipeline's folder that are not weights: configs and tokenizers."""

from pathlib import Path
from typing import Any

from prefpaint_jax.weights import folder as weights


def read_pipeline_configs(folder: Path) -> dict[str, dict[str, Any]]:
  """Reads the configs of a pipeline's networks by name, "scheduler" and "model_index".

  Raises:
    ValueError: the folder is no pipeline of a known class, or a part is missing.
  """
  weights.check_pipeline(folder)
  index = weights.read_config(folder, "model_index.json")
  parts = ["unet", "vae", "text_encoder"]
  is_xl = "StableDiffusionXL" in str(index.get("_class_name"))
  if is_xl:
    parts.append("text_encoder_2")
    if index.get("requires_aesthetics_score"):
      raise ValueError(
        f"{folder}: requires_aesthetics_score is true, which is not supported; expected false; "
        "give an inpainting checkpoint"
      )
  configs = {part: weights.read_config(folder / part) for part in parts}
  configs["scheduler"] = weights.read_config(folder / "scheduler", "scheduler_config.json")
  return configs | ({"model_index": index} if is_xl else {})


def read_tokenizers(folder: Path, has_second: bool) -> dict[str, dict[str, bytes]]:
  """Reads the files of a pipeline's tokenizers: {"tokenizer" or "tokenizer_2": {name: content}}.

  Raises:
    ValueError: a tokenizer has no files.
  """
  found = {}
  for name in ("tokenizer", "tokenizer_2") if has_second else ("tokenizer",):
    files = [file for file in sorted((folder / name).glob("*")) if file.is_file()]
    if not files:
      raise ValueError(f"{folder / name}: no files; copy the {name} of the base model into it")
    found[name] = {file.name: file.read_bytes() for file in files}
  return found
