"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP's encoders (Li et al. 2022) and a head.

The text encoder attends to the tokens of the image encoder. Modules have the attribute names of the
published file, so that `weights.names` converts it without renames.
"""
# Shapes: B samples, H W pixels, L text tokens, M image tokens, D width of the text tokens,
# E width of the image tokens.

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from prefpaint_jax.kernels.attention import attention
from prefpaint_jax.kernels.dense import Dense
from prefpaint_jax.models.blocks import Dtype
from prefpaint_jax.models.clip import MLP, activation
from prefpaint_jax.models.config import CLIPTextConfig, CLIPVisionConfig
from prefpaint_jax.weights.names import Params


@dataclasses.dataclass(frozen=True)
class BlipConfig:
  """The sizes of both encoders, in the fields of CLIP's."""

  vision: CLIPVisionConfig
  text: CLIPTextConfig


IMAGE_REWARD = BlipConfig(  # ViT-L/16 and BERT-base
  CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=16,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
  ),
  CLIPTextConfig(
    vocab_size=30524,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=512,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
    use_attention_mask=True,
  ),
)


class VisionAttention(nn.Module):
  """Self-attention of the image encoder, with one projection to queries, keys and values."""

  config: CLIPVisionConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    B, M, E = x.shape
    fused = Dense(3 * E, dtype=self.dtype, name="qkv")(x)
    heads = fused.reshape(B, M, 3, self.config.num_attention_heads, -1)
    y = attention(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2])
    return Dense(E, dtype=self.dtype, name="proj")(y.reshape(B, M, E))


class VisionBlock(nn.Module):
  """A pre-norm transformer layer: [B, M, E] -> [B, M, E]."""

  config: CLIPVisionConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    norm = functools.partial(nn.LayerNorm, epsilon=self.config.layer_norm_eps, dtype=self.dtype)
    x = x + VisionAttention(self.config, self.dtype, name="attn")(norm(name="norm1")(x))
    return x + MLP(self.config, self.dtype, name="mlp")(norm(name="norm2")(x))


class PatchEmbedding(nn.Module):
  """Patches as tokens: [B, H, W, 3] -> [B, M - 1, E]."""

  config: CLIPVisionConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    patch, E = (self.config.patch_size,) * 2, self.config.hidden_size
    conv = nn.Conv(E, patch, patch, "VALID", dtype=self.dtype, name="proj")
    return conv(pixels.astype(self.dtype)).reshape(pixels.shape[0], -1, E)


class VisionEncoder(nn.Module):
  """The image encoder: normalised pixels [B, H, W, 3] -> tokens [B, M, E], the class token first.

  H and W must be `config.image_size`.
  """

  config: CLIPVisionConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    config = self.config
    patches = PatchEmbedding(config, self.dtype, name="patch_embed")(pixels)
    B, patch_count, E = patches.shape
    init = nn.initializers.normal(0.02)
    first = self.param("cls_token", init, (1, 1, E)).astype(self.dtype)
    positions = self.param("pos_embed", init, (1, 1 + patch_count, E)).astype(self.dtype)
    x = jnp.concatenate([jnp.broadcast_to(first, (B, 1, E)), patches], axis=1) + positions
    for i in range(config.num_hidden_layers):
      x = VisionBlock(config, self.dtype, name=f"blocks_{i}")(x)
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=self.dtype, name="norm")(x)


class HeadsOfAttention(nn.Module):
  """Attention of x [B, L, D] to tokens [B, M, E], before its output projection.

  No query attends to tokens where `mask` [B, M] is 0.
  """

  config: CLIPTextConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    B, L, D = x.shape
    H = self.config.num_attention_heads

    def project(name: str, x: jax.Array) -> jax.Array:
      return Dense(D, dtype=self.dtype, name=name)(x).reshape(B, -1, H, D // H)

    query, key, value = project("query", x), project("key", tokens), project("value", tokens)
    if mask is None:
      return attention(query, key, value).reshape(B, L, D)
    known = mask[:, None, None] > 0
    return jax.nn.dot_product_attention(query, key, value, mask=known).reshape(B, L, D)


class Residual(nn.Module):
  """A dense layer, the sum with the residual x [B, L, D], and a layer norm."""

  config: CLIPTextConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, y: jax.Array, x: jax.Array) -> jax.Array:
    x = x + Dense(x.shape[-1], dtype=self.dtype, name="dense")(y)
    epsilon = self.config.layer_norm_eps
    return nn.LayerNorm(epsilon=epsilon, dtype=self.dtype, name="LayerNorm")(x)


