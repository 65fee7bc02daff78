"""Masks: never empty or full, equal for equal seeds, and of the kind that was drawn."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from prefpaint_jax.data import masks

SIZES = [(32, 32), (64, 48), (17, 40)]
RANGED = {
  "outpainting": masks.outpainting_mask,
  "box": masks.box_mask,
  "brush": masks.brush_mask,
}


@pytest.mark.parametrize("name", masks.DRAW)
@pytest.mark.parametrize("size", SIZES)
def test_masks_are_binary_neither_empty_nor_full_and_of_their_kind(name, size):
  kind, draw = masks.DRAW[name]
  for seed in range(100):
    mask = draw(seed, *size)
    assert mask.shape == (*size, 1) and mask.dtype == np.float32
    assert set(np.unique(mask)) == {0.0, 1.0}
    # mask_kind cannot tell brush strokes from holes.
    assert masks.mask_kind(mask) == (masks.WARPING if kind == masks.BRUSH else kind)


@pytest.mark.parametrize("draw", RANGED.values())
def test_the_smallest_masks_have_known_and_missing_pixels(draw):
  for size in [(2, 2), (2, 7), (5, 3)]:
    for seed in range(50):
      for missing in [(0.01, 0.02), (0.98, 0.99), (0.1, 0.9)]:
        assert 0 < draw(seed, *size, missing=missing).mean() < 1


@pytest.mark.parametrize("name", masks.DRAW)
def test_equal_seeds_draw_equal_masks_and_other_seeds_other_masks(name):
  _, draw = masks.DRAW[name]
  np.testing.assert_array_equal(draw(7, 32, 32), draw(7, 32, 32))
  np.testing.assert_array_equal(draw(7, 32, 32), draw(np.random.default_rng(7), 32, 32))
  assert len({draw(seed, 32, 32).tobytes() for seed in range(50)}) > 30


@pytest.mark.parametrize("name", RANGED)
@pytest.mark.parametrize("missing", [(0.05, 0.1), (0.15, 0.4), (0.6, 0.8)])
def test_the_share_of_missing_pixels_covers_its_range(name, missing):
  shares = [RANGED[name](seed, 60, 80, missing=missing).mean() for seed in range(50)]
  step = 0 if name == "brush" else 1 / 60  # the others have whole rows and columns
  assert missing[0] - step - 1e-3 <= min(shares) and max(shares) <= missing[1] + step + 1e-3
  third = (missing[1] - missing[0]) / 3
  assert min(shares) < missing[0] + third and max(shares) > missing[1] - third


def test_outpainting_keeps_one_rectangle_and_covers_all_combinations_of_sides():
  sides = set()
  for seed in range(300):
    known = masks.outpainting_mask(seed, 64, 64)[..., 0] == 0
    window = ndimage.find_objects(known.astype(int))[0]
    assert known[window].all()
    sides.add(tuple((s.start > 0, s.stop < 64) for s in window))
  assert len(sides) == 15  # all non-empty subsets of four sides


@pytest.mark.parametrize(
  "sides, ways",
  [(["left"], 1), (["top", "bottom"], 3), (["right", "bottom"], 3)],
)
def test_outpainting_removes_pixels_only_at_the_given_sides(sides, ways):
  seen = set()
  for seed in range(300):
    mask = masks.outpainting_mask(seed, 50, 64, sides=sides)[..., 0]
    edges = {"left": mask[:, 0], "right": mask[:, -1], "top": mask[0], "bottom": mask[-1]}
    seen.add(frozenset(side for side, edge in edges.items() if edge.all()))
  assert len(seen) == ways and frozenset().union(*seen) == set(sides)


@pytest.mark.slow
def test_boxes_and_brush_strokes_reach_every_pixel():
  for draw in (masks.box_mask, masks.brush_mask):
    mean = np.mean([draw(seed, 24, 32) for seed in range(300)], axis=0)
    assert mean.min() > 0 and mean.max() < 0.8


def test_brush_strokes_have_the_width_of_a_brush():
  for seed in range(20):
    mask = masks.brush_mask(seed, 128, 128)[..., 0] > 0
    # The smallest radius is 3.2 pixels; only the last disc may be incomplete.
    opened = ndimage.binary_opening(np.pad(mask, 8, mode="edge"), np.ones((3, 3)))[8:-8, 8:-8]
    assert (mask & ~opened).mean() < 0.004
    assert ndimage.distance_transform_edt(mask).max() < 40


def test_warping_masks_have_a_band_at_one_edge_and_inner_holes():
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


def test_the_kind_of_a_mask_follows_from_its_rectangle():
  mask = np.zeros((8, 9, 1))
  mask[2:5, 3:6] = 1
  assert masks.mask_kind(mask) == masks.BOX
  assert masks.mask_kind(1 - mask) == masks.OUTPAINTING
  mask[7, 7] = 1
  assert masks.mask_kind(mask) == masks.WARPING
  half = np.zeros((8, 9, 1))
  half[:, 5:] = 1
  assert masks.mask_kind(half) == masks.OUTPAINTING


def test_invalid_sizes_shares_and_sides_are_refused():
  for _, draw in masks.DRAW.values():
    with pytest.raises(ValueError, match="8x1 pixels"):
      draw(0, 1, 8)
  for draw in RANGED.values():
    for missing in [(0.0, 0.5), (0.5, 1.0), (0.5, 0.2)]:
      with pytest.raises(ValueError, match="missing"):
        draw(0, 8, 8, missing=missing)
  for sides in ["left", ["up"], []]:
    with pytest.raises(ValueError, match="sides"):
      masks.outpainting_mask(0, 8, 8, sides=sides)


def test_the_command_writes_a_row_for_each_kind(tmp_path):
  photo, output = tmp_path / "photo.png", tmp_path / "sheet.png"
  noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
  Image.fromarray(noise).save(photo)
  flags = [f"--image={photo}", f"--output={output}", "--size=32", "--number=3"]
  subprocess.run([sys.executable, "-m", "prefpaint_jax.data.masks", *flags], check=True)
  width, height = Image.open(output).size
  assert width == 3 * (32 + 4) and height > 5 * (32 + 4)
