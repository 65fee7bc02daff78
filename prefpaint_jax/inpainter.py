"""Inpainter: a Stable Diffusion inpainting pipeline, its parameters and its tokenizer.

`Modules` holds the pure functions (they run under any jit, on any mesh); `Inpainter` is the bundle
a user holds: load, paint, save. A *prompt* is an incomplete image and its mask; text is optional.
Shapes: B prompts, S samples per prompt, H W pixels, h w latents, L text tokens, D text width.
"""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from prefpaint_jax import mini
from prefpaint_jax.data import images as image_io
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.diffusion.ddim import Steps
from prefpaint_jax.models.pipeline import NETWORKS, Modules, Params, make_modules
from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.compilation import apart, fast_jit
from prefpaint_jax.runtime.workdir import read_workdir
from prefpaint_jax.weights import folder as weights


@functools.partial(jax.jit, static_argnames="modules")
def _encode_text(modules: Modules, params: Params, ids: jax.Array) -> jax.Array:
  return modules.text_encoder.apply({"params": params}, ids).astype(jnp.float32)


def _paint(
  modules: Modules,
  params: dict[str, Params],
  images: jax.Array,
  masks: jax.Array,
  context: jax.Array,
  empty_context: jax.Array,
  guidance_scale: jax.Array,
  latents: jax.Array,
  key: jax.Array,
  steps: Steps,
  num_samples: int,
  guided: bool,
  report: Callable[[], None] | None,
) -> jax.Array:
  prompts = modules.encode_prompts(params["vae"], images, masks, context).repeat(num_samples)

  def predict(latents: jax.Array, timestep: jax.Array) -> jax.Array:
    if report is not None:
      jax.debug.callback(lambda _: report(), timestep)
    if guided:
      return modules.predict_guided(
        params["unet"], prompts, empty_context, guidance_scale, latents, timestep
      )
    return modules.predict(params["unet"], prompts, latents, timestep)

  final = ddim.sample(predict, modules.schedule, steps, latents, key)
  return modules.decode(params["vae"], final)


@functools.cache
def _painter() -> Callable:
  return fast_jit()(_paint, static_argnames=("modules", "num_samples", "guided", "report"))


