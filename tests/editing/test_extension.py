"""Extension: every new pixel is inpainted once, known pixels are kept, and seams are removed."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from prefpaint_jax import mini
from prefpaint_jax.data import images as image_io
from prefpaint_jax.editing import extension
from prefpaint_jax.editing.extension import Borders, extend, inpaint_seamlessly, plan_windows
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models import architectures, sampling

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = 2
N = architectures.SIZE  # pixels along each side of a window


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
  coarse = np.random.default_rng(seed).uniform(size=(3, 3, 3))
  return image_io.resize_image(coarse, (height, width))


def inside(borders: Borders, size: tuple[int, int]) -> tuple[slice, slice]:
  """Returns the rows and columns of the image on its canvas."""
  left, _, top, _ = borders
  return slice(top, top + size[0]), slice(left, left + size[1])


CASES = [
  ((8, 8), Borders(right=32)),  # five windows wide
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
def test_every_new_pixel_is_inpainted_once_beside_known_pixels(inpainter, size, borders, overlap):
  rounds, window, batches = plan_windows(inpainter, size, borders, overlap)
  known = (rounds == 0).astype(int)
  assert window == N and known.any() and not known.all()
  before = 0
  for number, corners in batches:
    assert number >= before and len(corners) == len(batches[0][1])
    before = number
    known_before = known.copy()  # all windows of a batch see the canvas before the batch
    for y, x in corners:
      box = np.s_[y : y + N, x : x + N]
      assert known_before[box].shape == (N, N, 1)
      assert known_before[box].mean() >= overlap - 1 / N
      inpainted = rounds[box] == number
      assert inpainted.any()
      np.testing.assert_array_equal(known_before[box] == 0, inpainted)
      known[box] += inpainted
  assert (known == 1).all()


def test_left_and_right_windows_share_a_round(inpainter):
  _, _, batches = plan_windows(inpainter, (N, N), Borders(left=8, right=8))
  assert [(number, sorted(corners)) for number, corners in batches] == [
    (1, [(0, 4), (0, 12)]),
    (2, [(0, 0), (0, 16)]),
  ]


@pytest.mark.parametrize(
  ("size", "canvas"), [((12, 20), (12, 25)), ((24, 30), (12, 18)), ((4, 6), (8, 22))]
)
def test_shorter_side_of_the_image_is_resized_to_between_1_and_1_5_windows(inpainter, size, canvas):
  borders = Borders(left=5 if size[0] < 24 else 6)
  rounds, _, _ = plan_windows(inpainter, size, borders)
  assert rounds.shape == (*canvas, 1)
  known = canvas[1] - borders.left * canvas[0] // size[0]
  assert (rounds[:, -known:] == 0).all() and (rounds[:, :-known] > 0).all()


# ------------------------------------------------------------------------------------------ extend
@pytest.mark.parametrize(("size", "borders"), CASES)
def test_canvas_grows_by_the_borders_and_every_new_pixel_is_inpainted(
  inpainter, size, borders, monkeypatch
):
  monkeypatch.setattr(
    extension, "inpaint_seamlessly", lambda _, images, masks, key: np.where(masks > 0, 1.0, images)
  )
  monkeypatch.setattr(extension, "_remove_seam", lambda sample, *_: sample)
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
  else:  # resizing blurs across the border
    np.testing.assert_array_equal(extended[inside(borders, size)], 0)
    assert extended[expected == 1].min() > 0.25 and np.median(extended[expected == 1]) > 0.95


@pytest.mark.parametrize(("size", "borders"), [CASES[1], CASES[7]])
def test_known_pixels_are_kept_exactly_and_all_others_are_inpainted(inpainter, size, borders):
  image = photograph(*size)
  extended = extend(inpainter, image, *borders, num_steps=STEPS)
  np.testing.assert_array_equal(extended[inside(borders, size)], image)
  assert extended.dtype == np.float32
  assert extended.min() >= 0 and extended.max() <= 1
  canvas = extension._pad(image, borders, mode="edge")
  assert (extended != canvas).any(-1).sum() == (canvas.size - image.size) / 3


def test_extension_depends_only_on_the_key(inpainter):
  extend_with = lambda seed: extend(
    inpainter, photograph(8, 8), right=12, key=jax.random.key(seed), num_steps=STEPS, eta=1.0
  )
  first, again, other = extend_with(3), extend_with(3), extend_with(4)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other)[:, 8:].mean() > 0.01


def test_every_batch_gets_its_own_key(inpainter, monkeypatch):
  keys = []
  monkeypatch.setattr(
    extension,
    "inpaint_seamlessly",
    lambda _, images, masks, key: keys.append(jax.random.key_data(key)) or images,
  )
  extend(inpainter, photograph(8, 8), right=32)
  assert len({tuple(np.asarray(key)) for key in keys}) == len(keys) == 8


def test_all_windows_of_all_images_share_one_compiled_program(inpainter, monkeypatch):
  shapes = set()
  programs = sampling.programs()
  encode, *others = programs

  def recorded(modules, params, images, masks, *others, **options):
    shapes.add((images.shape, masks.shape))
    return encode(modules, params, images, masks, *others, **options)

  monkeypatch.setattr(sampling, "programs", lambda: (recorded, *others))
  compiled = [program._cache_size() for program in programs]
  extend(inpainter, photograph(8, 8), right=20, num_steps=STEPS, eta=0.5)
  extend(inpainter, photograph(31, 29), top=9, num_steps=STEPS, eta=0.5)
  assert shapes == {((1, N, N, 3), (1, N, N, 1))}
  for program, before in zip(programs, compiled, strict=True):
    assert program._cache_size() - before <= 1


def test_each_window_gets_the_known_pixels_in_its_overlap(inpainter, monkeypatch):
  """The model knows the known pixels of the canvas."""
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
  assert (second_mask[0, 0, :, 0] == [0, 0, 0, 0, 0, 1, 1, 1]).all()
  np.testing.assert_array_equal(second[0, :, :5], extended[:, 7:12])


@pytest.mark.slow
def test_no_seam_is_visible_between_windows(monkeypatch):
  """Neighbours across a border differ by less than neighbours within a window or the image."""
  policy = Inpainter.from_pretrained("mini")
  photo = Image.open(Path(mini.__file__).parent / "photos" / "meadow_090.jpg").resize((42, 32))
  borders = Borders(left=20, right=40, bottom=12)
  rounds = plan_windows(policy, (32, 42), borders).rounds[..., 0]

  def jumps() -> tuple[float, float, float]:
    """Returns mean differences of neighbours across a border, within a window, in the image."""
    image = extend(policy, photo, *borders, num_steps=8, eta=1.0)
    pairs = [
      (np.abs(np.diff(image, axis=axis)).mean(-1), np.minimum(*both), both[0] != both[1])
      for axis, both in enumerate([(rounds[1:], rounds[:-1]), (rounds[:, 1:], rounds[:, :-1])])
    ]
    select = lambda choose: np.concatenate([jump[choose(*which)] for jump, *which in pairs]).mean()
    return (
      select(lambda first, border: border),
      select(lambda first, border: ~border & (first > 0)),
      select(lambda first, border: ~border & (first == 0)),
    )

  border, in_window, in_image = jumps()
  assert border < in_window and border < in_image
  monkeypatch.setattr(extension, "_remove_seam", lambda sample, *_: sample)
  assert jumps()[0] > 2 * border  # without `_remove_seam` the seams are visible


# ------------------------------------------------------------------------------------------- seams
def test_colour_cast_is_removed_at_the_rim_and_kept_deep_in_the_hole():
  image = photograph(64, 64) * 0.5
  hole = np.zeros((64, 64, 1), np.float32)
  hole[:, 32:] = 1
  known = image_io.spread_known(image, hole)
  seamless = extension._remove_seam(known + 0.2, known, hole, hole[..., 0] > 0)
  cast = (seamless - known)[:, 32:]
  assert np.abs(cast[:, 0]).max() < 0.01
  np.testing.assert_allclose(cast[:, -1], 0.2, atol=0.01)
  assert np.diff(cast.mean((0, 2))).min() > -1e-6
  unchanged = extension._remove_seam(known + 0.2, known, hole, np.zeros((64, 64), bool))
  np.testing.assert_array_equal(unchanged, known + np.float32(0.2))


def test_shift_decays_into_the_hole_as_a_solution_of_laplaces_equation():
  """Beside a straight rim a wave of the rim decays as exp(-2 pi depth / wavelength)."""
  size, wavelength = 256, 32
  hole = np.zeros((size, size, 1), np.float32)
  hole[:, 128:] = 1
  wave = np.cos(2 * np.pi * np.arange(size) / wavelength)[:, None, None]
  sample = np.full((size, size, 3), 0.5, np.float32)
  known = sample + 0.2 * wave.astype(np.float32)
  seamless = extension._remove_seam(sample, known, hole, hole[..., 0] > 0)
  amplitude = np.einsum("yxc,y->x", seamless - 0.5, wave.ravel()) / (1.5 * size)
  for depth in (2, 4, 8, 12):
    expected = 0.2 * np.exp(-2 * np.pi * depth / wavelength)
    assert abs(amplitude[128 + depth] - expected) < 0.03


def test_pixels_in_the_hole_do_not_change_the_samples(inpainter):
  image, hole = photograph(11, 9), np.zeros((11, 9, 1), np.float32)
  hole[:, 5:] = 1
  inpaint = lambda image: inpaint_seamlessly(inpainter, image[None], hole[None], num_steps=STEPS)
  first = inpaint(image)
  np.testing.assert_array_equal(first, inpaint(np.where(hole > 0, 0, image)))
  np.testing.assert_array_equal(first[0, :, :5], image[:, :5])


# ------------------------------------------------------------------------------------------- errors
def refused(match: str):
  """Expects a ValueError of one line that matches."""
  return pytest.raises(ValueError, match=rf"\A(?=[^\n]*\Z)(?s:.*){match}")


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("left=abc", "left is 'abc'; expected a whole number"),
    ("left=1.5", "left is '1.5'; expected a whole number"),
    ("left", "left is ''; expected a whole number"),
    ("up=3", "'up' is no side"),
    ("", "'' is no side"),
    ("left=1,left=2", "left is named twice"),
    ("left=4,top=-1", "top is -1"),
    ("left=0,right=0", "all sides are 0"),
  ],
)
def test_invalid_borders_raise_errors(text, reason):
  with refused(reason):
    Borders.parse(text)


def test_borders_are_parsed_in_any_order():
  assert Borders.parse("bottom=3, left=12") == Borders(left=12, right=0, top=0, bottom=3)


def test_invalid_arguments_of_extend_raise_errors(inpainter):
  with refused("all sides are 0"):
    extend(inpainter, photograph(8, 8))
  with refused("overlap is 0.9"):
    extend(inpainter, photograph(8, 8), left=4, overlap=0.9)
  with refused("the 64x64 pixels leave no known pixel at 8x8 pixels"):
    hole = np.ones((1, 64, 64, 1), np.float32)
    hole[0, 3, 3] = 0
    inpaint_seamlessly(inpainter, photograph(64, 64)[None], hole)
