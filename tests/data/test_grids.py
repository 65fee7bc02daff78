"""Tests of image grids: every pixel is where it belongs, and texts change no image."""

import numpy as np
import pytest

from prefpaint_jax.data.grids import image_grid


def brute_force_grid(images, columns, scale, padding):
  count, height, width, _ = images.shape
  tile = np.array([height, width]) * scale + 2 * padding
  grid = np.full((-(-count // columns) * tile[0], columns * tile[1], 3), 255, np.uint8)
  for n in range(count):
    top, left = tile * divmod(n, columns) + padding
    for y in range(height * scale):
      for x in range(width * scale):
        for channel in range(3):
          value = min(max(images[n, y // scale, x // scale, channel], 0.0), 1.0)
          grid[top + y, left + x, channel] = round(255 * float(value))
  return grid


@pytest.mark.parametrize(
  ("count", "columns", "scale", "padding"), [(5, 3, 2, 1), (4, 2, 1, 0), (1, 4, 3, 2), (3, 1, 1, 2)]
)
def test_image_grid_equals_brute_force(count, columns, scale, padding):
  images = np.random.default_rng(0).uniform(-0.2, 1.2, (count, 4, 3, 3)).astype(np.float32)
  np.testing.assert_array_equal(
    image_grid(images, columns, scale, padding), brute_force_grid(images, columns, scale, padding)
  )


def test_labels_are_below_their_images_and_do_not_change_them():
  images = np.random.default_rng(0).uniform(size=(3, 8, 24, 3))
  plain = image_grid(images, columns=2, scale=2, padding=1)
  labelled = image_grid(images, columns=2, scale=2, padding=1, labels=["", "0.25", "a long label"])
  assert labelled.dtype == np.uint8 and labelled.shape[1] == plain.shape[1]
  rows = lambda grid: np.split(grid, 2)
  for with_text, without in zip(rows(labelled), rows(plain), strict=True):
    np.testing.assert_array_equal(with_text[:17], without[:17])
  first, second = np.split(rows(labelled)[0][17:], 2, axis=1)
  assert (first == 255).all() and (second < 128).any()
  with pytest.raises(ValueError, match="1 labels for 3 images"):
    image_grid(images, columns=2, labels=["one"])
