"""The two towers of a CLIP model, for rewards that are a function of its embeddings."""
# Shapes: P prompts, S samples of each, B = P S samples, H W pixels, L tokens, E embedding.

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from prefpaint_jax.models.clip import CLIPVisionModelWithProjection, PooledTextModel
from prefpaint_jax.models.config import CLIPTextConfig, CLIPVisionConfig
from prefpaint_jax.models.reward import CLIP_MEAN, CLIP_STD, preprocess
from prefpaint_jax.weights.names import Params


@dataclasses.dataclass(frozen=True)
class Towers:
  """The image encoder of a CLIP model and, for rewards that read texts, its text encoder."""

  vision: CLIPVisionModelWithProjection
  text: PooledTextModel | None = None

  @property
  def embedding_dim(self) -> int:
    """E."""
    return self.vision.config.projection_dim

  def shapes(self) -> Params:
    """Returns the parameters, under the names of transformers' CLIPModel, as a tree of shapes."""
    size, key = self.vision.config.image_size, jax.random.key(0)
    pixels = jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(lambda: self.vision.init(key, pixels))["params"]
    if self.text is not None:
      tokens = jnp.zeros((1, 2), jnp.int32)
      shapes |= jax.eval_shape(lambda: self.text.init(key, tokens))["params"]
      shapes["logit_scale"] = jax.ShapeDtypeStruct((), jnp.float32)
    return shapes

  def embed_images(self, params: Params, pixels: jax.Array) -> jax.Array:
    """Computes float32 embeddings [B, E] of unit length of normalised pixels [B, H, W, 3]."""
    return _unit(self.vision.apply({"params": params}, pixels))

  def embed_texts(self, params: Params, ids: jax.Array) -> jax.Array:
    """Computes float32 embeddings [P, E] of unit length of token ids [P, L]."""
    return _unit(self.text.apply({"params": params}, ids)[1])

  def cosines(
    self, params: Params, pixels: jax.Array, ids: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Computes the cosine [B] of each image and its text, and the images' embeddings [B, E].

    Args:
      pixels: normalised [B, H, W, 3]; S consecutive images share a text.
      ids: token ids [P, L].
    """
    images, texts = self.embed_images(params, pixels), self.embed_texts(params, ids)
    texts = jnp.repeat(texts, images.shape[0] // texts.shape[0], axis=0)
    return jnp.sum(images * texts, axis=-1), images

  def centre(self, images: jax.Array, offset: Callable[[float], int]) -> jax.Array:
    """Resizes, crops and normalises images [B, H, W, 3] in [0, 1]; see `preprocess`."""
    return preprocess(images, self.vision.config.image_size, offset)

  def letterbox(self, images: jax.Array) -> jax.Array:
    """Resizes, pads and normalises images [B, H, W, 3] in [0, 1], as open_clip's ResizeMaxSize.

    An antialiased bicubic filter resizes the longer side to the size of the tower, and black pads
    the shorter one. Overshoots of the filter are not clipped, as torchvision does not clip those of
    float tensors.
    """
    size = self.vision.config.image_size
    B, H, W, _ = images.shape
    scale = size / max(H, W)
    height, width = round(H * scale), round(W * scale)
    if (height, width) != (H, W):
      images = jax.image.resize(images, (B, height, width, 3), "cubic", antialias=True)
    rest = [(size - side) // 2 for side in (height, width)]
    pads = zip(rest, (size - height - rest[0], size - width - rest[1]), strict=True)
    images = jnp.pad(images, [(0, 0), *pads, (0, 0)])
    return (images - CLIP_MEAN) / CLIP_STD


def _unit(x: jax.Array) -> jax.Array:
  """Scales rows to unit length, in float32."""
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def make_towers(config: dict[str, Any], dtype: str, *, with_text: bool) -> Towers:
  """Makes the towers of a config of transformers' CLIPModel, in the compute dtype."""
  vision = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(config), jnp.dtype(dtype))
  if not with_text:
    return Towers(vision)
  text = CLIPTextConfig.from_dict(config)
  return Towers(vision, PooledTextModel(text, projection=True, dtype=jnp.dtype(dtype)))
