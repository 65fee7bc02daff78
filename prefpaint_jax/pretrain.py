"""Trains an inpainting model to denoise, to adapt a base policy or to make a small one.

  python -m prefpaint_jax.pretrain --config=configs/pretrain.py --workdir=runs/adapt \\
    --config.pictures=FOLDER

Trains the VAE if `vae.iterations` is not 0, then the UNet, on crops of the images in FOLDER with
outpainting masks and masks with holes. Writes the pipeline to WORKDIR/pipeline. The same command
resumes an interrupted run.
"""
# Shapes: B batch, H W pixels, L text tokens, D text width.

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from ml_collections import ConfigDict

from prefpaint_jax.data.drawn_prompts import DrawnPrompts
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.inpainter import Inpainter, open_policy
from prefpaint_jax.models.assembly import make_modules
from prefpaint_jax.models.conditioning import Context
from prefpaint_jax.models.pipeline import NETWORKS, Modules
from prefpaint_jax.models.tokenizer import byte_tokenizer
from prefpaint_jax.models.vae import AutoencoderKL
from prefpaint_jax.preference import simulation
from prefpaint_jax.runtime import cli, fitting, sharding
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.files import check_output_folder
from prefpaint_jax.runtime.workdir import open_workdir
from prefpaint_jax.weights.names import Params

with epy.lazy_imports():
  import grain

STAGES = ("vae", "unet")  # the networks in the order of their training; sections of the config


def open_pictures(config: ConfigDict, number: int) -> DrawnPrompts:
  """Opens `number` crops of the images with their masks; raises ValueError if none can be drawn."""
  return DrawnPrompts(
    config.pictures,
    "train",
    number,
    config.size,
    seed=config.seed,
    fit="random",
    crop=config.crop,
    test_share=config.test_share,
    kinds={"outpainting": 1.0, "holes": 1.0},
  )