class Attention(nn.Module):
  """Post-norm attention of x [B, L, D] to tokens [B, M, E]; `mask` as in `HeadsOfAttention`."""

  config: CLIPTextConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    y = HeadsOfAttention(self.config, self.dtype, name="self")(x, tokens, mask)
    return Residual(self.config, self.dtype, name="output")(y, x)


class Intermediate(nn.Module):
  """The first dense layer of an MLP and its activation."""

  config: CLIPTextConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = Dense(self.config.intermediate_size, dtype=self.dtype, name="dense")(x)
    return activation(self.config.hidden_act, hidden)


class TextLayer(nn.Module):
  """Self-attention, attention to the image tokens [B, M, E] and an MLP: [B, L, D] -> [B, L, D]."""

  config: CLIPTextConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, image_tokens: jax.Array) -> jax.Array:
    x = Attention(self.config, self.dtype, name="attention")(x, x, mask)
    x = Attention(self.config, self.dtype, name="crossattention")(x, image_tokens)
    hidden = Intermediate(self.config, self.dtype, name="intermediate")(x)
    return Residual(self.config, self.dtype, name="output")(hidden, x)


class TextEmbeddings(nn.Module):
  """Layer norm of token plus position embeddings: ids [B, L] -> [B, L, D]. No token types."""

  config: CLIPTextConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, input_ids: jax.Array) -> jax.Array:
    config = self.config
    embed = functools.partial(nn.Embed, features=config.hidden_size, dtype=self.dtype)
    tokens = embed(config.vocab_size, name="word_embeddings")(input_ids)
    positions = embed(config.max_position_embeddings, name="position_embeddings")
    x = tokens + positions(jnp.arange(input_ids.shape[1]))
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=self.dtype, name="LayerNorm")(x)


class TextLayers(nn.Module):
  """The stack of text layers: [B, L, D] -> [B, L, D]."""

  config: CLIPTextConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, image_tokens: jax.Array) -> jax.Array:
    for i in range(self.config.num_hidden_layers):
      x = TextLayer(self.config, self.dtype, name=f"layer_{i}")(x, mask, image_tokens)
    return x


class TextEncoder(nn.Module):
  """BERT that attends to image tokens: ids and mask [B, L], [B, M, E] -> [B, L, D]."""

  config: CLIPTextConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, input_ids: jax.Array, mask: jax.Array, image_tokens: jax.Array) -> jax.Array:
    x = TextEmbeddings(self.config, self.dtype, name="embeddings")(input_ids)
    return TextLayers(self.config, self.dtype, name="encoder")(x, mask, image_tokens)


class Blip(nn.Module):
  """Both encoders: pixels [B, H, W, 3], ids and mask [B, L] -> first text token [B, D]."""

  config: BlipConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array, input_ids: jax.Array, mask: jax.Array) -> jax.Array:
    image_tokens = VisionEncoder(self.config.vision, self.dtype, name="visual_encoder")(pixels)
    encoder = TextEncoder(self.config.text, self.dtype, name="text_encoder")
    return encoder(input_ids, mask, image_tokens)[:, 0]


class Head(nn.Module):
  """Five dense layers without an activation: [B, D] -> [B]."""

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    # torch counts the dropout layers, which do nothing at inference, too.
    for i, features in ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1)):
      z = Dense(features, name=f"layers_{i}")(z)
    return z[:, 0]


class ImageRewardNetwork(nn.Module):
  """Scores images: normalised pixels [B, H, W, 3], ids and mask [B, L] -> [B], and z [B, D].

  The score is an affine function of the feature z. Both are float32, whatever the compute dtype.
  """

  config: BlipConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, pixels: jax.Array, input_ids: jax.Array, mask: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    z = Blip(self.config, self.dtype, name="blip")(pixels, input_ids, mask).astype(jnp.float32)
    return Head(name="mlp")(z), z


@functools.lru_cache(2)  # tracing the network takes seconds
def network_shapes(config: BlipConfig) -> Params:
  """Returns the parameters of ImageReward as a tree of `jax.ShapeDtypeStruct`."""
  size = config.vision.image_size
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  init = ImageRewardNetwork(config).init
  return jax.eval_shape(init, jax.random.key(0), pixels, ids, ids)["params"]
