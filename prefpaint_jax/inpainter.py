"""Inpainter: loads, runs and saves a Stable Diffusion inpainting pipeline.

`Inpainter` holds the parameters and the tokenizer; `Modules` holds the networks as pure functions.
"""
# Shapes: B images, S samples of each, H W pixels, h w latents, L text tokens, D text width.

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from prefpaint_jax import mini
from prefpaint_jax.data import images as image_io
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.models import lora, sampling, single_file
from prefpaint_jax.models.assembly import make_modules
from prefpaint_jax.models.conditioning import Context, Guidance
from prefpaint_jax.models.exported import exported_configs
from prefpaint_jax.models.pipeline import Modules, Tokens
from prefpaint_jax.models.sampling import sampling_key
from prefpaint_jax.models.text import list_texts, load_tokenizer, tokenize
from prefpaint_jax.runtime import files, sharding
from prefpaint_jax.runtime.compilation import enable_cache
from prefpaint_jax.runtime.config_check import check_values
from prefpaint_jax.runtime.config_fields import ARGUMENTS
from prefpaint_jax.runtime.memory import check_memory
from prefpaint_jax.runtime.runs import open_run, pinned_step, trained_tree
from prefpaint_jax.weights import folder as weights
from prefpaint_jax.weights.names import Params
from prefpaint_jax.weights.pipeline_parts import read_pipeline_configs, read_tokenizers


