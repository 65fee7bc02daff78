"""The compiled programs of an inpainting pipeline: text, prompts, parts of the DDIM chain, images.

The chain is one program for every part and every number of steps: the first and the last step of a
part are arguments. No program calls back to Python, because JAX caches none that does.
"""
# Shapes: B images, S samples of each, H W pixels, h w latents.

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax.diffusion import ddim
from prefpaint_jax.diffusion.ddim import Steps
from prefpaint_jax.models.conditioning import Context, Guidance, Prompts
from prefpaint_jax.models.pipeline import Modules, Tokens
from prefpaint_jax.runtime.compilation import fast_jit
from prefpaint_jax.runtime.ranges import shorten
from prefpaint_jax.weights.names import Params

REPORT_SECONDS = 1.0  # between reports; after each part the host waits for the device


@functools.partial(jax.jit, static_argnames="modules")
def encode_text(modules: Modules, params: dict[str, Params], tokens: Tokens) -> Context:
  """Computes the context of the tokens of B texts."""
  return modules.encode_text(params, tokens)


def _encode(
  modules: Modules,
  params: Params,
  images: jax.Array,
  masks: jax.Array,
  context: Context,
  guidance: Guidance | None,
  num_samples: int,
) -> Prompts:
  """Encodes each prompt with the VAE and repeats it S times."""
  prompts = modules.encode_prompts(params, images, masks, None)
  return modules.condition(prompts, context, guidance).repeat(num_samples)


def _denoise(
  modules: Modules,
  params: Params,
  prompts: Prompts,
  latents: jax.Array,
  key: jax.Array,
  steps: Steps,
  start: jax.Array,
  stop: jax.Array,
) -> jax.Array:
  """Runs the steps `start` to `stop` of the DDIM chain on latents [B S, h, w, c]."""
  predict = functools.partial(modules.predict, params, prompts)
  transition = ddim.make_transition(predict, modules.schedule, key)
  advance = lambda index, latents: transition(latents, (index, steps.at(index)))[0]
  return jax.lax.fori_loop(start, stop, advance, latents.astype(jnp.float32))


@functools.cache
def programs() -> tuple[Callable, Callable, Callable]:
  """Returns `_encode`, `_denoise` and `Modules.decode`, jitted once per process."""
  jit = fast_jit()
  return (
    jit(_encode, static_argnames=("modules", "num_samples")),
    jit(_denoise, static_argnames="modules"),
    jit(Modules.decode, static_argnums=0),
  )


def inpaint(
  modules: Modules,
  params: dict[str, Params],
  images: Any,
  masks: Any,
  context: Context,
  guidance: Guidance | None,
  latents: Any,
  key: jax.Array,
  steps: Steps,
  num_samples: int,
  report: Callable[[int], Any] | None,
) -> jax.Array:
  """Samples S inpaintings [B S, H, W, 3] of each image: encodes, runs the DDIM chain, decodes.

  With `report` the chain runs in parts: one step, then as many as take about a second. The samples
  are the same, bit for bit.

  Args:
    params: trees of "unet" and "vae".
    images: [B, H, W, 3] in [0, 1].
    masks: [B, H, W, 1], 1 = missing.
    context: of one text for all images, or of B texts.
    guidance: None: the chain follows the context alone.
    latents: initial noise [B S, h, w, c].
    key: of the noise of the chain.
    steps: the DDIM steps.
    num_samples: S.
    report: called after each part with its number of steps; None: one part.
  """
  encode, denoise, decode = programs()
  prompts = encode(
    modules, params["vae"], images, masks, context, guidance, num_samples=num_samples
  )
  number, total = len(steps.timestep), modules.schedule.num_train_timesteps
  # One length for every number of steps, so that the program does not depend on it.
  padded = Steps(*(np.resize(field, total) for field in steps))
  first, part = 0, 1 if report else number
  while first < number:
    began = time.monotonic()
    latents = denoise(modules, params["unet"], prompts, latents, key, padded, first, first + part)
    first += part
    if report:
      latents.block_until_ready()
      report(part)
      rate = part / (time.monotonic() - began)
      part = max(1, min(int(rate * REPORT_SECONDS), number - first))
  return decode(modules, params["vae"], latents)


def sampling_key(key: Any) -> jax.Array:
  """Returns a PRNG key, `jax.random.key(0)` for None; raises ValueError for what is no key."""
  if key is None:
    return jax.random.key(0)
  is_typed = isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
  raw_shape = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
  is_raw = getattr(key, "dtype", None) == jnp.uint32 and key.shape == raw_shape
  if not (is_raw or (is_typed and key.ndim == 0)):
    found = f"an array of {key.dtype}{list(key.shape)}" if hasattr(key, "shape") else shorten(key)
    raise ValueError(f"key is {found}; expected one PRNG key; give jax.random.key(SEED)")
  return key
