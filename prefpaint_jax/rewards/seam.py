"""The reward `seam`: whether the border of the hole is invisible. It has no weights.

It compares the mean step (absolute difference of two neighbouring pixels) across the border with
the mean step between known pixels near it. The score is minus |log| of their ratio: 0 is best, and
a border that is smoother than its surroundings scores as low as one that is rougher. Steps below
0.015 hardly count.
"""
# Shapes: B samples, P prompts, H W pixels, N pairs of neighbours.

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.rewards.surroundings import holes, log_ratio, make_reward, mean, near

JUST_SEEN = 0.015  # the smallest visible step


def load(name: str, weights: str = "", dtype: str = "float32") -> Reward:
  """Makes the reward; it computes in float32."""
  return make_reward(name, weights, score)


def score(
  params: Any,
  images: Float[Array, "B H W 3"],
  masked_images: Any,
  masks: Float[Array, "P H W 1"],
  texts: None = None,
) -> tuple[Float[Array, " B"], None]:
  """Computes scores, from log(0.015 / 1.015) = -4.2 to 0; see `Reward` for the arguments."""
  hole = holes(masks, len(images))
  border = near(hole) * near(1 - hole)  # large where hole and known pixels are both near
  parts = [_pairs(images.astype(jnp.float32), hole, border, axis) for axis in (1, 2)]
  steps, across, beside = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
  return -log_ratio(mean(steps, across), mean(steps, beside), JUST_SEEN), None


def _pairs(
  images: Float[Array, "B H W 3"],
  hole: Float[Array, "B H W"],
  border: Float[Array, "B H W"],
  axis: int,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Float[Array, "B N"]]:
  """Returns the steps along an axis and their weights: across the border, and beside it."""
  size = images.shape[axis]

  def sums(x: Float[Array, "B H W"]) -> Float[Array, "B ..."]:
    return lax.slice_in_dim(x, 0, size - 1, axis=axis) + lax.slice_in_dim(x, 1, size, axis=axis)

  steps = jnp.abs(jnp.diff(images, axis=axis)).mean(-1)
  missing = jnp.round(sums(hole))  # pixels of the pair in the hole
  weights = (missing == 1).astype(jnp.float32), (missing == 0) * sums(border)
  flat = lambda x: x.reshape(len(x), -1)
  return flat(steps), *map(flat, weights)
