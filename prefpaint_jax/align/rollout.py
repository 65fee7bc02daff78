"""Rollout: encode prompts, sample with the behaviour policy, decode; on any mesh."""
# Shapes: P prompts, S samples of each, B = P S samples, H W pixels, h w latents, c channels.

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from prefpaint_jax.align.settings import Settings
from prefpaint_jax.align.state import (
  Endpoint,
  Frozen,
  Sampler,
  gather,
  log_prob_weight,
  merged_params,
)
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.diffusion.ddim import Trajectory
from prefpaint_jax.models.conditioning import Context, Guidance, Prompts, combine
from prefpaint_jax.models.pipeline import Modules
from prefpaint_jax.weights.names import Params


def chunk_size(batch: int, most: int) -> int:
  """Returns the largest size of equal chunks of `batch` examples that is not above `most`.

  Args:
    most: 0: no limit.
  """
  return max(n for n in range(1, min(most or batch, batch) + 1) if batch % n == 0)


def in_chunks(function: Callable, size: int, mesh: Mesh | None, params: Any, *arrays: Any) -> Any:
  """Computes `function(params, *arrays)` on each device's examples, at most `size` at a time.

  The result of one example must not depend on the others. Devices do not wait for each other.

  Args:
    params: a tree of arrays that all examples share.
    arrays: trees of arrays whose leading dimension counts examples.
    size: examples per call on each device; 0: all of them.
    mesh: the devices that the leading dimension of `arrays` is split over; None: one device.
  """

  def local(params: Any, *arrays: Any):
    batch = jax.tree.leaves(arrays)[0].shape[0]
    chunk = chunk_size(batch, size)
    if chunk == batch:
      return function(params, *arrays)
    split = lambda x: x.reshape(-1, chunk, *x.shape[1:])
    join = lambda x: x.reshape(batch, *x.shape[2:])
    one = lambda some: function(params, *some)
    return jax.tree.map(join, jax.lax.map(one, jax.tree.map(split, arrays)))

  if mesh is None or mesh.size == 1:
    return local(params, *arrays)
  own = P(mesh.axis_names)
  specs = (P(), *(own,) * len(arrays))
  spread = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)
  return spread(params, *arrays)


def decode(
  modules: Modules,
  vae_params: Params,
  latents: Float[Array, "B h w c"],
  prompts: Prompts,
  chunk: int,
  mesh: Mesh | None = None,
) -> Float[Array, "B H W 3"]:
  """Decodes final latents to images in [0, 1] and restores the known pixels."""
  images = in_chunks(modules.decode, chunk, mesh, vae_params, latents)
  return jnp.where(prompts.mask > 0, images, prompts.masked_image)


def encode_prompts(
  modules: Modules,
  settings: Settings,
  frozen: Frozen,
  images: Float[Array, "P H W 3"],
  masks: Float[Array, "P H W 1"],
  context: Context | None = None,
  mesh: Mesh | None = None,
  key: jax.Array | None = None,
) -> Prompts:
  """Encodes images in [0, 1] and masks (1 = missing) as the prompts of B = P S samples.

  Args:
    context: of the prompts' texts; None: no prompt has a text.
    key: draws one sample of the VAE's posterior for each prompt; None: the posterior's mean.
  """
  arrays = (images, masks)
  if key is not None:
    arrays += (jax.random.normal(key, modules.latent_shape(*images.shape[:3])),)

  def encode(params: Params, images: jax.Array, masks: jax.Array, noise: jax.Array | None = None):
    return modules.encode_prompts(params, images, masks, None, noise)

  prompts = in_chunks(encode, settings.decode_batch, mesh, frozen.vae, *arrays)
  guidance = None
  if frozen.negative is not None:
    guidance = Guidance(jnp.float32(settings.guidance_scale), frozen.negative)
  prompts = modules.condition(prompts, frozen.context if context is None else context, guidance)
  return prompts.repeat(settings.samples_per_prompt)


def drop_texts(settings: Settings, frozen: Frozen, context: Context, key: jax.Array) -> Context:
  """Replaces each prompt's text by the empty text with the probability `text_dropout`."""
  P = context.tokens.shape[0]
  dropped = jax.random.bernoulli(key, settings.text_dropout, (P,))
  choose = lambda x, empty: jnp.where(jnp.expand_dims(dropped, range(1, x.ndim)), empty, x)
  return jax.tree.map(choose, context, frozen.context.broadcast(P))


def _start_chain(
  sampler: Sampler,
  policy: Params,
  frozen: Frozen,
  images: jax.Array,
  masks: jax.Array,
  context: Context | None,
  key: jax.Array,
  mesh: Mesh | None,
):
  """Returns the prompts, the policy as a `predict`, the initial noise, and the key of the steps."""
  modules, settings, _ = sampler
  posterior_key = None
  if settings.vae_posterior == "sample":
    key, posterior_key = jax.random.split(key)
  prompts = encode_prompts(modules, settings, frozen, images, masks, context, mesh, posterior_key)
  noise_key, chain_key = jax.random.split(key)
  noise = jax.random.normal(noise_key, prompts.masked_latents.shape)
  return prompts, _predictor(sampler, policy, frozen, prompts, mesh), noise, chain_key


