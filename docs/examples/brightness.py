"""A reward that is easy to exploit: `--config.reward="docs/examples/brightness.py:brightness"`."""


def brightness(images, masks):
  """Scores the mean brightness of the hole."""
  grey = images.mean(axis=-1, keepdims=True)
  return (grey * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))
