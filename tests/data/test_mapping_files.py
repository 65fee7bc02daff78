"""Prompts of folders with mapping_file.json, the layout of BrushBench."""

import json

import numpy as np
import pytest
from PIL import Image

from prefpaint_jax.data import examples, masks, prompts

PIXELS = 512 * 512


@pytest.fixture
def entry():
  # The upper or the lower half of the image is missing.
  return {
    "image": "natural/one.png",
    "caption": "a café",
    "inpainting_mask": [1, PIXELS // 2],
    "outpainting_mask": [PIXELS // 2 + 1, PIXELS // 2],
    "editing_prompt": "not used",
  }


@pytest.fixture
def folder(tmp_path, entry):
  (tmp_path / "natural").mkdir()
  image = np.random.default_rng(0).integers(1, 256, (512, 512, 3), np.uint8)
  Image.fromarray(image).save(tmp_path / "natural" / "one.png", compress_level=0)
  write(tmp_path, {"000": entry})
  return tmp_path


def write(folder, entries):
  (folder / "mapping_file.json").write_text(json.dumps(entries, ensure_ascii=False))


def test_a_mapping_file_opens_with_the_mask_inside_or_outside(folder):
  for source, missing in ((folder, slice(0, 256)), (f"{folder}:outpainting", slice(256, 512))):
    opened = prompts.open_prompts(source, "test")
    assert opened.has_texts and len(opened) == 1
    (prompt,) = opened
    expected = np.zeros((512, 512, 1))
    expected[missing] = 1
    np.testing.assert_array_equal(prompt["mask"], expected)
    stored = np.asarray(Image.open(folder / "natural" / "one.png"))
    np.testing.assert_allclose(prompt["image"], stored / 255, atol=1e-6)
    assert (prompt["id"], prompt["text"], prompt["complete"]) == ("000", "a café", True)
    assert prompt["kind"] == masks.mask_kind(expected)
  assert prompts.open_prompts(folder, "train", (32, 24))[0]["image"].shape == (32, 24, 3)


@pytest.mark.parametrize("runs", [[2, 1, 513, 2, PIXELS, 1], [[2, 1], [513, 2], [PIXELS, 1]]])
def test_runs_begin_at_pixel_one_in_row_major_order(folder, entry, runs):
  write(folder, {"a": entry | {"inpainting_mask": runs}})
  mask = prompts.open_prompts(folder, "test")[0]["mask"][..., 0]
  assert np.argwhere(mask).tolist() == [[0, 1], [1, 0], [1, 1], [511, 511]]


def test_lists_choose_the_entries_of_a_mapping_file(folder, entry):
  write(folder, {"b": entry, "a": entry | {"prompt_full": "the full prompt"}})
  texts = lambda source, split: examples.stack(list(prompts.open_prompts(source, split, 16)))[
    "text"
  ]
  assert texts(folder, "train").tolist() == ["a café", "the full prompt"]
  (folder / "mine.txt").write_text("a\n")
  assert texts(f"{folder}:mine.txt", "train").tolist() == ["the full prompt"]
  (folder / "unseen.txt").write_text("b\n")
  assert prompts.final_split(folder) == "unseen"
  assert texts(folder, "unseen").tolist() == ["a café"]
  (folder / "unseen.txt").write_text("c\n")
  with pytest.raises(ValueError, match="no entry 'c', but it is listed; remove the ID"):
    prompts.open_prompts(folder, "unseen")


@pytest.mark.parametrize(
  ("change", "error"),
  [
    ({"caption": None}, "000: caption is None; expected a string"),
    ({"image": 3}, "000: image is 3; expected a string"),
    ({"inpainting_mask": [1, 2, 3]}, "000: inpainting_mask is not a list of start, length, "),
    ({"inpainting_mask": [[1, 2], 3]}, "000: inpainting_mask is not a list of start, length, "),
    ({"inpainting_mask": [[1, 2.0]]}, "000: inpainting_mask is not a list of start, length, "),
    ({"inpainting_mask": "1 2"}, "000: inpainting_mask is not a list of start, length, "),
    ({"inpainting_mask": [0, 2]}, "has a run outside of pixels 1 to 262144; correct it"),
    ({"inpainting_mask": [PIXELS, 2]}, "has a run outside of pixels 1 to 262144; correct it"),
    ({"inpainting_mask": [10**30, 1]}, "has a run outside of pixels 1 to 262144; correct it"),
    ({"inpainting_mask": []}, "000: the mask is empty"),
    ({"inpainting_mask": [1, PIXELS]}, "000: the mask is full"),
    ({"image": "gone.png"}, r"gone\.png"),
    ({"image": "small.png"}, r"small\.png is 8x8; expected 512x512, the size of its mask"),
  ],
)
def test_bad_entries_are_refused_in_one_line(folder, entry, change, error):
  Image.new("RGB", (8, 8), "white").save(folder / "small.png")
  write(folder, {"000": entry | change})
  with pytest.raises(ValueError, match=error) as refusal:
    list(prompts.open_prompts(folder, "test"))
  assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
  ("content", "error"),
  [
    ("[]", r"mapping_file\.json holds a JSON value of type list; expected an object"),
    ("{", r"mapping_file\.json is not JSON \(line 1"),
    ("{}", "there is no entry; add one"),
    ('{"a": 1}', "a has no image, caption, inpainting_mask; expected"),
    ('{"a": {"image": "x", "inpainting_mask": []}}', "a has no caption; expected"),
    ('{"a": 1,\n"a": 1}', "'a' is there 2 times; keep one"),
  ],
)
def test_bad_mapping_files_are_refused_in_one_line(folder, content, error):
  (folder / "mapping_file.json").write_text(content)
  with pytest.raises(ValueError, match=error) as refusal:
    prompts.open_prompts(folder, "test")
  assert "\n" not in str(refusal.value)
