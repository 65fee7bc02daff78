"""The modules of a pipeline from its configs."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from packaging.version import InvalidVersion, Version

from prefpaint_jax.diffusion.schedule import Schedule
from prefpaint_jax.models.clip import CLIPTextModel, PooledTextModel
from prefpaint_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from prefpaint_jax.models.pipeline import Modules
from prefpaint_jax.models.unet import UNet2DConditionModel
from prefpaint_jax.models.vae import AutoencoderKL
from prefpaint_jax.runtime.config_fields import DTYPE
from prefpaint_jax.runtime.ranges import check


def make_modules(
  configs: dict[str, dict],
  dtype: str = "float32",
  remat: bool = False,
  where: str = "pipeline",
  mask_latents: str = "cells",
) -> Modules:
  """Makes the modules of a pipeline folder from its configs.

  Args:
    configs: the JSON of "unet", "vae", "text_encoder" and "scheduler"; SDXL has "text_encoder_2"
      and "model_index" too.
    dtype: compute dtype of the networks.
    remat: rematerialise the UNet's blocks in the backward pass.
    where: name of the pipeline, for error messages.
    mask_latents: "cells" or "corner", see `Modules`.

  As stock pipelines do, it takes `steps_offset` of the scheduler as 1, except for SDXL, and a
  `sample_size` below 64 of a UNet that a version of diffusers before 0.9 wrote as 64. As theirs,
  SDXL's text encoders have no attention mask, and its VAE encodes in float32 by `force_upcast`.

  Raises:
    ValueError: a config is not supported, or the networks do not fit together.
  """
  unet, vae = UNetConfig.from_dict(configs["unet"]), VAEConfig.from_dict(configs["vae"])
  if _is_older(configs["unet"], "0.9.0.dev0") and isinstance(unet.sample_size, int):
    unet = dataclasses.replace(unet, sample_size=max(unet.sample_size, 64))
  encoders = {
    name: CLIPTextConfig.from_dict(configs[name])
    for name in ("text_encoder", "text_encoder_2")
    if name in configs
  }
  latents = vae.latent_channels
  if unet.in_channels != 2 * latents + 1:
    raise ValueError(
      f"{where}: the UNet has {unet.in_channels} input channels; expected {2 * latents + 1}; use "
      "an inpainting checkpoint"
    )
  _check_widths(where, unet, encoders)
  check("dtype", str(dtype), DTYPE)
  compute_dtype = jnp.dtype(dtype)
  schedule, is_xl = Schedule.from_config(configs["scheduler"]), len(encoders) == 2
  if is_xl:
    unmasked = {n: dataclasses.replace(c, use_attention_mask=None) for n, c in encoders.items()}
    text_encoders = {
      name: PooledTextModel(config, name == "text_encoder_2", compute_dtype)
      for name, config in unmasked.items()
    }
  else:
    text_encoders = {"text_encoder": CLIPTextModel(encoders["text_encoder"], compute_dtype)}
    schedule = dataclasses.replace(schedule, steps_offset=1)
  zero_negative = configs.get("model_index", {}).get("force_zeros_for_empty_prompt", True)
  return Modules(
    UNet2DConditionModel(unet, compute_dtype, remat),
    AutoencoderKL(vae, compute_dtype, jnp.dtype("float32") if is_xl and vae.force_upcast else None),
    schedule=schedule,
    mask_latents=mask_latents,
    zero_negative=is_xl and bool(zero_negative),
    **text_encoders,
  )


def _check_widths(where: str, unet: UNetConfig, encoders: Mapping[str, CLIPTextConfig]) -> None:
  """Raises ValueError unless the text encoders make what the UNet takes."""
  width, names = sum(config.hidden_size for config in encoders.values()), " and ".join(encoders)
  if unet.cross_attention_dim != width:
    raise ValueError(
      f"{where}: cross_attention_dim of the UNet is {unet.cross_attention_dim}; expected {width}, "
      f"the hidden_size of {names}; use the UNet and text encoder of one model"
    )
  if (unet.addition_embed_type == "text_time") != (len(encoders) == 2):
    raise ValueError(
      f"{where}: addition_embed_type of the UNet is {unet.addition_embed_type!r}, with {names}; "
      "expected 'text_time' with two text encoders, and null with one; use the parts of one model"
    )
  if len(encoders) == 2:
    second = encoders["text_encoder_2"]
    if (second.projection_dim or 0) < 1:
      raise ValueError(
        f"{where}: projection_dim of text_encoder_2 is {second.projection_dim}; expected 1 or more;"
        " use the config of the base model"
      )
    own = second.projection_dim + 6 * unet.addition_time_embed_dim
    if unet.projection_class_embeddings_input_dim != own:
      raise ValueError(
        f"{where}: projection_class_embeddings_input_dim of the UNet is "
        f"{unet.projection_class_embeddings_input_dim}; expected {own}, the pooled text and six "
        "sizes; use the parts of one model"
      )


def _is_older(config: dict, version: str) -> bool:
  """Returns whether a config says that a version of diffusers before `version` wrote it."""
  written = config.get("_diffusers_version")
  if written is None:
    return False
  try:
    return Version(Version(written).base_version) < Version(version)
  except (InvalidVersion, TypeError):
    raise ValueError(
      f"UNet config: _diffusers_version is {written!r}; expected a version such as 0.30.0; correct "
      "it, or remove it"
    ) from None
