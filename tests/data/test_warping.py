"""Warping against geometry worked out anew: shifts, rays cast pixel by pixel, and homographies."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from prefpaint_jax.data import warping
from prefpaint_jax.data.depth import fill_unknown, load_depth, synthetic_depth
from prefpaint_jax.data.warping import Intrinsics, draw_view, warp

CAMERA = Intrinsics(fx=30.0, fy=24.0, cx=10.0, cy=8.0)


def picture(height: int, width: int) -> np.ndarray:
  return np.random.default_rng(0).uniform(0.1, 1, (height, width, 3)).astype(np.float32)


def position(source: np.ndarray, width: int) -> np.ndarray:
  """[..., 2]: the row and column of each index."""
  return np.stack([source // width, source % width], -1)


def test_no_motion_is_the_identity_without_holes():
  image = picture(24, 31)
  depth = np.random.default_rng(1).uniform(0.5, 9, image.shape[:2]).astype(np.float32)
  for intrinsics in (None, CAMERA):
    view = warp(image, depth, intrinsics)
    np.testing.assert_array_equal(view.image, image)
    np.testing.assert_array_equal(view.depth, depth)
    np.testing.assert_array_equal(view.source.ravel(), np.arange(image[..., 0].size))
    assert not view.mask.any() and view.mask.shape == (24, 31, 1)


@pytest.mark.parametrize("right, down", [(3, 0), (-5, 0), (0, 2), (4, -3)])
def test_a_plane_moved_by_whole_pixels_is_rolled_and_leaves_a_band(right, down):
  image, depth = picture(16, 21), 2.5
  move = (right * depth / CAMERA.fx, down * depth / CAMERA.fy, 0)
  view = warp(image, np.full((16, 21), depth), CAMERA, move)
  rows, columns = np.indices((16, 21)) + np.array([down, right])[:, None, None]
  hole = (rows < 0) | (rows >= 16) | (columns < 0) | (columns >= 21)
  np.testing.assert_array_equal(view.mask[..., 0], hole)
  rolled = np.roll(image, (-down, -right), (0, 1))  # the camera moves right, the picture left
  np.testing.assert_array_equal(view.image, np.where(hole[..., None], 0, rolled))


def test_a_near_rectangle_uncovers_exactly_the_band_it_hid():
  depth = np.full((16, 30), 4.0)
  depth[4:10, 8:16] = 2.0
  camera = Intrinsics(20, 20, 14.5, 7.5)
  view = warp(picture(16, 30), depth, camera, move=(0.6, 0, 0))  # near by 6 pixels, far by 3
  expected = np.zeros((16, 30))
  expected[:, 27:] = 1  # what was out of sight
  expected[4:10, 10:13] = 1  # the rectangle now ends at 10, the far side begins at 13
  np.testing.assert_array_equal(view.mask[..., 0], expected)
  assert (view.depth[4:10, 2:10] == 2).all()


def test_each_pixel_is_owned_by_the_nearest_of_those_that_land_on_it():
  """Moving back, everything shrinks, so that there are no cracks: a z-buffer is all there is."""
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
    view = warp(picture(14, 19), depth, CAMERA, move, edge=0.1)
    np.testing.assert_array_equal(view.source, expected)


@pytest.mark.parametrize("kind", ["block", "pole", "scattered"])
def test_magnified_surfaces_have_no_cracks_and_hide_what_is_behind(kind):
  """Every new pixel casts a ray at a near surface and a far wall, both seen as squares."""
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
        for z, surface in [(3.0, ~near), (1.0, near)]:  # the near one is painted over the far one
          scale = (z - move[2]) / z
          u = camera.cx + scale * (column - camera.cx) + camera.fx * move[0] / z
          v = camera.cy + scale * (row - camera.cy) + camera.fy * move[1] / z
          i, j = round(v), round(u)
          if 0 <= i < height and 0 <= j < width and surface[i, j]:
            expected[row, column] = i * width + j
    view = warp(picture(height, width), depth, camera, move)
    np.testing.assert_array_equal(view.source, expected)
    if kind == "block" and move[0] == 0:
      assert not view.mask.any()  # all that grows out of the middle stays whole


@pytest.mark.parametrize("turn", [(9, 0), (0, -7), (-6, 4, 0), (5, 3, 25), (0, 0, 45)])
def test_a_turn_is_a_homography_whatever_the_depth(turn):
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
  view = warp(picture(height, width), depth, camera, turn=turn)
  seen = view.source >= 0
  assert np.abs(position(view.source, width) - old)[seen].max() < 0.8
  beyond = np.maximum(-0.5 - old, old - np.array([height, width]) + 0.5).max(-1)
  assert seen[beyond < -1e-6].all() and not seen[beyond > 0.3].any()


def test_positive_turns_are_right_up_and_clockwise():
  right, up, roll = (warping.camera_pose(turn=t)[0] for t in [(10, 0), (0, 10), (0, 0, 10)])
  assert right[0, 2] > 0 > up[1, 2]  # where the line of sight points; y is down
  assert roll[1, 0] > 0  # the camera's right goes down


def test_there_and_back_again_shows_the_same_pixels():
  depth = synthetic_depth(5, 96, 96)
  move = np.array([0.15, 0.03, -0.2])
  there = warp(picture(96, 96), depth, move=move)
  back = warp(there.image, fill_unknown(there.depth), move=-move)
  origin = np.where(back.source < 0, -1, there.source.ravel()[back.source])
  known = origin >= 0
  error = np.abs(position(origin, 96) - position(np.arange(96 * 96).reshape(96, 96), 96)).max(-1)
  assert known.mean() > 0.8
  assert (error[known] <= 1).mean() > 0.97


def test_a_view_is_made_of_old_pixels_and_does_not_depend_on_chunks(monkeypatch):
  image, depth = picture(48, 64), synthetic_depth(6, 48, 64)
  view = warp(image, depth, move=(0.3, 0.1, 0.5), turn=(4, -3, 10))
  hole = view.source < 0
  np.testing.assert_array_equal(view.mask[..., 0], hole)
  np.testing.assert_array_equal(view.image[~hole], image.reshape(-1, 3)[view.source[~hole]])
  assert not view.image[hole].any() and not view.depth[hole].any()
  assert (view.depth[~hole] > 0).all()
  monkeypatch.setattr(warping, "_CHUNK", 97)
  for one, other in zip(view, warp(image, depth, None, (0.3, 0.1, 0.5), (4, -3, 10)), strict=True):
    np.testing.assert_array_equal(one, other)


def test_nothing_is_seen_of_what_the_camera_has_passed():
  depth = np.full((16, 16), 4.0)
  depth[:, :8] = 1.0
  view = warp(picture(16, 16), depth, move=(0, 0, 2.0))
  assert set(np.unique(view.depth)) == {0.0, 2.0}
  assert warp(picture(16, 16), depth, turn=(180, 0)).mask.all()


def test_drawn_views_have_the_asked_share_of_holes_and_repeat():
  image = picture(32, 40)
  for missing in [(0.08, 0.55), (0.2, 0.25)]:
    shares = [draw_view(seed, image, missing=missing).mask.mean() for seed in range(20)]
    assert missing[0] <= min(shares) and max(shares) <= missing[1]
  one, same = draw_view(3, image), draw_view(np.random.default_rng(3), image)
  np.testing.assert_array_equal(one.source, same.source)
  assert len({draw_view(seed, image).source.tobytes() for seed in range(20)}) == 20
  depth = synthetic_depth(0, 32, 40)
  units = [draw_view(3, image, unit * depth).source for unit in (1, 16)]
  np.testing.assert_array_equal(*units)


def test_synthetic_scenes_lie_between_one_and_four():
  for seed in range(20):
    depth = synthetic_depth(seed, 40, 60)
    assert depth.dtype == np.float32 and depth.min() >= 1 and depth.max() <= 4
    assert depth[-1].mean() < depth[0].mean()


# -------------------------------------------------------------------------------------------- files
def test_kitti_depth_is_read_in_metres_and_filled_from_the_nearest(tmp_path, caplog):
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


def test_npy_depth_takes_nan_as_unknown(tmp_path):
  np.save(tmp_path / "depth.npy", [[1.5, np.nan, np.nan], [1.5, 0.0, 4.0]])
  depth = load_depth(tmp_path / "depth.npy")
  assert depth.dtype == np.float32
  np.testing.assert_array_equal(depth[:, [0, 2]], [[1.5, 4], [1.5, 4]])


@pytest.mark.parametrize(
  "values, reason",
  [
    (np.zeros((4, 4)), "no depth is known"),
    (np.full((4, 4), -1.0), "from -1 to -1"),
    (np.array([[1.0, np.inf]] * 4), "to inf"),
    (np.ones((4, 4), int), "int64"),
    (np.ones((4, 5)), "4x5, its image 4x4"),
    (np.full((4, 4), 9, np.uint8), "mode L"),
    ("text", "the depth cannot be read"),
    (None, "no such file"),
  ],
)
def test_unusable_depth_is_refused_in_one_line(tmp_path, values, reason):
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


def test_the_default_camera_sees_sixty_degrees_about_the_middle():
  fx, fy, cx, cy = Intrinsics.of_view(30, 40)
  edges = np.degrees(np.arctan((np.array([-0.5, 39.5]) - cx) / fx))
  np.testing.assert_allclose(edges, [-30, 30])
  assert fx == fy and cy == 14.5


def test_depth_that_does_not_fit_the_picture_is_refused():
  with pytest.raises(ValueError, match="8x9"):
    warp(picture(8, 9), np.ones((9, 8)))
  with pytest.raises(ValueError, match="unknown"):
    warp(picture(8, 8), np.zeros((8, 8)))
  with pytest.raises(ValueError, match="missing"):
    draw_view(0, picture(8, 8), missing=(0.5, 0.2))
