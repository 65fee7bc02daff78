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


def test_marked_images_have_a_frame_around_them_and_keep_their_pixels():
  images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3))
  plain = image_grid(images, columns=2, padding=3)
  framed = image_grid(images, columns=2, padding=3, marked=[False, True])
  changed = (plain != framed).any(-1)
  expected = np.zeros((14, 28), bool)
  expected[1:13, 15:27] = True  # one pixel of the padding stays white
  expected[3:11, 17:25] = False
  np.testing.assert_array_equal(changed, expected)
  assert len(np.unique(framed[expected], axis=0)) == 1


def test_names_of_rows_and_the_caption_are_beside_the_rows_and_change_no_image():
  images = np.random.default_rng(0).uniform(size=(4, 40, 40, 3))
  plain = image_grid(images, columns=2)
  named = image_grid(images, columns=2, rows=["first", "second"], caption="caption")
  texts = len(named) - len(plain)
  is_row = np.ones(len(named), bool)
  starts = [i for i in range(len(named) - 43) if (named[i : i + 44] == plain[:44]).all()]
  starts += [i for i in range(len(named) - 43) if (named[i : i + 44] == plain[44:]).all()]
  assert len(starts) == 2
  for start in starts:
    is_row[start : start + 44] = False
  assert is_row.sum() == texts
  strips = np.split(named, [starts[0], starts[0] + 44, starts[1], starts[1] + 44])[::2]
  assert all((strip < 128).any() for strip in strips)  # one has each name, the last the caption
  with pytest.raises(ValueError, match="1 names for 2 rows"):
    image_grid(images, columns=2, rows=["one"])


def test_a_label_of_several_lines_fits_the_width_of_its_image():
  images = np.zeros((2, 100, 100, 3))
  long = "true preference 3.1"
  for labels in (["a", f"{long}\n{long}"], [f"{long}\n{long}", "a"]):
    grid = image_grid(images, columns=2, labels=labels)
    tiles = np.split(grid, 2, axis=1)
    assert all((tile[104:] < 128).any() for tile in tiles)
    assert (np.stack(tiles)[:, 104:, -2:] == 255).all()
