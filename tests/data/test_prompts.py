"""Prompts: writing and opening in every layout, and the order of batches."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from prefpaint_jax import mini
from prefpaint_jax.data import examples, images, masks, prompts
from prefpaint_jax.data.drawn_prompts import DrawnPrompts
from prefpaint_jax.data.pictures import open_pictures


@pytest.fixture(scope="module")
def photos_dir(tmp_path_factory):
  """Two photographs: red is the column, green is the row, blue is noise."""
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  rows, columns = np.mgrid[:90, :200].astype(np.uint8)
  for name in ("one", "two"):
    noise = rng.integers(0, 256, rows.shape, np.uint8)
    Image.fromarray(np.stack([columns, rows, noise], -1)).save(folder / f"{name}.png")
  return folder


@pytest.fixture(scope="module")
def built(photos_dir, tmp_path_factory):
  folder = tmp_path_factory.mktemp("built")
  others = folder.parent / "others"
  shutil.copytree(photos_dir, others, dirs_exist_ok=True)
  options = {"size": 16, "unseen": others, "num_unseen": 4}
  prompts.build_prompts(folder, photos_dir, num_train=12, num_test=6, **options)
  return folder


@pytest.fixture
def released(tmp_path):
  """A folder of image files: a and b with the missing pixels black; c whole and larger."""
  for name in ("masks", "masks_color", "images"):
    (tmp_path / name).mkdir()
  rng = np.random.default_rng(1)
  for index, (id_, size) in enumerate((("a", 16), ("b", 16), ("c", 24))):
    image = rng.integers(1, 256, (size, size, 3), np.uint8)
    draw = (masks.outpainting_mask, masks.warping_mask)[index % 2]
    mask = draw(index, size, size)[..., 0].astype(np.uint8)
    Image.fromarray(255 * mask).save(tmp_path / "masks" / f"{id_}_mask.png")
    if id_ == "c":
      Image.fromarray(image).save(tmp_path / "images" / "c.png")
    else:
      image = image * (1 - mask[..., None])
      Image.fromarray(image).save(tmp_path / "masks_color" / f"{id_}_mask_color.png")
  return tmp_path


class Numbered:
  """A sequence of tiny prompts; the ID and the pixels of a prompt are its index."""

  def __init__(self, number):
    self.number = number

  def __len__(self):
    return self.number

  def __getitem__(self, index):
    image = np.full((2, 2, 3), index, np.float32)
    return examples.Prompt(id=str(index), kind=index % 2, image=image, mask=image[..., :1])


def ids(batch):
  return batch["id"].astype(int).tolist()


def test_opened_prompts_equal_the_drawn_prompts(built, photos_dir):
  for split, number in (("train", 12), ("test", 6)):
    opened = prompts.open_prompts(built, split)
    kinds = {"outpainting": 1, "holes": 1}
    drawn = DrawnPrompts(photos_dir, split, number, 16, fit="random", test_share=0.22, kinds=kinds)
    assert len(opened) == number
    for ours, theirs in zip(opened, drawn, strict=True):
      assert (ours["id"], ours["kind"]) == (theirs["id"], theirs["kind"])
      np.testing.assert_array_equal(ours["mask"], theirs["mask"])
      np.testing.assert_allclose(ours["image"], theirs["image"], atol=0.51 / 255)
    assert [p["kind"] for p in opened] == [0, 1] * (number // 2)
    assert all(masks.mask_kind(p["mask"]) == p["kind"] for p in opened)


def test_building_is_deterministic_and_never_overwrites_a_dataset(built, photos_dir, tmp_path):
  prompts.build_prompts(tmp_path, photos_dir, num_train=12, num_test=6, size=16)
  for split in examples.SPLITS:
    again, before = prompts.open_prompts(tmp_path, split), prompts.open_prompts(built, split)
    for ours, theirs in zip(again, before, strict=True):
      assert (ours["id"], ours["kind"]) == (theirs["id"], theirs["kind"])
      np.testing.assert_array_equal(ours["image"], theirs["image"])
      np.testing.assert_array_equal(ours["mask"], theirs["mask"])
  assert [path.name for path in tmp_path.iterdir()] == ["prompts"]
  with pytest.raises(ValueError, match="already contains prompts"):
    prompts.build_prompts(tmp_path, photos_dir, num_train=2, num_test=2, size=16)


def test_building_and_reading_import_no_tensorflow(built):
  code = (
    "import sys; from prefpaint_jax.data import prompts;"
    f"prompts.open_prompts({str(built)!r}, 'test')[0];"
    "sys.exit('tensorflow' in sys.modules or 'torch' in sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_the_final_split_is_the_unseen_one_if_there_is_one(built, released):
  assert prompts.final_split("mini") == prompts.final_split(built) == "unseen"
  assert prompts.final_split(released) == prompts.final_split("tfds:kitti") == "test"
  (released / "unseen.txt").write_text("b\n")
  assert prompts.final_split(released) == "unseen"
  assert [prompt["id"] for prompt in prompts.open_prompts(released, "unseen")] == ["b"]


def test_unseen_prompts_are_drawn_from_whole_images(built):
  opened = prompts.open_prompts(built, prompts.UNSEEN)
  assert [prompt["id"][:12] for prompt in opened] == [f"unseen_{i:05d}" for i in range(4)]
  columns = np.concatenate([255 * p["image"][..., 0][p["mask"][..., 0] == 0] for p in opened])
  assert columns.min() < 0.78 * 200 < columns.max()  # red is the column


def test_no_unseen_photograph_is_one_of_the_mini_world():
  photos, unseen = (open_pictures(mini.locate("mini", k)) for k in ("photos", "photos_unseen"))
  small = [
    np.stack([images.resize_image(one.image, (8, 8)) for one in source]).reshape(len(source), -1)
    for source in (photos, unseen)
  ]
  assert len(unseen) == 12
  assert np.corrcoef(small[0], small[1])[: len(photos), len(photos) :].max() < 0.95


def test_the_embedded_prompts_are_complete_and_balanced():
  for split in (*examples.SPLITS, prompts.UNSEEN):
    opened = prompts.open_prompts("mini", split)
    assert len(opened) >= 256
    sample = [opened[index] for index in range(64)]
    assert {prompt["image"].shape for prompt in sample} == {(32, 32, 3)}
    assert sum(prompt["kind"] for prompt in sample) == 32
    assert all(prompt["id"].startswith(split) for prompt in sample)
  with pytest.raises(IndexError):
    opened[len(opened)]
  assert opened[-1]["id"] == opened[len(opened) - 1]["id"]


def test_a_folder_of_image_files_opens_with_and_without_lists(released):
  everything = prompts.open_prompts(released, "train")
  assert [p["id"] for p in everything] == ["a", "b", "c"]
  assert [p["kind"] for p in everything] == [0, 1, 0]  # derived from the masks
  for prompt in everything:
    hole = prompt["mask"][..., 0] == 1
    assert (prompt["image"][~hole] > 0).all()
    assert (prompt["image"][hole] > 0).all() == (prompt["id"] == "c") == prompt["complete"]
  (released / "train.txt").write_text("c\n\na\n")
  (released / "mine.txt").write_text("b\n")
  assert [p["id"] for p in prompts.open_prompts(released, "train")] == ["c", "a"]
  assert [p["id"] for p in prompts.open_prompts(f"{released}:mine.txt", "train")] == ["b"]
  elsewhere = prompts.open_prompts(f"{released}:{released / 'train.txt'}", "test")
  assert [p["id"] for p in elsewhere] == ["c", "a"]


def test_every_prompt_of_a_list_is_in_one_split_and_once(released):
  (released / "train.txt").write_text("a\nb\na\n")
  (released / "test.txt").write_text("c\n")
  assert [p["id"] for p in prompts.open_prompts(released, "train")] == ["a", "b"]
  for other in ("test", "unseen"):
    (released / f"{other}.txt").write_text("c\nb\n")
    for split in ("train", other):
      error = rf"\A.*{split}\.txt and \w+\.txt both list b; keep each ID in one list\Z"
      with pytest.raises(ValueError, match=error):
        prompts.open_prompts(released, split)
    (released / f"{other}.txt").unlink()


def test_kinds_come_from_prompts_jsonl_if_it_exists(released):
  kinds = [{"image_id": "a", "kind": "brush"}, {"image_id": "c", "kind": "box", "source": "x"}]
  (released / "prompts.jsonl").write_text("\n".join(map(json.dumps, kinds)))
  opened = prompts.open_prompts(released, "train")
  assert [masks.KINDS[p["kind"]] for p in opened] == ["brush", "warping", "box"]
  (released / "prompts.jsonl").write_text('{"image_id": "a", "kind": "blob"}\n')
  with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1: not"):
    prompts.open_prompts(released, "train")


def test_images_open_as_prompts_drawn_from_them(photos_dir, tmp_path):
  for i in range(20):
    shutil.copy(photos_dir / "one.png", tmp_path / f"{i}.png")
  opened = {split: prompts.open_prompts(tmp_path, split, 16) for split in examples.SPLITS}
  assert sum(map(len, opened.values())) == 20 and all(map(len, opened.values()))
  kinds = [masks.KINDS[prompt["kind"]] for prompt in opened["train"]]
  assert set(kinds) == {"outpainting", "warping"}
  assert abs(kinds.count("outpainting") - kinds.count("warping")) <= 1
  mixture = prompts.open_prompts(f"3*{tmp_path},{tmp_path}", "train", (12, 16))
  assert mixture[0]["image"].shape == (12, 16, 3)
  with pytest.raises(ValueError, match="contains images; give the size"):
    prompts.open_prompts(tmp_path, "train")


def test_size_resizes_images_and_masks(released, built):
  for source in (released, built):
    for prompt in prompts.open_prompts(source, "test", size=20):
      assert prompt["image"].shape == (20, 20, 3) and prompt["mask"].shape == (20, 20, 1)
      assert set(np.unique(prompt["mask"])) == {0.0, 1.0}
  assert prompts.open_prompts(released, "test", size=(20, 12))[0]["image"].shape == (20, 12, 3)


def test_errors_about_folders_are_one_line(released, built, tmp_path_factory):
  empty, images_only = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("pictures")
  shutil.copytree(built, images_only, dirs_exist_ok=True)
  features = next(images_only.rglob("features.json"))
  kept = json.loads(features.read_text())
  kept["featuresDict"]["features"] = {"image": kept["featuresDict"]["features"]["image"]}
  features.write_text(json.dumps(kept))

  def expect(pattern, source, split="train"):
    with pytest.raises(ValueError, match=pattern) as error:
      list(prompts.open_prompts(source, split, 16))
    assert "\n" not in str(error.value)

  expect("not a folder", released / "gone")
  expect(r"contains no \.jpg, ", empty)
  expect("has no id, kind, mask; give tfds:", images_only)
  expect("has no split 'valid'; it has", built, "valid")
  expect(r"mine\.txt: no such list", f"{released}:mine.txt")
  (released / "train.txt").write_text("\n")
  expect(r"train\.txt: the list of prompts is empty", released)
  expect(r"test\.txt: no such list", released, "test")
  (released / "train.txt").write_text("a\nz\n")
  expect(r"z_mask\.png: no such file, but z is listed", released)
  (released / "train.txt").write_text("a\n")
  shutil.copy(released / "masks" / "c_mask.png", released / "masks" / "a_mask.png")
  expect(r"a_mask\.png: the mask is 24x24 pixels, its image 16x16 pixels", released)
  (released / "masks_color" / "a_mask_color.png").unlink()
  expect(r"neither images/a\.png nor masks_color/a_mask_color\.png", released)


def test_every_epoch_has_every_prompt_once_in_a_new_order():
  loader = prompts.prompt_loader(Numbered(12), batch_size=4, seed=3)
  epochs = [[index for _ in range(3) for index in ids(next(loader))] for _ in range(3)]
  assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3
  plain = prompts.prompt_loader(Numbered(12), batch_size=4, seed=3, shuffle=False)
  assert [ids(next(plain)) for _ in range(4)][3] == [0, 1, 2, 3]


def test_batches_have_their_shapes_and_depend_only_on_the_seed():
  def first(seed):
    return next(prompts.prompt_loader(Numbered(10), batch_size=4, seed=seed))

  batch = first(0)
  assert batch["image"].shape == (4, 2, 2, 3) and batch["mask"].shape == (4, 2, 2, 1)
  assert batch["kind"].dtype == np.int32 and batch["image"].dtype == np.float32
  np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], ids(batch))
  assert ids(first(0)) == ids(batch) != ids(first(1))


def test_batches_of_one_work():
  loader = prompts.prompt_loader(Numbered(3), batch_size=1, seed=0)
  assert sorted(ids(next(loader))[0] for _ in range(3)) == [0, 1, 2]


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_together_read_the_global_batches(process_count):
  whole = prompts.prompt_loader(Numbered(10), batch_size=8, seed=5)
  parts = [
    prompts.prompt_loader(Numbered(10), 8, 5, process_index=index, process_count=process_count)
    for index in range(process_count)
  ]
  for _ in range(5):  # more than one epoch
    expected = ids(next(whole))
    batches = [ids(next(part)) for part in parts]
    assert [number for batch in batches for number in batch] == expected


def test_a_restored_loader_continues_exactly():
  def fresh():
    return prompts.prompt_loader(Numbered(10), batch_size=4, seed=1)

  loader = fresh()
  for _ in range(3):
    next(loader)
  state = loader.get_state()
  rest = [ids(next(loader)) for _ in range(6)]
  resumed = fresh()
  resumed.set_state(state)
  assert [ids(next(resumed)) for _ in range(6)] == rest


def test_errors_about_batches_are_one_line(released):
  with pytest.raises(ValueError, match="multiple of 3"):
    prompts.prompt_loader(Numbered(10), batch_size=4, seed=0, process_count=3)
  with pytest.raises(ValueError, match="10 prompts are fewer than batch_size 16"):
    prompts.prompt_loader(Numbered(10), batch_size=16, seed=0)
  loader = prompts.prompt_loader(prompts.open_prompts(released, "train"), batch_size=3, seed=0)
  with pytest.raises(ValueError, match="prompts of two sizes in one batch"):
    next(loader)


@pytest.mark.parametrize(
  ("split", "photos", "region", "share"),
  [
    ("train", "photos", "train", 0.22),
    ("test", "photos", "test", 0.22),
    ("unseen", "photos_unseen", "test", 1.0),
  ],
)
def test_embedded_prompts_equal_prompts_drawn_from_the_embedded_photographs(
  split, photos, region, share
):
  embedded = prompts.open_prompts("mini", split)
  kinds = {"outpainting": 1.0, "holes": 1.0}
  folder = mini.locate("mini", photos)
  drawn = DrawnPrompts(folder, region, 64, 32, fit="random", test_share=share, kinds=kinds)
  for stored, one in zip(embedded, drawn, strict=False):
    assert (stored["id"], stored["kind"]) == (one["id"].replace(region, split), one["kind"])
    np.testing.assert_array_equal(stored["mask"], one["mask"])
    np.testing.assert_allclose(stored["image"], one["image"], atol=0.5 / 255 + 1e-6)
