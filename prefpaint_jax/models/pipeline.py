"""The networks of an inpainting pipeline as pure functions, and the prompts they are given.

Shapes: B prompts, S samples per prompt, H W pixels, h w latents, L text tokens, D text width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prefpaint_jax.diffusion.schedule import Schedule
from prefpaint_jax.models.clip import CLIPTextModel
from prefpaint_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from prefpaint_jax.models.unet import UNet2DConditionModel
from prefpaint_jax.models.vae import AutoencoderKL

Params = Any  # a tree of arrays
NETWORKS = ("unet", "vae", "text_encoder")


class Prompts(NamedTuple):
  """What a policy is given: incomplete images, and the text they share or have each."""

  mask: jax.Array  # [B, H, W, 1], 1 = missing
  masked_image: jax.Array  # [B, H, W, 3] in [0, 1], the hole black
  mask_latents: jax.Array  # [B, h, w, 1]
  masked_latents: jax.Array  # [B, h, w, 4], scaled
  context: jax.Array  # [1 or B, L, D]

  def repeat(self, samples: int) -> "Prompts":
    """Each prompt `samples` times in a row; a context shared by all stays shared."""
    if samples == 1:
      return self
    repeated = Prompts(*(jnp.repeat(x, samples, axis=0) for x in self))
    shared = self.context.shape[0] == 1
    return repeated._replace(context=self.context) if shared else repeated


@dataclasses.dataclass(frozen=True)
class Modules:
  """The networks and the noise schedule: hashable, without parameters."""

  unet: UNet2DConditionModel
  vae: AutoencoderKL
  text_encoder: CLIPTextModel
  schedule: Schedule

  @property
  def native_size(self) -> int:
    """Pixels along each side of the square images that the UNet was made for."""
    size = self.unet.config.sample_size or 64
    return (size if isinstance(size, int) else min(size)) * self.vae.config.factor

  def latent_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
    factor = self.vae.config.factor
    if height % factor or width % factor:
      raise ValueError(f"images are {height}x{width}: both sides must be multiples of {factor}")
    return batch, height // factor, width // factor, self.vae.config.latent_channels

  def encode_prompts(
    self, vae_params: Params, images: jax.Array, masks: jax.Array, context: jax.Array
  ) -> Prompts:
    """Images [B, H, W, 3] in [0, 1], masks [B, H, W, 1] -> Prompts; the hole is not looked at."""
    factor = self.vae.config.factor
    known = 1.0 - masks
    # On the VAE's scale of [-1, 1] the hole is grey, as in training; the reward sees it black.
    mean, _ = self.vae.apply(
      {"params": vae_params}, (2.0 * images - 1.0) * known, method=AutoencoderKL.encode
    )
    return Prompts(
      mask=masks,
      masked_image=images * known,
      mask_latents=masks[:, ::factor, ::factor],
      masked_latents=mean * self.vae.config.scaling_factor,
      context=context,
    )

  def predict(
    self, unet_params: Params, prompts: Prompts, latents: jax.Array, timestep: jax.Array
  ) -> jax.Array:
    """The UNet's output for noisy latents [B, h, w, 4] at timestep [] or [B], in float32."""
    sample = jnp.concatenate([latents, prompts.mask_latents, prompts.masked_latents], axis=-1)
    output = self.unet.apply({"params": unet_params}, sample, timestep, prompts.context)
    return output.astype(jnp.float32)

  def round_params(self, unet_params: Params) -> Params:
    """As the UNet's layers read them: in its compute dtype, but for those of norms."""
    dtype = self.unet.dtype

    def round_one(path: tuple, x: jax.Array) -> jax.Array:
      return x if "norm" in jax.tree_util.keystr(path) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(round_one, unet_params)

  def predict_guided(
    self,
    unet_params: Params,
    prompts: Prompts,
    empty_context: jax.Array,
    guidance_scale: jax.Array,
    latents: jax.Array,
    timestep: jax.Array,
  ) -> jax.Array:
    """Classifier-free guidance (Ho & Salimans 2022) away from the empty text, as one batch."""
    B = latents.shape[0]
    spread = lambda context: jnp.broadcast_to(context, (B, *context.shape[1:]))
    context = jnp.concatenate([spread(empty_context), spread(prompts.context)])
    doubled = Prompts(*(jnp.concatenate([x, x]) for x in prompts[:-1]), context)
    output = self.predict(unet_params, doubled, jnp.concatenate([latents, latents]), timestep)
    return output[:B] + guidance_scale * (output[B:] - output[:B])

  def decode(self, vae_params: Params, latents: jax.Array) -> jax.Array:
    """Scaled latents [B, h, w, 4] -> images [B, H, W, 3] in [0, 1]."""
    decoded = self.vae.apply(
      {"params": vae_params},
      latents / self.vae.config.scaling_factor,
      method=AutoencoderKL.decode,
    )
    return jnp.clip(0.5 * decoded + 0.5, 0.0, 1.0)

  def init(self, key: jax.Array) -> dict[str, Params]:
    """Fresh parameters for all networks; under `jax.eval_shape`, their shapes."""
    unet, vae, text = self.unet.config, self.vae.config, self.text_encoder.config
    keys = jax.random.split(key, 3)
    # Big enough for every level; parameter shapes do not depend on it.
    side = 2 ** len(unet.block_out_channels)
    sample = jnp.zeros((1, side, side, unet.in_channels))
    context = jnp.zeros((1, 1, unet.cross_attention_dim))
    image = jnp.zeros((1, 2 * vae.factor, 2 * vae.factor, 3))
    tokens = jnp.zeros((1, text.max_position_embeddings), jnp.int32)
    return {
      "unet": self.unet.init(keys[0], sample, jnp.zeros((1,)), context)["params"],
      "vae": self.vae.init(keys[1], image)["params"],
      "text_encoder": self.text_encoder.init(keys[2], tokens)["params"],
    }


def make_modules(
  configs: dict[str, dict], dtype: str = "float32", remat: bool = False, where: str = "pipeline"
) -> Modules:
  """Modules from the folder's configs: unet, vae, text_encoder, scheduler."""
  unet, vae = UNetConfig.from_dict(configs["unet"]), VAEConfig.from_dict(configs["vae"])
  text = CLIPTextConfig.from_dict(configs["text_encoder"])
  latents = vae.latent_channels
  if unet.in_channels != 2 * latents + 1:
    raise ValueError(
      f"{where}: the UNet has {unet.in_channels} input channels, an inpainting UNet has "
      f"{2 * latents + 1}; use an inpainting checkpoint"
    )
  if unet.cross_attention_dim != text.hidden_size:
    raise ValueError(
      f"{where}: the UNet attends to {unet.cross_attention_dim} features, the text encoder gives "
      f"{text.hidden_size}; the folder mixes two models"
    )
  kind = jnp.dtype(dtype)
  return Modules(
    UNet2DConditionModel(unet, kind, remat),
    AutoencoderKL(vae, kind),
    CLIPTextModel(text, kind),
    Schedule.from_config(configs["scheduler"]),
  )
