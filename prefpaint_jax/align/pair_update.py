"""The loss of a batch of pairs: encode, add noise, denoise with policy and reference, compare.

Winner and loser of a pair are neighbours in every batch of 2 B images, so that a batch of pairs
that is split over devices stays split.
"""
# Shapes: B pairs, H W pixels, h w latents, c latent channels, D features.

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prefpaint_jax.align import dpo
from prefpaint_jax.align.score import trust_weights
from prefpaint_jax.align.settings import Trust
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.models import lora
from prefpaint_jax.models.conditioning import Context, Prompts
from prefpaint_jax.models.pipeline import Modules
from prefpaint_jax.models.vae import AutoencoderKL
from prefpaint_jax.weights.names import Params


@dataclasses.dataclass(frozen=True)
class PairSettings:
  """The settings of the loss; `configs/dpo.py` explains the fields."""

  loss: str
  beta: float
  region: str
  lora: bool  # the trained parameters are LoRA adapters of the reference
  trust: Trust
  reward: Callable[..., Any] | None = None  # `Reward.function`, whose features give the trust


class PairFrozen(NamedTuple):
  """Trees that never change."""

  vae: Params
  reference: Params  # the UNet before the training
  context: Context  # of the empty text
  text_encoders: dict[str, Params] | None  # by name; None: no prompt has a text
  reward: Params | None  # of the reward that gives the trust weight
  whitening: Float[Array, "D D"] | None  # of its bound


def pair_loss(
  modules: Modules,
  settings: PairSettings,
  frozen: PairFrozen,
  params: Params,
  batch: Mapping[str, jax.Array],
  key: jax.Array,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
  """Computes the mean loss of a batch of pairs and its metrics.

  Args:
    params: of the UNet, or LoRA adapters of the reference.
    batch: of `data.pairs.stack_pairs`.
    key: of the timesteps, the noise and the VAE's posterior.
  """
  terms, trust = pair_terms(modules, settings, frozen, params, batch, key)
  metrics = {f"dpo/{name}": jnp.mean(x) for name, x in terms.items()}
  if trust is None:
    return metrics["dpo/loss"], metrics
  metrics |= {"trust/mean": jnp.mean(trust), "trust/std": jnp.std(trust)}
  return jnp.mean(trust * terms["loss"]), metrics


def pair_terms(
  modules: Modules,
  settings: PairSettings,
  frozen: PairFrozen,
  params: Params,
  batch: Mapping[str, jax.Array],
  key: jax.Array,
) -> tuple[dict[str, Float[Array, " B"]], Float[Array, " B"] | None]:
  """Computes `dpo.pair_metrics` of each pair, and the trust weight of its loss or None.

  The two images of a pair have the same timestep, and with "dpo" the same noise; with "capo" each
  has its own.
  """
  time_key, noise_key, posterior_key = jax.random.split(key, 3)
  prompts, images = _encode_prompts(modules, frozen, batch)
  flat = images.reshape(-1, *images.shape[2:])
  mean, log_variance = modules.vae.apply(
    {"params": frozen.vae}, 2.0 * flat - 1.0, method=AutoencoderKL.encode
  )
  posterior = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(posterior_key, mean.shape)
  clean = posterior * modules.vae.config.scaling_factor
  B = len(images)
  t = jax.random.randint(time_key, (B,), 0, modules.schedule.num_train_timesteps)
  noises = 1 if settings.loss == "dpo" else 2
  noise = jax.random.normal(noise_key, (B, noises, *clean.shape[1:]))
  noise = jnp.broadcast_to(noise, (B, 2, *clean.shape[1:])).reshape(clean.shape)
  both = prompts.repeat(2), clean, noise, jnp.repeat(t, 2)

  def errors_of(unet: Params) -> jax.Array:
    return prediction_errors(modules, settings.region, unet, *both).reshape(B, 2)

  reference_errors = errors_of(frozen.reference)
  errors = errors_of(lora.merge(frozen.reference, params) if settings.lora else params)
  margin = dpo.preference_margin(errors, reference_errors, settings.beta)
  if settings.loss == "dpo":
    loss = dpo.dpo_loss(margin)
  else:
    loss = dpo.capo_loss(margin, batch["score_gap"])
  trust = None
  if settings.trust.needs_bound:
    known, masks = prompts.masked_image, prompts.mask
    _, features = settings.reward(frozen.reward, flat, known, masks, None)
    trust = trust_weights(settings.trust, frozen.whitening, features).reshape(B, 2).mean(1)
  return dpo.pair_metrics(loss, margin), trust


def prediction_errors(
  modules: Modules,
  region: str,
  unet: Params,
  prompts: Prompts,
  clean: Float[Array, "B h w c"],
  noise: Float[Array, "B h w c"],
  t: jax.Array,
) -> Float[Array, " B"]:
  """Computes the `dpo.region_error` of the UNet's output for noisy latents at timesteps t [B]."""
  noisy = ddim.add_noise(modules.schedule, clean, noise, t)
  output = modules.predict(unet, prompts, noisy, t)
  target = ddim.training_target(modules.schedule, clean, noise, t)
  return dpo.region_error((output - target) ** 2, prompts.mask_latents, region)


def _encode_prompts(
  modules: Modules, frozen: PairFrozen, batch: Mapping[str, jax.Array]
) -> tuple[Prompts, Float[Array, "B 2 H W 3"]]:
  """Encodes the prompts of a batch with their texts; returns them and the pairs' images."""
  to_float = lambda x: x.astype(jnp.float32) / 255.0
  context = frozen.context
  if frozen.text_encoders is not None:
    numbers = range(len(frozen.text_encoders))
    tokens = tuple((batch[f"ids_{n}"], batch.get(f"attention_{n}")) for n in numbers)
    context = modules.encode_text(frozen.text_encoders, tokens)
  masks = batch["mask"].astype(jnp.float32)
  prompts = modules.encode_prompts(frozen.vae, to_float(batch["masked_image"]), masks, context)
  return prompts, to_float(batch["candidates"])