def image_loader(config: ConfigDict, batch_size: int) -> "grain.DatasetIterator":
  """Makes an endless iterator over this process's share of random batches.

  A batch has "image" [B, H, W, 3] in [0, 1], "mask" [B, H, W, 1] and "target" [B, H, W, 3]: the
  image, or in `faded_share` of the examples the image with a faded hole.
  """
  prompts = open_pictures(config, 2**20)

  def draw(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    prompt = prompts[index % len(prompts)]
    image, mask = prompt["image"], prompt["mask"]
    is_faded = rng.random() < config.faded_share
    target = simulation.fade(image[None], mask[None])[0] if is_faded else image
    return {"image": image, "mask": mask, "target": target}

  numbers = grain.MapDataset.range(2**31).seed(config.seed).random_map(draw)
  share = numbers.slice(slice(jax.process_index(), None, jax.process_count()))
  batches = share.batch(batch_size // jax.process_count())
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def vae_loss(
  modules: Modules, kl_weight: float, params: Params, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the loss of the VAE and its metrics.

  The loss is the mean absolute plus the mean squared error of the reconstruction, plus `kl_weight`
  times KL(posterior ‖ N(0, 1)) per latent.

  Args:
    params: of the VAE.
    batch: of `image_loader`; the VAE reconstructs "target".
    key: of the posterior's sample.
  """
  images = 2.0 * batch["target"] - 1.0
  apply = functools.partial(modules.vae.apply, {"params": params})
  mean, log_variance = apply(images, method=AutoencoderKL.encode)
  noise = jax.random.normal(key, mean.shape)
  decoded = apply(mean + jnp.exp(0.5 * log_variance) * noise, method=AutoencoderKL.decode)
  error = decoded - images
  kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
  squared = jnp.mean(error**2)
  loss = jnp.mean(jnp.abs(error)) + squared + kl_weight * kl
  psnr = -10.0 * jnp.log10(squared / 4.0)  # values are in [-1, 1]
  return loss, {"vae/loss": loss, "vae/psnr_db": psnr, "vae/kl": kl}


def unet_loss(
  modules: Modules,
  vae: Params,
  context: Context,
  params: Params,
  batch: dict[str, jax.Array],
  key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the denoising loss at random timesteps (Ho et al. 2020, eq. 14) and its metrics.

  Args:
    vae: parameters of the VAE.
    context: of the empty text.
    params: of the UNet.
    batch: of `image_loader`. The prompt is "image" under "mask", and the UNet denoises "target".
    key: of the timesteps and the noise.
  """
  time_key, noise_key = jax.random.split(key)
  prompts = modules.encode_prompts(vae, batch["image"], batch["mask"], context)
  target = 2.0 * batch["target"] - 1.0
  mean, _ = modules.vae.apply({"params": vae}, target, method=AutoencoderKL.encode)
  clean = mean * modules.vae.config.scaling_factor
  t = jax.random.randint(time_key, clean.shape[:1], 0, modules.schedule.num_train_timesteps)
  noise = jax.random.normal(noise_key, clean.shape)
  noisy = ddim.add_noise(modules.schedule, clean, noise, t)
  output = modules.predict(params, prompts, noisy, t)
  loss = jnp.mean((output - ddim.training_target(modules.schedule, clean, noise, t)) ** 2)
  return loss, {"unet/loss": loss}


def fit(
  config: ConfigDict,
  stage: str,
  loss: Callable,
  frozen: tuple,
  params: Params,
  workdir: Path,
  mesh: jax.sharding.Mesh,
  restored: Callable[[], None],
) -> Params | None:
  """Trains one network; returns its parameters, or None if the command was asked to stop.

  Args:
    stage: "vae" or "unet", the section of the config with the settings. Checkpoints and metrics are
      written to the folder `stage` of `workdir`.
    loss: function (*frozen, params, batch, key) -> (loss, metrics).
    frozen: arguments of `loss` that are not trained.
    params: initial parameters.
    restored: called before the first iteration, when the state is restored or made.
  """
  settings = config[stage]
  return fitting.fit(
    loss,
    frozen,
    params,
    fitting.warmup_cosine(
      settings.learning_rate, config.warmup_iterations, settings.iterations, weight_decay=1e-4
    ),
    image_loader(config, settings.batch_size),
    workdir / stage,
    mesh,
    jax.random.fold_in(jax.random.key(config.seed), stage == "unet"),
    iterations=settings.iterations,
    ema_decay=config.ema_decay,
    checkpoint_every=config.checkpoint_every,
    log_every=config.log_every,
    restored=restored,
  )


def new_inpainter(config: ConfigDict) -> Inpainter:
  """Makes an untrained pipeline from `config.architecture`."""
  configs = json.loads(json.dumps(config.architecture.to_dict()))
  modules = make_modules(configs, config.dtype, config.remat, where="config.architecture")
  length = modules.text_encoder.config.max_position_embeddings
  params = jax.jit(modules.init)(jax.random.key(config.seed))
  return Inpainter(modules, params, configs, {"tokenizer": byte_tokenizer(length)})


def pretrain(config: ConfigDict, workdir: Path) -> None:
  """Trains the VAE and the UNet as `config` asks and writes WORKDIR/pipeline."""
  check_fields(config, "pretrain")
  if not config.pictures:
    raise ValueError("config.pictures is empty; give --config.pictures=FOLDER")
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  for stage in STAGES:
    if config[stage].iterations:
      sharding.check_batch(config[stage].batch_size, mesh, f"{stage}.batch_size")
  writes, progress = (*STAGES, "pipeline"), "*/checkpoints/*"
  with open_workdir(config, workdir, "pretrain", writes, progress=progress) as write_config:
    _pretrain(config, workdir, mesh, write_config)


def _pretrain(
  config: ConfigDict, workdir: Path, mesh: jax.sharding.Mesh, write_config: Callable[[], None]
) -> None:
  """Trains in a workdir that this process holds, until the end or a request to stop."""
  open_pictures(config, 1)  # raises ValueError for a bad folder before the networks are made
  parts = ("tokenizer", "model_index.json", "model_index", "scheduler", *NETWORKS)
  check_output_folder(workdir / "pipeline", replaces=parts)
  if config.policy:
    inpainter = open_policy(config.policy, config.dtype, remat=config.remat)
  else:
    inpainter = new_inpainter(config)
  modules, params = inpainter.modules, inpainter.params
  modules.latent_shape(1, config.size, config.size)  # raises ValueError for a size that cannot be

  if config.vae.iterations:
    loss = functools.partial(vae_loss, modules, config.vae.kl_weight)
    params["vae"] = fit(config, "vae", loss, (), params["vae"], workdir, mesh, write_config)
    if params["vae"] is None:
      return
    # The noise schedule expects latents of unit variance.
    images = next(image_loader(config, 256))["image"]
    encode = jax.jit(functools.partial(modules.vae.apply, method=AutoencoderKL.encode))
    mean, _ = encode({"params": params["vae"]}, 2.0 * images - 1.0)
    inpainter.configs["vae"]["scaling_factor"] = round(1.0 / float(jnp.std(mean)), 5)
    modules = make_modules(inpainter.configs, config.dtype, config.remat)

  if config.unet.iterations:
    loss = functools.partial(unet_loss, modules)
    frozen = params["vae"], inpainter.empty_context
    params["unet"] = fit(config, "unet", loss, frozen, params["unet"], workdir, mesh, write_config)
    if params["unet"] is None:
      return
  if jax.process_index() == 0:
    Inpainter(modules, params, inpainter.configs, inpainter.tokenizer_files).save_pretrained(
      workdir / "pipeline"
    )
    print(f"{workdir / 'pipeline'}: open with Inpainter.from_pretrained or --config.policy")


if __name__ == "__main__":
  cli.run_with_config(pretrain)