def _predictor(
  sampler: Sampler, policy: Params, frozen: Frozen, prompts: Prompts, mesh: Mesh | None
) -> ddim.Predict:
  """Returns the policy as a `predict` of all samples' latents, in chunks on each device."""
  modules, settings, _ = sampler
  # The parameters are gathered once for all steps; then every device works without the others.
  policy = gather(sampler, policy, mesh)
  policy = modules.round_params(merged_params(settings, frozen.base, policy))

  own, shared = prompts.partition()

  def predict_some(shared: Any, own: Prompts, latents: jax.Array):
    policy, shared, timestep = shared
    return modules.predict(policy, combine(own, shared), latents, timestep)

  def predict(latents: jax.Array, timestep: jax.Array):
    of_all = policy, shared, timestep
    return in_chunks(predict_some, settings.samples_per_pass, mesh, of_all, own, latents)

  return predict


def rollout(
  sampler: Sampler,
  policy: Params,
  frozen: Frozen,
  images: Float[Array, "P H W 3"],
  masks: Float[Array, "P H W 1"],
  key: jax.Array,
  context: Context | None = None,
  window: Int[Array, ""] | None = None,
  mesh: Mesh | None = None,
) -> tuple[Prompts, Trajectory | Endpoint, Float[Array, "B H W 3"]]:
  """Samples S inpaintings of each prompt with the policy, and keeps what the algorithm trains on.

  Args:
    policy: the behaviour policy's parameters, or its LoRA adapters.
    images: in [0, 1]; pixels under the mask are ignored.
    masks: 1 = missing.
    context: of the prompts' texts; None: no prompt has a text.
    window: first of the `settings.window` steps with noise; None: all steps have it.

  Returns:
    The prompts of the B samples, their chain or their final latents, and the samples in [0, 1].
  """
  if sampler.settings.text_dropout and context is not None:
    key, text_key = jax.random.split(key)
    context = drop_texts(sampler.settings, frozen, context, text_key)
  prompts, predict, noise, key = _start_chain(
    sampler, policy, frozen, images, masks, context, key, mesh
  )
  settings, schedule, steps = sampler.settings, sampler.modules.schedule, sampler.steps
  if window is not None:
    index = jnp.arange(settings.num_steps)
    inside = (index >= window) & (index < window + settings.window)
    steps = steps._replace(sigma=jnp.where(inside, steps.sigma, 0.0))
  if settings.keeps_chain:
    weight = log_prob_weight(settings, prompts)
    record = ddim.rollout(predict, schedule, steps, noise, key, weight)
    latents = record.latents[-1]
    if settings.ratio_normalisation:
      record = record._replace(key=key)
  else:
    key, forward_key = jax.random.split(key)
    latents = ddim.sample(predict, schedule, steps, noise, key)
    record = Endpoint(latents, forward_key)
  samples = decode(sampler.modules, frozen.vae, latents, prompts, settings.decode_batch, mesh)
  return prompts, record, samples


def inpaint(
  sampler: Sampler,
  policy: Params,
  frozen: Frozen,
  images: Float[Array, "P H W 3"],
  masks: Float[Array, "P H W 1"],
  key: jax.Array,
  context: Context | None = None,
  mesh: Mesh | None = None,
) -> Float[Array, "P H W 3"]:
  """Samples one inpainting of each prompt as `rollout` does, without keeping the chain.

  `sampler.settings.samples_per_prompt` must be 1.
  """
  prompts, predict, noise, key = _start_chain(
    sampler, policy, frozen, images, masks, context, key, mesh
  )
  latents = ddim.sample(predict, sampler.modules.schedule, sampler.steps, noise, key)
  chunk = sampler.settings.decode_batch
  return decode(sampler.modules, frozen.vae, latents, prompts, chunk, mesh)


def kl_to_base(
  sampler: Sampler,
  policy: Params,
  base: Params,
  frozen: Frozen,
  images: Float[Array, "P H W 3"],
  masks: Float[Array, "P H W 1"],
  key: jax.Array,
  context: Context | None = None,
  mesh: Mesh | None = None,
) -> Float[Array, " P"]:
  """Samples as `inpaint` does and computes the KL divergence of the chain from the base policy's.

  It is Σ over the steps and the latents of KL(N(μ, σ²) ‖ N(μ_base, σ²)), in nats; steps without
  noise count 0.

  Args:
    base: parameters, or adapters, of the base policy.
  """
  prompts, predict, noise, key = _start_chain(
    sampler, policy, frozen, images, masks, context, key, mesh
  )
  predict_base = _predictor(sampler, base, frozen, prompts, mesh)
  schedule = sampler.modules.schedule
  size = noise[0].size

  def one_step(predict: ddim.Predict, latents: jax.Array, step: ddim.Steps) -> jax.Array:
    return ddim.predict_mean(schedule, step, latents, predict(latents, step.timestep))

  def advance(carry, numbered_step):
    (latents, total), (index, step) = carry, numbered_step
    mean, base_mean = (one_step(one, latents, step) for one in (predict, predict_base))
    total += size * ddim.gaussian_kl(mean, base_mean, step.sigma)
    noise = jax.random.normal(jax.random.fold_in(key, index), latents.shape)
    return (mean + step.sigma * noise, total), None

  steps = jax.tree.map(jnp.asarray, sampler.steps)
  numbered = jnp.arange(len(steps.timestep)), steps
  start = noise.astype(jnp.float32), jnp.zeros(len(noise))
  return jax.lax.scan(advance, start, numbered)[0][1]
