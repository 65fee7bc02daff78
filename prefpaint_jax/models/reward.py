"""The reward network of PrefPaint: CLIP embeds the inpainted and the masked image, a head scores.

Shapes: B batch, H W pixels, P projection width of CLIP, T tokens (1 or 2), D features.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax.kernels.dense import Dense
from prefpaint_jax.models.blocks import Dtype
from prefpaint_jax.models.clip import CLIPVisionModelWithProjection, SelfAttention
from prefpaint_jax.models.config import RewardConfig

# Mean and standard deviation of CLIP's training images, per channel of RGB in [0, 1].
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
BLACK = (0.5 / 255.0 - CLIP_MEAN) / CLIP_STD  # the darkest byte, once normalised


def early_channels(pixels: jax.Array, masked_pixels: jax.Array) -> jax.Array:
  """What the tower sees in early fusion, [B, H, W, 13].

  The filling, its surroundings and the hole; and the steps to the next pixel, rightwards and
  downwards, within the filling, within the surroundings, and across the seam. A patch embedding is
  linear, so it could not make the size of a step from the pixels by itself.
  """
  hole = jnp.all(masked_pixels <= BLACK, axis=-1, keepdims=True).astype(pixels.dtype)
  channels = [pixels * hole, masked_pixels * (1.0 - hole), hole]
  for axis in (2, 1):
    size = jnp.mean(_step(pixels, axis), axis=-1, keepdims=True)
    channels += [size * hole, size * (1.0 - hole), size * _step(hole, axis)]
  return jnp.concatenate(channels, axis=-1)


def _step(x: jax.Array, axis: int) -> jax.Array:
  """How far each value is from the next along an axis; 0 for the last."""
  return jnp.pad(jnp.abs(jnp.diff(x, axis=axis)), [(0, int(dim == axis)) for dim in range(x.ndim)])


class EncoderLayer(nn.Module):
  """A post-norm transformer encoder layer with ReLU (torch.nn.TransformerEncoderLayer)."""

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
  """Flattened tokens [B, T P] -> reward [B] and the features z [B, D] that it is linear in."""

  config: RewardConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array]:
    config = self.config
    activate = nn.gelu if config.activation == "gelu" else lambda y: y
    x = activate(Dense(config.hidden_dim, dtype=self.dtype, name="layers_0")(x))
    x = nn.Dropout(config.dropout, deterministic=deterministic)(x)
    z = activate(Dense(config.feature_dim, dtype=self.dtype, name="layers_2")(x))
    z = z.astype(jnp.float32)  # the bound is about wᵀz: keep both exact whatever the compute type
    reward = Dense(1, use_bias=False, name="last_layer")(z)[:, 0]
    return reward, z


class RewardNetwork(nn.Module):
  """(inpainted [B, H, W, 3], masked [B or B/S, H, W, 3]), CLIP-normalised -> reward [B], z [B, D].

  S consecutive inpaintings may share one masked image. Reward and features are float32.
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
      tokens = clip(early_channels(pixels, masked_pixels))[:, None]
    else:
      # One pass over both kinds of picture; a masked image that several inpaintings share, once.
      embeddings = clip(jnp.concatenate([pixels, masked_pixels]))
      masked = jnp.repeat(embeddings[B:], S, axis=0)
      tokens = jnp.stack([embeddings[:B], masked], axis=1).reshape(B, config.num_tokens, -1)
    tokens = EncoderLayer(config, self.dtype, name="encoder_layer")(tokens, deterministic)
    reward, z = Head(config, self.dtype, name="mlp")(tokens.reshape(B, -1), deterministic)
    return (reward - config.shift) / config.scale, z


def preprocess(images: jax.Array, size: int) -> jax.Array:
  """CLIP's preprocessing on the device: [B, H, W, 3] in [0, 1] -> [B, size, size, 3], normalised.

  Antialiased bicubic resize of the shorter side to `size`, then a centre crop.
  """
  B, H, W, _ = images.shape
  if (size, size) != (H, W):
    # The longer side is cut, not rounded, as CLIP's own preprocessing does; in integers, so that
    # rounding of the ratio cannot take a pixel off it.
    height, width = (size * side // min(H, W) for side in (H, W))
    images = jax.image.resize(images, (B, height, width, 3), "cubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    images = jnp.clip(images[:, top : top + size, left : left + size], 0.0, 1.0)
  return (images - CLIP_MEAN) / CLIP_STD


def apply(
  network: RewardNetwork, params: Any, images: jax.Array, masked_images: jax.Array, **options: Any
) -> tuple[jax.Array, jax.Array]:
  """Reward [B] and features [B, D] of images [B, H, W, 3] given masked images [M, H, W, 3].

  `options` go to the network: deterministic, rngs.
  """
  size = network.config.vision.image_size
  pixels, masked_pixels = preprocess(images, size), preprocess(masked_images, size)
  return network.apply({"params": params}, pixels, masked_pixels, **options)


def network_shapes(config: RewardConfig) -> Any:
  """The tree of parameter shapes of a reward network."""
  size = config.vision.image_size
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(RewardNetwork(config).init, jax.random.key(0), pixels, pixels)["params"]
