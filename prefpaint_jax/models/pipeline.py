"""The networks of an inpainting pipeline as pure functions."""
# Shapes: B prompts, H W pixels, h w latents, c latent channels.

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from prefpaint_jax.diffusion.schedule import Schedule
from prefpaint_jax.models.clip import CLIPTextModel, PooledTextModel
from prefpaint_jax.models.conditioning import Context, Guidance, Prompts
from prefpaint_jax.models.unet import UNet2DConditionModel
from prefpaint_jax.models.vae import AutoencoderKL
from prefpaint_jax.runtime.memory import check_memory
from prefpaint_jax.weights.names import Params

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")  # SDXL has the last one
MASK_LATENTS = ("cells", "corner")

# For each text encoder: token ids [B, L], and attention mask [B, L] or None.
Tokens = tuple[tuple[jax.Array, jax.Array | None], ...]

# One timestep for the batch, or one per sample.
Timestep = int | Int[Array, ""] | Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Modules:
  """The networks and the noise schedule, without parameters; hashable, so a static argument.

  `mask_latents` says which latents the UNet is told are missing. A latent encodes a cell of the
  VAE's factor by factor pixels. "cells": every cell with a missing pixel. "corner": cells whose top
  left pixel is missing, as diffusers, which misses the cells that the rim of a hole cuts.

  Raises:
    ValueError: `mask_latents` is unknown.
  """

  unet: UNet2DConditionModel
  vae: AutoencoderKL
  text_encoder: CLIPTextModel | PooledTextModel
  schedule: Schedule
  mask_latents: str = "cells"
  text_encoder_2: PooledTextModel | None = None  # of SDXL
  zero_negative: bool = False  # guidance without a negative text leads away from a context of zeros

  def __post_init__(self):
    if self.mask_latents not in MASK_LATENTS:
      raise ValueError(
        f"mask_latents is {self.mask_latents!r}; expected {' or '.join(map(repr, MASK_LATENTS))}"
      )

  @property
  def native_size(self) -> int:
    """Returns the side, in pixels, of the square images that the UNet was trained on."""
    size = self.unet.config.sample_size or 64
    return (size if isinstance(size, int) else min(size)) * self.vae.config.factor

  @property
  def networks(self) -> dict[str, nn.Module]:
    """Returns the networks by their names in NETWORKS."""
    found = {name: getattr(self, name) for name in NETWORKS}
    return {name: network for name, network in found.items() if network is not None}

  @property
  def text_encoders(self) -> dict[str, nn.Module]:
    """Returns the text encoders by name."""
    return {name: one for name, one in self.networks.items() if name.startswith("text_encoder")}

  def latent_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns the shape [B, h, w, c] of the latents of images of `height` by `width` pixels.

    Raises:
      ValueError: a side is not a multiple of the VAE's factor, or the images need more memory than
        the machine has.
    """
    # A lower bound: the decoder's second block holds two arrays at the full size. XLA allocates 1.3
    # times as much for the embedded model.
    per_pixel = 2 * max(self.vae.config.block_out_channels[:2]) * jnp.dtype(self.vae.dtype).itemsize
    check_memory(per_pixel * batch * height * width, f"{batch} images of {height}x{width}")
    factor = self.vae.config.factor
    if height % factor or width % factor:
      raise ValueError(f"images are {height}x{width}: both sides must be multiples of {factor}")
    return batch, height // factor, width // factor, self.vae.config.latent_channels

  def encode_prompts(
    self,
    vae_params: Params,
    images: Float[Array, "B H W 3"],
    masks: Float[Array, "B H W 1"],
    context: Context | None,
    noise: Float[Array, "B h w c"] | None = None,
  ) -> Prompts:
    """Encodes images and masks as prompts.

    Args:
      images: in [0, 1]; pixels under the mask are ignored.
      masks: 1 = missing.
      context: of one text for all prompts or of B texts; None: `condition` sets it later.
      noise: standard normal, to sample the VAE's posterior; None: its mean.
    """
    known = 1.0 - masks
    # The hole is 0 in the range of both: grey for the VAE ([-1, 1]), as in its training, and black
    # for the reward model ([0, 1]).
    latents, log_variance = self.vae.apply(
      {"params": vae_params}, (2.0 * images - 1.0) * known, method=AutoencoderKL.encode
    )
    if noise is not None:
      latents = latents + jnp.exp(0.5 * log_variance) * noise
    prompts = Prompts(
      mask=masks,
      masked_image=images * known,
      mask_latents=self._shrink(masks),
      masked_latents=latents * self.vae.config.scaling_factor,
      context=None,
    )
    return prompts if context is None else self.condition(prompts, context)

  def _shrink(self, masks: Float[Array, "B H W 1"]) -> Float[Array, "B h w 1"]:
    """Computes the mask of the latents from that of the pixels, as `mask_latents` says."""
    factor = self.vae.config.factor
    if self.mask_latents == "corner":
      return masks[:, ::factor, ::factor]
    B, H, W, _ = masks.shape
    cells = jnp.reshape(masks, (B, H // factor, factor, W // factor, factor, 1))
    return jnp.max(cells, axis=(2, 4))

  def condition(
    self, prompts: Prompts, context: Context, guidance: Guidance | None = None
  ) -> Prompts:
    """Returns the prompts with a context, and with guidance by texts unless it is None.

    SDXL's contexts get the sizes of the images: original size, top left corner of the crop, target
    size, of images that are neither scaled nor cropped, as stock pipelines.
    """
    if self.unet.config.addition_embed_type == "text_time":
      H, W = prompts.mask.shape[1:3]
      sizes = jnp.array([H, W, 0, 0, H, W], jnp.float32)

      def add_sizes(context: Context) -> Context:
        return context._replace(time_ids=jnp.broadcast_to(sizes, (len(context.tokens), 6)))

      context = add_sizes(context)
      guidance = guidance and guidance._replace(negative=add_sizes(guidance.negative))
    return prompts._replace(context=context, guidance=guidance)

  def predict(
    self,
    unet_params: Params,
    prompts: Prompts,
    latents: Float[Array, "B h w c"],
    timestep: Timestep,
  ) -> Float[Array, "B h w c"]:
    """Computes the UNet's output for noisy latents, in float32; guided if the prompts say so.

    The UNet evaluates the negative texts and the prompts' texts as one batch of 2 B.
    """
    sample = jnp.concatenate([latents, prompts.mask_latents, prompts.masked_latents], axis=-1)
    context, guidance = prompts.context, prompts.guidance
    if guidance is None:
      return self._apply_unet(unet_params, sample, timestep, context)
    B, twice = len(sample), lambda x: jnp.concatenate([x, x])
    if jnp.ndim(timestep):
      timestep = twice(timestep)
    both = guidance.negative.broadcast(B), context.broadcast(B)
    context = jax.tree.map(lambda *x: jnp.concatenate(x), *both)
    output = self._apply_unet(unet_params, twice(sample), timestep, context)
    return output[:B] + guidance.scale * (output[B:] - output[:B])

  def _apply_unet(
    self, params: Params, sample: jax.Array, timestep: Timestep, context: Context
  ) -> jax.Array:
    output = self.unet.apply({"params": params}, sample, timestep, *context)
    return output.astype(jnp.float32)

  def round_params(self, unet_params: Params) -> Params:
    """Casts parameters to the UNet's compute dtype, except those of norms, which it keeps."""
    dtype = self.unet.dtype

    def round_one(path: tuple, x: Any) -> Any:
      return x if "norm" in jax.tree_util.keystr(path) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(round_one, unet_params)

  def encode_text(self, params: dict[str, Params], tokens: Tokens) -> Context:
    """Computes the context of B texts from their tokens.

    SDXL's tokens are the penultimate hidden states of both encoders side by side.

    Args:
      params: trees of the text encoders by name.
    """
    encoded = [
      network.apply({"params": params[name]}, *own)
      for (name, network), own in zip(self.text_encoders.items(), tokens, strict=True)
    ]
    if self.text_encoder_2 is None:
      return Context(encoded[0].astype(jnp.float32))
    hidden, pooled = zip(*encoded, strict=True)
    joined = jnp.concatenate(hidden, axis=-1)
    return Context(joined.astype(jnp.float32), pooled[-1].astype(jnp.float32))

  def decode(self, vae_params: Params, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
    """Decodes scaled latents to images in [0, 1]."""
    decoded = self.vae.apply(
      {"params": vae_params},
      latents / self.vae.config.scaling_factor,
      method=AutoencoderKL.decode,
    )
    return jnp.clip(0.5 * decoded + 0.5, 0.0, 1.0)

  def init(self, key: Key[Array, ""]) -> dict[str, Params]:
    """Initialises the parameters of all networks."""
    return _init(tuple(self.networks.items()), key)

  def shapes(self) -> dict[str, Params]:
    """Returns the parameters of all networks as trees of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda leaf: leaf, _shapes(tuple(self.networks.items())))


Networks = tuple[tuple[str, nn.Module], ...]


def _init(networks: Networks, key: Key[Array, ""]) -> dict[str, Params]:
  keys = jax.random.split(key, len(networks))
  found = zip(networks, keys, strict=True)
  return {name: net.init(key, *_inputs(name, net.config))["params"] for (name, net), key in found}


def _inputs(name: str, config: Any) -> tuple[jax.Array, ...]:
  """Makes the smallest inputs of a network. Parameter shapes do not depend on their size."""
  if name == "vae":
    return (jnp.zeros((1, 2 * config.factor, 2 * config.factor, 3)),)
  if name != "unet":
    return (jnp.zeros((1, config.max_position_embeddings), jnp.int32),)
  side = 2 ** len(config.block_out_channels)  # halves at every level
  sample = jnp.zeros((1, side, side, config.in_channels))
  inputs = sample, jnp.zeros(1), jnp.zeros((1, 1, config.cross_attention_dim))
  if config.addition_embed_type is None:
    return inputs
  width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
  return *inputs, jnp.zeros((1, width)), jnp.zeros((1, 6))


# Tracing the networks takes a second or more, so it is done once for each architecture.
@functools.lru_cache(8)
def _shapes(networks: Networks) -> dict[str, Params]:
  return jax.eval_shape(functools.partial(_init, networks), jax.random.key(0))
