"""Configs of an exported pipeline: they agree with its files, and stock diffusers opens them."""

from typing import Any

from prefpaint_jax.diffusion.schedule import Schedule
from prefpaint_jax.models.config import nested

_LIBRARY = {
  "unet": ["diffusers", "UNet2DConditionModel"],
  "vae": ["diffusers", "AutoencoderKL"],
  "text_encoder": ["transformers", "CLIPTextModel"],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "scheduler": ["diffusers", "DDIMScheduler"],
}
_SECOND = {
  "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
  "tokenizer_2": ["transformers", "CLIPTokenizer"],
}


def exported_configs(
  configs: dict[str, dict], schedule: Schedule, dtype: str
) -> dict[str, dict[str, Any]]:
  """Makes the configs of a pipeline whose weights are stored as `dtype`.

  Stock diffusers computes in float32 unless it is told `torch_dtype`, whatever the type of the
  weights. transformers 5 computes the text encoder in the type of its config, or without one in
  that of its weights: in half precision stock would then mix types and fail. So the config of the
  text encoder says float32.

  The scheduler is a DDIMScheduler, the sampler of this package, whatever class the base names: so
  stock diffusers samples as `Inpainter` does.

  Args:
    configs: those of the base, as `weights.pipeline_parts.read_pipeline_configs` reads them.
    schedule: the schedule that the policy samples with.
    dtype: type of the stored weights.

  Returns:
    The same configs, and "model_index".
  """
  scheduler = schedule.to_config()
  if configs["scheduler"].get("_class_name") == "DDIMScheduler":
    scheduler = configs["scheduler"] | {"steps_offset": schedule.steps_offset}
  index = {"_diffusers_version": "0.30.0", "feature_extractor": [None, None]} | _LIBRARY
  if "text_encoder_2" not in configs:
    index |= {"_class_name": "StableDiffusionInpaintPipeline", "safety_checker": [None, None]}
    index["requires_safety_checker"] = False
  else:
    index |= _SECOND | {"_class_name": "StableDiffusionXLInpaintPipeline"}
    force_zeros = configs["model_index"].get("force_zeros_for_empty_prompt", True)
    index |= {"image_encoder": [None, None], "force_zeros_for_empty_prompt": force_zeros}
    index["requires_aesthetics_score"] = False
  exported = {
    "unet": configs["unet"] | {"_class_name": "UNet2DConditionModel"},
    "vae": configs["vae"] | {"_class_name": "AutoencoderKL"},
    "scheduler": scheduler,
    "model_index": index,
  }
  for part in ("text_encoder", "text_encoder_2"):
    if part in configs:
      text = dict(nested(configs[part], "text_config"))
      named = {"dtype", "torch_dtype"} & text.keys()  # of current and of earlier transformers
      text |= dict.fromkeys(named or ({"dtype"} if dtype != "float32" else ()), "float32")
      text |= {"architectures": [index[part][1]], "model_type": "clip_text_model"}
      exported[part] = text
  return exported
