"""The denoising UNet of Stable Diffusion 1.x and 2.x, conditioned on time and text.

For inpainting its 9 input channels are 4 noisy latents, 1 mask, 4 latents of the masked image.
Shapes: B batch, h w latent height and width, L text tokens, D text width, E time embedding.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from prefpaint_jax.kernels.activations import silu
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
  """What all levels share: residual blocks and transformers, rematerialised or not."""

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
      self.config.transformer_layers_per_block,
      self.config.norm_num_groups,
      self.config.use_linear_projection,
      self.dtype,
      name=f"attentions_{index}",
    )


class DownBlock(_Stage):
  """One level of the way down; returns its output and what each step leaves for the way up."""

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
        padding = (0, 1)  # what no padding means in diffusers
      x = Downsample2D(padding, self.dtype, name="downsamplers_0")(x)
      skips.append(x)
    return x, skips


class MidBlock(_Stage):
  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> jax.Array:
    channels = self.config.block_out_channels[-1]
    x = self.resnet(0, channels)(x, temb)
    x = self.transformer(0)(x, context)
    return self.resnet(1, channels)(x, temb)


class UpBlock(_Stage):
  """One level of the way up; takes its skips from the end of the list."""

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
  """(sample [B, h, w, Cin], timesteps [B] or [], context [B or 1, L, D]) -> [B, h, w, Cout].

  `remat` recomputes each residual block and transformer in the backward pass: less memory.
  """

  config: UNetConfig
  dtype: Dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self, sample: jax.Array, timesteps: jax.Array, encoder_hidden_states: jax.Array
  ) -> jax.Array:
    config = self.config
    channels = config.block_out_channels
    stage = functools.partial(dict, config=config, dtype=self.dtype, remat=self.remat)
    context = encoder_hidden_states.astype(self.dtype)

    # One timestep is one row, which broadcasts: its gradient is that of a bias.
    timesteps = jnp.atleast_1d(timesteps)
    temb = timestep_embedding(timesteps, channels[0], config.flip_sin_to_cos, config.freq_shift)
    temb = TimestepEmbedding(4 * channels[0], self.dtype, name="time_embedding")(temb)

    x = conv(channels[0], 3, self.dtype, "conv_in", padding=1)(sample.astype(self.dtype))
    skips = [x]
    for level in range(len(channels)):
      x, more = DownBlock(**stage(level=level), name=f"down_blocks_{level}")(x, temb, context)
      skips += more
    x = MidBlock(**stage(level=len(channels) - 1), name="mid_block")(x, temb, context)
    for i, level in enumerate(reversed(range(len(channels)))):
      x = UpBlock(**stage(level=level), name=f"up_blocks_{i}")(x, skips, temb, context)

    x = GroupNorm(config.norm_num_groups, config.norm_eps, self.dtype, name="conv_norm_out")(x)
    return conv(config.out_channels, 3, self.dtype, "conv_out", padding=1)(silu(x))