class Inpainter:
  """An inpainting model: `Inpainter.from_pretrained(name)`, then `inpainter(image, mask, ...)`.

  Attributes:
    modules: the networks and the schedule (pure functions).
    params: {"unet", "vae", "text_encoder"} trees of float32 arrays.
    configs: the raw json of unet, vae, text_encoder and scheduler, written back as they were.
    tokenizer_files: file name -> content of the folder's `tokenizer/`.
  """

  def __init__(
    self,
    modules: Modules,
    params: dict[str, Params],
    configs: dict[str, dict],
    tokenizer_files: dict[str, bytes],
  ):
    self.modules, self.params = modules, params
    self.configs, self.tokenizer_files = configs, tokenizer_files
    self._batch_sharding: NamedSharding | None = None

  @classmethod
  @apart()
  def from_pretrained(
    cls,
    name: str | Path,
    dtype: str = "float32",
    remat: bool = False,
    variant: str | None = None,
  ) -> "Inpainter":
    """Loads a diffusers folder, a hub name, or the embedded "mini".

    Args:
      name: folder or hub name, e.g. "stable-diffusion-v1-5/stable-diffusion-inpainting".
      dtype: what the networks compute in; parameters stay float32.
      remat: recompute the UNet's blocks in the backward pass.
      variant: file variant such as "fp16"; only needed when several are there.
    """
    path = weights.resolve_pipeline(mini.locate(name, "policy"))
    configs = {part: weights.read_config(path / part) for part in NETWORKS}
    configs["scheduler"] = weights.read_config(path / "scheduler", "scheduler_config.json")
    modules = make_modules(configs, dtype, remat, where=str(name))
    shapes = jax.eval_shape(modules.init, jax.random.key(0))
    params = {part: weights.load_params(path / part, shapes[part], variant) for part in NETWORKS}
    files = sorted((path / "tokenizer").glob("*"))
    tokenizer_files = {file.name: file.read_bytes() for file in files if file.is_file()}
    if not tokenizer_files:
      raise ValueError(
        f"{path / 'tokenizer'}: no files; copy the tokenizer of the base model there"
      )
    return cls(modules, params, configs, tokenizer_files)

  def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
    """Writes a folder that this class and stock diffusers open; `dtype` is that of the files."""
    folder = Path(folder)
    library = {
      "unet": ["diffusers", "UNet2DConditionModel"],
      "vae": ["diffusers", "AutoencoderKL"],
      "text_encoder": ["transformers", "CLIPTextModel"],
      "tokenizer": ["transformers", "CLIPTokenizer"],
      "scheduler": ["diffusers", self.configs["scheduler"].get("_class_name", "DDIMScheduler")],
    }
    index = {"_class_name": "StableDiffusionInpaintPipeline", "_diffusers_version": "0.30.0"}
    index |= library | {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index |= {"requires_safety_checker": False}
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", self.configs["scheduler"])
    for part in NETWORKS:
      _write_json(folder / part / "config.json", self.configs[part])
      weights.save_params(folder / part, self.params[part], dtype)
    self._write_tokenizer(folder / "tokenizer")

  def _write_tokenizer(self, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in self.tokenizer_files.items():
      (folder / name).write_bytes(content)

  @functools.cached_property
  def tokenizer(self):
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not missed here
    from transformers import CLIPTokenizer  # slow to import: only when a text is needed

    folder = Path(tempfile.mkdtemp(prefix="tokenizer"))
    try:
      self._write_tokenizer(folder)
      return CLIPTokenizer.from_pretrained(folder)
    finally:
      shutil.rmtree(folder)

  def place(self, mesh: Mesh) -> "Inpainter":
    """Copies the parameters to every device of `mesh`; batches that divide are split over them."""
    self.params = jax.device_put(self.params, sharding.replicated(mesh))
    self._batch_sharding = sharding.batch_sharding(mesh)
    return self

  def encode_text(self, texts: Sequence[str]) -> jax.Array:
    """Texts -> their context [B, L, D]; longer ones are cut."""
    length = self.modules.text_encoder.config.max_position_embeddings
    tokens = self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
    ids = jnp.asarray(tokens["input_ids"], jnp.int32)
    return _encode_text(self.modules, self.params["text_encoder"], ids)

  @functools.cached_property
  def empty_context(self) -> jax.Array:
    """The context [1, L, D] of the empty text, computed once."""
    return self.encode_text([""])

  def working_size(self, height: int, width: int) -> tuple[int, int]:
    """Where an image is painted: its shorter side native, both multiples of the factor."""
    factor, scale = self.modules.vae.config.factor, self.modules.native_size / min(height, width)
    fit = lambda side: max(factor, round(side * scale / factor) * factor)
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
    guidance_scale: float = 7.5,
    latents: Any = None,
    num_samples: int = 1,
    paste_back: bool = True,
    report: Callable[[], None] | None = None,
  ) -> np.ndarray:
    """Paints the missing parts of one image or of several of the same size.

    Images are painted with their shorter side at the model's own size and brought back to theirs.

    Args:
      image: PIL image, path or array [H, W, 3] (uint8, or float in [0, 1]), or a list of B of them.
      mask: the same, white (1) = missing; one mask serves all images.
      key: `jax.random.key`; default `jax.random.key(0)`.
      num_steps: DDIM steps.
      eta: 0 is deterministic given the initial noise; 1 adds the full noise of the chain.
      text: one text for all, or B texts. The empty text needs no guidance, so none is computed.
      guidance_scale: strength of the text; 1 is none.
      latents: initial noise [B*S, h, w, 4] in place of the key's.
      num_samples: S, inpaintings of each image.
      paste_back: put the known pixels back.
      report: called at each step, for a progress bar.

    Returns:
      float32 [B*S, H, W, 3] in [0, 1], the S samples of an image in a row.
    """
    images, masks = image_io.load_pairs(image, mask)
    B, H, W, _ = images.shape
    size = self.working_size(H, W)
    small_images = np.stack([image_io.resize_image(x, size) for x in images])
    small_masks = np.stack([image_io.resize_mask(x, size) for x in masks])

    texts = [text] if isinstance(text, str) else list(text)
    if len(texts) not in (1, B):
      raise ValueError(f"{len(texts)} texts for {B} images; give one, or one for each")
    empty = self.empty_context
    guided = guidance_scale != 1 and any(texts)
    context = self.encode_text(texts) if any(texts) else empty

    key = jax.random.key(0) if key is None else key
    noise_key, chain_key = jax.random.split(key)
    shape = self.modules.latent_shape(B * num_samples, *size)
    if latents is None:
      latents = jax.random.normal(noise_key, shape)
    elif np.shape(latents) != shape:
      raise ValueError(f"latents are {np.shape(latents)}; these images need {shape}")
    if self._batch_sharding is not None and B % self._batch_sharding.num_devices == 0:
      small_images, small_masks, latents = jax.device_put(
        (small_images, small_masks, latents), self._batch_sharding
      )
    painted = _painter()(
      self.modules,
      self.params,
      small_images,
      small_masks,
      context,
      empty,
      float(guidance_scale),
      latents,
      chain_key,
      ddim.ddim_steps(self.modules.schedule, num_steps, eta),
      num_samples=num_samples,
      guided=guided,
      report=report,
    )
    painted = np.stack([image_io.resize_image(x, (H, W)) for x in np.asarray(painted)])
    if paste_back:
      images, masks = (np.repeat(x, num_samples, axis=0) for x in (images, masks))
      painted = image_io.paste_back(painted, images, masks)
    return painted


def _write_json(path: Path, content: dict) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def open_policy(name: str, dtype: str = "float32", step: int | str | None = None) -> "Inpainter":
  """The policy of a run's workdir at a checkpoint (default: the latest), or of any folder or name.

  A run that kept a moving average of the parameters gives that. `step` is an iteration, or "best"
  for the checkpoint that `keep_best` kept.
  """
  # They bring JAX along, which commands that paint nothing do without.
  from prefpaint_jax.models import lora
  from prefpaint_jax.runtime.checkpoint import Checkpoints

  workdir = Path(name)
  if (workdir / "model_index.json").is_file() or not (workdir / "config.json").is_file():
    return Inpainter.from_pretrained(name, dtype)
  config = read_workdir(workdir)
  inpainter = Inpainter.from_pretrained(config.policy, dtype)
  kept = "ema" if config.ema_decay else "params"
  checkpoints = Checkpoints(workdir / "checkpoints", best=config.get("keep_best", ""))
  step = int(step) if isinstance(step, str) and step.isdecimal() else step
  trained = checkpoints.load(kept, step)
  if config.get("lora", {}).get("rank", 0):
    trained = lora.merge(inpainter.params["unet"], trained)
  inpainter.params["unet"] = trained
  return inpainter
