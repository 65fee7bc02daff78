"""The compiled programs of an inpainting pipeline: text, prompts, parts of the DDIM chain, images.

The chain is one program for every part and every number of steps: the first and the last step of a
part are arguments. No program calls back to Python, because JAX caches none that does.
"""
# Shapes: B images, S samples of each, H W pixels, h w latents, L text tokens, D text width.

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax.diffusion import ddim
from prefpaint_jax.diffusion.ddim import Steps
from prefpaint_jax.models.pipeline import Modules, Prompts
from prefpaint_jax.runtime.compilation import fast_jit
from prefpaint_jax.weights.names import Params

REPORT_SECONDS = 1.0  # between reports; after each part the host waits for the device


@functools.partial(jax.jit, static_argnames="modules")
def encode_text(
  modules: Modules, params: Params, ids: np.ndarray, mask: np.ndarray | None
) -> jax.Array:
  """Computes the context [B, L, D] of the tokens of B texts."""
  return modules.text_encoder.apply({"params": params}, ids, mask).astype(jnp.float32)


def _encode(
  modules: Modules,
  params: Params,
  images: jax.Array,
  masks: jax.Array,
  context: jax.Array,
  num_samples: int,
) -> Prompts:
  """Encodes each prompt with the VAE and repeats it S times."""
  return modules.encode_prompts(params, images, masks, context).repeat(num_samples)


def _denoise(
  modules: Modules,
  params: Params,
  prompts: Prompts,
  empty_context: jax.Array,
  guidance_scale: jax.Array,
  latents: jax.Array,
  key: jax.Array,
  steps: Steps,
  start: jax.Array,
  stop: jax.Array,
  guided: bool,
) -> jax.Array:
  """Runs the steps `start` to `stop` of the DDIM chain on latents [B S, h, w, c]."""

  def predict(latents: jax.Array, timestep: jax.Array) -> jax.Array:
    if guided:
      return modules.predict_guided(
        params, prompts, empty_context, guidance_scale, latents, timestep
      )
    return modules.predict(params, prompts, latents, timestep)

  transition = ddim.make_transition(predict, modules.schedule, key)
  advance = lambda index, latents: transition(latents, (index, steps.at(index)))[0]
  return jax.lax.fori_loop(start, stop, advance, latents.astype(jnp.float32))


@functools.cache
def programs() -> tuple[Callable, Callable, Callable]:
  """Returns `_encode`, `_denoise` and `Modules.decode`, jitted once per process."""
  jit = fast_jit()
  return (
    jit(_encode, static_argnames=("modules", "num_samples")),
    jit(_denoise, static_argnames=("modules", "guided")),
    jit(Modules.decode, static_argnums=0),
  )


def inpaint(
  modules: Modules,
  params: dict[str, Params],
  images: Any,
  masks: Any,
  context: jax.Array,
  empty_context: jax.Array,
  guidance_scale: float,
  latents: Any,
  key: jax.Array,
  steps: Steps,
  num_samples: int,
  guided: bool,
  report: Callable[[int], Any] | None,
) -> jax.Array:
  """Samples S inpaintings [B S, H, W, 3] of each image: encodes, runs the DDIM chain, decodes.

  With `report` the chain runs in parts: one step, then as many as take about a second. The samples
  are the same, bit for bit.

  Args:
    params: trees of "unet" and "vae".
    images: [B, H, W, 3] in [0, 1].
    masks: [B, H, W, 1], 1 = missing.
    context: [B, L, D] of the texts.
    empty_context: that of the empty text.
    guidance_scale: strength of the text, used if `guided`.
    latents: initial noise [B S, h, w, c].
    key: of the noise of the chain.
    steps: the DDIM steps.
    num_samples: S.
    report: called after each part with its number of steps; None: one part.
  """
  encode, denoise, decode = programs()
  prompts = encode(modules, params["vae"], images, masks, context, num_samples=num_samples)
  number, total = len(steps.timestep), modules.schedule.num_train_timesteps
  # One length for every number of steps, so that the program does not depend on it.
  padded = Steps(*(np.resize(field, total) for field in steps))
  first, part = 0, 1 if report else number
  while first < number:
    began = time.monotonic()
    latents = denoise(
      modules,
      params["unet"],
      prompts,
      empty_context,
      guidance_scale,
      latents,
      key,
      padded,
      first,
      first + part,
      guided=guided,
    )
    first += part
    if report:
      latents.block_until_ready()
      report(part)
      rate = part / (time.monotonic() - began)
      part = max(1, min(int(rate * REPORT_SECONDS), number - first))
  return decode(modules, params["vae"], latents)
