"""Wider pictures: every new pixel painted once, known pixels kept, seams hidden."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from prefpaint_jax import inpainter as inpainter_module
from prefpaint_jax import mini
from prefpaint_jax.data import images as image_io
from prefpaint_jax.editing import extension
from prefpaint_jax.editing.extension import Borders, extend, fill, plan_windows
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models import architectures

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = 2
N = architectures.SIZE  # sides of a window


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
  coarse = np.random.default_rng(seed).uniform(size=(3, 3, 3))
  return image_io.resize_image(coarse, (height, width))


def inside(borders: Borders, size: tuple[int, int]) -> tuple[slice, slice]:
  """Where the photograph is on its canvas."""
  left, _, top, _ = borders
  return slice(top, top + size[0]), slice(left, left + size[1])


CASES = [
  ((8, 8), Borders(right=32)),  # a panorama five windows wide
  ((8, 8), Borders(3, 5, 2, 9)),
  ((11, 30), Borders(left=6, right=6)),
  ((12, 12), Borders(7, 6, 5, 4)),
  ((30, 13), Borders(1, 0, 0, 1)),
  ((21, 34), Borders(10, 11, 12, 13)),
  ((8, 19), Borders(top=7)),
  ((5, 7), Borders(4, 2, 3, 1)),  # smaller than a window
  ((3, 11), Borders(bottom=8)),
]


# --------------------------------------------------------------------------------------------- plan
@pytest.mark.parametrize(("size", "borders"), CASES)
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
def test_every_new_pixel_is_painted_once_next_to_what_is_known(inpainter, size, borders, overlap):
  turn, window, batches = plan_windows(inpainter, size, borders, overlap)
  known = (turn == 0).astype(int)
  assert window == N and known.any() and not known.all()
  before = 0
  for number, corners in batches:
    assert number >= before and len(corners) == len(batches[0][1])
    before = number
    at_first = known.copy()  # all windows of a batch see the canvas as it was before the batch
    for y, x in corners:
      box = np.s_[y : y + N, x : x + N]
      assert at_first[box].shape == (N, N, 1)
      assert at_first[box].mean() >= overlap - 1 / N
      mine = turn[box] == number
      assert mine.any()
      np.testing.assert_array_equal(at_first[box] == 0, mine)
      known[box] += mine
  assert (known == 1).all()


def test_left_and_right_are_painted_at_once(inpainter):
  _, _, batches = plan_windows(inpainter, (N, N), Borders(left=8, right=8))
  assert [(number, sorted(corners)) for number, corners in batches] == [
    (1, [(0, 4), (0, 12)]),
    (2, [(0, 0), (0, 16)]),
  ]


@pytest.mark.parametrize(
  ("size", "canvas"), [((12, 20), (12, 25)), ((24, 30), (12, 18)), ((4, 6), (8, 22))]
)
def test_a_window_sees_most_of_the_photograph_and_not_more_than_it(inpainter, size, canvas):
  """Its own scale if that will do; else it is made smaller or larger."""
  borders = Borders(left=5 if size[0] < 24 else 6)
  turn, _, _ = plan_windows(inpainter, size, borders)
  assert turn.shape == (*canvas, 1)
  known = canvas[1] - borders.left * canvas[0] // size[0]
  assert (turn[:, -known:] == 0).all() and (turn[:, :-known] > 0).all()


# -------------------------------------------------------------------------------------------- paint
@pytest.mark.parametrize(("size", "borders"), CASES)
def test_canvas_grows_by_the_borders_and_no_pixel_is_left_unpainted(
  inpainter, size, borders, monkeypatch
):
  monkeypatch.setattr(
    extension, "fill", lambda _, images, holes, key: np.where(holes > 0, 1.0, images)
  )
  monkeypatch.setattr(extension, "_join", lambda painted, *_: painted)
  black = np.zeros((*size, 3), np.float32)
  extended = extend(inpainter, black, *borders)
  assert extended.shape == (
    size[0] + borders.top + borders.bottom,
    size[1] + borders.left + borders.right,
    3,
  )
  expected = np.ones_like(extended)
  expected[inside(borders, size)] = 0
  if N <= min(size) <= 1.5 * N:
    np.testing.assert_array_equal(extended, expected)
  else:  # resizing back blurs across the border
    np.testing.assert_array_equal(extended[inside(borders, size)], 0)
    assert extended[expected == 1].min() > 0.25 and np.median(extended[expected == 1]) > 0.95


@pytest.mark.parametrize(("size", "borders"), [CASES[1], CASES[7]])
def test_known_pixels_are_kept_exactly_and_the_rest_is_painted(inpainter, size, borders):
  image = photograph(*size)
  extended = extend(inpainter, image, *borders, num_steps=STEPS)
  np.testing.assert_array_equal(extended[inside(borders, size)], image)
  assert extended.dtype == np.float32
  assert extended.min() >= 0 and extended.max() <= 1
  canvas = extension._pad(image, borders, mode="edge")
  assert (extended != canvas).any(-1).sum() == (canvas.size - image.size) / 3


def test_same_key_same_picture_and_another_key_another(inpainter):
  paint = lambda seed: extend(
    inpainter, photograph(8, 8), right=12, key=jax.random.key(seed), num_steps=STEPS, eta=1.0
  )
  first, again, other = paint(3), paint(3), paint(4)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other)[:, 8:].mean() > 0.01


def test_windows_get_noise_of_their_own(inpainter, monkeypatch):
  keys = []
  monkeypatch.setattr(
    extension, "fill", lambda _, images, holes, key: keys.append(jax.random.key_data(key)) or images
  )
  extend(inpainter, photograph(8, 8), right=32)
  assert len({tuple(np.asarray(key)) for key in keys}) == len(keys) == 8


def test_one_program_serves_all_windows_of_all_photographs(inpainter, monkeypatch):
  shapes = set()
  paint = inpainter_module._painter()

  def recorded(modules, params, images, masks, *others, **options):
    shapes.add((images.shape, masks.shape))
    return paint(modules, params, images, masks, *others, **options)

  monkeypatch.setattr(inpainter_module, "_painter", lambda: recorded)
  compiled = paint._cache_size()
  extend(inpainter, photograph(8, 8), right=20, num_steps=STEPS, eta=0.5)
  extend(inpainter, photograph(31, 29), top=9, num_steps=STEPS, eta=0.5)
  assert shapes == {((1, N, N, 3), (1, N, N, 1))}
  assert paint._cache_size() - compiled <= 1


def test_each_window_is_given_all_that_it_overlaps(inpainter, monkeypatch):
  """Known to the model is what is known on the canvas, but for cells that the hole touches."""
  given = []
  monkeypatch.setattr(
    Inpainter,
    "__call__",
    lambda self, images, masks, **options: given.append((images, masks)) or 1 - images,
  )
  image = photograph(8, 8)
  extended = extend(inpainter, image, right=7)
  (first, first_mask), (second, second_mask) = given
  np.testing.assert_array_equal(first[0, :, :4], image[:, 4:])
  np.testing.assert_array_equal(first_mask[0, :, :, 0], [[0, 0, 0, 0, 1, 1, 1, 1]] * 8)
  assert (second_mask[0, 0, :, 0] == [0, 0, 0, 0, 1, 1, 1, 1]).all()
  np.testing.assert_array_equal(second[0, :, :4], extended[:, 7:11])


def test_windows_meet_without_a_jump(monkeypatch):
  """Neighbouring pixels of two windows differ no more than those of one, nor of the photograph."""
  policy = Inpainter.from_pretrained("mini")
  photo = Image.open(Path(mini.__file__).parent / "photos" / "meadow_090.jpg").resize((42, 32))
  borders = Borders(left=20, right=40, bottom=12)
  turn = plan_windows(policy, (32, 42), borders).turn[..., 0]

  def jumps() -> tuple[float, float, float]:
    """Mean difference of neighbours in two windows, in one, and in the photograph."""
    image = extend(policy, photo, *borders, num_steps=8, eta=1.0)
    pairs = [
      (np.abs(np.diff(image, axis=axis)).mean(-1), np.minimum(*both), both[0] != both[1])
      for axis, both in enumerate([(turn[1:], turn[:-1]), (turn[:, 1:], turn[:, :-1])])
    ]
    select = lambda choose: np.concatenate([jump[choose(*which)] for jump, *which in pairs]).mean()
    return (
      select(lambda first, border: border),
      select(lambda first, border: ~border & (first > 0)),
      select(lambda first, border: ~border & (first == 0)),
    )

  border, painted, photographed = jumps()
  assert border < painted and border < photographed
  monkeypatch.setattr(extension, "_join", lambda painted, *_: painted)
  assert jumps()[0] > 2 * border  # so it is the joining that hides them


# --------------------------------------------------------------------------------------------- fill
def test_a_hole_grows_to_whole_cells():
  rng = np.random.default_rng(0)
  for _ in range(20):
    hole = (rng.uniform(size=(12, 16, 1)) < 0.05).astype(np.float32)
    cells = hole.reshape(6, 2, 8, 2).max((1, 3))
    np.testing.assert_array_equal(
      extension._whole_cells(hole, (12, 16), 2)[..., 0], np.kron(cells, np.ones((2, 2)))
    )
    smaller = hole.reshape(3, 4, 4, 4).max((1, 3))  # half the size, cells of two
    np.testing.assert_array_equal(
      extension._whole_cells(hole, (6, 8), 2)[..., 0], np.kron(smaller, np.ones((2, 2)))
    )
    np.testing.assert_array_equal(  # twice the size: a cell is a pixel
      extension._whole_cells(hole, (24, 32), 2)[..., 0], np.kron(hole[..., 0], np.ones((2, 2)))
    )


def test_a_cast_over_the_whole_painting_is_gone_at_the_rim_and_stays_deep_in_the_hole():
  image = photograph(64, 64) * 0.5
  hole = np.zeros((64, 64, 1), np.float32)
  hole[:, 32:] = 1
  spread = extension._spread_known(image, hole)
  joined = extension._join(spread + 0.2, spread, hole, hole[..., 0] > 0)
  cast = (joined - spread)[:, 32:]
  assert np.abs(cast[:, 0]).max() < 0.01
  np.testing.assert_allclose(cast[:, -1], 0.2, atol=0.01)
  assert np.diff(cast.mean((0, 2))).min() > -1e-6
  apart = extension._join(spread + 0.2, spread, hole, np.zeros((64, 64), bool))
  np.testing.assert_array_equal(apart, spread + np.float32(0.2))


def test_what_the_rim_lacks_spreads_as_a_membrane_does():
  """Beside a long straight rim a wave on it is gone like exp(-2 pi depth / wavelength)."""
  size, wavelength = 256, 32
  hole = np.zeros((size, size, 1), np.float32)
  hole[:, 128:] = 1
  wave = np.cos(2 * np.pi * np.arange(size) / wavelength)[:, None, None]
  painted = np.full((size, size, 3), 0.5, np.float32)
  spread = painted + 0.2 * wave.astype(np.float32)
  joined = extension._join(painted, spread, hole, hole[..., 0] > 0)
  amplitude = np.einsum("yxc,y->x", joined - 0.5, wave.ravel()) / (1.5 * size)
  for depth in (2, 4, 8, 12):
    expected = 0.2 * np.exp(-2 * np.pi * depth / wavelength)
    assert abs(amplitude[128 + depth] - expected) < 0.03


def test_what_is_in_a_hole_does_not_matter(inpainter):
  image, hole = photograph(11, 9), np.zeros((11, 9, 1), np.float32)
  hole[:, 5:] = 1
  paint = lambda image: fill(inpainter, image[None], hole[None], num_steps=STEPS)
  first = paint(image)
  np.testing.assert_array_equal(first, paint(np.where(hole > 0, 0, image)))
  np.testing.assert_array_equal(first[0, :, :5], image[:, :5])


# ------------------------------------------------------------------------------------------- errors
def refused(match: str):
  """The error that a user sees: one line that says this."""
  return pytest.raises(ValueError, match=rf"\A(?=[^\n]*\Z)(?s:.*){match}")


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("left=abc", "left is 'abc', not a whole number"),
    ("left=1.5", "left is '1.5', not a whole number"),
    ("left", "left is '', not a whole number"),
    ("up=3", "'up' is no side"),
    ("", "'' is no side"),
    ("left=1,left=2", "left is named twice"),
    ("left=4,top=-1", "top is -1"),
    ("left=0,right=0", "no side grows"),
  ],
)
def test_borders_that_cannot_be_are_refused(text, reason):
  with refused(reason):
    Borders.parse(text)


def test_borders_are_read_in_any_order():
  assert Borders.parse("bottom=3, left=12") == Borders(left=12, right=0, top=0, bottom=3)


def test_extend_refuses_what_it_cannot_do(inpainter):
  with refused("no side grows"):
    extend(inpainter, photograph(8, 8))
  with refused("overlap is 0.9"):
    extend(inpainter, photograph(8, 8), left=4, overlap=0.9)
  with refused("next to nothing of the 8x8 pixels is known"):
    hole = np.ones((1, 8, 8, 1), np.float32)
    hole[0, 3, 3] = 0
    fill(inpainter, photograph(8, 8)[None], hole)
