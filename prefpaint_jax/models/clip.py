"""CLIP's text encoder and vision tower (Radford et al. 2021).

Modules have the attribute names of transformers, so that `weights.names` converts its checkpoints.
"""
# Shapes: B batch, L tokens, D width, P projection width, H W pixels.

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from prefpaint_jax.kernels.attention import attention
from prefpaint_jax.kernels.dense import Dense
from prefpaint_jax.models.blocks import Dtype
from prefpaint_jax.models.config import CLIPTextConfig, CLIPVisionConfig

CLIPConfig = CLIPTextConfig | CLIPVisionConfig


def activation(name: str, x: jax.Array) -> jax.Array:
  """Computes the activation `name`: "quick_gelu" (OpenAI's x σ(1.702 x)) or "gelu" (exact)."""
  return x * nn.sigmoid(1.702 * x) if name == "quick_gelu" else nn.gelu(x, approximate=False)


class SelfAttention(nn.Module):
  """Multi-head self-attention over [B, L, D] with a bias in every projection.

  With `num_queries` only the first `num_queries` tokens are queries and the output is
  [B, num_queries, D]. No token attends to those where `mask` [B, L] is 0 (causal attention only).
  """

  num_heads: int
  is_causal: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, num_queries: int | None = None, mask: jax.Array | None = None
  ) -> jax.Array:
    B, _, D = x.shape

    def project(name: str, x: jax.Array) -> jax.Array:
      y = Dense(D, dtype=self.dtype, name=name)(x)
      return y.reshape(B, -1, self.num_heads, D // self.num_heads)

    query = project("q_proj", x[:, :num_queries])
    key, value = project("k_proj", x), project("v_proj", x)
    if self.is_causal:
      known = None if mask is None else mask[:, None, None] > 0
      y = jax.nn.dot_product_attention(query, key, value, mask=known, is_causal=True)
    else:
      y = attention(query, key, value)
    return Dense(D, dtype=self.dtype, name="out_proj")(y.reshape(B, -1, D))


class MLP(nn.Module):
  """Two dense layers with an activation between them: [B, L, D] -> [B, L, D]."""

  config: CLIPConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
    hidden = activation(self.config.hidden_act, hidden)
    return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


class EncoderLayer(nn.Module):
  """A pre-norm transformer layer; `num_queries` and `mask` as in `SelfAttention`."""

  config: CLIPConfig
  is_causal: bool
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, num_queries: int | None = None, mask: jax.Array | None = None
  ) -> jax.Array:
    norm = functools.partial(nn.LayerNorm, epsilon=self.config.layer_norm_eps, dtype=self.dtype)
    attention = SelfAttention(
      self.config.num_attention_heads, self.is_causal, self.dtype, name="self_attn"
    )
    x = x[:, :num_queries] + attention(norm(name="layer_norm1")(x), num_queries, mask)
    return x + MLP(self.config, self.dtype, name="mlp")(norm(name="layer_norm2")(x))


class Encoder(nn.Module):
  """A stack of transformer layers: [B, L, D] -> its output, and the input of the last layer.

  With `num_outputs` the last layer computes only the first `num_outputs` tokens.
  """

  config: CLIPConfig
  is_causal: bool
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, num_outputs: int | None = None, mask: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    last = self.config.num_hidden_layers - 1
    for i in range(last + 1):
      layer = EncoderLayer(self.config, self.is_causal, self.dtype, name=f"layers_{i}")
      before, x = x, layer(x, num_outputs if i == last else None, mask)
    return x, before


class TextEmbeddings(nn.Module):
  """Token plus position embeddings: ids [B, L] -> [B, L, D]."""

  config: CLIPTextConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, input_ids: jax.Array) -> jax.Array:
    config = self.config
    embed = functools.partial(nn.Embed, features=config.hidden_size, dtype=self.dtype)
    tokens = embed(config.vocab_size, name="token_embedding")(input_ids)
    positions = embed(config.max_position_embeddings, name="position_embedding")
    return tokens + positions(jnp.arange(input_ids.shape[1]))


