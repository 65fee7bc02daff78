"""The denoising UNet of Stable Diffusion 1.x, 2.x and XL, conditioned on time and text.

The 9 input channels of an inpainting UNet are 4 noisy latents, 1 mask and 4 latents of the masked
image. Modules have the attribute names of diffusers.
"""
# Shapes: B batch, h w latent height and width, L text tokens, D text width.

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from prefpaint_jax.models.blocks import (
  Downsample2D,
  Dtype,
  GroupNorm,
  ResnetBlock2D,
  TimestepEmbedding,
  Transformer2DModel,
  Upsample2D,
  conv,
  timestep_embedding,
)
from prefpaint_jax.models.config import UNetConfig


class _Stage(nn.Module):
  """Makes the residual blocks and transformers of one level, rematerialised if `remat`."""

  config: UNetConfig
  level: int
  dtype: Dtype = jnp.float32
  remat: bool = False

  def resnet(self, index: int, channels: int) -> nn.Module:
    block = nn.remat(ResnetBlock2D) if self.remat else ResnetBlock2D
    groups, epsilon = self.config.norm_num_groups, self.config.norm_eps
    return block(channels, groups, epsilon, self.dtype, name=f"resnets_{index}")

  def transformer(self, index: int) -> nn.Module:
    block = nn.remat(Transformer2DModel) if self.remat else Transformer2DModel
    return block(
      self.config.heads[self.level],
      self.config.depths[self.level],
      self.config.norm_num_groups,
      self.config.use_linear_projection,
      self.dtype,
      name=f"attentions_{index}",
    )


class DownBlock(_Stage):
  """One level of the encoder; returns its output and the list of its skip connections."""

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array):
    config, level = self.config, self.level
    skips = []
    for i in range(config.layers[level]):
      x = self.resnet(i, config.block_out_channels[level])(x, temb)
      if config.down_block_types[level].startswith("CrossAttn"):
        x = self.transformer(i)(x, context)
      skips.append(x)
    if level < len(config.block_out_channels) - 1:
      padding = (config.downsample_padding,) * 2
      if padding == (0, 0):
        padding = (0, 1)  # diffusers' `downsample_padding=0` pads right and bottom by 1
      x = Downsample2D(padding, self.dtype, name="downsamplers_0")(x)
      skips.append(x)
    return x, skips


class MidBlock(_Stage):
  """Residual block, transformer and residual block at the lowest resolution."""

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> jax.Array:
    channels = self.config.block_out_channels[-1]
    x = self.resnet(0, channels)(x, temb)
    x = self.transformer(0)(x, context)
    return self.resnet(1, channels)(x, temb)


class UpBlock(_Stage):
  """One level of the decoder; pops its skip connections from the end of `skips`."""

  @nn.compact
  def __call__(self, x: jax.Array, skips: list[jax.Array], temb: jax.Array, context: jax.Array):
    config, level = self.config, self.level
    block_type = config.up_block_types[len(config.block_out_channels) - 1 - level]
    for i in range(config.layers[level] + 1):
      x = jnp.concatenate([x, skips.pop()], axis=-1)
      x = self.resnet(i, config.block_out_channels[level])(x, temb)
      if block_type.startswith("CrossAttn"):
        x = self.transformer(i)(x, context)
    if level > 0:
      x = Upsample2D(self.dtype, name="upsamplers_0")(x, skips[-1].shape[1:3])
    return x


class UNet2DConditionModel(nn.Module):
  """Denoises latents: (sample [B, h, w, Cin], timesteps, context) -> [B, h, w, Cout].

  `timesteps` is [B] or [], `encoder_hidden_states` [B or 1, L, D]. SDXL adds `pooled` [B or 1, P],
  the pooled text, and `time_ids` [B or 1, 6], the sizes of the image. With `remat` the backward
  pass recomputes each residual block and transformer, which saves memory.
  """

  config: UNetConfig
  dtype: Dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    sample: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    pooled: jax.Array | None = None,
    time_ids: jax.Array | None = None,
  ) -> jax.Array:
    config = self.config
    channels = config.block_out_channels
    stage = functools.partial(dict, config=config, dtype=self.dtype, remat=self.remat)
    context = encoder_hidden_states.astype(self.dtype)

    # A scalar timestep gives one row that broadcasts over the batch, so XLA computes its gradient
    # as that of a bias.
    timesteps = jnp.atleast_1d(timesteps)
    sinusoids = functools.partial(
      timestep_embedding, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
    )
    embed = functools.partial(TimestepEmbedding, 4 * channels[0], self.dtype)
    temb = embed(name="time_embedding")(sinusoids(timesteps, channels[0]))
    if config.addition_embed_type == "text_time":
      sizes = sinusoids(time_ids.ravel(), config.addition_time_embed_dim)
      added = jnp.concatenate([pooled, sizes.reshape(len(pooled), -1)], axis=-1)
      temb = temb + embed(name="add_embedding")(added)

    x = conv(channels[0], 3, self.dtype, "conv_in", padding=1)(sample.astype(self.dtype))
    skips = [x]
    for level in range(len(channels)):
      x, more = DownBlock(**stage(level=level), name=f"down_blocks_{level}")(x, temb, context)
      skips += more
    x = MidBlock(**stage(level=len(channels) - 1), name="mid_block")(x, temb, context)
    for i, level in enumerate(reversed(range(len(channels)))):
      x = UpBlock(**stage(level=level), name=f"up_blocks_{i}")(x, skips, temb, context)

    x = GroupNorm(
      config.norm_num_groups, config.norm_eps, self.dtype, silu=True, name="conv_norm_out"
    )(x)
    return conv(config.out_channels, 3, self.dtype, "conv_out", padding=1)(x)
