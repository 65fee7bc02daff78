"""Images and masks: loading equals PIL, and an error is one line that names the source."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from prefpaint_jax.data import images


@pytest.fixture
def photo():
  return np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def save(path, array, **options):
  Image.fromarray(array).save(path, **options)
  return path


def message(error):
  text = str(error.value)
  assert "\n" not in text
  return text


def test_paths_pil_images_and_arrays_load_to_the_same_image(tmp_path, photo):
  expected = photo.astype(np.float32) / 255
  path = save(tmp_path / "photo.png", photo)
  for source in (path, str(path), Image.fromarray(photo), photo, expected, jnp.asarray(photo)):
    loaded = images.load_image(source)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, expected)


def test_grey_is_repeated_and_palettes_are_converted_to_rgb(photo):
  grey = Image.fromarray(photo[..., 0])
  np.testing.assert_array_equal(
    images.load_image(grey), np.repeat(photo[..., :1], 3, -1).astype(np.float32) / 255
  )
  np.testing.assert_array_equal(images.load_image(photo[..., 0]), images.load_image(grey))
  palette = Image.fromarray(photo).convert("P")
  np.testing.assert_array_equal(
    images.load_image(palette), np.asarray(palette.convert("RGB"), np.float32) / 255
  )


def test_sixteen_bit_values_keep_their_precision(tmp_path):
  ramp = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
  path = save(tmp_path / "deep.png", ramp)
  for source in (path, ramp):
    np.testing.assert_allclose(images.load_image(source)[..., 1], ramp / 65535, atol=1e-7)


def test_transparent_pixels_are_white_in_images_and_refused_in_masks(photo):
  alpha = np.zeros((12, 20, 1), np.uint8)
  alpha[:, 10:] = 255
  rgba = np.concatenate([photo, alpha], -1)
  loaded = images.load_image(rgba)
  assert (loaded[:, :10] == 1).all()
  np.testing.assert_array_equal(loaded[:, 10:], photo[:, 10:].astype(np.float32) / 255)
  np.testing.assert_array_equal(loaded, images.load_image(Image.fromarray(rgba)))
  white = np.concatenate([np.full_like(photo, 255), alpha], -1)
  with pytest.raises(ValueError, match="transparent pixels; expected an opaque mask"):
    images.load_mask(white)
  opaque = np.concatenate([np.repeat(alpha, 3, -1), np.full_like(alpha, 255)], -1)
  np.testing.assert_array_equal(images.load_mask(opaque)[..., 0], alpha[..., 0] / 255)


def test_exif_orientation_is_applied(tmp_path, photo):
  exif = Image.Exif()
  exif[0x0112] = 6  # 6 = rotate the stored pixels by 90 degrees clockwise
  path = save(tmp_path / "turned.png", photo, exif=exif)
  expected = np.rot90(photo, -1).astype(np.float32) / 255
  np.testing.assert_array_equal(images.load_image(path), expected)
  with Image.open(path) as opened:
    np.testing.assert_array_equal(images.load_image(opened), expected)


def test_mask_is_one_for_pixels_of_at_least_half_white():
  values = np.array([[0, 127, 128, 255]], np.uint8)
  for source in (values, Image.fromarray(values), values / 255.0, values[..., None], values > 127):
    mask = images.load_mask(source)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, np.array([0, 0, 1, 1]).reshape(1, 4, 1))


def test_files_that_are_missing_not_images_or_truncated_are_named(tmp_path, photo):
  with pytest.raises(ValueError, match=r"gone\.png: no such file"):
    images.load_image(tmp_path / "gone.png")
  with pytest.raises(ValueError, match="folder"):
    images.load_image(tmp_path)
  text = tmp_path / "text.png"
  text.write_text("not an image")
  with pytest.raises(ValueError, match=r"text\.png: not an image"):
    images.load_image(text)
  for suffix in ("png", "jpg"):
    whole = save(tmp_path / f"whole.{suffix}", np.tile(photo, (20, 20, 1)))
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cut\.{suffix}.*truncated") as error:
      images.load_image(cut)
    message(error)


def test_masks_of_another_size_and_empty_or_full_masks_are_named(tmp_path):
  blank = np.zeros((12, 20), np.uint8)
  holed = blank.copy()
  holed[3:5] = 255
  path = save(tmp_path / "holed.png", holed)
  assert images.load_mask(path, (12, 20)).sum() == 40
  with pytest.raises(
    ValueError, match=r"holed\.png: the mask is 20x12 pixels, its image 12x20 pixels"
  ) as error:
    images.load_mask(path, (20, 12))
  message(error)
  with pytest.raises(ValueError, match=r"blank\.png.*empty"):
    images.load_mask(save(tmp_path / "blank.png", blank))
  with pytest.raises(ValueError, match=r"white\.png.*full"):
    images.load_mask(save(tmp_path / "white.png", blank + 255))


@pytest.mark.parametrize(
  ("array", "expected"),
  [
    (np.full((4, 4, 3), 2.0), "values from 0 to 2"),
    (np.full((4, 4, 3), np.nan), "values from"),
    (np.zeros((4, 4, 3), np.int64), "int64"),
    (np.zeros((4, 4, 2), np.uint8), "shape"),
    (np.zeros((2, 4, 4, 3), np.uint8), "shape"),
    (np.zeros((0, 4, 3), np.uint8), "shape"),
  ],
)
def test_arrays_of_wrong_range_dtype_or_shape_are_refused(array, expected):
  with pytest.raises(ValueError, match=expected) as error:
    images.load_image(array)
  message(error)


def test_resizing_equals_pil_to_eight_bits():
  # The narrow range of values avoids clipped overshoot.
  photo = np.random.default_rng(0).integers(80, 176, (12, 20, 3), np.uint8)
  image = photo.astype(np.float32) / 255
  for size in ((6, 7), (24, 40)):
    ours = images.resize_image(image, size)
    theirs = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.LANCZOS))
    assert ours.shape == (*size, 3)
    np.testing.assert_allclose(ours, theirs / 255, atol=1.5 / 255)  # two rounded passes
  assert images.resize_image(image, (12, 20)) is image


def test_resizing_clips_the_overshoot_of_the_filter():
  edge = np.zeros((16, 16, 3), np.float32)
  edge[:, 8:] = 1
  larger = images.resize_image(edge, (40, 40))
  assert larger.min() == 0 and larger.max() == 1


@pytest.mark.parametrize("size", [(6, 8), (12, 20), (5, 7), (1, 19), (11, 3), (32, 44), (7, 33)])
def test_resized_mask_is_missing_wherever_it_overlaps_a_missing_pixel(size):
  mask = (np.random.default_rng(1).random((12, 20, 1)) < 0.1).astype(np.float32)
  # Overlap of new pixel i and old pixel j on one side, or of the centre of i on a side that grows.
  overlaps = []
  for new, old in zip(size, mask.shape, strict=False):
    i, j = np.mgrid[:new, :old]
    if new < old:
      overlaps.append((i * old < (j + 1) * new) & (j * new < (i + 1) * old))
    else:
      overlaps.append((2 * i + 1) * old // (2 * new) == j)
  expected = np.einsum("yj,xk,jkc->yxc", *overlaps, mask) > 0
  np.testing.assert_array_equal(images.resize_mask(mask, size), expected)


@pytest.mark.parametrize("side", [9, 16, 17, 31, 32, 64, 100, 255])
def test_a_hole_one_pixel_wide_survives_at_every_size(side):
  for at in (0, 37, 101, 255):
    mask = np.zeros((256, 256, 1), np.float32)
    mask[:, at] = 1
    assert images.resize_mask(mask, (side, side)).any(axis=1).all()


@pytest.mark.parametrize("size", [(8, 8), (13, 10), (40, 25), (64, 64)])
def test_content_of_the_hole_does_not_change_known_pixels_of_a_resized_prompt(size):
  rng = np.random.default_rng(0)
  mask = (rng.random((32, 32, 1)) < 0.1).astype(np.float32)
  white = np.ones((32, 32, 3), np.float32)
  image, small = images.resize_prompt(white * (1 - mask), mask, size)
  known = np.broadcast_to(small == 0, image.shape)
  assert known.any() and not known.all()
  np.testing.assert_allclose(image[known], 1.0, atol=1e-6)
  photo = rng.random((32, 32, 3), np.float32)
  black, noise = (np.where(mask > 0, content, photo) for content in (0, rng.random(photo.shape)))
  of = lambda x: images.resize_prompt(x.astype(np.float32), mask, size)[0][known]
  np.testing.assert_array_equal(of(black), of(noise))


def test_paste_back_keeps_known_pixels_bit_identical():
  rng = np.random.default_rng(2)
  image, result = rng.random((2, 3, 8, 8, 3)).astype(np.float32)
  mask = (rng.random((3, 8, 8, 1)) < 0.5).astype(np.float32)
  expected = np.where(mask == 1, result, image)
  np.testing.assert_array_equal(images.paste_back(result, image, mask), expected)
  on_device = images.paste_back(jnp.asarray(result), jnp.asarray(image), jnp.asarray(mask))
  np.testing.assert_array_equal(on_device, expected)


def test_a_pil_image_opened_from_bytes_loads(photo):
  file = io.BytesIO()
  Image.fromarray(photo).save(file, "png")
  np.testing.assert_array_equal(images.load_image(Image.open(file)), photo.astype(np.float32) / 255)