class TextTransformer(nn.Module):
  """Embeddings, causal encoder and final norm: ids [B, L] -> last and penultimate [B, L, D]."""

  config: CLIPTextConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, input_ids: jax.Array, mask: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    config = self.config
    x = TextEmbeddings(config, self.dtype, name="embeddings")(input_ids)
    x, penultimate = Encoder(config, True, self.dtype, name="encoder")(x, mask=mask)
    norm = nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")
    return norm(x), penultimate


class CLIPTextModel(nn.Module):
  """CLIP's text encoder: token ids [B, L] -> last hidden state [B, L, D] after the final norm.

  No token attends to those where `mask` [B, L] is 0.
  """

  config: CLIPTextConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, input_ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    return TextTransformer(self.config, self.dtype, name="text_model")(input_ids, mask)[0]


class PooledTextModel(nn.Module):
  """A text encoder: ids [B, L] -> penultimate hidden state [B, L, D], and pooled [B, P].

  With `projection` (transformers' CLIPTextModelWithProjection: SDXL's second encoder, rewards) the
  pooled text is that of the last hidden state of the token that ends the text; without (SDXL's
  first encoder) it is None, and XLA removes the last layer, whose output nothing uses.
  """

  config: CLIPTextConfig
  projection: bool
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, input_ids: jax.Array, mask: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array | None]:
    config = self.config
    last, penultimate = TextTransformer(config, self.dtype, name="text_model")(input_ids, mask)
    if not self.projection:
      return penultimate, None
    is_end = input_ids if config.eos_token_id == 2 else input_ids == config.eos_token_id
    end = jnp.argmax(is_end, axis=-1)
    pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
    project = Dense(config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")
    return penultimate, project(pooled)


class VisionEmbeddings(nn.Module):
  """Class token and patch embeddings plus positions: [B, H, W, 3] -> [B, 1 + patches, D]."""

  config: CLIPVisionConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    config = self.config
    patch, D = config.patch_size, config.hidden_size
    patches = nn.Conv(
      D,
      (patch, patch),
      (patch, patch),
      "VALID",
      use_bias=False,
      dtype=self.dtype,
      name="patch_embedding",
    )(pixels.astype(self.dtype))
    patches = patches.reshape(pixels.shape[0], -1, D)
    first = self.param("class_embedding", nn.initializers.normal(0.02), (D,))
    first = jnp.broadcast_to(first.astype(self.dtype), (pixels.shape[0], 1, D))
    x = jnp.concatenate([first, patches], axis=1)
    length = (config.image_size // patch) ** 2 + 1
    positions = nn.Embed(length, D, dtype=self.dtype, name="position_embedding")
    return x + positions(jnp.arange(length))


class VisionTransformer(nn.Module):
  """The vision tower: [B, H, W, 3] -> class token [B, D] after the final layer norm."""

  config: CLIPVisionConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    config = self.config
    norm = functools.partial(nn.LayerNorm, epsilon=config.layer_norm_eps, dtype=self.dtype)
    x = VisionEmbeddings(config, self.dtype, name="embeddings")(pixels)
    x = norm(name="pre_layrnorm")(x)  # transformers spells it so
    x, _ = Encoder(config, False, self.dtype, name="encoder")(x, num_outputs=1)
    return norm(name="post_layernorm")(x[:, 0])


class CLIPVisionModelWithProjection(nn.Module):
  """CLIP's image encoder: normalised pixels [B, H, W, 3] -> embedding [B, P].

  H and W must be `config.image_size`. The embedding is not scaled to unit length.
  """

  config: CLIPVisionConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    size = self.config.image_size
    if pixels.shape[1:3] != (size, size):
      raise ValueError(
        f"pixels are {pixels.shape}; expected [B, {size}, {size}, 3]; preprocess them first"
      )
    pooled = VisionTransformer(self.config, self.dtype, name="vision_model")(pixels)
    project = Dense(
      self.config.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection"
    )
    return project(pooled)
