"""The reward `known-colour`: whether the hole has the colours around it. It has no weights.

It compares saturation, contrast of luma and mean hue of the hole with those of the known pixels
near it. The score is minus a weighted sum of the deviations: 0 is best, and too much colour or
contrast scores as low as too little.
"""
# Shapes: B samples, P prompts, H W pixels.

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.rewards.surroundings import holes, log_ratio, make_reward, mean, near

# Weights of the deviations: |log| of a ratio, |log| of a ratio, and a distance of colours.
SATURATION, CONTRAST, HUE = 0.5, 0.6, 5.0
JUST_SEEN = 0.05  # the smallest visible saturation, and standard deviation of luma


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
  """Computes scores, at most 0; see `Reward` for the arguments."""
  red, green, blue = jnp.moveaxis(images.astype(jnp.float32), -1, 0)
  grey = 0.299 * red + 0.587 * green + 0.114 * blue  # luma of Rec. 601
  red_green, yellow_blue = red - green, (red + green) / 2 - blue
  hole = holes(masks, len(images))
  # 1e-4 gives far pixels a weight, for masks without known pixels near the hole.
  around = (1 - hole) * (near(hole) + 1e-4)

  def spread(weights: Float[Array, "B H W"]) -> Float[Array, " B"]:
    centred = grey - mean(grey, weights)[:, None, None]
    return jnp.sqrt(mean(centred**2, weights))

  colourful = jnp.hypot(red_green, yellow_blue)
  saturation = log_ratio(mean(colourful, hole), mean(colourful, around), JUST_SEEN)
  contrast = log_ratio(spread(hole), spread(around), JUST_SEEN)
  hue = jnp.hypot(*(mean(x, hole) - mean(x, around) for x in (red_green, yellow_blue)))
  return -(SATURATION * saturation + CONTRAST * contrast + HUE * hue), None