class Inpainter:
  """An inpainting model: `Inpainter.from_pretrained(name)`, then `inpainter(image, mask, ...)`.

  Attributes:
    modules: the networks and the noise schedule, as pure functions.
    params: {"unet", "vae", "text_encoder"}, trees of float32 arrays; SDXL has "text_encoder_2" too.
    configs: JSON of the networks, of "scheduler" and, of SDXL, "model_index".
    tokenizer_files: {"tokenizer": {file name: content}}; SDXL has "tokenizer_2" too.
  """

  def __init__(
    self,
    modules: Modules,
    params: dict[str, Params],
    configs: dict[str, dict],
    tokenizer_files: dict[str, dict[str, bytes]],
  ):
    self.modules, self.params = modules, params
    self.configs, self.tokenizer_files = configs, tokenizer_files
    self._batch_sharding: NamedSharding | None = None

  @classmethod
  def from_pretrained(
    cls,
    name: str | Path,
    dtype: str = "float32",
    remat: bool = False,
    variant: str | None = None,
    mask_latents: str = "cells",
  ) -> "Inpainter":
    """Loads a pipeline: a folder in the format of diffusers, or a single file in that of CompVis.

    It also enables JAX's compilation cache, unless the process has chosen one (see
    `runtime.compilation.enable_cache`).

    Args:
      name: a folder, a `.safetensors` or `.ckpt` file, a hub name
        ("stable-diffusion-v1-5/stable-diffusion-inpainting"), or "mini", the model inside this
        package.
      dtype: compute dtype of the networks; parameters stay float32.
      remat: rematerialise the UNet's blocks in the backward pass.
      variant: variant of the weight files, "fp16" for example; default: full precision, if present.
      mask_latents: latents that the UNet is told are missing, "cells" or "corner" (see `Modules`).

    Raises:
      ValueError: a file is missing, or the folder is not an inpainting pipeline.
    """
    check_values({"remat": remat}, ARGUMENTS, owner="")
    enable_cache()
    path = weights.resolve_pipeline(mini.locate(name, "policy"))
    file = single_file.read(path, variant) if path.is_file() else None
    configs = file.configs if file else read_pipeline_configs(path)
    modules = make_modules(configs, dtype, remat, str(name), mask_latents)
    tokenizers = file.tokenizers if file else path
    tokenizer_files = read_tokenizers(tokenizers, modules.text_encoder_2 is not None)
    shapes = modules.shapes()
    load = lambda part: weights.load_params(path / part, shapes[part], variant)
    params = file.params(shapes) if file else {part: load(part) for part in shapes}
    return cls(modules, params, configs, tokenizer_files)

  def add_lora(self, name: str | Path) -> None:
    """Adds the LoRA adapters of a file to the UNet's kernels; "FILE:0.8" scales them."""
    self.params["unet"] = lora.add(self.params["unet"], name)

  def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
    """Writes a diffusers folder, with parameters stored as `dtype`, whole or not at all.

    Raises:
      ValueError: a parameter is not finite, or the folder has files of something else.
    """
    configs = exported_configs(self.configs, self.modules.schedule, dtype)
    replaced = "model_index.json", *configs, *self.tokenizer_files
    with files.atomic_folder(folder, replaces=replaced) as new:
      files.write_json(new / "model_index.json", configs["model_index"], sort_keys=True)
      scheduler = new / "scheduler" / "scheduler_config.json"
      files.write_json(scheduler, configs["scheduler"], sort_keys=True)
      for part in self.modules.networks:
        files.write_json(new / part / "config.json", configs[part], sort_keys=True)
        weights.save_params(new / part, self.params[part], dtype)
      for name, content in self.tokenizer_files.items():
        (new / name).mkdir(parents=True)
        for file, data in content.items():
          (new / name / file).write_bytes(data)

  @functools.cached_property
  def tokenizers(self) -> list[Any]:
    """The tokenizers of transformers, loaded on first use."""
    return [load_tokenizer(content, name) for name, content in self.tokenizer_files.items()]

  def place(self, mesh: Mesh) -> "Inpainter":
    """Replicates the parameters on `mesh`; later calls shard batches whose size divides over it."""
    self.params = jax.device_put(self.params, sharding.replicated(mesh))
    self._batch_sharding = sharding.batch_sharding(mesh)
    return self

  def tokenize(self, texts: Sequence[str]) -> Tokens:
    """Computes the tokens of B texts; texts of more than L tokens are cut."""
    encoders = self.modules.text_encoders.values()
    pairs = zip(self.tokenizers, encoders, strict=True)
    tokens = tuple(tokenize(tokenizer, encoder.config, texts) for tokenizer, encoder in pairs)
    lengths = [ids.shape[1] for ids, _ in tokens]
    if len(set(lengths)) > 1:
      raise ValueError(
        f"tokenizer and tokenizer_2 make {lengths[0]} and {lengths[1]} tokens; expected equal "
        "numbers; use tokenizers and text encoders of one model"
      )
    return tokens

  def encode_text(self, texts: Sequence[str]) -> Context:
    """Computes the context of B texts."""
    return sampling.encode_text(self.modules, self.text_params, self.tokenize(texts))

  @property
  def text_params(self) -> dict[str, Params]:
    """The parameters of the text encoders by name."""
    return {name: self.params[name] for name in self.modules.text_encoders}

  @functools.cached_property
  def empty_context(self) -> Context:
    """The context of the empty text, computed on first use."""
    return self.encode_text([""])

  def guidance(
    self, scale: float, texts: Sequence[str] | None, negative_texts: Sequence[str] | None = None
  ) -> Guidance | None:
    """Returns classifier-free guidance away from negative texts, or None if it changes nothing.

    Args:
      texts: None: any.
      negative_texts: None: the empty text, or for SDXL a context of zeros, as stock pipelines.
    """
    if scale == 1:
      return None
    scale = np.float32(scale)
    if negative_texts is None and self.modules.zero_negative:
      return Guidance(scale, jax.tree.map(np.zeros_like, self.empty_context))
    negative_texts = negative_texts or [""]
    if texts is not None and np.all(np.array(texts) == np.array(negative_texts)):
      return None
    is_empty = not any(negative_texts)
    negative = self.empty_context if is_empty else self.encode_text(negative_texts)
    return Guidance(scale, negative)

  def working_size(self, height: int, width: int) -> tuple[int, int]:
    """Returns the (height, width) at which the networks process an image.

    The shorter side is the model's native size, and both are multiples of the VAE's factor.
    """
    factor, scale = self.modules.vae.config.factor, self.modules.native_size / min(height, width)
    fit = lambda side: max(factor, round(side * scale / factor) * factor)
    self.modules.latent_shape(1, fit(height), fit(width))  # raises ValueError for lack of memory
    return fit(height), fit(width)

  def __call__(
    self,
    image: Any,
    mask: Any,
    *,
    key: jax.Array | None = None,
    num_steps: int = 50,
    eta: float = 0.0,
    text: str | Sequence[str] = "",
    negative_text: str | Sequence[str] | None = None,
    guidance_scale: float = 7.5,
    latents: Any = None,
    num_samples: int = 1,
    paste_back: bool = True,
    report: Callable[[int], Any] | None = None,
  ) -> np.ndarray:
    """Inpaints one image, or several images of one size.

    Images are resized so that their shorter side is the model's native size, and samples are
    resized back. Pixels under the mask do not change the samples.

    Args:
      image: PIL image, path or array [H, W, 3] (uint8, or float in [0, 1]), or a list of B of them.
      mask: the same, white (1) = missing; or one mask for all images.
      key: `jax.random.key`; default `jax.random.key(0)`.
      num_steps: DDIM steps.
      eta: 0 is deterministic given the initial noise; 1 has the noise of DDPM.
      text: one text for all images, or B texts.
      negative_text: what guidance leads away from, one text or B texts; default: no text.
      guidance_scale: weight of classifier-free guidance; 1, or equal texts, disables it.
      latents: initial noise [B S, h, w, 4]; default: drawn from `key`.
      num_samples: S.
      paste_back: keep the known pixels of `image`; otherwise the VAE reconstructs them.
      report: called about once a second with the number of steps done since, for a progress bar.

    Returns:
      float32 [B S, H, W, 3] in [0, 1], the S samples of each image in a row.

    Raises:
      ValueError: inputs cannot be read, or do not have matching sizes or numbers.
    """
    check_values(locals(), ARGUMENTS, owner="")
    key = sampling_key(key)
    images, masks = image_io.load_pairs(image, mask)
    B, H, W, _ = images.shape
    size = self.working_size(H, W)
    check_memory(36 * B * num_samples * H * W, f"num_samples={num_samples} of {B} {H}x{W} images")
    small_images, small_masks = image_io.resize_prompts(images, masks, size)
    texts, negative_texts = list_texts(text, B), negative_text
    if negative_text is not None:
      negative_texts = list_texts(negative_text, B, "negative_text")
    context = self.encode_text(texts) if any(texts) else self.empty_context
    noise_key, chain_key = jax.random.split(key)
    latents = self._initial_noise(noise_key, latents, B * num_samples, size)
    if self._batch_sharding is not None and B % self._batch_sharding.num_devices == 0:
      small_images, small_masks, latents = jax.device_put(
        (small_images, small_masks, latents), self._batch_sharding
      )
    samples = sampling.inpaint(
      self.modules,
      self.params,
      small_images,
      small_masks,
      context,
      self.guidance(guidance_scale, texts, negative_texts),
      latents,
      chain_key,
      ddim.ddim_steps(self.modules.schedule, num_steps, eta),
      num_samples=num_samples,
      report=report,
    )
    samples = np.asarray(samples)
    if not np.isfinite(samples).all():
      raise ValueError("samples are not finite; give a smaller guidance_scale, or dtype float32")
    samples = np.stack([image_io.resize_image(x, (H, W)) for x in samples])
    if paste_back:
      images, masks = (np.repeat(x, num_samples, axis=0) for x in (images, masks))
      samples = image_io.paste_back(samples, images, masks)
    return samples

  def _initial_noise(
    self, key: jax.Array, latents: Any, batch: int, size: tuple[int, int]
  ) -> jax.Array:
    """Checks the shape of `latents`, or draws them if they are None."""
    shape = self.modules.latent_shape(batch, *size)
    if latents is None:
      return jax.random.normal(key, shape)
    if np.shape(latents) != shape:
      raise ValueError(f"latents are {np.shape(latents)}; these images need {shape}")
    return latents


def open_policy(
  name: str, dtype: str = "float32", step: int | str | None = None, remat: bool = False
) -> "Inpainter":
  """Loads the policy of an alignment run, or a pipeline as `Inpainter.from_pretrained` does.

  From a run it takes the moving average of the parameters, if the run has one, merges LoRA adapters
  into the base policy, and keeps the run's `mask_latents`.

  Args:
    name: workdir of a run, folder, hub name, or "mini".
    dtype: compute dtype of the networks.
    step: iteration of the run's checkpoint, or "best" for the one that `keep_best` keeps; default:
      the latest.
    remat: rematerialise the UNet's blocks in the backward pass.
  """
  run = open_run(name)
  if run is None:
    return Inpainter.from_pretrained(name, dtype, remat)
  config, checkpoints = run
  inpainter = open_policy(config.policy, dtype, pinned_step(name), remat)
  mask_latents = config.get("mask_latents", "corner")
  inpainter.modules = dataclasses.replace(inpainter.modules, mask_latents=mask_latents)
  trained = checkpoints.load(trained_tree(config), step)
  if config.get("lora", {}).get("rank", 0):
    trained = lora.merge(inpainter.params["unet"], trained)
  inpainter.params["unet"] = trained
  return inpainter
