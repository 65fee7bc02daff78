"""Blocks of the UNet and the VAE, under the attribute names of diffusers."""
# Shapes: B batch, H W height and width, C channels, L M tokens, D context width, E time embedding.

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from prefpaint_jax.kernels.attention import attention
from prefpaint_jax.kernels.convolution import conv2d
from prefpaint_jax.kernels.dense import Dense, DenseHalves
from prefpaint_jax.kernels.group_norm import Norm, group_norm

Dtype = jnp.dtype


class GroupNorm(nn.Module):
  """Group normalisation of [B, H, W, C], with statistics in float32, followed by SiLU if `silu`."""

  num_groups: int
  epsilon: float
  dtype: Dtype = jnp.float32
  silu: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    C = x.shape[-1]
    if C % self.num_groups:
      raise ValueError(f"GroupNorm: {C} channels do not divide into {self.num_groups} groups")
    scale = self.param("scale", nn.initializers.ones, (C,))
    bias = self.param("bias", nn.initializers.zeros, (C,))
    norm = Norm(self.num_groups, self.epsilon, self.silu)
    return group_norm(norm, x, scale, bias).astype(self.dtype)


def conv(
  features: int, kernel: int, dtype: Dtype, name: str, stride: int = 1, padding="SAME"
) -> nn.Conv:
  """Makes a square 2-D convolution of [B, H, W, C]."""
  return nn.Conv(
    features,
    (kernel, kernel),
    (stride, stride),
    padding,
    dtype=dtype,
    conv_general_dilated=conv2d,
    name=name,
  )


class ResnetBlock2D(nn.Module):
  """Two convolutions with a residual; the time embedding, if given, is added between them."""

  out_channels: int
  norm_num_groups: int
  norm_eps: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
    norm = functools.partial(GroupNorm, self.norm_num_groups, self.norm_eps, self.dtype, silu=True)
    hidden = norm(name="norm1")(x)
    hidden = conv(self.out_channels, 3, self.dtype, "conv1", padding=1)(hidden)
    if temb is not None:
      time = Dense(self.out_channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))
      hidden = hidden + time[:, None, None, :]
    hidden = norm(name="norm2")(hidden)
    hidden = conv(self.out_channels, 3, self.dtype, "conv2", padding=1)(hidden)
    if x.shape[-1] != self.out_channels:
      x = conv(self.out_channels, 1, self.dtype, "conv_shortcut")(x)
    return x + hidden


class Downsample2D(nn.Module):
  """A convolution of stride 2; `padding` is (1, 1) in the UNet and (0, 1) in the VAE."""

  padding: tuple[int, int]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    pads = (self.padding, self.padding)
    return conv(x.shape[-1], 3, self.dtype, "conv", stride=2, padding=pads)(x)


class Upsample2D(nn.Module):
  """Nearest-neighbour enlargement to `size` (default: twice the size), then a convolution."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    B, H, W, C = x.shape
    if size is None or size == (2 * H, 2 * W):
      x = jnp.broadcast_to(x[:, :, None, :, None, :], (B, H, 2, W, 2, C))
      x = x.reshape(B, 2 * H, 2 * W, C)
    else:
      rows = jnp.arange(size[0]) * H // size[0]
      columns = jnp.arange(size[1]) * W // size[1]
      x = x[:, rows][:, :, columns]
    return conv(C, 3, self.dtype, "conv", padding=1)(x)


class Attention(nn.Module):
  """Multi-head attention of x [B, L, C] over itself, or over a context [B or 1, M, D]."""

  num_heads: int
  use_bias: bool = False  # of the query, key and value projections
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
    context = x if context is None else context
    B, L, C = x.shape

    def project(name: str, tokens: jax.Array) -> jax.Array:
      y = Dense(C, use_bias=self.use_bias, dtype=self.dtype, name=name)(tokens)
      return y.reshape(*y.shape[:2], self.num_heads, C // self.num_heads)

    query = project("to_q", x)
    key, value = project("to_k", context), project("to_v", context)
    y = attention(query, key, value).reshape(B, L, C)
    return Dense(C, dtype=self.dtype, name="to_out_0")(y)


class GEGLU(nn.Module):
  """Gated linear unit, hidden · gelu(gate): [B, L, C] -> [B, L, 4C]."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden, gate = DenseHalves(4 * x.shape[-1], self.dtype, name="proj")(x)
    # In float32, as PyTorch computes it for bfloat16 too. Flax's gelu has erfc, which takes longer.
    gate = gate.astype(jnp.float32)
    return hidden * (gate * 0.5 * (1 + jax.lax.erf(gate * 2**-0.5))).astype(self.dtype)


class FeedForward(nn.Module):
  """GEGLU and a projection back: [B, L, C] -> [B, L, C]."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = GEGLU(self.dtype, name="net_0")(x)
    return Dense(x.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class BasicTransformerBlock(nn.Module):
  """Self-attention, cross-attention to the text, and a feed-forward layer, each pre-normalised."""

  num_heads: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)
    attend = functools.partial(Attention, self.num_heads, dtype=self.dtype)
    x = x + attend(name="attn1")(norm(name="norm1")(x))
    x = x + attend(name="attn2")(norm(name="norm2")(x), context)
    return x + FeedForward(self.dtype, name="ff")(norm(name="norm3")(x))


class Transformer2DModel(nn.Module):
  """Transformer blocks over the pixels of [B, H, W, C], with a residual around them."""

  num_heads: int
  num_layers: int
  norm_num_groups: int
  use_linear_projection: bool
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    B, H, W, C = x.shape
    hidden = GroupNorm(self.norm_num_groups, 1e-6, self.dtype, name="norm")(x)
    if self.use_linear_projection:
      hidden = Dense(C, dtype=self.dtype, name="proj_in")(hidden.reshape(B, H * W, C))
    else:
      hidden = conv(C, 1, self.dtype, "proj_in")(hidden).reshape(B, H * W, C)
    for i in range(self.num_layers):
      block = BasicTransformerBlock(self.num_heads, self.dtype, name=f"transformer_blocks_{i}")
      hidden = block(hidden, context)
    if self.use_linear_projection:
      hidden = Dense(C, dtype=self.dtype, name="proj_out")(hidden).reshape(B, H, W, C)
    else:
      hidden = conv(C, 1, self.dtype, "proj_out")(hidden.reshape(B, H, W, C))
    return x + hidden


def timestep_embedding(
  timesteps: jax.Array, width: int, flip_sin_to_cos: bool, freq_shift: float
) -> jax.Array:
  """Computes sinusoids of the timestep (Vaswani et al. 2017): [B] -> [B, width], float32."""
  half = width // 2
  exponent = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
  angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)
  sines, cosines = jnp.sin(angles), jnp.cos(angles)
  return jnp.concatenate([cosines, sines] if flip_sin_to_cos else [sines, cosines], axis=-1)


class TimestepEmbedding(nn.Module):
  """Two dense layers: [B, C] -> [B, E]."""

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = nn.silu(Dense(self.width, dtype=self.dtype, name="linear_1")(x))
    return Dense(self.width, dtype=self.dtype, name="linear_2")(hidden)
