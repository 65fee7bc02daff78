"""Unusual images load as a viewer shows them, and bad ones are refused in one line."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from prefpaint_jax.data import decoding, images

PHOTO = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
GREY = PHOTO[..., 0]


def encode(image, file_format="PNG", **options) -> bytes:
  image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
  file = io.BytesIO()
  image.save(file, file_format, **options)
  return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
  checksum = struct.pack(">I", zlib.crc32(kind + content))
  return struct.pack(">I", len(content)) + kind + content + checksum


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
  """Inserts chunks after the header of a PNG."""
  return png[:33] + b"".join(chunks) + png[33:]


def png_of(height: int, width: int, bits: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
  header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
  content = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + header + content


def floats(array) -> np.ndarray:
  """Divides bytes by 255 and repeats grey over the channels."""
  array = np.asarray(array, np.float32) / 255
  return np.repeat(array[..., None], 3, -1) if array.ndim == 2 else array


def turned(orientation: int) -> bytes:
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encode(PHOTO, exif=exif)


def texts(*fields) -> PngImagePlugin.PngInfo:
  info = PngImagePlugin.PngInfo()
  for name, text, compressed in fields:
    info.add_text(name, text, compressed)
  return info


def profile(kind: str = "sRGB") -> bytes:
  return ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes()


PALETTE = Image.fromarray(PHOTO).convert("P")
DEEP_RGB = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PHOTO.astype(int) * 257)
INT32 = np.arange(240, dtype=np.int32).reshape(12, 20)
UINT16 = (INT32 * 273).astype(np.uint16)
LAYER = np.dstack([PHOTO, np.full_like(GREY, 255)])

GOOD = {  # name: (source, expected image)
  "bytes of a PNG": (encode(PHOTO), floats(PHOTO)),
  "BMP": (encode(PHOTO, "BMP"), floats(PHOTO)),
  "lossless WebP": (encode(PHOTO, "WEBP", lossless=True), floats(PHOTO)),
  "grey with alpha": (encode(Image.fromarray(GREY).convert("LA")), floats(GREY)),
  "opaque RGBA": (encode(LAYER), floats(PHOTO)),
  "palette": (encode(PALETTE), floats(PALETTE.convert("RGB"))),
  "bilevel": (encode(Image.fromarray(GREY > 127)), floats(np.where(GREY > 127, 255, 0))),
  "CMYK TIFF": (
    encode(Image.fromarray(PHOTO).convert("CMYK"), "TIFF"),
    floats(Image.fromarray(PHOTO).convert("CMYK").convert("RGB")),
  ),
  "16-bit grey PNG": (encode(UINT16), floats(UINT16 / 257)),
  "16-bit grey PNG of small values": (encode(INT32.astype(np.uint16)), floats(INT32 / 257)),
  "16-bit RGB PNG": (png_of(12, 20, 16, 2, DEEP_RGB), floats(PHOTO)),
  "int32 TIFF of bytes": (encode(INT32, "TIFF"), floats(INT32)),
  "int32 TIFF of 16 bits": (encode(INT32 * 273, "TIFF"), floats(UINT16 / 257)),
  "16-bit PGM": (encode(Image.fromarray(UINT16), "PPM"), floats(UINT16 / 257)),
  "float TIFF": (encode(INT32.astype(np.float32) / 255, "TIFF"), floats(INT32)),
  "float64 array": (PHOTO / 255.0, floats(PHOTO)),
  "float16 array": (np.full((2, 2), 0.5, np.float16), np.full((2, 2, 3), 0.5)),
  "bool array": (GREY > 127, floats(np.where(GREY > 127, 255, 0))),
  "EXIF 6": (turned(6), floats(np.rot90(PHOTO, -1))),
  "EXIF 3": (turned(3), floats(PHOTO[::-1, ::-1])),
  "EXIF 5": (turned(5), floats(PHOTO.swapaxes(0, 1))),
  "unknown EXIF orientation": (turned(77), floats(PHOTO)),
  "damaged EXIF": (with_chunks(encode(PHOTO), chunk(b"eXIf", b"II*\0\xff\xff")), floats(PHOTO)),
  "EXIF of noise": (with_chunks(encode(PHOTO), chunk(b"eXIf", b"noise")), floats(PHOTO)),
  "huge text": (encode(PHOTO, pnginfo=texts(("a", "x" * 2**21, True))), floats(PHOTO)),
  "sRGB profile": (encode(PHOTO, icc_profile=profile()), floats(PHOTO)),
  "damaged profile": (encode(PHOTO, icc_profile=b"noise"), floats(PHOTO)),
  "RGB profile of grey": (encode(GREY, icc_profile=profile()), floats(GREY)),
  "gamma of sRGB": (
    with_chunks(encode(PHOTO), chunk(b"gAMA", struct.pack(">I", 45455))),
    floats(PHOTO),
  ),
}


@pytest.mark.parametrize("name", GOOD)
def test_unusual_images_load_to_the_values_that_a_viewer_shows(name):
  source, expected = GOOD[name]
  loaded = images.load_image(source)
  assert loaded.dtype == np.float32
  np.testing.assert_allclose(loaded, expected, atol=1e-6)


def test_linear_gamma_is_converted_to_srgb():
  png = with_chunks(encode(PHOTO), chunk(b"gAMA", struct.pack(">I", 100000)))
  linear = floats(PHOTO)
  expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
  np.testing.assert_allclose(images.load_image(png), expected, atol=1e-6)
  # A mask keeps its stored values.
  np.testing.assert_array_equal(images.load_mask(png), images.load_mask(PHOTO))


def test_wide_primaries_are_converted_to_srgb():
  # Display P3: white stays white, and its red is beyond the red of sRGB.
  p3 = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
  colours = np.array([[[255, 255, 255], [128, 128, 128], [255, 0, 0], [0, 128, 0]]], np.uint8)
  png = with_chunks(encode(colours), chunk(b"cHRM", struct.pack(">8I", *p3)))
  white, grey, red, green = images.load_image(png)[0]
  np.testing.assert_allclose(white, 1, atol=1e-3)
  np.testing.assert_allclose(grey, 128 / 255, atol=1e-3)
  np.testing.assert_allclose(red, [1, 0, 0], atol=1e-6)  # clipped
  # CSS Color 4: color(display-p3 0 0.50196 0) has an sRGB green of 0.5126, red and blue below 0.
  np.testing.assert_allclose(green, [0, 0.5126, 0], atol=2e-3)


def test_icc_profile_is_converted_as_littlecms_does():
  # A matrix profile like sRGB with red and blue exchanged.
  content = bytearray(profile())
  tags = {content[132 + 12 * i : 136 + 12 * i].decode(): 132 + 12 * i for i in range(content[131])}
  red, blue = tags["rXYZ"], tags["bXYZ"]
  content[red : red + 4], content[blue : blue + 4] = (
    content[blue : blue + 4],
    content[red : red + 4],
  )
  expected = floats(PHOTO[..., ::-1])
  for array, right in ((PHOTO, expected), (LAYER, expected)):
    loaded = images.load_image(encode(array, icc_profile=bytes(content)))
    np.testing.assert_allclose(loaded, right, atol=2 / 255)


def test_image_above_the_limit_of_pil_is_read_and_the_limit_is_kept(monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # PIL refuses more than twice as many
  np.testing.assert_array_equal(images.load_image(encode(PHOTO)), floats(PHOTO))
  assert Image.MAX_IMAGE_PIXELS == 100


JPEG = encode(np.tile(PHOTO, (8, 8, 1)), "JPEG")
PNG = encode(np.tile(PHOTO, (8, 8, 1)))
HALF = np.where(GREY > 127, 255, 0).astype(np.uint8)
BAD = {  # name: (source, part of the line)
  "no image": (b"text", "not an image"),
  "empty file": (b"", "not an image"),
  "half a PNG": (PNG[: len(PNG) // 2], "truncated or damaged"),
  "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated or damaged"),
  "PNG without content": (PNG[:40], "not an image"),
  "PNG with a bad checksum": (PNG[:50] + b"\xff" * 40 + PNG[90:], "damaged"),
  "PNG of 2^62 pixels": (png_of(2**31 - 1, 2**31 - 1), "fit into memory"),
  "PNG of 10^11 pixels": (png_of(10**6, 10**5), "fit into memory"),
  "TIFF with an unknown compression": (
    encode(PHOTO, "TIFF").replace(
      struct.pack("<HHII", 259, 3, 1, 1), struct.pack("<HHII", 259, 3, 1, 9)
    ),
    "",
  ),
  "premultiplied grey": (Image.new("La", (4, 4)), "the mode is La"),
  "negative int32": (Image.fromarray(INT32 - 9), "values from -9 to 230"),
  "int32 beyond 16 bits": (Image.fromarray(INT32 * 1000), "values from 0 to 239000"),
  "float TIFF of bytes": (encode(INT32.astype(np.float32), "TIFF"), "values from 0 to 239"),
  "float PIL image of NaN": (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "values from"),
  "floats up to 255": (PHOTO.astype(np.float32), "values from 0 to 255; give uint8"),
  "negative floats": (PHOTO / 255 - 0.5, "values from -0.5"),
  "infinity": (np.full((2, 2), np.inf), "values from 0 to inf"),
  "int64": (PHOTO.astype(np.int64), "the dtype is int64"),
  "complex": (np.ones((2, 2), complex), "the dtype is complex128"),
  "text array": (np.array([["a"]]), "the dtype is <U1"),
  "None": (None, "the dtype is object"),
  "number": (0.5, "the shape is"),
  "one row": (np.zeros(4, np.uint8), "the shape is"),
  "five channels": (np.zeros((4, 4, 5), np.uint8), "the shape is"),
  "no pixels": (np.zeros((4, 0, 3), np.uint8), "the shape is"),
}


@pytest.mark.parametrize("load", [images.load_image, images.load_mask])
@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_in_one_line(name, load):
  source, part = BAD[name]
  with pytest.raises(ValueError) as error:
    load(source)
  assert part in str(error.value) and "\n" not in str(error.value)


BAD_MASKS = {
  "black": (np.zeros_like(GREY), "the mask is empty"),
  "white": (np.full_like(GREY, 255), "the mask is full"),
  "white on a transparent layer": (np.dstack([*[HALF] * 4]), "transparent pixels"),
  "erased": (np.dstack([PHOTO, 255 - HALF]), "transparent pixels"),
  "grey with alpha": (Image.fromarray(np.dstack([HALF, HALF]), "LA"), "transparent pixels"),
  "half transparent": (np.dstack([HALF, HALF, HALF, HALF // 2 + 127]), "transparent pixels"),
  "faint": (np.full_like(GREY, 127) * (HALF > 0), "the mask is empty"),
  "another size": (HALF[:, :5], "the mask is 5x12 pixels, its image 20x12 pixels"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks_are_refused_in_one_line(name):
  source, part = BAD_MASKS[name]
  with pytest.raises(ValueError) as error:
    images.load_mask(source, (12, 20))
  assert part in str(error.value) and "\n" not in str(error.value)


def test_masks_count_by_the_luminance_of_pil():
  # All colours around the threshold, and random ones.
  rng = np.random.default_rng(0)
  colours = rng.integers(0, 256, (400, 100, 3), np.uint8)
  colours[0] = [[127, 128, 127]] * 100
  colours[1, :, 0], colours[1, :, 1:] = 0, 255
  expected = np.asarray(Image.fromarray(colours).convert("L")) >= 128
  for source in (colours, Image.fromarray(colours), colours / 255):
    np.testing.assert_array_equal(images.load_mask(source)[..., 0] > 0, expected)


def test_errors_name_the_file(tmp_path):
  for name in ("none.png", "text.png", "half.png"):
    path = tmp_path / name
    if name != "none.png":
      path.write_bytes(b"text" if name == "text.png" else PNG[: len(PNG) // 2])
    with pytest.raises(ValueError, match=name):
      images.load_image(path)
  assert decoding.decode_bytes(PNG, "whole").shape == (96, 160, 3)
