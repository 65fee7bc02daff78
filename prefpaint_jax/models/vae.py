"""The variational autoencoder of Stable Diffusion, with the attribute names of diffusers.

Images are in [-1, 1]. Latents are unscaled: callers multiply them by `config.scaling_factor` before
diffusion and divide by it before decoding.
"""
# Shapes: B batch, H W pixels, h w latents, C channels.

import flax.linen as nn
import jax
import jax.numpy as jnp

from prefpaint_jax.models.blocks import (
  Attention,
  Downsample2D,
  Dtype,
  GroupNorm,
  ResnetBlock2D,
  Upsample2D,
  conv,
)
from prefpaint_jax.models.config import VAEConfig

EPSILON = 1e-6  # of every group norm


class VAEAttention(nn.Module):
  """Single-head self-attention over the pixels of [B, H, W, C], with a residual."""

  norm_num_groups: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    B, H, W, C = x.shape
    hidden = GroupNorm(self.norm_num_groups, EPSILON, self.dtype, name="group_norm")(x)
    attention = Attention(1, use_bias=True, dtype=self.dtype)
    # Checkpoints name the projections as children of this module, so it shares its scope.
    nn.share_scope(self, attention)
    return x + attention(hidden.reshape(B, H * W, C)).reshape(B, H, W, C)


class MidBlock(nn.Module):
  """Residual block, attention and residual block at the lowest resolution."""

  config: VAEConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    groups, C = self.config.norm_num_groups, x.shape[-1]
    x = ResnetBlock2D(C, groups, EPSILON, self.dtype, name="resnets_0")(x)
    x = VAEAttention(groups, self.dtype, name="attentions_0")(x)
    return ResnetBlock2D(C, groups, EPSILON, self.dtype, name="resnets_1")(x)


class DownBlock(nn.Module):
  """One level of the encoder; halves height and width, except at the last level."""

  config: VAEConfig
  level: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    channels, groups = config.block_out_channels, config.norm_num_groups
    for i in range(config.layers_per_block):
      x = ResnetBlock2D(channels[self.level], groups, EPSILON, self.dtype, name=f"resnets_{i}")(x)
    if self.level < len(channels) - 1:
      x = Downsample2D((0, 1), self.dtype, name="downsamplers_0")(x)
    return x


class UpBlock(nn.Module):
  """One level of the decoder; doubles height and width, except at the last level."""

  config: VAEConfig
  level: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    channels, groups = config.block_out_channels[self.level], config.norm_num_groups
    for i in range(config.layers_per_block + 1):
      x = ResnetBlock2D(channels, groups, EPSILON, self.dtype, name=f"resnets_{i}")(x)
    return Upsample2D(self.dtype, name="upsamplers_0")(x) if self.level > 0 else x


class Encoder(nn.Module):
  """Images [B, H, W, 3] -> [B, h, w, 2 C]: C channels of the mean, C of the log-variance."""

  config: VAEConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    x = conv(config.block_out_channels[0], 3, self.dtype, "conv_in", padding=1)(x)
    for level in range(len(config.block_out_channels)):
      x = DownBlock(config, level, self.dtype, name=f"down_blocks_{level}")(x)
    x = MidBlock(config, self.dtype, name="mid_block")(x)
    x = GroupNorm(config.norm_num_groups, EPSILON, self.dtype, silu=True, name="conv_norm_out")(x)
    return conv(2 * config.latent_channels, 3, self.dtype, "conv_out", padding=1)(x)


class Decoder(nn.Module):
  """Latents [B, h, w, C] -> images [B, H, W, 3]."""

  config: VAEConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    levels = len(config.block_out_channels)
    x = conv(config.block_out_channels[-1], 3, self.dtype, "conv_in", padding=1)(x)
    x = MidBlock(config, self.dtype, name="mid_block")(x)
    for i, level in enumerate(reversed(range(levels))):
      x = UpBlock(config, level, self.dtype, name=f"up_blocks_{i}")(x)
    x = GroupNorm(config.norm_num_groups, EPSILON, self.dtype, silu=True, name="conv_norm_out")(x)
    return conv(config.out_channels, 3, self.dtype, "conv_out", padding=1)(x)


class AutoencoderKL(nn.Module):
  """The autoencoder; `encode` and `decode` are its methods for `apply`.

  `encode_dtype` is the compute dtype of `encode`; None: that of `decode`, `dtype`.
  """

  config: VAEConfig
  dtype: Dtype = jnp.float32
  encode_dtype: Dtype | None = None

  def setup(self):
    dtype = self.encode_dtype or self.dtype
    self.encoder = Encoder(self.config, dtype)
    self.decoder = Decoder(self.config, self.dtype)
    self.quant_conv = nn.Conv(2 * self.config.latent_channels, (1, 1), dtype=dtype)
    self.post_quant_conv = nn.Conv(self.config.latent_channels, (1, 1), dtype=self.dtype)

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes images [B, H, W, 3] to the posterior's mean and log-variance, each [B, h, w, C]."""
    moments = self.quant_conv(self.encoder(images.astype(self.encoder.dtype))).astype(jnp.float32)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Decodes latents [B, h, w, C] to float32 images [B, H, W, 3], not clipped."""
    hidden = self.post_quant_conv(latents.astype(self.dtype))
    return self.decoder(hidden).astype(jnp.float32)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Reconstructs images from the posterior's mean; `init` calls it to create all parameters."""
    return self.decode(self.encode(images)[0])
