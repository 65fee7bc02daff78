"""New views: pixels of the image and inpainted pixels persist; holes get the background's depth."""

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


def image() -> np.ndarray:
  return image_io.resize_image(np.random.default_rng(0).uniform(size=(4, 4, 3)), SIZE)


def near_and_far() -> np.ndarray:
  """Returns the depth of a wall at 4 and a rectangle at 2 in front of it."""
  depth = np.full(SIZE, 4.0)
  depth[3:9, 5:9] = 2.0
  return depth


# -------------------------------------------------------------------------------------------- views
def test_views_without_a_move_equal_the_image():
  depth = synthetic_depth(0, *SIZE)
  for view in sweep(None, image(), depth, views=3):
    np.testing.assert_array_equal(view, image())


def test_warped_pixels_are_kept_and_holes_are_inpainted(inpainter):
  move, turn = (0.4, 0.1, -0.2), (3.0, -2.0)
  warped = warp(image(), near_and_far(), CAMERA, move, turn)
  (view,) = sweep(inpainter, image(), near_and_far(), CAMERA, move, turn, num_steps=STEPS)
  hole = warped.mask[..., 0] > 0
  assert 0.05 < hole.mean() < 0.6
  np.testing.assert_array_equal(view[~hole], warped.image[~hole])
  assert (view[hole] > 0).any(-1).all()
  assert view.shape == (*SIZE, 3) and view.dtype == np.float32
  assert view.min() >= 0 and view.max() <= 1


def test_inpainted_pixels_of_a_view_appear_in_the_next(inpainter):
  """On a plane every step moves the image and the inpainted pixels by two whole pixels."""
  depth = np.full(SIZE, 2.5)
  move = (6 * 2.5 / CAMERA.fx, 0, 0)
  first, second, third = sweep(
    inpainter, image(), depth, CAMERA, move, views=3, num_steps=STEPS, eta=1.0
  )
  np.testing.assert_array_equal(first[:, :-2], image()[:, 2:])
  np.testing.assert_array_equal(second[:, :-2], first[:, 2:])
  np.testing.assert_array_equal(third[:, :-2], second[:, 2:])
  assert np.abs(third[:, -2:] - second[:, -2:]).mean() > 1e-3


def test_pixels_of_the_image_take_precedence_over_inpainted_ones(inpainter):
  move, turn = (0.5, 0.0, 0.3), (-4.0, 2.0)
  rendered = sweep(inpainter, image(), near_and_far(), CAMERA, move, turn, 3, num_steps=STEPS)
  for number, view in enumerate(rendered, start=1):
    share = number / 3
    warped = warp(
      image(), near_and_far(), CAMERA, np.multiply(share, move), np.multiply(share, turn)
    )
    known = warped.mask[..., 0] == 0
    np.testing.assert_array_equal(view[known], warped.image[known])


def test_views_depend_only_on_the_key(inpainter):
  sweep_with = lambda seed: sweep(
    inpainter,
    image(),
    near_and_far(),
    CAMERA,
    (0.5, 0, 0),
    views=2,
    key=jax.random.key(seed),
    num_steps=STEPS,
    eta=1.0,
  )
  first, again, other = sweep_with(1), sweep_with(1), sweep_with(2)
  np.testing.assert_array_equal(first, again)
  assert np.abs(np.subtract(first, other)).max() > 0.01


def test_view_that_shows_no_pixel_of_the_image_raises_an_error(inpainter):
  with pytest.raises(
    ValueError, match=r"\A[^\n]*no pixel of the image is in sight at 100%[^\n]*\Z"
  ):
    sweep(inpainter, image(), near_and_far(), CAMERA, turn=(120, 0))


# ------------------------------------------------------------------------------------------- layers
def test_relative_move_and_turn_take_one_pose_to_the_other():
  rng = np.random.default_rng(0)
  for _ in range(20):
    old, new = (camera_pose(rng.normal(size=3), rng.uniform(-80, 80, 3)) for _ in range(2))
    move, turn = views._relative(old, new)
    rotation, position = camera_pose(move, turn)
    np.testing.assert_allclose(old[0] @ rotation, new[0], atol=1e-9)
    np.testing.assert_allclose(old[0] @ position + old[1], new[1], atol=1e-9)
    yaw, pitch, roll = turn  # intrinsic rotations about y, x and z
    expected = Rotation.from_matrix(old[0].T @ new[0]).as_euler("YXZ", degrees=True)
    np.testing.assert_allclose([yaw, pitch, roll], expected, atol=1e-6)


def test_only_added_pixels_are_rendered_and_earlier_layers_take_precedence():
  colours, depth = image(), np.full(SIZE, 3.0)
  left, right = np.zeros((2, *SIZE), bool)
  left[:, :6], right[:, 4:10] = True, True
  layers = [
    Layer(colours, depth, left, camera_pose()),
    Layer(1 - colours, depth, right, camera_pose()),
  ]
  rendered, rendered_depth = views.render(layers, CAMERA, camera_pose())
  np.testing.assert_array_equal(rendered[:, :6], colours[:, :6])
  np.testing.assert_array_equal(rendered[:, 6:10], 1 - colours[:, 6:10])
  np.testing.assert_array_equal(rendered_depth > 0, left | right)


def test_hole_beside_a_near_object_gets_the_depth_of_the_wall_behind_it():
  for move in [(0.8, 0, 0), (-0.8, 0, 0), (0, 0.8, 0), (0, -0.8, 0)]:
    warped = warp(image(), near_and_far(), CAMERA, move)
    filled = background_depth(warped.depth)
    hole = warped.mask[..., 0] > 0
    assert hole.any()
    np.testing.assert_array_equal(filled[~hole], warped.depth[~hole])
    np.testing.assert_array_equal(filled[hole], 4)


def test_hole_beside_a_slanted_plane_continues_the_depth_of_its_rows():
  rows = np.linspace(4, 1, SIZE[0])[:, None]
  depth = np.broadcast_to(rows, SIZE).copy()
  depth[:, 12:] = 0
  filled = background_depth(depth)
  np.testing.assert_allclose(filled[2:-2], np.broadcast_to(rows, SIZE)[2:-2])


def test_pixel_with_an_unknown_row_and_column_gets_the_nearest_known_depth():
  depth = np.full(SIZE, 3.0)
  depth[8:], depth[:, 10:] = 0, 0
  np.testing.assert_array_equal(background_depth(depth), 3)


def test_depth_at_the_ends_of_a_gap_equals_a_brute_force_search():
  rng = np.random.default_rng(3)
  depth = rng.uniform(1, 5, (30, 9)) * (rng.uniform(size=(30, 9)) < 0.4)
  farther, width = views._farther_end(depth)
  for y, x in np.argwhere(depth == 0):
    before = max([c for c in range(x) if depth[y, c] > 0], default=-1)
    after = min([c for c in range(x, 9) if depth[y, c] > 0], default=9)
    ends = [depth[y, c] for c in (before, after) if 0 <= c < 9]
    assert farther[y, x] == max(ends, default=0)
    assert width[y, x] == (after - before if ends else np.inf)
