"""A reward that reads texts: `--config.reward="mini,docs/examples/warmth.py:warmth"`."""

import jax.numpy as jnp
import numpy as np


def warmth(images, masks, texts):
  """Scores 0 if the hole is as much warmer or colder than the rest as the text says, else less."""
  red_minus_blue = images[..., :1] - images[..., 2:]
  mean = lambda weight: (red_minus_blue * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
  return -jnp.abs(mean(masks) - mean(1 - masks) - 0.2 * texts) * jnp.abs(texts)


def tokenize(texts):
  """Converts texts to 1 (warm), -1 (cold) or 0."""
  return np.array([("warm" in text) - ("cold" in text) for text in texts], np.float32)


warmth.tokenize = tokenize
