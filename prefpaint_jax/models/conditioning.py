"""The conditions of the UNet: masked images, masks, texts, and the guidance by texts."""
# Shapes: B prompts, H W pixels, h w latents, c latent channels, L text tokens, D text width.

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Context(NamedTuple):
  """The condition by text: one text for all samples (one row), or one text for each sample.

  Stable Diffusion 1 and 2 have tokens alone. SDXL adds the pooled text and the sizes of the image.
  """

  tokens: Float[Array, "#B L D"]
  pooled: Float[Array, "#B P"] | None = None
  time_ids: Float[Array, "#B 6"] | None = None

  @property
  def is_shared(self) -> bool:
    """Whether all samples share the context's one row."""
    return self.tokens.shape[0] == 1

  def broadcast(self, batch: int) -> "Context":
    """Returns the context with one row for each sample."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), self)


class Guidance(NamedTuple):
  """Classifier-free guidance (Ho & Salimans 2022): negative + scale (text - negative)."""

  scale: Float[Array, ""]
  negative: Context  # the context that the prediction is moved away from


class Prompts(NamedTuple):
  """Encoded prompts: masked images, their masks, and texts."""

  mask: Float[Array, "B H W 1"]  # 1 = missing
  masked_image: Float[Array, "B H W 3"]  # in [0, 1], black in the hole
  mask_latents: Float[Array, "B h w 1"]
  masked_latents: Float[Array, "B h w c"]  # scaled
  context: Context | None  # None: not encoded yet
  guidance: Guidance | None = None  # None: the prediction for the context alone

  @property
  def per_sample(self) -> "Prompts":
    """The same tree with True for each array that has one row per sample, False for shared ones."""

    def flags(context: Context | None) -> Any:
      return jax.tree.map(lambda _: not context.is_shared, context)

    guidance = self.guidance and Guidance(False, flags(self.guidance.negative))
    return Prompts(True, True, True, True, flags(self.context), guidance)

  def map_samples(self, function: Callable[[jax.Array], jax.Array]) -> "Prompts":
    """Applies `function` to each array that has one row per sample; keeps shared ones."""
    return jax.tree.map(lambda x, own: function(x) if own else x, self, self.per_sample)

  def repeat(self, samples: int) -> "Prompts":
    """Repeats each prompt `samples` times in a row; a context that all share stays one row."""
    if samples == 1:
      return self
    return self.map_samples(lambda x: jnp.repeat(x, samples, axis=0))

  def partition(self) -> tuple["Prompts", "Prompts"]:
    """Splits into the arrays with one row per sample and the shared ones; others become None."""
    flags = self.per_sample
    own = jax.tree.map(lambda x, own: x if own else None, self, flags)
    return own, jax.tree.map(lambda x, own: None if own else x, self, flags)


def combine(own: Prompts, shared: Prompts) -> Prompts:
  """Joins what `Prompts.partition` has split."""
  first = lambda x, y: y if x is None else x
  return jax.tree.map(first, own, shared, is_leaf=lambda x: x is None)
