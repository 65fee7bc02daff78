"""New views: what the warp shows stays, what is painted stays too, and its depth is that behind."""

import jax
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from prefpaint_jax.data import images as image_io
from prefpaint_jax.data.depth import synthetic_depth
from prefpaint_jax.data.warping import Intrinsics, camera_pose, warp
from prefpaint_jax.editing import views
from prefpaint_jax.editing.views import Layer, background_depth, sweep

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = 2
CAMERA = Intrinsics(fx=20.0, fy=16.0, cx=7.5, cy=5.5)
SIZE = (12, 16)


def picture() -> np.ndarray:
  return image_io.resize_image(np.random.default_rng(0).uniform(size=(4, 4, 3)), SIZE)


def near_and_far() -> np.ndarray:
  """A wall at 4, and a rectangle at 2 before it."""
  depth = np.full(SIZE, 4.0)
  depth[3:9, 5:9] = 2.0
  return depth


# -------------------------------------------------------------------------------------------- views
def test_without_a_move_the_picture_is_unchanged_and_nothing_is_painted():
  depth = synthetic_depth(0, *SIZE)
  for view in sweep(None, picture(), depth, views=3):
    np.testing.assert_array_equal(view, picture())


def test_what_the_warp_shows_stays_and_its_holes_are_painted(inpainter):
  move, turn = (0.4, 0.1, -0.2), (3.0, -2.0)
  warped = warp(picture(), near_and_far(), CAMERA, move, turn)
  (view,) = sweep(inpainter, picture(), near_and_far(), CAMERA, move, turn, num_steps=STEPS)
  hole = warped.mask[..., 0] > 0
  assert 0.05 < hole.mean() < 0.6
  np.testing.assert_array_equal(view[~hole], warped.image[~hole])
  assert (view[hole] > 0).any(-1).all()
  assert view.shape == (*SIZE, 3) and view.dtype == np.float32
  assert view.min() >= 0 and view.max() <= 1


def test_what_a_view_painted_is_seen_again_in_the_next(inpainter):
  """On a plane every step moves the picture by two whole pixels, with all that was painted."""
  depth = np.full(SIZE, 2.5)
  move = (6 * 2.5 / CAMERA.fx, 0, 0)
  first, second, third = sweep(
    inpainter, picture(), depth, CAMERA, move, views=3, num_steps=STEPS, eta=1.0
  )
  np.testing.assert_array_equal(first[:, :-2], picture()[:, 2:])
  np.testing.assert_array_equal(second[:, :-2], first[:, 2:])
  np.testing.assert_array_equal(third[:, :-2], second[:, 2:])
  assert np.abs(third[:, -2:] - second[:, -2:]).mean() > 1e-3


def test_the_photograph_goes_before_all_that_is_painted(inpainter):
  move, turn = (0.5, 0.0, 0.3), (-4.0, 2.0)
  seen = sweep(inpainter, picture(), near_and_far(), CAMERA, move, turn, 3, num_steps=STEPS)
  for number, view in enumerate(seen, start=1):
    share = number / 3
    warped = warp(
      picture(), near_and_far(), CAMERA, np.multiply(share, move), np.multiply(share, turn)
    )
    known = warped.mask[..., 0] == 0
    np.testing.assert_array_equal(view[known], warped.image[known])


def test_same_key_same_views_and_another_key_others(inpainter):
  paint = lambda seed: sweep(
    inpainter,
    picture(),
    near_and_far(),
    CAMERA,
    (0.5, 0, 0),
    views=2,
    key=jax.random.key(seed),
    num_steps=STEPS,
    eta=1.0,
  )
  first, again, other = paint(1), paint(1), paint(2)
  np.testing.assert_array_equal(first, again)
  assert np.abs(np.subtract(first, other)).max() > 0.01


def test_a_view_that_shows_nothing_of_the_picture_is_refused(inpainter):
  with pytest.raises(
    ValueError, match=r"\A[^\n]*nothing of the picture is in sight at 100%[^\n]*\Z"
  ):
    sweep(inpainter, picture(), near_and_far(), CAMERA, turn=(120, 0))


# ------------------------------------------------------------------------------------------- layers
def test_a_pose_and_the_way_to_another_give_the_other():
  rng = np.random.default_rng(0)
  for _ in range(20):
    old, new = (camera_pose(rng.normal(size=3), rng.uniform(-80, 80, 3)) for _ in range(2))
    move, turn = views._relative(old, new)
    rotation, place = camera_pose(move, turn)
    np.testing.assert_allclose(old[0] @ rotation, new[0], atol=1e-9)
    np.testing.assert_allclose(old[0] @ place + old[1], new[1], atol=1e-9)
    yaw, pitch, roll = turn  # scipy's angles: y and x and z about the axes that turn along
    expected = Rotation.from_matrix(old[0].T @ new[0]).as_euler("YXZ", degrees=True)
    np.testing.assert_allclose([yaw, pitch, roll], expected, atol=1e-6)


def test_only_a_layers_own_pixels_are_seen_and_the_first_layer_goes_before():
  image, depth = picture(), np.full(SIZE, 3.0)
  left, right = np.zeros((2, *SIZE), bool)
  left[:, :6], right[:, 4:10] = True, True
  layers = [Layer(image, depth, left, camera_pose()), Layer(1 - image, depth, right, camera_pose())]
  seen, seen_depth = views.look(layers, CAMERA, camera_pose())
  np.testing.assert_array_equal(seen[:, :6], image[:, :6])
  np.testing.assert_array_equal(seen[:, 6:10], 1 - image[:, 6:10])
  np.testing.assert_array_equal(seen_depth > 0, left | right)


def test_what_opens_behind_something_near_is_as_far_as_the_wall_behind_it():
  for move in [(0.8, 0, 0), (-0.8, 0, 0), (0, 0.8, 0), (0, -0.8, 0)]:
    warped = warp(picture(), near_and_far(), CAMERA, move)
    filled = background_depth(warped.depth)
    hole = warped.mask[..., 0] > 0
    assert hole.any()
    np.testing.assert_array_equal(filled[~hole], warped.depth[~hole])
    np.testing.assert_array_equal(filled[hole], 4)


def test_what_opens_beside_slanted_ground_goes_on_in_its_rows():
  rows = np.linspace(4, 1, SIZE[0])[:, None]
  depth = np.broadcast_to(rows, SIZE).copy()
  depth[:, 12:] = 0
  filled = background_depth(depth)
  np.testing.assert_allclose(filled[2:-2], np.broadcast_to(rows, SIZE)[2:-2])


def test_a_corner_whose_row_and_column_are_unknown_is_like_the_nearest_known():
  depth = np.full(SIZE, 3.0)
  depth[8:], depth[:, 10:] = 0, 0
  np.testing.assert_array_equal(background_depth(depth), 3)


def test_depth_at_the_ends_of_a_gap_by_brute_force():
  rng = np.random.default_rng(3)
  depth = rng.uniform(1, 5, (30, 9)) * (rng.uniform(size=(30, 9)) < 0.4)
  farther, width = views._farther_end(depth)
  for y, x in np.argwhere(depth == 0):
    before = max([c for c in range(x) if depth[y, c] > 0], default=-1)
    after = min([c for c in range(x, 9) if depth[y, c] > 0], default=9)
    ends = [depth[y, c] for c in (before, after) if 0 <= c < 9]
    assert farther[y, x] == max(ends, default=0)
    assert width[y, x] == (after - before if ends else np.inf)
