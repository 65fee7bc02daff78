"""Sources of images, and prompts drawn from them: order, splits, crops, errors."""

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from prefpaint_jax.data import drawn_prompts, examples, images, masks, pictures
from prefpaint_jax.data.drawn_prompts import DrawnPrompts
from prefpaint_jax.data.examples import stack
from prefpaint_jax.data.prompts import prompt_loader

EVERY_MASK = dict.fromkeys(drawn_prompts.MASKS, 1.0)
MARKS = {"outpainting": 1.0, "holes": 1.0}  # these masks leave the image unchanged


def textured(seed, height=40, width=60):
  """Returns an image, uint8 [H, W, 3]: red is the column, green is the row, blue is noise."""
  noise = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
  rows, columns = np.indices((height, width)).astype(np.uint8)
  return np.stack([columns, rows, noise], axis=-1)


def encoded(image, form="png"):
  file = io.BytesIO()
  Image.fromarray(image).save(file, form)
  file.seek(0)
  return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Twenty images, half of them in a subfolder; `other` has images of the same names."""
  return make_folder(tmp_path_factory.mktemp("pictures"), 20)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
  return make_folder(tmp_path_factory.mktemp("other"), 7)


def make_folder(folder, number):
  (folder / "within").mkdir()
  for i in range(number):
    path = folder / ("within" if i % 2 else "") / f"picture {i:02d}.png"
    Image.fromarray(textured(i)).save(path)
  return folder


def opened(*args, **kwargs):
  return list(DrawnPrompts(*args, **kwargs))


def same(ours, theirs):
  """Returns whether two prompts, or two batches, are bit-identical."""
  return ours.keys() == theirs.keys() and all(
    np.array_equal(ours[name], theirs[name]) for name in ours
  )


def test_every_epoch_has_every_image_once_in_a_new_order(folder):
  prompts = opened(folder, "train", 60, 16, fit="random", crop=(16, 30), kinds=MARKS)
  epochs = [[prompt["picture"] for prompt in prompts[i : i + 20]] for i in range(0, 60, 20)]
  names = [f"picture {i:02d}" if i % 2 == 0 else f"within/picture {i:02d}" for i in range(20)]
  assert all(sorted(epoch) == sorted(names) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3


# Links in a folder with one.png and inside/two.png, and elsewhere/three.png beside it.
@pytest.mark.parametrize(
  ("links", "ids"),
  [
    ({"loop": "."}, ["inside/two", "one"]),
    ({"a": ".", "b": "."}, ["inside/two", "one"]),
    ({"inside/up": ".."}, ["inside/two", "one"]),
    ({"inside/up": "../.."}, ["inside/two", "one"]),  # above the root: would lead back to it
    ({"root": "/"}, ["inside/two", "one"]),
    ({"again": "inside"}, ["inside/two", "one"]),
    ({"a.png": "one.png", "inside/b.png": "two.png"}, ["inside/two", "one"]),
    ({"outside": "../elsewhere"}, ["inside/two", "one", "outside/three"]),
    ({"x": "../elsewhere", "y": "../elsewhere"}, ["inside/two", "one", "x/three"]),
    ({"x.png": "../elsewhere/three.png"}, ["inside/two", "one", "x"]),
    ({"../elsewhere/back": "../pictures", "x": "../elsewhere"}, ["inside/two", "one", "x/three"]),
    ({"self": "self"}, ["inside/two", "one"]),
  ],
)
def test_an_image_that_links_reach_again_is_one_image(tmp_path, links, ids):
  root = tmp_path / "pictures"
  for i, name in enumerate(("pictures/one", "pictures/inside/two", "elsewhere/three")):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.fromarray(textured(i)).save(tmp_path / f"{name}.png")
  for name, target in links.items():
    (root / name).symlink_to(target)
  linked = tmp_path / "linked"
  linked.symlink_to(root)
  for folder in (root, linked):
    found = pictures.open_pictures(folder)
    assert [found.id(i) for i in range(len(found))] == ids
    assert [one.id for one in found] == ids


def test_a_hard_link_is_one_image_and_a_dangling_link_is_an_error_of_one_line(tmp_path):
  Image.fromarray(textured(0)).save(tmp_path / "one.png")
  (tmp_path / "two.png").hardlink_to(tmp_path / "one.png")
  assert len(pictures.open_pictures(tmp_path)) == 1
  (tmp_path / "three.png").symlink_to("nowhere.png")
  with pytest.raises(ValueError, match=r"\A.*three\.png: cannot be read .*; remove or mend it\Z"):
    pictures.open_pictures(tmp_path)


@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (0.5, 0.25, 0.2, 0.05), (1, 0, 3)])
def test_every_prefix_has_the_weighted_shares_within_rounding(weights):
  shares = np.array(weights) / sum(weights)
  order = drawn_prompts.interleave(weights, 1000)
  counts = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
  expected = np.arange(1, 1001)[:, None] * shares
  assert np.all(np.abs(counts - expected) <= 0.5 + shares * len(weights) / 2 + 1e-9)
  np.testing.assert_array_equal(drawn_prompts.interleave(weights, 300), order[:300])
  np.testing.assert_allclose(counts[839], 840 * shares)  # all expected counts are whole numbers


def test_a_mixture_keeps_the_weights_of_sources_and_of_kinds(folder, other):
  kinds = {"outpainting": 2.0, "box": 1.0, "brush": 0.0}
  mixture = f"2*{folder}, {other}"
  prompts = opened(mixture, "train", 90, 16, fit="random", crop=(16, 30), kinds=kinds)
  for source, number in ((folder, 60), (other, 30)):
    mine = [masks.KINDS[p["kind"]] for p in prompts if p["source"] == str(source)]
    assert len(mine) == number
    assert (mine.count("outpainting"), mine.count("box")) == (2 * number // 3, number // 3)


def test_a_prompt_depends_only_on_seed_split_and_index(folder):
  def draw(number=24, **kwargs):
    return DrawnPrompts(folder, "train", number, 16, crop=(16, 30), kinds=EVERY_MASK, **kwargs)

  for fit in drawn_prompts.FITS:
    forwards, backwards, longer = draw(fit=fit), draw(fit=fit), draw(50, fit=fit)
    for index in reversed(range(24)):
      ours = backwards[index]
      assert ours["id"] == backwards.id(index)
      assert same(ours, forwards[index]) and same(ours, longer[index])
    assert not any(same(forwards[i], draw(fit=fit, seed=1)[i]) for i in range(24))
  assert same(forwards[-1], forwards[23])
  with pytest.raises(IndexError):
    forwards[24]


def test_ids_are_unique_and_valid_file_names(folder):
  prompts = DrawnPrompts(folder, "test", 30, 16, fit="random", crop=(8, 12))
  names = [prompts.id(index) for index in range(30)]
  assert len(set(names)) == 30
  assert all(name.replace("_", "").isalnum() for name in names)
  assert names[3].startswith("test_00003_") and "picture" in names[3]


def test_two_processes_read_the_two_halves_of_each_batch(folder):
  prompts = DrawnPrompts(folder, "train", 20, 16, fit="random", crop=(16, 30))
  whole = prompt_loader(prompts, 8, seed=2)
  halves = [prompt_loader(prompts, 8, 2, process_index=i, process_count=2) for i in range(2)]
  for _ in range(4):
    batch, parts = next(whole), [next(half) for half in halves]
    assert set(batch) == {"id", "kind", "complete", "text", "image", "mask"}
    assert batch["image"].shape == (8, 16, 16, 3)
    for i, part in enumerate(parts):
      assert same(part, {name: values[4 * i : 4 * i + 4] for name, values in batch.items()})


def test_a_restored_loader_continues_exactly(folder):
  def fresh():
    return prompt_loader(DrawnPrompts(folder, "train", None, 16, kinds=EVERY_MASK), 4, seed=1)

  loader = fresh()
  for _ in range(3):
    next(loader)
  position = loader.get_state()
  rest = [next(loader) for _ in range(5)]
  resumed = fresh()
  resumed.set_state(position)
  assert all(same(next(resumed), batch) for batch in rest)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_splits_share_no_image_and_together_have_all_images(folder, fit):
  splits = {
    split: {p["picture"] for p in opened(folder, split, None, 16, fit=fit, test_share=0.4)}
    for split in examples.SPLITS
  }
  assert not splits["train"] & splits["test"]
  assert len(splits["train"] | splits["test"]) == 20


def test_the_split_of_an_image_depends_only_on_its_name_and_a_larger_test_share_adds_to_it():
  names = [f"within/{i}" for i in range(20000)]
  held_out = [examples.in_test(name, 0.1) for name in names]
  assert abs(np.mean(held_out) - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 20000)
  more = [examples.in_test(name, 0.2) for name in names]
  assert all(b for a, b in zip(held_out, more, strict=True) if a)


def test_random_crops_of_the_splits_share_no_column(folder):
  seen = {}
  for split in examples.SPLITS:
    drawn = opened(folder, split, 200, 10, fit="random", crop=(10, 10), test_share=0.3, kinds=MARKS)
    seen[split] = np.unique([np.round(255 * prompt["image"][..., 0]) for prompt in drawn])
  assert seen["train"].max() == 41 and seen["test"].min() == 42  # of 60 columns
  assert seen["train"].min() == 0 and seen["test"].max() == 59


def test_random_squares_have_sides_in_their_range_and_half_are_mirrored():
  rng, image = np.random.default_rng(0), images.load_image(textured(0, 50, 90))
  squares = [drawn_prompts.random_square(rng, image, (20, 70)) for _ in range(400)]
  sides = [square.shape[0] for square in squares]
  assert all(square.shape[0] == square.shape[1] for square in squares)
  assert (min(sides), max(sides)) == (20, 50)  # the image is 50 pixels high
  mirrored = np.mean([square[0, 0, 0] > square[0, -1, 0] for square in squares])
  assert 0.4 < mirrored < 0.6
  assert drawn_prompts.random_square(rng, image[:7], (20, 70)).shape == (7, 7, 3)


@pytest.mark.parametrize("shape", [(90, 150), (150, 90), (64, 64)])
@pytest.mark.parametrize("size", [(48, 48), (40, 72)])
def test_crop_and_pad_keep_the_aspect_ratio_and_the_centre(shape, size):
  rows, columns = np.indices(shape) + 0.5
  disc = np.hypot(rows - shape[0] / 2, columns - shape[1] / 2) < 15
  image = np.repeat(disc[..., None], 3, axis=-1).astype(np.float32)
  for cut in (drawn_prompts.centre_crop(image, size), drawn_prompts.fit_inside(image, size)):
    seen = cut[..., 0] > 0.5
    extents = [np.flatnonzero(seen.any(axis)) for axis in (0, 1)]
    width, height = (extent[-1] - extent[0] + 1 for extent in extents)
    assert abs(int(width) - int(height)) <= 1
    assert all(
      abs(e.mean() + 0.5 - n / 2) <= 0.5 for e, n in zip(extents, seen.T.shape, strict=True)
    )
  assert cut.shape[0] == size[0] or cut.shape[1] == size[1]


def test_padding_is_black_and_missing(folder):
  for prompt in opened(folder, "train", None, 30, fit="pad", kinds=MARKS):
    border = np.ones((30, 30), bool)
    border[5:25] = False  # 40x60 pixels are resized to 20x30
    assert not prompt["image"][border].any() and prompt["mask"][border].all()
    assert prompt["image"][~border].any() and 0 < prompt["mask"][~border].mean() < 1
    assert not prompt["complete"]
  for prompt in opened(folder, "train", None, (20, 30), fit="pad", kinds=MARKS):
    assert prompt["complete"]


@pytest.mark.parametrize("fit", drawn_prompts.FITS)
def test_drawn_masks_are_binary_and_of_the_requested_kinds(folder, fit):
  prompts = opened(
    folder, "train", 40, 24, fit=fit, crop=(24, 36), test_share=0.1, kinds=EVERY_MASK
  )
  for prompt in prompts:
    assert prompt["image"].shape == (24, 24, 3) and prompt["mask"].shape == (24, 24, 1)
    assert set(np.unique(prompt["mask"])) == {0.0, 1.0}
    assert {x.dtype for x in (prompt["image"], prompt["mask"])} == {np.dtype(np.float32)}
  assert sum(prompt["complete"] for prompt in prompts) == (0 if fit == "pad" else 32)
  kinds = np.bincount([prompt["kind"] for prompt in prompts], minlength=4)
  np.testing.assert_array_equal(kinds, [8, 16, 8, 8])  # "warping" and "holes" are one kind
  assert stack(prompts)["image"].shape == (40, 24, 24, 3)


def test_a_new_view_has_black_holes_and_a_warped_image(folder):
  views = opened(folder, "train", None, 24, kinds={"warping": 1})
  still = opened(folder, "train", None, 24, kinds={"holes": 1})
  for view, original in zip(views, still, strict=True):
    assert view["picture"] == original["picture"]
    assert not view["complete"] and original["complete"]
    assert not (view["image"] * view["mask"]).any()
    known = view["mask"][..., 0] == 0
    assert not np.allclose(view["image"][known], original["image"][known])


def test_uniform_crops_are_drawn_again(tmp_path):
  photo = np.full((60, 100, 3), 128, np.uint8)
  photo[:, :30] = textured(0, 60, 30)
  Image.fromarray(photo).save(tmp_path / "half.png")
  drawn = opened(tmp_path, "train", 40, 16, fit="random", crop=(20, 25), kinds=MARKS)
  assert min(prompt["image"].std(axis=(0, 1)).max() for prompt in drawn) >= 0.04


def car(count):
  box = tfds.features.BBox(0.1, 0.1, 0.5, 0.5)
  about = {"type": "Car", "occluded": 0, "bbox": box, "location": np.zeros(3, np.float32)}
  about |= {"truncated": 0.0, "alpha": 0.0, "rotation_y": 0.0, "dimensions": about["location"]}
  return [about] * count


# {dataset: function that makes an example in the format of its tfds builder}.
EXAMPLES = {
  "scene_parse150": lambda i: {
    "image": encoded(textured(i), "jpeg"),
    "annotation": encoded(np.zeros((40, 60, 3), np.uint8)),
  },
  "imagenet2012": lambda i: {
    "image": encoded(textured(i), "jpeg"),
    "label": i,
    "file_name": f"n{i}.JPEG",
  },
  "kitti": lambda i: {
    "image": encoded(textured(i)),
    "image/file_name": f"{i:06d}.png",
    "objects": car(i % 3),
  },
  "div2k": lambda i: {"lr": encoded(textured(i, 20, 30)), "hr": encoded(textured(i))},
}


def prepare(name, data_dir, file_format="array_record", example=None):
  """Prepares a dataset of six images with the features that tfds declares for this name."""
  real, example = tfds.builder_cls(name), example or EXAMPLES[name]

  class Local(real, skip_registration=True):
    __module__ = real.__module__
    name = real.name
    code_path = None  # no checksums, because nothing is downloaded

    def _split_generators(self, dl_manager):
      return {"train": ((i, example(i)) for i in range(6)), "validation": [(0, example(9))]}

  builder = Local(data_dir=data_dir, file_format=file_format)
  builder.download_and_prepare(download_dir=data_dir / "downloads")
  return builder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("tfds")
  for name in EXAMPLES:
    prepare(name, data_dir)
  tfds.core.add_data_dir(data_dir)  # has the effect of TFDS_DATA_DIR
  return data_dir


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_datasets_of_the_paper_open_by_name_and_by_folder(data_dir, name):
  for source in (f"tfds:{name}", f"tfds:{data_dir / name}", f"tfds:{data_dir / name}:validation"):
    one = pictures.open_pictures(source)
    split = "validation" if source.endswith("validation") else "train"
    assert len(one) == (6 if split == "train" else 1)
    assert [one.id(i) for i in range(len(one))] == [p.id for p in one]
    assert one[0].id == f"{name}_{split}_0000000" and one[0].source == source
    blue = {item.image[..., 2].tobytes() for item in one}
    assert len(blue) == len(one)
    for item in one:
      assert item.image.shape == (40, 60, 3) and item.image.dtype == np.float32
      ramp = np.broadcast_to(np.arange(60) / 255, (40, 60))
      np.testing.assert_allclose(item.image[..., 0], ramp, atol=0.2)  # JPEG mixes the channels
  with pytest.raises(IndexError):
    one[len(one)]


def test_lossless_images_of_records_are_exact(data_dir):
  found = {item.image.tobytes() for item in pictures.open_pictures("tfds:kitti")}
  assert found == {images.load_image(textured(i)).tobytes() for i in range(6)}


def test_a_mixture_of_the_four_datasets_of_the_paper_has_its_weights(data_dir):
  mixture = ",".join(f"{weight}*tfds:{name}" for weight, name in zip("4321", EXAMPLES, strict=True))
  prompts = DrawnPrompts(mixture, "train", 20, 16, test_share=0.3, kinds=MARKS)
  sources = [prompt["source"] for prompt in prompts]
  assert [sources.count(f"tfds:{name}") for name in EXAMPLES] == [8, 6, 4, 2]


def test_images_of_records_are_read_without_tensorflow(data_dir):
  code = (
    "import sys; from prefpaint_jax.data.drawn_prompts import DrawnPrompts;"
    f"DrawnPrompts('tfds:{data_dir / 'kitti'}', 'train', 2, 16)[0];"
    "sys.exit('tensorflow' in sys.modules or 'torch' in sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_the_cache_decodes_once_and_respects_its_limit(folder):
  plain, decoded = pictures.open_pictures(folder), []

  class Counted(pictures.FolderPictures):
    def __getitem__(self, index):
      decoded.append(index)
      return super().__getitem__(index)

  limit = 3 * plain[0].image.nbytes
  cached = pictures.Cached(Counted(folder), limit)
  order = [0, 1, 2, 0, 1, 2, 3, 1, 2, 0]
  for index in order:
    np.testing.assert_array_equal(cached[index].image, plain[index].image)
    assert sum(item.image.nbytes for item in cached._kept.values()) <= limit
  assert decoded == [0, 1, 2, 3, 0]  # 3 evicts 0, the least recently used image


def refuse(pattern, call):
  with pytest.raises(ValueError, match=pattern) as error:
    call()
  assert "\n" not in str(error.value)


def test_errors_about_sources_are_one_line(folder, data_dir, tmp_path):
  opening = lambda source: lambda: pictures.open_mixture(source)
  refuse(r"'.*gone' is not a folder", opening(tmp_path / "gone"))
  refuse(r"contains no \.jpg, \.jpeg, \.png, \.webp;", opening(tmp_path))
  refuse("weight is '0'; give a positive", opening(f"0*{folder}"))
  refuse("weight is '-1'", opening(f"{folder},-1*{folder}"))
  refuse("weight is 'two'", opening(f"two*{folder}"))
  refuse("tfds:no_such_set: tfds cannot open it .*not found", opening("tfds:no_such_set"))
  refuse("tfds:: tfds cannot open it", opening("tfds:"))
  refuse("kitti:1.0.0: tfds cannot open it .*cannot be loaded", opening("tfds:kitti:1.0.0"))
  refuse("kitti/raw: tfds cannot open it .*BuilderConfig raw", opening("tfds:kitti/raw"))
  refuse("kitti:test: no split 'test'; it has train, validation", opening("tfds:kitti:test"))
  refuse("mnist: not prepared, .*tfds build mnist --file_format=array_rec", opening("tfds:mnist"))
  refuse("the folder contains 3 datasets; give the folder of one", opening(f"tfds:{data_dir}"))
  refuse("tfds cannot open it .*or the folder of a prepared dataset", opening(f"tfds:{folder}"))


def test_datasets_in_another_format_or_with_ambiguous_images_are_refused(data_dir, tmp_path):
  def altered(name, file, old, new):
    folder = tmp_path / name
    shutil.copytree(data_dir / name, folder)
    path = next(folder.rglob(file))
    path.write_text(path.read_text().replace(old, new))
    return lambda: pictures.open_pictures(f"tfds:{folder}")

  refuse(
    "the file format is tfrecord; .*: run tfds build kitti --file_format=array_record --overwrite",
    altered("kitti", "dataset_info.json", "array_record", "tfrecord"),
  )
  refuse(
    "features high, lr, of which these are images: high, lr; give",
    altered("div2k", "features.json", '"hr"', '"high"'),
  )


def test_damaged_and_too_small_images_are_named(tmp_path):
  whole = encoded(textured(0, 200, 300), "jpeg").getvalue()
  (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
  refuse(r"cut\.jpg.*truncated or damaged", lambda: opened(tmp_path, "train", 1, 16))
  (tmp_path / "cut.jpg").unlink()
  Image.fromarray(textured(0, 2, 300)).save(tmp_path / "line.png")
  refuse(
    "image line: mask: the size is 32x1 pixels",
    lambda: opened(tmp_path, "train", 1, 32, fit="pad", kinds=MARKS),
  )
  Image.fromarray(textured(0, 300, 2)).save(tmp_path / "line.png")
  refuse(
    "image line is 2 pixels wide; with test_share 0.1 no column is in 'test'",
    lambda: opened(tmp_path, "test", 1, 16, fit="random"),
  )


def test_a_damaged_record_is_named(tmp_path):
  broken = lambda i: {**EXAMPLES["kitti"](i), "image": io.BytesIO(encoded(textured(i)).read(900))}
  prepare("kitti", tmp_path, example=broken)
  source = pictures.open_pictures(f"tfds:{tmp_path}/kitti")
  refuse(r"image kitti_train_0000002 is damaged \(.*\); prepare", lambda: source[2])


def test_errors_about_drawing_are_one_line(folder):
  def drawing(**kwargs):
    arguments = {"source": folder, "split": "train", "number": 4, "size": 16} | kwargs
    return lambda: DrawnPrompts(**arguments)

  refuse("fit is 'stretch'; expected one of crop, pad, random", drawing(fit="stretch"))
  refuse("split is 'valid'; expected train or test", drawing(split="valid"))
  refuse("'blob'; expected some of outpainting, holes", drawing(kinds={"blob": 1}))
  refuse("the weight of box is -1", drawing(kinds={"box": -1, "brush": 1}))
  refuse("no mask has a weight", drawing(kinds={"box": 0}))
  refuse("test_share is 1.5", drawing(test_share=1.5))
  refuse("crop is .*least and the largest", drawing(fit="random", crop=(20, 10)))
  refuse("prompts are square", drawing(fit="random", size=(16, 20)))
  refuse("none of its 20 images is in 'test'", drawing(split="test", test_share=0.0))
