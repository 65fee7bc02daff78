"""Masks: always usable, the same for the same seed, and of the kind they were drawn as."""

import numpy as np
import pytest
from scipy import ndimage

from prefpaint_jax.data import masks

SIZES = [(32, 32), (64, 48), (17, 40)]
DRAW = {masks.OUTPAINTING: masks.outpainting_mask, masks.WARPING: masks.warping_mask}


@pytest.mark.parametrize("kind", DRAW)
@pytest.mark.parametrize("size", SIZES)
def test_masks_are_binary_neither_empty_nor_full_and_of_their_kind(kind, size):
  for seed in range(200):
    mask = DRAW[kind](seed, *size)
    assert mask.shape == (*size, 1) and mask.dtype == np.float32
    assert set(np.unique(mask)) == {0.0, 1.0}
    assert masks.mask_kind(mask) == kind


@pytest.mark.parametrize("kind", DRAW)
def test_same_seed_same_mask_and_other_seeds_other_masks(kind):
  draw = DRAW[kind]
  np.testing.assert_array_equal(draw(7, 32, 32), draw(7, 32, 32))
  np.testing.assert_array_equal(draw(7, 32, 32), draw(np.random.default_rng(7), 32, 32))
  assert len({draw(seed, 32, 32).tobytes() for seed in range(50)}) > 30


def test_outpainting_keeps_one_rectangle_of_the_asked_share():
  rows, sides = 64, set()
  for seed in range(300):
    known = masks.outpainting_mask(seed, rows, rows, keep=(0.6, 0.85))[..., 0] == 0
    assert abs(known.mean() - 0.725) <= 0.125 + 2 / rows  # whole rows and columns only
    window = ndimage.find_objects(known.astype(int))[0]
    assert known[window].all()
    sides.add(tuple((s.start > 0, s.stop < rows) for s in window))
  assert len(sides) == 15  # every way to crop some of four sides


def test_warping_leaves_an_edge_band_and_holes_apart_from_it():
  inner, shares = [], []
  for seed in range(200):
    mask = masks.warping_mask(seed, 64, 64)[..., 0]
    edges = [mask[0].mean(), mask[-1].mean(), mask[:, 0].mean(), mask[:, -1].mean()]
    assert max(edges) > 0.5
    labels, number = ndimage.label(mask)
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    inner.append(number + 1 - len(np.union1d(border, [0])))
    shares.append(mask.mean())
  assert np.mean(inner) > 0.5
  assert min(shares) >= 0.08 and max(shares) <= 0.55


def test_too_small_a_picture_is_refused():
  for draw in DRAW.values():
    with pytest.raises(ValueError, match="1x8"):
      draw(0, 1, 8)
