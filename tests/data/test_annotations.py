"""Annotations: Krippendorff's alpha, joined scores, and the report of all errors."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from prefpaint_jax.data import agreement, annotations, masks

CRITERIA = ("structure", "texture", "overall")


def write_images(folder, names, size=8, whole=True):
  """Writes masks, images and candidates.

  Args:
    names: {image ID: number of candidates}.
    whole: write whole images; else images with the missing pixels black.
  """
  for kind in ("masks", "images" if whole else "masks_color", "inpaint"):
    (folder / kind).mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(len(names))
  for index, (image_id, number) in enumerate(names.items()):
    draw = (masks.outpainting_mask, masks.warping_mask)[index % 2]
    hole = draw(index, size, size)[..., 0] == 1
    Image.fromarray(255 * hole.astype(np.uint8)).save(folder / f"masks/{image_id}_mask.png")
    for k in range(number):
      image = rng.integers(1, 256, (size, size, 3), np.uint8)
      Image.fromarray(image).save(folder / f"inpaint/{image_id}_{k}.png")
    name = f"images/{image_id}" if whole else f"masks_color/{image_id}_mask_color"
    image = image if whole else image * ~hole[..., None]
    Image.fromarray(image).save(folder / f"{name}.png")


def write_lines(file, rows):
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rating(image_id, k, annotator, *scores):
  row = {"image_id": image_id, "candidate": f"{image_id}_{k}", "annotator": annotator}
  return row | dict(zip(CRITERIA, scores, strict=True))


def write_candidates_folder(folder, names, ratings):
  """Writes a candidates folder with two policies that take turns."""
  write_images(folder, names)
  write_lines(
    folder / "prompts.jsonl",
    [
      {"image_id": image_id, "source": "photos", "kind": masks.KINDS[index % 2]}
      | ({"text": f"text of {image_id} — <b>"} if index % 2 else {})
      for index, image_id in enumerate(names)
    ],
  )
  write_lines(
    folder / "candidates.jsonl",
    [
      {"image_id": image_id, "candidate": f"{image_id}_{k}", "policy": ("base", "ours")[k % 2]}
      for image_id, number in names.items()
      for k in range(number)
    ],
  )
  write_lines(folder / "annotations.jsonl", ratings)
  return folder


def errors_of(folder):
  """Returns the errors that reading the folder reports, without the line that counts them."""
  with pytest.raises(annotations.BadAnnotations) as error:
    annotations.read_annotations(folder)
  first, *errors = str(error.value).splitlines()
  assert re.fullmatch(
    rf"\d+ errors in the annotations of {re.escape(str(folder))}\. Fix all of them and rerun:",
    first,
  )
  return errors


def test_scores_are_averaged_over_annotators_and_criteria_are_weighted(tmp_path):
  ratings = [
    rating("a", 1, "mia", 7, 0, 3),
    rating("a", 0, "mia", 1, 2, 3),
    rating("a", 0, "leo", 2, 4, 6.5),
    rating("b", 0, "leo", 0, 7, 7),
  ]
  folder = write_candidates_folder(tmp_path, {"a": 2, "b": 1}, ratings)
  read = annotations.read_annotations(folder, {"structure": 1, "texture": 1, "overall": 2})
  first, second = read.prompts
  assert (first.image_id, first.source, first.kind, second.kind) == ("a", "photos", 0, 1)
  assert [c.name for c in first.candidates] == ["a_0", "a_1"]
  assert [c.policy for c in first.candidates] == ["base", "ours"]
  assert [c.annotators for c in first.candidates] == [2, 1]
  assert first.candidates[0][3:6] == (1.5, 3, 4.75)
  assert [c.score for c in first.candidates] == [3.5, 3.25]
  assert second.candidates[0].score == 5.25
  assert read.annotators == 2 and read.lists == {}
  pair = np.array([[1, 2], [7, math.nan], [0, math.nan]])
  assert read.agreement["structure"] == agreement.krippendorff_alpha(pair)
  pair = np.array([[2.25, 4.75], [3.25, math.nan], [5.25, math.nan]])
  np.testing.assert_allclose(read.agreement["combined"], agreement.krippendorff_alpha(pair))


def test_released_layout_is_read_from_flat_and_grouped_files(tmp_path):
  write_images(tmp_path, {"x_1": 11, "x_2": 2, "x_3": 1}, whole=False)
  flat = {"x_1_10": [-0.5, 3], "x_1_2.png": [1.25, 1], "x_2_0": [0.5, 1]}
  grouped = {"x_2": {"x_2_1": [7.5, 2], "x_2_0.png": [0.5, 1]}}
  (tmp_path / "flat.json").write_text(json.dumps(flat, indent=1))
  (tmp_path / "grouped.json").write_text(json.dumps(grouped))
  read = annotations.read_annotations(tmp_path)
  scores = {c.name: c.score for prompt in read.prompts for c in prompt.candidates}
  assert scores == {"x_1_2": 1.25, "x_1_10": -0.5, "x_2_0": 0.5, "x_2_1": 7.5}
  assert list(scores) == ["x_1_2", "x_1_10", "x_2_0", "x_2_1"]  # by number
  assert [prompt.kind for prompt in read.prompts] == [0, 1]  # derived from the masks
  assert read.prompts[0].image == tmp_path / "masks_color" / "x_1_mask_color.png"
  assert all(math.isnan(x) for x in read.prompts[0].candidates[0][3:6])
  assert all(math.isnan(alpha) for alpha in read.agreement.values())
  assert read.left_out == {"candidates": 10, "prompts": 1} and read.annotators == 0


def test_texts_come_from_prompts_jsonl_or_from_captions(tmp_path):
  folder = write_candidates_folder(tmp_path, {"a": 1, "b": 1}, [rating("b", 0, "mia", 1, 2, 3)])
  texts = lambda: [prompt.text for prompt in annotations.read_annotations(folder).prompts]
  assert texts() == ["text of b — <b>"]
  write_lines(folder / "captions.jsonl", [{"id": "b", "text": "another"}])
  assert errors_of(folder) == ["captions and prompts.jsonl both have texts; keep only one"]
  for name in ("prompts.jsonl", "candidates.jsonl"):
    (folder / name).unlink()
  assert texts() == ["another"]


def test_unscored_candidates_and_prompts_are_left_out_and_counted(tmp_path):
  ratings = [rating("b", 1, "mia", 1, 2, 3)]
  folder = write_candidates_folder(tmp_path, {"a": 2, "b": 3}, ratings)
  (folder / "inpaint" / "a_0.png").unlink()  # images that are left out need not exist
  read = annotations.read_annotations(folder)
  assert [[c.name for c in prompt.candidates] for prompt in read.prompts] == [["b_1"]]
  assert read.left_out == {"candidates": 4, "prompts": 1}
  (folder / "annotations.jsonl").write_text("\n")
  with pytest.raises(ValueError, match="none of 5 candidates has a score"):
    annotations.read_annotations(folder)


def test_one_report_lists_every_error_of_a_candidates_folder(tmp_path):
  names = dict.fromkeys("abcdef", 2)
  ratings = [rating(name, k, "mia", 1, 2, 3) for name in names for k in range(2)]
  folder = write_candidates_folder(tmp_path, names, ratings)
  (folder / "train.txt").write_text("a\nb\n\nnobody\n")
  (folder / "test.txt").write_text("c\na\n")
  bad = [
    "{",
    "[1]",
    {"image_id": "a", "candidate": "a_0", "annotator": "leo", "structure": 1, "texture": 1},
    rating("z", 0, "leo", 1, 2, 3),
    rating("a", 9, "leo", 1, 2, 3),
    rating("a", 0, "leo", 1, 2, 3) | {"candidate": "b_0"},
    rating("a", 0, "leo", 8, -1, math.nan),
    rating("a", 0, "leo", "5", True, None),
    rating("a", 0, "mia", 1, 2, 3),
    rating("a", 0, "", 1, 2, 3),
  ]
  with (folder / "annotations.jsonl").open("a") as file:
    file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in bad)
  with (folder / "annotations.jsonl").open("ab") as file:
    file.write(b'{"image_id": "\xff"}\n')
  with (folder / "prompts.jsonl").open("a") as file:
    file.write('{"image_id": "g", "source": "photos", "kind": "odd"}\n')
    file.write('{"image_id": "a", "source": "photos", "kind": 0, "text": 5}\n')
  (folder / "captions.jsonl").write_text('{"id": "h", "text": "x"}')
  with (folder / "candidates.jsonl").open("a") as file:
    file.write('{"image_id": "a", "candidate": "a_1", "policy": "base"}\n')
  (folder / "inpaint" / "a_1.png").unlink()
  candidate = folder / "inpaint" / "b_0.png"
  candidate.write_bytes(candidate.read_bytes()[:80])
  (folder / "images" / "c.png").write_text("no image")
  Image.new("L", (8, 9), 255).save(folder / "masks" / "d_mask.png")
  Image.new("L", (8, 8)).save(folder / "masks" / "e_mask.png")
  Image.new("RGB", (9, 8)).save(folder / "inpaint" / "f_1.png")
  at = "annotations.jsonl"
  expected = [
    "prompts.jsonl:7: kind is 'odd'",
    "prompts.jsonl:8: image id 'a' is also in prompts.jsonl:1",
    "prompts.jsonl:8: text is 5; expected a string",
    "captions.jsonl, line 1: unknown id 'h'",
    "candidates.jsonl:13: candidate 'a_1' is also in candidates.jsonl:2",
    f"{at}:13: not JSON",
    f"{at}:14: not a JSON object",
    f"{at}:15: missing overall",
    f"{at}:16: unknown image id 'z'",
    f"{at}:17: unknown candidate 'a_9'",
    f"{at}:18: candidate 'b_0' does not belong to image id 'a'",
    f"{at}:19: structure is 8; expected a number from 0 to 7",
    f"{at}:19: texture is -1; expected a number from 0 to 7",
    f"{at}:19: overall is NaN; expected a number from 0 to 7",
    f'{at}:20: structure is "5"; expected a number from 0 to 7',
    f"{at}:20: texture is true; expected a number from 0 to 7",
    f"{at}:20: overall is null; expected a number from 0 to 7",
    f"{at}:21: 'mia' already scored 'a_0' in {at}:1",
    f"{at}:22: annotator: expected a non-empty string",
    f"{at}:23: not JSON",
    "train.txt:4: unknown image id 'nobody'",
    "test.txt:2: 'a' is also in train.txt:1",
    "candidates.jsonl:13: inpaint/a_1.png: no such file",
    "candidates.jsonl:3: inpaint/b_0.png: the image is truncated",
    "prompts.jsonl:3: images/c.png: not an image",
    "prompts.jsonl:4: masks/d_mask.png: the mask is 8x9 pixels, its image 8x8 pixels (w",
    "prompts.jsonl:5: masks/e_mask.png: the mask is empty",
    "candidates.jsonl:12: inpaint/f_1.png is 8x9, its prompt is 8x8",
  ]
  found = errors_of(folder)
  for message in expected:
    assert sum(line.startswith(message) for line in found) == 1, (message, found)
  assert len(found) == len(expected), found


def test_errors_of_the_released_layout_name_the_line_of_their_key(tmp_path):
  write_images(tmp_path, {"a": 2, "b": 1}, whole=False)
  (tmp_path / "masks_color" / "b_mask_color.png").unlink()
  (tmp_path / "flat.json").write_text(
    '{"a_0": [1.0, 1],\n"a_1": [NaN, 2],\n"c_0": [1, 1],\n"a_7": [1, 1],\n"b_0": [2, 1],\n'
    '"a_1": "a_0",\n"a_0": [3, 1]}'
  )
  (tmp_path / "grouped.json").write_text('{"a":\n{"b_0": [2, 1],\n"a_0": [9, 1]}}')
  (tmp_path / "torn.json").write_text('{"a_0":\n[1,')
  found = errors_of(tmp_path)
  expected = [
    "flat.json:2: 'a_1' is not [score, rank]",
    "flat.json:3: unknown image id 'c'",
    "flat.json:4: unknown candidate 'a_7'",
    "flat.json:6: 'a_1' is not [score, rank]",
    "flat.json:7: 'a_0' has another score in flat.json:1",
    "grouped.json:2: candidate 'b_0' does not belong to image id 'a'",
    "grouped.json:3: 'a_0' has another score in flat.json:1",
    "torn.json:2: not JSON",
    "flat.json:5: masks_color/b_mask_color.png: no such file",
  ]
  assert len(found) == len(expected), found
  for line, message in zip(found, expected, strict=True):
    assert line.startswith(message)


def test_a_report_lists_at_most_fifty_errors_and_counts_the_others(tmp_path):
  ratings = [rating("a", 0, f"rater {i}", 9, 2, 3) for i in range(60)]
  found = errors_of(write_candidates_folder(tmp_path, {"a": 1}, ratings))
  assert len(found) == 51 and found[-1] == "and 10 more"


def test_errors_about_the_folder_are_one_line(tmp_path):
  def expect(pattern, *arguments):
    with pytest.raises(ValueError, match=pattern) as error:
      annotations.read_annotations(*arguments)
    assert "\n" not in str(error.value)

  expect("no such folder", tmp_path / "gone")
  expect("contains neither annotations.jsonl nor JSON files", tmp_path)
  for weights in ({"structure": 1}, dict.fromkeys(CRITERIA, 0), dict.fromkeys(CRITERIA, -1)):
    expect("weights are", tmp_path, weights)
  folder = write_candidates_folder(tmp_path, {"a": 1}, [])
  (folder / "annotations.jsonl").unlink()
  expect(r"annotations\.jsonl: no such file", folder)
