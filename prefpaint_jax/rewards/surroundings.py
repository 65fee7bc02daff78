"""Statistics of a hole and of the known pixels near it, for rewards without weights.

The definitions are those of `preference.simulation`, in JAX.
"""
# Shapes: B samples, P prompts, S = B / P, H W pixels.

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from prefpaint_jax.rewards.reward import Reward

# Standard deviation of the Gaussian that defines "near", as a share of the image's shorter side.
NEAR = 0.08


def make_reward(name: str, weights: str, function: Callable[..., Any]) -> Reward:
  """Makes a reward without weights.

  Raises:
    ValueError: the name has weights.
  """
  if weights:
    raise ValueError(f"reward {name}: it has no weights; give {name.partition('@')[0]}")
  return Reward(name, function)


def near(region: Float[Array, "B H W"]) -> Float[Array, "B H W"]:
  """Computes how near each pixel is to a region: blurs it with a Gaussian, and zeros outside.

  It equals `scipy.ndimage.gaussian_filter(region, sigma, mode="constant")` of each image.
  """
  height, width = region.shape[1:]
  sigma = NEAR * min(height, width)
  rows, columns = _blur(height, sigma), _blur(width, sigma)
  return jnp.einsum("hi,bij,wj->bhw", rows, region, columns, precision="highest")


def _blur(size: int, sigma: float) -> Float[Array, "N N"]:
  """Returns the matrix of a Gaussian filter of one axis, cut at four standard deviations."""
  radius = int(4 * sigma + 0.5)
  weigh = lambda distance: jnp.where(
    abs(distance) <= radius, jnp.exp(-(distance**2) / (2 * sigma**2)), 0.0
  )
  total = weigh(jnp.arange(-radius, radius + 1)).sum()
  return weigh(jnp.arange(size)[:, None] - jnp.arange(size)) / total


def holes(masks: Float[Array, "P H W 1"], B: int) -> Float[Array, "B H W"]:
  """Repeats the mask of each prompt for its samples."""
  return jnp.repeat(masks[..., 0].astype(jnp.float32), B // len(masks), axis=0)


def mean(values: Float[Array, "B ..."], weights: Float[Array, "B ..."]) -> Float[Array, " B"]:
  """Computes the weighted mean over pixels; 0 without weights."""
  total = lambda x: x.reshape(len(x), -1).sum(-1)
  return total(values * weights) / jnp.maximum(total(weights), 1e-12)


def log_ratio(
  first: Float[Array, " B"], second: Float[Array, " B"], just_seen: float
) -> Float[Array, " B"]:
  """Computes |log| of the ratio of two positive sizes; near 0 for sizes below `just_seen`."""
  return jnp.abs(jnp.log((first + just_seen) / (second + just_seen)))
