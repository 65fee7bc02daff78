"""Texts of prompts and of images: where they are read from, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from prefpaint_jax.data import examples, masks, pictures, prompts
from prefpaint_jax.data.records import encode_png, write_records

# JSON lines may hold non-ASCII text and line separators that Python's str.splitlines splits at.
TEXT = '  Ein „Café“\u2028with a <b>bold</b> & "quoted" sign\t'


@pytest.fixture
def folder(tmp_path):
  """A folder of two prompts, a and b."""
  for name in ("masks", "images"):
    (tmp_path / name).mkdir()
  for id_ in "ab":
    image = np.random.default_rng(0).integers(1, 256, (16, 16, 3), np.uint8)
    mask = 255 * masks.outpainting_mask(0, 16, 16)[..., 0].astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "images" / f"{id_}.png")
    Image.fromarray(mask).save(tmp_path / "masks" / f"{id_}_mask.png")
  return tmp_path


def write(folder, files):
  for name, content in files.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def row(**fields):
  return json.dumps(fields, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
  "files",
  [
    {"captions.jsonl": "\n" + row(id="b", text=TEXT, score=1)},
    {"captions/b.txt": f"{TEXT}\n", "captions/.hidden.txt": b"\xff"},
    {"captions/b.txt": b"\xef\xbb\xbf" + f"{TEXT}\r\n".encode()},
    {"prompts.jsonl": row(image_id="b", kind="box", text=TEXT)},
  ],
)
def test_texts_of_a_folder_reach_its_batches_unchanged(folder, files):
  write(folder, files)
  opened = prompts.open_prompts(folder, "train")
  assert opened.has_texts
  assert examples.stack(list(opened))["text"].tolist() == ["", TEXT]


@pytest.mark.parametrize(
  "files", [{}, {"captions.jsonl": row(id="a", text="")}, {"captions/a.txt": ""}]
)
def test_a_folder_whose_texts_are_all_empty_has_no_texts(folder, files):
  write(folder, files)
  opened = prompts.open_prompts(folder, "train")
  assert not opened.has_texts
  assert examples.stack(list(opened))["text"].tolist() == ["", ""]


def test_drawn_and_embedded_prompts_without_captions_have_no_texts(folder):
  for source in ("mini", folder / "images"):
    opened = prompts.open_prompts(source, "train", 16)
    assert not opened.has_texts and "text" not in opened[0]


def test_texts_of_a_dataset_are_those_that_were_written(tmp_path):
  import tensorflow_datasets as tfds

  image = lambda C: tfds.features.Image(shape=(None, None, C), encoding_format="png")
  mask = masks.outpainting_mask(0, 16, 16)[..., 0]
  encoded = lambda: {"image": encode_png(np.ones((16, 16, 3))), "mask": encode_png(mask)}
  features = {
    "id": tfds.features.Text(),
    "kind": tfds.features.ClassLabel(names=list(masks.KINDS)),
    "image": image(3),
    "mask": image(1),
    "text": tfds.features.Text(),
  }
  texts = {"a": TEXT, "b": ""}
  records = [{"id": id_, "kind": 0, "text": text} | encoded() for id_, text in texts.items()]
  write_records(tmp_path, "prompts", "", features, {"train": records})
  opened = prompts.open_prompts(tmp_path, "train")
  assert opened.has_texts and [prompt["text"] for prompt in opened] == [TEXT, ""]


@pytest.mark.parametrize(
  ("files", "error"),
  [
    ({"captions.jsonl": row(id="a", text="x") + "{"}, r"captions\.jsonl, line 2 is not JSON "),
    ({"captions.jsonl": '["a", "x"]'}, r"line 1 holds a JSON value of type list; expected an obj"),
    ({"captions.jsonl": b'{"id": "a", "text": "\xff"}'}, "line 1 is not text in UTF-8"),
    ({"captions.jsonl": row(id="a", text=5)}, "line 1: text is 5; expected a string"),
    ({"captions.jsonl": row(id="a")}, "line 1: text is None; expected a string"),
    ({"captions.jsonl": row(id=7, text="x")}, "line 1: id is 7; expected a string"),
    ({"captions.jsonl": r'{"id": "a", "text": "\ud800"}'}, "which is not valid Unicode"),
    (
      {"captions.jsonl": row(id="c", text="x")},
      "line 1: unknown id 'c'; expected an ID such",
    ),
    ({"captions.jsonl": 2 * row(id="a", text="x")}, "line 2: 'a' is also in line 1; keep one"),
    ({"captions/a.txt": b"one\ntwo \xff"}, r"captions/a\.txt, line 2: not text in UTF-8"),
    ({"captions/c.txt": "x"}, r"captions/c\.txt: unknown id 'c'"),
    (
      {"captions.jsonl": row(id="a", text="x"), "captions/a.txt": "x"},
      r"captions\.jsonl and .*/captions both have texts; remove one",
    ),
    (
      {"captions/a.txt": "x", "prompts.jsonl": row(image_id="a", kind="box", text="x")},
      r"captions and prompts\.jsonl both have texts; keep only one",
    ),
    (
      {"prompts.jsonl": 2 * row(image_id=1, kind="box", text="x")},
      r"prompts\.jsonl, line 2: 1 has a text in an earlier line; keep one",
    ),
    (
      {"prompts.jsonl": row(image_id="a", kind="box", text=["x"])},
      r"prompts\.jsonl, line 1: text is \['x'\]; expected a string",
    ),
  ],
)
def test_bad_captions_are_refused_in_one_line(folder, files, error):
  write(folder, files)
  with pytest.raises(ValueError, match=error) as refusal:
    prompts.open_prompts(folder, "train")
  assert "\n" not in str(refusal.value)


def test_drawn_prompts_have_the_texts_of_their_images(folder, tmp_path_factory):
  photos = folder / "images"
  write(photos, {"captions.jsonl": row(id="b", text=TEXT)})
  drawn = prompts.open_prompts(f"{folder / 'masks'},{photos}", "train", 16)
  assert drawn.has_texts
  texts = {prompt["picture"]: prompt["text"] for prompt in drawn}
  assert texts == {"a_mask": "", "b_mask": "", "a": "", "b": TEXT}

  built = tmp_path_factory.mktemp("built")
  options = {"size": 16, "crop": (8, 16), "test_share": 0.5}
  prompts.build_prompts(built, photos, num_train=4, num_test=2, **options)
  for split in examples.SPLITS:
    opened = prompts.open_prompts(built, split)
    assert opened.has_texts
    assert all(p["text"] == (TEXT if p["id"].endswith("_b") else "") for p in opened)
  again = prompts.open_prompts(f"tfds:{built}", "train", 16)
  assert again.has_texts and {prompt["text"] for prompt in again} == {"", TEXT}


def test_captions_of_images_name_their_paths(folder):
  write(folder, {"captions.jsonl": row(id="b", text=TEXT)})
  error = r"captions\.jsonl, line 1: unknown id 'b'; expected an ID such as 'images/a'"
  with pytest.raises(ValueError, match=error):
    pictures.open_pictures(folder)
  write(folder, {"captions.jsonl": row(id="images/b", text=TEXT)})
  texts = {picture.id: picture.text for picture in pictures.open_pictures(folder)}
  assert texts == {"images/a": "", "images/b": TEXT, "masks/a_mask": "", "masks/b_mask": ""}
