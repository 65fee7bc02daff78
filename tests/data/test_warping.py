"""Warping against independent geometry: shifts, ray casting per pixel, and homographies."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from prefpaint_jax.data import warping
from prefpaint_jax.data.depth import fill_unknown, load_depth, synthetic_depth
from prefpaint_jax.data.warping import Intrinsics, draw_view, warp

CAMERA = Intrinsics(fx=30.0, fy=24.0, cx=10.0, cy=8.0)


def image_of(height: int, width: int) -> np.ndarray:
  """Draws a random image [H, W, 3]."""
  return np.random.default_rng(0).uniform(0.1, 1, (height, width, 3)).astype(np.float32)


def position(source: np.ndarray, width: int) -> np.ndarray:
  """Returns the row and column [..., 2] of each row-major index."""
  return np.stack([source // width, source % width], -1)


def test_no_motion_is_the_identity_without_holes():
  image = image_of(24, 31)
  depth = np.random.default_rng(1).uniform(0.5, 9, image.shape[:2]).astype(np.float32)
  for intrinsics in (None, CAMERA):
    view = warp(image, depth, intrinsics)
    np.testing.assert_array_equal(view.image, image)
    np.testing.assert_array_equal(view.depth, depth)
    np.testing.assert_array_equal(view.source.ravel(), np.arange(image[..., 0].size))
    assert not view.mask.any() and view.mask.shape == (24, 31, 1)


@pytest.mark.parametrize("right, down", [(3, 0), (-5, 0), (0, 2), (4, -3)])
def test_a_plane_shifted_by_whole_pixels_is_rolled_and_leaves_a_band(right, down):
  image, depth = image_of(16, 21), 2.5
  move = (right * depth / CAMERA.fx, down * depth / CAMERA.fy, 0)
  view = warp(image, np.full((16, 21), depth), CAMERA, move)
  rows, columns = np.indices((16, 21)) + np.array([down, right])[:, None, None]
  hole = (rows < 0) | (rows >= 16) | (columns < 0) | (columns >= 21)
  np.testing.assert_array_equal(view.mask[..., 0], hole)
  rolled = np.roll(image, (-down, -right), (0, 1))  # the image moves against the camera
  np.testing.assert_array_equal(view.image, np.where(hole[..., None], 0, rolled))


def test_a_near_rectangle_uncovers_exactly_the_band_that_it_occluded():
  depth = np.full((16, 30), 4.0)
  depth[4:10, 8:16] = 2.0
  camera = Intrinsics(20, 20, 14.5, 7.5)
  view = warp(image_of(16, 30), depth, camera, move=(0.6, 0, 0))  # near moves 6 pixels, far 3
  expected = np.zeros((16, 30))
  expected[:, 27:] = 1  # outside the old view
  expected[4:10, 10:13] = 1  # the rectangle now ends at 10, the background begins at 13
  np.testing.assert_array_equal(view.mask[..., 0], expected)
  assert (view.depth[4:10, 2:10] == 2).all()


def test_the_nearest_of_the_pixels_that_land_on_one_pixel_owns_it():
  """A camera that moves back shrinks surfaces. Then no cracks open, and a z-buffer is exact."""
  rng = np.random.default_rng(2)
  for _ in range(8):
    depth = rng.choice([1.0, 1.5, 2.25, 3.4], (14, 19))
    move = (*rng.normal(0, 0.2, 2), -rng.uniform(0.02, 0.5))
    owners = {}
    for row in range(14):
      for column in range(19):
        z = depth[row, column]
        x = (column - CAMERA.cx) / CAMERA.fx * z - move[0]
        y = (row - CAMERA.cy) / CAMERA.fy * z - move[1]
        landing = (
          math.floor(CAMERA.fy * y / (z - move[2]) + CAMERA.cy + 0.5),
          math.floor(CAMERA.fx * x / (z - move[2]) + CAMERA.cx + 0.5),
        )
        if z < owners.get(landing, (math.inf,))[0]:
          owners[landing] = (z, row * 19 + column)
    expected = [
      [owners.get((row, column), (0, -1))[1] for column in range(19)] for row in range(14)
    ]
    view = warp(image_of(14, 19), depth, CAMERA, move, edge=0.1)
    np.testing.assert_array_equal(view.source, expected)


@pytest.mark.parametrize("kind", ["block", "pole", "scattered"])
def test_magnified_surfaces_have_no_cracks_and_occlude_the_background(kind):
  """The reference casts a ray per new pixel at a near surface and a far wall of square pixels."""
  height, width, rng = 25, 31, np.random.default_rng(3)
  rows, columns = np.indices((height, width))
  near = {
    "block": (abs(rows - 11) < 6) & (abs(columns - 16) < 6),
    "pole": columns == 15,
    "scattered": rng.random((height, width)) < 0.2,
  }[kind]
  depth = np.where(near, 1.0, 3.0)
  camera = Intrinsics(25.0, 25.0, 15.0, 12.0)
  for move in [(0, 0, 0.6), (0.0513, -0.0321, 0.45), (-0.1234, 0.0217, 0.71)]:
    expected = np.full((height, width), -1)
    for row in range(height):
      for column in range(width):
        for z, surface in [(3.0, ~near), (1.0, near)]:  # near overwrites far
          scale = (z - move[2]) / z
          u = camera.cx + scale * (column - camera.cx) + camera.fx * move[0] / z
          v = camera.cy + scale * (row - camera.cy) + camera.fy * move[1] / z
          i, j = round(v), round(u)
          if 0 <= i < height and 0 <= j < width and surface[i, j]:
            expected[row, column] = i * width + j
    view = warp(image_of(height, width), depth, camera, move)
    np.testing.assert_array_equal(view.source, expected)
    if kind == "block" and move[0] == 0:
      assert not view.mask.any()  # a block that grows from the centre disoccludes nothing


@pytest.mark.parametrize("turn", [(9, 0), (0, -7), (-6, 4, 0), (5, 3, 25), (0, 0, 45)])
def test_a_rotation_is_a_homography_at_any_depth(turn):
  height, width = 40, 56
  rng = np.random.default_rng(4)
  depth = rng.uniform(1, 8, (height, width))
  camera = Intrinsics(50.0, 45.0, 26.0, 20.5)
  matrix = np.array([[50, 0, 26], [0, 45, 20.5], [0, 0, 1]])
  rotation = Rotation.from_euler("YXZ", [*turn, 0][:3], degrees=True).as_matrix()
  homography = matrix @ rotation @ np.linalg.inv(matrix)  # from new pixels to old ones
  v, u = np.indices((height, width))
  old = homography @ np.stack([u, v, np.ones_like(u)]).reshape(3, -1)
  old = (old[:2] / old[2])[::-1].T.reshape(height, width, 2)  # rows and columns
  view = warp(image_of(height, width), depth, camera, turn=turn)
  seen = view.source >= 0
  assert np.abs(position(view.source, width) - old)[seen].max() < 0.8
  beyond = np.maximum(-0.5 - old, old - np.array([height, width]) + 0.5).max(-1)
  assert seen[beyond < -1e-6].all() and not seen[beyond > 0.3].any()


def test_positive_angles_rotate_right_up_and_clockwise():
  right, up, roll = (warping.camera_pose(turn=t)[0] for t in [(10, 0), (0, 10), (0, 0, 10)])
  assert right[0, 2] > 0 > up[1, 2]  # the optical axis; y points down
  assert roll[1, 0] > 0  # the x axis of the camera tilts down


def test_warping_forth_and_back_shows_the_same_pixels():
  depth = synthetic_depth(5, 96, 96)
  move = np.array([0.15, 0.03, -0.2])
  there = warp(image_of(96, 96), depth, move=move)
  back = warp(there.image, fill_unknown(there.depth), move=-move)
  origin = np.where(back.source < 0, -1, there.source.ravel()[back.source])
  known = origin >= 0
  error = np.abs(position(origin, 96) - position(np.arange(96 * 96).reshape(96, 96), 96)).max(-1)
  assert known.mean() > 0.8
  assert (error[known] <= 1).mean() > 0.97


def test_a_view_copies_old_pixels_and_does_not_depend_on_chunks(monkeypatch):
  image, depth = image_of(48, 64), synthetic_depth(6, 48, 64)
  view = warp(image, depth, move=(0.3, 0.1, 0.5), turn=(4, -3, 10))
  hole = view.source < 0
  np.testing.assert_array_equal(view.mask[..., 0], hole)
  np.testing.assert_array_equal(view.image[~hole], image.reshape(-1, 3)[view.source[~hole]])
  assert not view.image[hole].any() and not view.depth[hole].any()
  assert (view.depth[~hole] > 0).all()
  monkeypatch.setattr(warping, "_CHUNK", 97)
  for one, other in zip(view, warp(image, depth, None, (0.3, 0.1, 0.5), (4, -3, 10)), strict=True):
    np.testing.assert_array_equal(one, other)


def test_points_behind_the_camera_are_not_visible():
  depth = np.full((16, 16), 4.0)
  depth[:, :8] = 1.0
  view = warp(image_of(16, 16), depth, move=(0, 0, 2.0))
  assert set(np.unique(view.depth)) == {0.0, 2.0}
  assert warp(image_of(16, 16), depth, turn=(180, 0)).mask.all()


def test_drawn_views_have_the_requested_share_of_holes_and_are_reproducible():
  image = image_of(32, 40)
  for missing in [(0.08, 0.55), (0.2, 0.25)]:
    shares = [draw_view(seed, image, missing=missing).mask.mean() for seed in range(20)]
    assert missing[0] <= min(shares) and max(shares) <= missing[1]
  one, same = draw_view(3, image), draw_view(np.random.default_rng(3), image)
  np.testing.assert_array_equal(one.source, same.source)
  assert len({draw_view(seed, image).source.tobytes() for seed in range(20)}) == 20
  depth = synthetic_depth(0, 32, 40)
  units = [draw_view(3, image, unit * depth).source for unit in (1, 16)]
  np.testing.assert_array_equal(*units)


def test_depths_of_synthetic_scenes_are_between_one_and_four():
  for seed in range(20):
    depth = synthetic_depth(seed, 40, 60)
    assert depth.dtype == np.float32 and depth.min() >= 1 and depth.max() <= 4
    assert depth[-1].mean() < depth[0].mean()


def test_kitti_depth_is_read_in_metres_and_unknown_depth_is_the_nearest_known(tmp_path, caplog):
  rng = np.random.default_rng(7)
  stored = rng.integers(256, 65536, (9, 13)).astype(np.uint16)
  known = rng.random(stored.shape) < 0.4
  Image.fromarray(np.where(known, stored, 0).astype(np.uint16)).save(tmp_path / "depth.png")
  depth = load_depth(tmp_path / "depth.png", (9, 13))
  np.testing.assert_array_equal(depth[known], (stored / 256).astype(np.float32)[known])
  places = np.argwhere(known)
  for hole in np.argwhere(~known):
    distance = ((places - hole) ** 2).sum(1)
    nearest = places[distance == distance.min()]
    assert depth[tuple(hole)] in stored[tuple(nearest.T)] / 256
  assert f"{100 * (~known).mean():.1f} %" in caplog.text
  np.testing.assert_array_equal(
    load_depth(tmp_path / "depth.png", scale=0.5)[known], stored[known] / 2
  )


def test_nan_in_npy_files_means_unknown_depth(tmp_path):
  np.save(tmp_path / "depth.npy", [[1.5, np.nan, np.nan], [1.5, 0.0, 4.0]])
  depth = load_depth(tmp_path / "depth.npy")
  assert depth.dtype == np.float32
  np.testing.assert_array_equal(depth[:, [0, 2]], [[1.5, 4], [1.5, 4]])


@pytest.mark.parametrize(
  "values, reason",
  [
    (np.zeros((4, 4)), "every depth is unknown"),
    (np.full((4, 4), -1.0), "from -1 to -1"),
    (np.array([[1.0, np.inf]] * 4), "to inf"),
    (np.ones((4, 4), int), "int64"),
    (np.ones((4, 5)), "5x4 pixels, its image 4x4"),
    (np.full((4, 4), 9, np.uint8), "mode L"),
    ("text", "the depth cannot be read"),
    (None, "no such file"),
  ],
)
def test_errors_about_depth_files_are_one_line_and_name_the_file(tmp_path, values, reason):
  file = tmp_path / "depth.npy"
  if isinstance(values, str):
    file.write_text(values)
  elif values is not None and values.dtype == np.uint8:
    file = tmp_path / "depth.png"
    Image.fromarray(values).save(file)
  elif values is not None:
    np.save(file, values)
  size = (4, 4) if values is not None and np.shape(values) == (4, 5) else None
  with pytest.raises(ValueError, match=reason) as error:
    load_depth(file, size)
  assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_intrinsics_are_read_from_numbers_and_matrices(tmp_path):
  matrix = np.array([[30.0, 0, 10], [0, 24, 8], [0, 0, 1]])
  np.save(tmp_path / "k.npy", matrix)
  np.savetxt(tmp_path / "k.txt", matrix)
  (tmp_path / "row.txt").write_text("30, 0, 10, 0, 24, 8, 0, 0, 1\n")
  for source in ("30,24,10,8", *(tmp_path / name for name in ("k.npy", "k.txt", "row.txt"))):
    assert Intrinsics.parse(source) == CAMERA
  np.savetxt(tmp_path / "skew.txt", matrix + np.eye(3, k=1))
  np.savetxt(tmp_path / "short.txt", matrix[:2])
  refused = {"30,24": "four", "-1,2,3,4": "positive", "nan,2,3,4": "positive"}
  refused |= {tmp_path / "skew.txt": "skew", tmp_path / "short.txt": "3x3"}
  for source, reason in refused.items():
    with pytest.raises(ValueError, match=reason):
      Intrinsics.parse(source)


def test_the_default_camera_has_a_centred_field_of_view_of_sixty_degrees():
  fx, fy, cx, cy = Intrinsics.of_view(30, 40)
  edges = np.degrees(np.arctan((np.array([-0.5, 39.5]) - cx) / fx))
  np.testing.assert_allclose(edges, [-30, 30])
  assert fx == fy and cy == 14.5


def test_depth_of_another_size_or_without_values_is_refused():
  with pytest.raises(ValueError, match="8x9"):
    warp(image_of(8, 9), np.ones((9, 8)))
  with pytest.raises(ValueError, match="not positive and finite"):
    warp(image_of(8, 8), np.zeros((8, 8)))
  with pytest.raises(ValueError, match="missing"):
    draw_view(0, image_of(8, 8), missing=(0.5, 0.2))
