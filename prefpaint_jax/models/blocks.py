"""Blocks that the UNet and the VAE are made of, under the attribute names of diffusers.

Shapes: B batch, H W height and width, C channels, L tokens, D context width, E time embedding.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from prefpaint_jax.kernels.activations import gated, silu
from prefpaint_jax.kernels.attention import attention
from prefpaint_jax.kernels.convolution import convolve, enlarge_and_convolve
from prefpaint_jax.kernels.dense import Dense, product
from prefpaint_jax.kernels.dispatch import by_platform
from prefpaint_jax.kernels.group_norm import _gain_and_offset, _Norm
from prefpaint_jax.kernels.sums import moments, scale_and_shift

Dtype = jnp.dtype


class GroupNorm(nn.Module):
  """Group normalisation over [B, H, W, C] with float32 statistics.

  The sums of x and x² per channel are all that touches the picture: their gradient costs a fifth
  of that of a mean and a variance over reshaped groups, and the affine map is one multiply-add.
  """

  num_groups: int
  epsilon: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    B, H, W, C = x.shape
    G = self.num_groups
    if C % G:
      raise ValueError(f"GroupNorm: {C} channels do not divide into {G} groups")
    scale = self.param("scale", nn.initializers.ones, (C,))
    bias = self.param("bias", nn.initializers.zeros, (C,))
    wide = x.astype(jnp.float32)
    norm = _Norm(G, H * W * C // G, self.epsilon)
    gain, offset = _gain_and_offset(norm, *moments(wide), scale, bias)
    return scale_and_shift(wide, gain, offset).astype(self.dtype)


def conv(
  features: int,
  kernel: int,
  dtype: Dtype,
  name: str,
  stride: int = 1,
  padding="SAME",
  convolution=convolve,
):
  return nn.Conv(
    features,
    (kernel, kernel),
    (stride, stride),
    padding,
    dtype=dtype,
    conv_general_dilated=convolution,
    name=name,
  )


class ResnetBlock2D(nn.Module):
  """Two convolutions with a residual; the time embedding, if any, is added between them."""

  out_channels: int
  norm_num_groups: int
  norm_eps: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
    norm = functools.partial(GroupNorm, self.norm_num_groups, self.norm_eps, self.dtype)
    hidden = silu(norm(name="norm1")(x))
    hidden = conv(self.out_channels, 3, self.dtype, "conv1", padding=1)(hidden)
    if temb is not None:
      time = Dense(self.out_channels, dtype=self.dtype, name="time_emb_proj")(silu(temb))
      hidden = hidden + time[:, None, None, :]
    hidden = silu(norm(name="norm2")(hidden))
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
      return conv(C, 3, self.dtype, "conv", padding=1, convolution=enlarge_and_convolve)(x)
    rows = jnp.arange(size[0]) * H // size[0]
    columns = jnp.arange(size[1]) * W // size[1]
    return conv(C, 3, self.dtype, "conv", padding=1)(x[:, rows][:, :, columns])


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


class DensePair(nn.Module):
  """The two halves of a dense layer's output [..., 2 features].

  As products of their own, for which a GPU would cut the kernel in two each time.
  """

  features: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> list[jax.Array]:
    shape = (x.shape[-1], 2 * self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros, shape[1:])
    x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))

    def apart(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> list[jax.Array]:
      halves = zip(jnp.split(kernel, 2, axis=1), jnp.split(bias, 2), strict=True)
      return [product(x, half) + shift for half, shift in halves]

    together = lambda x, kernel, bias: jnp.split(product(x, kernel) + bias, 2, axis=-1)
    return by_platform(x, kernel, bias, cuda=together, default=apart)


class GEGLU(nn.Module):
  """Gated linear unit: [B, L, C] -> [B, L, 4C]."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden, gate = DensePair(4 * x.shape[-1], self.dtype, name="proj")(x)
    return gated(hidden, gate)


class FeedForward(nn.Module):
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
  """Sinusoids of the timestep (Vaswani et al. 2017): [B] -> [B, width], float32."""
  half = width // 2
  exponent = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
  angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)
  sines, cosines = jnp.sin(angles), jnp.cos(angles)
  return jnp.concatenate([cosines, sines] if flip_sin_to_cos else [sines, cosines], axis=-1)


class TimestepEmbedding(nn.Module):
  """[B, C] -> [B, E]."""

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = silu(Dense(self.width, dtype=self.dtype, name="linear_1")(x))
    return Dense(self.width, dtype=self.dtype, name="linear_2")(hidden)
