"""The reward network of PrefPaint (arXiv 2410.21966): CLIP embeddings and a head that scores them.

With late fusion CLIP embeds the sample and the masked image separately; with early fusion it
embeds both as channels of one image.
"""
# Shapes: B samples, S samples per masked image, H W pixels, P projection width of CLIP,
# T tokens (1 or 2), D features.

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax.kernels.dense import Dense
from prefpaint_jax.models.blocks import Dtype
from prefpaint_jax.models.clip import CLIPVisionModelWithProjection, SelfAttention
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.weights.names import Params

# Mean and standard deviation of CLIP's training images: RGB in [0, 1].
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
BLACK = (0.5 / 255.0 - CLIP_MEAN) / CLIP_STD  # normalised pixels at or below it are the byte 0


def early_channels(
  pixels: jax.Array, masked_pixels: jax.Array, differences: bool = True
) -> jax.Array:
  """Computes the input of CLIP's vision tower for early fusion.

  The 13 channels are the sample inside the hole (3), the masked image outside it (3), the mask (1),
  and absolute differences to the next pixel to the right and below, each inside the hole, outside
  it, and across its border (6). The patch embedding is linear and could not compute absolute
  differences.

  Args:
    pixels: normalised samples [B, H, W, 3].
    masked_pixels: normalised masked images [B, H, W, 3], black in the hole.
    differences: False: leaves out the 6 channels of differences.

  Returns:
    [B, H, W, 13], or [B, H, W, 7].
  """
  hole = jnp.all(masked_pixels <= BLACK, axis=-1, keepdims=True).astype(pixels.dtype)
  channels = [pixels * hole, masked_pixels * (1.0 - hole), hole]
  for axis in (2, 1) if differences else ():
    size = jnp.mean(_difference(pixels, axis), axis=-1, keepdims=True)
    channels += [size * hole, size * (1.0 - hole), size * _difference(hole, axis)]
  return jnp.concatenate(channels, axis=-1)


def _difference(x: jax.Array, axis: int) -> jax.Array:
  """Computes the absolute difference of each value and the next along `axis`; 0 for the last."""
  return jnp.pad(jnp.abs(jnp.diff(x, axis=axis)), [(0, int(dim == axis)) for dim in range(x.ndim)])


class EncoderLayer(nn.Module):
  """A post-norm transformer encoder layer with ReLU, as torch.nn.TransformerEncoderLayer."""

  config: RewardConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
    config = self.config
    drop = nn.Dropout(config.encoder_dropout, deterministic=deterministic)

    attention = SelfAttention(config.num_heads, dtype=self.dtype, name="self_attn")(x)
    x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm1")(x + drop(attention))
    hidden = nn.relu(Dense(config.feedforward_dim, dtype=self.dtype, name="linear1")(x))
    hidden = Dense(x.shape[-1], dtype=self.dtype, name="linear2")(drop(hidden))
    return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm2")(x + drop(hidden))


class Head(nn.Module):
  """Three dense layers: flattened tokens [B, T P] -> reward [B] and features z [B, D].

  The reward is linear in the features: reward = wᵀ z.
  """

  config: RewardConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array]:
    config = self.config
    activate = nn.gelu if config.activation == "gelu" else lambda y: y
    x = activate(Dense(config.hidden_dim, dtype=self.dtype, name="layers_0")(x))
    x = nn.Dropout(config.dropout, deterministic=deterministic)(x)
    z = activate(Dense(config.feature_dim, dtype=self.dtype, name="layers_2")(x))
    z = z.astype(jnp.float32)  # the reward's bound holds for wᵀz in float32
    reward = Dense(1, use_bias=False, name="last_layer")(z)[:, 0]
    return reward, z


class RewardNetwork(nn.Module):
  """Scores samples: (pixels [B, H, W, 3], masked_pixels [B/S, H, W, 3]) -> reward [B], z [B, D].

  Both inputs are normalised (`preprocess`). S consecutive samples share one masked image. Reward
  and features are float32, whatever the compute dtype.
  """

  config: RewardConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, pixels: jax.Array, masked_pixels: jax.Array, deterministic: bool = True
  ) -> tuple[jax.Array, jax.Array]:
    config = self.config
    B = pixels.shape[0]
    S = B // masked_pixels.shape[0]
    clip = CLIPVisionModelWithProjection(config.vision, self.dtype, name="clip")
    if config.fusion == "early":
      masked_pixels = jnp.repeat(masked_pixels, S, axis=0)
      tokens = clip(early_channels(pixels, masked_pixels, config.differences))[:, None]
    else:
      # CLIP embeds all images in one call, and each masked image once for its S samples.
      embeddings = clip(jnp.concatenate([pixels, masked_pixels]))
      masked = jnp.repeat(embeddings[B:], S, axis=0)
      tokens = jnp.stack([embeddings[:B], masked], axis=1).reshape(B, config.num_tokens, -1)
    tokens = EncoderLayer(config, self.dtype, name="encoder_layer")(tokens, deterministic)
    reward, z = Head(config, self.dtype, name="mlp")(tokens.reshape(B, -1), deterministic)
    return (reward - config.shift) / config.scale, z


def preprocess(images: jax.Array, size: int, offset: Callable[[float], int] = round) -> jax.Array:
  """Resizes, crops and normalises images as CLIP does: [B, H, W, 3] -> [B, size, size, 3].

  The input is in [0, 1]. An antialiased bicubic filter resizes the shorter side to `size`, then the
  centre is cropped.

  Args:
    offset: makes a whole number of the first row and column. `round` (OpenAI's transform by
      torchvision) rounds a half to the even number; `int` is that of transformers.
  """
  B, H, W, _ = images.shape
  if (size, size) != (H, W):
    # CLIP truncates the length of the longer side. Integer division does so exactly; a float
    # ratio could round just below an integer and lose a pixel.
    height, width = (size * side // min(H, W) for side in (H, W))
    images = jax.image.resize(images, (B, height, width, 3), "cubic", antialias=True)
    top, left = offset((height - size) / 2), offset((width - size) / 2)
    images = jnp.clip(images[:, top : top + size, left : left + size], 0.0, 1.0)
  return (images - CLIP_MEAN) / CLIP_STD


def apply(
  network: RewardNetwork,
  params: Params,
  images: jax.Array,
  masked_images: jax.Array,
  **options: Any,
) -> tuple[jax.Array, jax.Array]:
  """Computes rewards [B] and features [B, D] of samples.

  Args:
    images: samples [B, H, W, 3] in [0, 1].
    masked_images: [B/S, H, W, 3] in [0, 1], black in the hole; S consecutive samples share one.
    **options: `deterministic` and `rngs` of the network.
  """
  size = network.config.vision.image_size
  pixels, masked_pixels = preprocess(images, size), preprocess(masked_images, size)
  return network.apply({"params": params}, pixels, masked_pixels, **options)


def network_shapes(config: RewardConfig) -> Params:
  """Returns the parameters of a reward network as a tree of `jax.ShapeDtypeStruct`."""
  return jax.tree.map(lambda leaf: leaf, _shapes(config))


# Tracing the network takes a second or more, so it is done once for each architecture.
@functools.lru_cache(8)
def _shapes(config: RewardConfig) -> Params:
  size = config.vision.image_size
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(RewardNetwork(config).init, jax.random.key(0), pixels, pixels)["params"]
