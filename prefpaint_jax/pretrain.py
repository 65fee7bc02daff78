"""Denoising training of an inpainting model on pictures: to adapt a base, or to make a small one.

  python -m prefpaint_jax.pretrain --config=configs/pretrain.py --workdir=runs/adapt \
    --config.photos=FOLDER

Trains the VAE (if asked), then the UNet with the masks of both kinds of prompt, and writes the
pipeline to WORKDIR/pipeline. The same command resumes an interrupted run.
"""
# Shapes: B batch, H W pixels, h w latents.

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from prefpaint_jax import app, diffusion, mini, sharding, simulation
from prefpaint_jax.checkpoint import Checkpoints
from prefpaint_jax.data import images as image_io
from prefpaint_jax.data import masks as mask_io
from prefpaint_jax.data import prompts as prompt_io
from prefpaint_jax.inpainter import Inpainter, Modules, Params, make_modules
from prefpaint_jax.metrics import MetricsWriter, progress
from prefpaint_jax.models.vae import AutoencoderKL


class State(NamedTuple):
  iteration: jax.Array
  params: Params
  opt_state: optax.OptState
  ema: Params


def picture_loader(config: ConfigDict, batch_size: int):
  """Endless batches of crops: image [b, H, W, 3] in [0, 1], mask and faded image likewise."""
  photos = prompt_io.load_photos(mini.locate(config.photos, "photos"))
  names, size = sorted(photos), config.size

  def draw(_: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    photo = photos[names[rng.integers(len(names))]]
    crop = prompt_io.random_crop(rng, photo, "train", config.train_share, config.crop)
    image = image_io.resize_image(crop, (size, size))
    kinds = mask_io.outpainting_mask, mask_io.warping_mask
    mask = kinds[rng.integers(2)](rng, size, size)
    target = image
    if rng.random() < config.faded_share:
      target = simulation.fade(image[None], mask[None])[0]
    return {"image": image, "mask": mask, "target": target}

  numbers = grain.MapDataset.range(2**31).seed(config.seed).random_map(draw)
  mine = numbers.slice(slice(jax.process_index(), None, jax.process_count()))
  batches = mine.batch(batch_size // jax.process_count())
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def vae_loss(
  modules: Modules, kl_weight: float, params: Params, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Absolute and squared error of the reconstruction, and the posterior's KL to N(0, 1)."""
  pictures = 2.0 * batch["target"] - 1.0
  apply = functools.partial(modules.vae.apply, {"params": params})
  mean, log_variance = apply(pictures, method=AutoencoderKL.encode)
  noise = jax.random.normal(key, mean.shape)
  decoded = apply(mean + jnp.exp(0.5 * log_variance) * noise, method=AutoencoderKL.decode)
  error = decoded - pictures
  kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
  squared = jnp.mean(error**2)
  loss = jnp.mean(jnp.abs(error)) + squared + kl_weight * kl
  psnr = -10.0 * jnp.log10(squared / 4.0)  # of values in [-1, 1]
  return loss, {"vae/loss": loss, "vae/psnr_db": psnr, "vae/kl": kl}


def unet_loss(
  modules: Modules,
  vae: Params,
  context: jax.Array,
  params: Params,
  batch: dict[str, jax.Array],
  key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Squared error of the denoising target at random timesteps (Ho et al. 2020, eq. 14)."""
  time_key, noise_key = jax.random.split(key)
  prompts = modules.encode_prompts(vae, batch["image"], batch["mask"], context)
  target = 2.0 * batch["target"] - 1.0
  mean, _ = modules.vae.apply({"params": vae}, target, method=AutoencoderKL.encode)
  clean = mean * modules.vae.config.scaling_factor
  t = jax.random.randint(time_key, clean.shape[:1], 0, modules.schedule.num_train_timesteps)
  noise = jax.random.normal(noise_key, clean.shape)
  noisy = diffusion.add_noise(modules.schedule, clean, noise, t)
  output = modules.predict(params, prompts, noisy, t)
  loss = jnp.mean((output - diffusion.training_target(modules.schedule, clean, noise, t)) ** 2)
  return loss, {"unet/loss": loss}


def fit(
  config: ConfigDict,
  stage: str,
  loss: Callable,
  frozen: tuple,
  params: Params,
  workdir: Path,
  mesh: jax.sharding.Mesh,
) -> Params:
  """Minimises `loss(*frozen, params, batch, key)`; returns the moving average of the parameters.

  `config[stage]` says how long and how. Checkpoints to WORKDIR/checkpoints/STAGE and resumes.
  """
  iterations = config[stage].iterations
  sharding.check_batch(config[stage].batch_size, mesh)
  warmup = min(config.warmup_iterations, iterations // 2)
  rate = optax.warmup_cosine_decay_schedule(0.0, config[stage].learning_rate, warmup, iterations)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-4))

  def init(params: Params) -> State:
    copy = jax.tree.map(jnp.copy, params)
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), copy)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: State, frozen, batch, key):
    key = jax.random.fold_in(key, state.iteration)
    gradients, metrics = jax.grad(lambda params: loss(*frozen, params, batch, key), has_aux=True)(
      state.params
    )
    changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)
    # Young averages follow closely, so that a short run is not held back by its start.
    decay = jnp.minimum(config.ema_decay, (1.0 + state.iteration) / (10.0 + state.iteration))
    ema = optax.incremental_update(params, state.ema, 1.0 - decay)
    return State(state.iteration + 1, params, opt_state, ema), metrics

  shapes = jax.eval_shape(init, params)
  shardings = sharding.specs(shapes, sharding.DEFAULT_RULES, mesh)
  loader = picture_loader(config, config[stage].batch_size)
  writer = MetricsWriter(workdir / stage, is_writer=jax.process_index() == 0)
  checkpoints = Checkpoints(workdir / "checkpoints" / stage, keep=1)
  if checkpoints.latest() is None:
    state = jax.jit(init, out_shardings=shardings)(params)
  else:
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    state, position, _ = checkpoints.restore(abstract)
    loader.set_state(position)
  start = int(state.iteration)
  writer.truncate(start)
  key = jax.random.fold_in(jax.random.key(config.seed), stage == "unet")
  frozen = jax.device_put(frozen, sharding.replicated(mesh))
  bar = progress(iterations, start, visible=jax.process_index() == 0)
  for iteration in range(start, iterations):
    batch = sharding.to_global(mesh, next(loader))
    state, metrics = step(state, frozen, batch, key)
    done = iteration + 1
    if done % config.log_every == 0 or done == iterations:
      metrics = {name: float(value) for name, value in metrics.items()}
      writer.write(done, metrics)
      bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    if done % config.checkpoint_every == 0 or done == iterations:
      checkpoints.save(done, state, loader.get_state(), {})
    bar.update()
  bar.close()
  checkpoints.close()
  writer.close()
  return jax.device_get(state.ema)


def byte_tokenizer(length: int = 77) -> dict[str, bytes]:
  """A CLIP tokenizer of single bytes without merges; `length` tokens a text."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [byte for byte in range(256) if byte not in printable]
  # As in GPT-2's byte-level vocabulary, bytes that do not print take characters from 256 on.
  symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
  marks = ["<|startoftext|>", "<|endoftext|>"]
  tokens = symbols + [symbol + "</w>" for symbol in symbols] + marks
  special = dict(zip(("bos_token", "eos_token"), marks, strict=True))
  special |= {"unk_token": marks[1], "pad_token": marks[1]}
  config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
  config |= {"do_lower_case": True, "add_prefix_space": False, "errors": "replace"}
  to_bytes = lambda content: (json.dumps(content, ensure_ascii=False) + "\n").encode()
  return {
    "vocab.json": to_bytes({token: i for i, token in enumerate(tokens)}),
    "merges.txt": b"#version: 0.2\n",
    "special_tokens_map.json": to_bytes(special),
    "tokenizer_config.json": to_bytes(config),
  }


def new_inpainter(config: ConfigDict) -> Inpainter:
  """An untrained pipeline of `config.architecture`."""
  configs = json.loads(json.dumps(config.architecture.to_dict()))
  modules = make_modules(configs, config.dtype, config.remat, where="config.architecture")
  length = modules.text_encoder.config.max_position_embeddings
  params = jax.jit(modules.init)(jax.random.key(config.seed))
  return Inpainter(modules, params, configs, byte_tokenizer(length))


def pretrain(config: ConfigDict, workdir: Path) -> None:
  app.open_workdir(config, workdir, free=())
  if not config.photos:
    raise ValueError("config.photos is empty: give --config.photos=FOLDER")
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  if config.policy:
    inpainter = Inpainter.from_pretrained(config.policy, config.dtype, config.remat)
  else:
    inpainter = new_inpainter(config)
  modules, params = inpainter.modules, inpainter.params

  if config.vae.iterations:
    loss = functools.partial(vae_loss, modules, config.vae.kl_weight)
    params["vae"] = fit(config, "vae", loss, (), params["vae"], workdir, mesh)
    # Latents of unit variance, as the noise schedule expects them.
    images = next(picture_loader(config, 256))["image"]
    encode = jax.jit(functools.partial(modules.vae.apply, method=AutoencoderKL.encode))
    mean, _ = encode({"params": params["vae"]}, 2.0 * images - 1.0)
    inpainter.configs["vae"]["scaling_factor"] = round(1.0 / float(jnp.std(mean)), 5)
    modules = make_modules(inpainter.configs, config.dtype, config.remat)

  if config.unet.iterations:
    loss = functools.partial(unet_loss, modules)
    frozen = params["vae"], inpainter.empty_context
    params["unet"] = fit(config, "unet", loss, frozen, params["unet"], workdir, mesh)
  if jax.process_index() == 0:
    Inpainter(modules, params, inpainter.configs, inpainter.tokenizer_files).save_pretrained(
      workdir / "pipeline"
    )


if __name__ == "__main__":
  app.run_with_config(pretrain)
