"""Image files of a command: pairs of images and masks, refused masks, formats by suffix."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prefpaint_jax import mini
from prefpaint_jax.data import image_files
from prefpaint_jax.data.image_files import Pair, check_drawn, find_pairs, save_image


def write(folder, *names):
  folder.mkdir(exist_ok=True)
  for name in names:
    (folder / name).write_bytes(b"")
  return folder


def test_masks_in_a_folder_belong_to_images_of_their_name(tmp_path):
  images = write(tmp_path / "images", "a.jpg", "b.PNG", "notes.txt")
  masks = write(tmp_path / "masks", "a.png", "b_mask.webp", "c.png")
  output = tmp_path / "out"
  assert find_pairs(str(images), str(masks), str(output)) == [
    Pair(images / "a.jpg", masks / "a.png", output / "a.png"),
    Pair(images / "b.PNG", masks / "b_mask.webp", output / "b.png"),
  ]
  assert find_pairs(str(images), "m.png", "out")[1].mask.name == "m.png"
  files = ("a.jpg", "m.png", "o.webp")
  assert find_pairs(*files) == [Pair(*map(Path, files))]


def test_one_folder_may_have_images_and_masks(tmp_path):
  folder = write(tmp_path / "both", "a.jpg", "a_mask.png")
  (pair,) = find_pairs(str(folder), str(folder), "out")
  assert (pair.image.name, pair.mask.name) == ("a.jpg", "a_mask.png")


@pytest.mark.parametrize(
  ("names", "masks", "message"),
  [
    (["a.png", "b.png"], ["a.png"], r"no mask of b\.png; add b\.png or b_mask\.png"),
    (["a.png", "a.jpg"], ["a.png"], r"a\.jpg and a\.png have one name; rename one"),
    (["a.txt"], ["a.png"], "no images; expected files that end in .png"),
    (["a.png"], [], "no images; expected files that end in .png"),
  ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, names, masks, message):
  images, masks = write(tmp_path / "images", *names), write(tmp_path / "masks", *masks)
  with pytest.raises(ValueError, match=message) as error:
    find_pairs(str(images), str(masks), "out")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["coffee", "cat", "astronaut", "dandelions"])
def test_photographs_are_no_masks(name):
  with pytest.raises(ValueError, match="a colour photograph; expected a mask"):
    check_drawn(mini.locate("mini", "photos") / f"{name}.jpg")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("colour", [(255, 255, 255), (255, 255, 0)])
def test_drawn_masks_are_taken(tmp_path, suffix, colour):
  image = Image.new("RGB", (64, 64))
  image.paste(colour, (8, 8, 40, 40))
  image.resize((96, 96), Image.Resampling.BICUBIC).save(tmp_path / f"mask.{suffix}")
  check_drawn(tmp_path / f"mask.{suffix}")


@pytest.mark.parametrize(("suffix", "kind"), image_files.FORMATS.items())
def test_the_suffix_gives_the_format_and_keeps_the_text(tmp_path, suffix, kind):
  image = np.full((16, 16, 3), (200, 40, 90), np.uint8)
  save_image(tmp_path / f"o{suffix}", image, {"seed": "3"})
  with Image.open(tmp_path / f"o{suffix}") as file:
    assert file.format == kind
    assert file.text == {"seed": "3"} if kind == "PNG" else file.getexif()[0x010E] == "seed: 3"
    assert np.abs(np.asarray(file.convert("RGB"), int) - image).max() <= 3
