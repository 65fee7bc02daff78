"""Preferences: reading equals the scores as given; splits; the order of batches; errors."""

import json
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from scipy import stats
from test_annotations import CRITERIA, rating, write_candidates_folder, write_images

from prefpaint_jax.data import (
  annotations,
  examples,
  masks,
  preference_records,
  preferences,
  prompts,
)
from prefpaint_jax.data.examples import CRITERIA as WEIGHTS

CONFIG = Path(__file__).parents[2] / "configs" / "preferences.py"
NAMES = {f"p{i}": 2 + i % 3 for i in range(14)}


def pixels(file):
  return np.asarray(Image.open(file))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Fourteen prompts with 2 to 4 candidates and two annotators; the last two are for testing."""
  rng = np.random.default_rng(0)
  ratings = [
    rating(name, k, annotator, *rng.integers(0, 8, 3).tolist())
    for name, number in NAMES.items()
    for k in range(number)
    for annotator in ("mia", "leo")
  ]
  folder = write_candidates_folder(tmp_path_factory.mktemp("source"), NAMES, ratings)
  (folder / "train.txt").write_text("\n".join(list(NAMES)[:12]))
  return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
  folder = tmp_path_factory.mktemp("built")
  preference_records.build_preferences(source, folder)
  return folder


def text_of(id_):
  return f"text of {id_} — <b>" if list(NAMES).index(id_) % 2 else ""


def scores_of(source):
  """Returns {candidate: scores [annotators, criteria]} of annotations.jsonl."""
  given = {}
  for line in (source / "annotations.jsonl").read_text().splitlines():
    row = json.loads(line)
    given.setdefault(row["candidate"], []).append([row[name] for name in CRITERIA])
  return {name: np.array(scores, float) for name, scores in given.items()}


def test_reading_returns_the_images_and_scores_of_the_source(source, built):
  given, weights = scores_of(source), [WEIGHTS[name] for name in CRITERIA]
  raw = {name: scores.mean(0) @ weights for name, scores in given.items()}
  chosen = preferences.open_preferences(built, "validation")
  validation = [preference["id"] for preference in chosen]
  train = [
    raw[f"{name}_{k}"]
    for name in list(NAMES)[:12]
    if name not in validation
    for k in range(NAMES[name])
  ]
  seen = []
  for split, number in (
    ("train", 12 - len(validation)),
    ("validation", len(validation)),
    ("test", 2),
  ):
    opened = preferences.open_preferences(built, split)
    assert len(opened) == number and opened.num_candidates == 4
    for preference in opened:
      id_ = preference["id"]
      seen.append(id_)
      names = [f"{id_}_{k}" for k in range(NAMES[id_])]
      assert preference["kind"] == list(NAMES).index(id_) % 2
      assert preference["text"] == text_of(id_)
      hole = pixels(source / f"masks/{id_}_mask.png")[..., None] // 255
      image = pixels(source / f"images/{id_}.png")
      np.testing.assert_array_equal(preference["mask"], hole)
      np.testing.assert_array_equal(preference["masked_image"], image * (1 - hole))
      for name, candidate in zip(names, preference["candidates"], strict=True):
        np.testing.assert_array_equal(candidate, pixels(source / f"inpaint/{name}.png"))
      expected = np.array([raw[name] for name in names])
      np.testing.assert_allclose(preference["raw_scores"], expected, rtol=1e-6)
      normalised = (expected - np.mean(train)) / np.std(train)
      np.testing.assert_allclose(preference["scores"], normalised, rtol=1e-5, atol=1e-6)
      assert preference["scores"].dtype == np.float32
      assert preference["candidates"].dtype == preference["mask"].dtype == np.uint8
  assert sorted(seen) == sorted(NAMES) and 0 < len(validation) < 12
  assert opened[-1]["id"] == opened[1]["id"]
  with pytest.raises(IndexError):
    opened[2]


def test_a_dataset_of_an_earlier_version_has_no_texts(source, tmp_path, monkeypatch):
  for name in ("_features", "_record"):
    original = getattr(preference_records, name)
    without = lambda *args, call=original: {k: v for k, v in call(*args).items() if k != "text"}
    monkeypatch.setattr(preference_records, name, without)
  preference_records.build_preferences(source, tmp_path)
  opened = preferences.open_preferences(tmp_path, "train")
  assert preferences.stack(list(opened), 4)["text"].tolist() == [""] * len(opened)


def test_tfds_reads_every_feature(source, built):
  given = scores_of(source)
  builder = tfds.builder_from_directory(built / "preferences" / "1.0.0")
  for record in builder.as_data_source(split="train"):
    id_, candidates = record["id"].decode(), record["candidates"]
    names = [f"{id_}_{k}" for k in range(NAMES[id_])]
    assert [name.decode() for name in candidates["name"]] == names
    assert [policy.decode() for policy in candidates["policy"]] == ["base", "ours", "base", "ours"][
      : len(names)
    ]
    assert record["source"] == b"photos" and record["text"].decode() == text_of(id_)
    np.testing.assert_array_equal(record["image"], pixels(source / f"images/{id_}.png"))
    for index, name in enumerate(CRITERIA):
      np.testing.assert_allclose(candidates[name], [given[n].mean(0)[index] for n in names])
    scores = np.array(candidates["score"])
    np.testing.assert_array_equal(candidates["rank"], stats.rankdata(-scores, method="min"))
    assert list(candidates["annotators"]) == [2] * len(names)


def test_folder_that_a_killed_process_left_is_no_dataset_and_is_removed(source, built, tmp_path):
  left = tmp_path / "preferences" / "incomplete.4UEM6Y_1.0.0"  # the name that tfds chooses
  shutil.copytree(built / "preferences" / "1.0.0", left)
  for folder in (tmp_path, left.parent, left):
    with pytest.raises(ValueError, match="contains 0 datasets"):
      preferences.open_preferences(folder, "train")
  preference_records.build_preferences(source, tmp_path)
  assert not left.exists()
  assert len(preferences.open_preferences(tmp_path, "train")) > 0


def test_full_disk_is_one_line_and_leaves_no_dataset(source, tmp_path):
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  try:
    with pytest.raises(
      OSError, match=r"preferences/1\.0\.0: cannot be written .*; make room"
    ) as error:
      preference_records.build_preferences(source, tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert "\n" not in str(error.value)
  assert not list((tmp_path / "preferences").iterdir())


def test_ranks_equal_scipy_and_ignore_rounding():
  rng = np.random.default_rng(0)
  for _ in range(50):
    scores = rng.integers(0, 5, rng.integers(1, 7)) / 3
    expected = stats.rankdata(-scores, method="min")
    np.testing.assert_array_equal(preference_records.ranks(scores), expected)
    noisy = scores + rng.uniform(-1e-9, 1e-9, scores.shape)
    np.testing.assert_array_equal(preference_records.ranks(noisy), expected)


def test_metadata_describes_the_dataset(built):
  metadata = preferences.read_metadata(built)
  assert metadata == preferences.read_metadata(built / "preferences" / "1.0.0")
  opened = preferences.open_preferences(built, "train")
  raw = np.concatenate([preference["raw_scores"] for preference in opened])
  np.testing.assert_allclose([metadata["mean"], metadata["std"]], [raw.mean(), raw.std()], 1e-6)
  scores = np.concatenate([preference["scores"] for preference in opened])
  np.testing.assert_allclose([scores.mean(), scores.std()], [0, 1], atol=1e-6)
  assert metadata["weights"] == WEIGHTS and metadata["annotators"] == 2
  assert set(metadata["alpha"]) == {*CRITERIA, "combined"}
  counts = metadata["counts"]
  kinds = dict.fromkeys(masks.KINDS, 0) | {"outpainting": 6, "warping": 6}
  both = (counts[split]["prompts"] for split in ("train", "validation"))
  assert [sum(numbers) for numbers in zip(*map(dict.values, both), strict=True)] == [
    *kinds.values()
  ]
  assert counts["train"]["candidates"] == len(raw) == counts["train"]["ratings"] / 2
  assert metadata["left_out"] == {"candidates": 0, "prompts": 0, "unlisted": 0}


def test_released_layout_is_built_from_its_combined_scores(tmp_path):
  source = tmp_path / "source"
  write_images(source, {"a": 3, "b": 3}, whole=False)
  scores = {"a": {"a_0": [1.5, 2], "a_1": [-2, 3], "a_2": [4, 1]}, "b": {"b_1.png": [0.5, 1]}}
  (source / "scores.json").write_text(json.dumps(scores))
  (source / "test.txt").write_text("b\n")
  preference_records.build_preferences(source, tmp_path)
  (train,) = preferences.open_preferences(tmp_path, "train")
  (test,) = preferences.open_preferences(tmp_path, "test")
  np.testing.assert_array_equal(train["raw_scores"], [1.5, -2, 4])
  np.testing.assert_allclose(train["scores"], stats.zscore([1.5, -2, 4]), rtol=1e-6)
  np.testing.assert_array_equal(test["candidates"], [pixels(source / "inpaint" / "b_1.png")])
  np.testing.assert_array_equal(
    test["masked_image"], pixels(source / "masks_color" / "b_mask_color.png")
  )
  assert preferences.read_metadata(tmp_path)["alpha"]["overall"] is None


def test_without_lists_crops_of_one_image_share_a_split(source, tmp_path):
  names = {f"{i}": 1 for i in range(60)}
  ratings = [rating(name, 0, "mia", i % 7, 1, 2) for i, name in enumerate(names)]
  folder = write_candidates_folder(tmp_path / "source", names, ratings)
  rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
  for i, row in enumerate(rows):
    row["picture"] = f"photo {i // 3}"
  (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
  preference_records.build_preferences(folder, tmp_path, test_share=0.3)
  split_of = {}
  for split in ("train", "validation", "test"):
    for preference in preferences.open_preferences(tmp_path, split):
      assert preference["id"] not in split_of
      split_of[preference["id"]] = split
  assert set(split_of) == set(names)
  assert all(split_of[str(i)] == split_of[str(i - i % 3)] for i in range(60))
  assert 6 <= list(split_of.values()).count("test") <= 33  # 18 expected


def test_lists_define_the_splits_and_unlisted_prompts_are_left_out(source, tmp_path):
  read = annotations.read_annotations(source)
  lists = {"train": {"p1", "p5"}, "test": {"p0"}, "validation": {"p7"}}

  def ids(**lists):
    splits = preference_records.assign_splits(read._replace(lists=lists), 0.5)
    described = preference_records.describe(read, splits, WEIGHTS)
    found = {split: {prompt.image_id for prompt in chosen} for split, chosen in splits.items()}
    return found, described["left_out"]["unlisted"]

  assert ids(**lists) == (lists, len(NAMES) - 4)
  del lists["validation"]
  found, unlisted = ids(**lists)
  assert found["train"] | found["validation"] == lists["train"] and unlisted == len(NAMES) - 3
  assert len(found["train"]) == len(found["validation"]) == 1 and found["test"] == {"p0"}


def test_a_dataset_without_validation_split_gives_up_some_training_prompts(built, tmp_path):
  new = {split: [p["id"] for p in part] for split, part in preferences.open_splits(built).items()}
  copy = tmp_path / "old"
  shutil.copytree(built, copy)
  info = next(copy.rglob("dataset_info.json"))
  about = json.loads(info.read_text())
  about["splits"] = [split for split in about["splits"] if split["name"] != "validation"]
  info.write_text(json.dumps(about))
  old = {split: [p["id"] for p in part] for split, part in preferences.open_splits(copy).items()}
  assert list(old) == list(new) == ["train", "validation", "test"]
  assert old["test"] == new["test"] and not set(old["train"]) & set(old["validation"])
  assert sorted(old["train"] + old["validation"]) == sorted(new["train"])
  assert 0 < len(old["validation"]) < len(old["train"])


def test_validation_takes_whole_images_and_stays_when_images_are_added():
  names = [f"image {i // 4}" for i in range(4000)]
  chosen = examples.in_validation(names)
  assert abs(np.mean(chosen) - examples.VALIDATION_SHARE) < 0.04  # 4 standard deviations
  assert all(len(set(chosen[i : i + 4])) == 1 for i in range(0, 4000, 4))
  assert chosen[:400] == examples.in_validation(names[:400])
  held_out = [examples.in_test(name, 0.1) for name in names]
  assert abs(np.corrcoef(chosen, held_out)[0, 1]) < 0.13  # independent of the other hash
  for number in (2, 3):  # never no image, never all
    assert 0 < sum(examples.in_validation([str(i) for i in range(number)])) < number


def test_size_resizes_and_keeps_the_hole_black(built):
  for preference in preferences.open_preferences(built, "train", size=12):
    assert preference["candidates"].shape[1:] == preference["masked_image"].shape == (12, 12, 3)
    hole = preference["mask"][..., 0] == 1
    assert 0 < hole.mean() < 1 and (preference["masked_image"][hole] == 0).all()
  same, stored = (preferences.open_preferences(built, "test", size=size)[0] for size in (8, None))
  np.testing.assert_array_equal(same["candidates"], stored["candidates"])


def test_batches_are_padded_and_mark_the_padding(built):
  opened = preferences.open_preferences(built, "train")
  batch = next(preferences.preference_loader(opened, batch_size=6, seed=0, shuffle=False))
  shapes = {name: value.shape for name, value in batch.items()}
  assert shapes["masked_image"] == (6, 8, 8, 3) and shapes["candidates"] == (6, 4, 8, 8, 3)
  assert batch["kind"].dtype == np.int32 and batch["candidates"].dtype == np.uint8
  for row, preference in enumerate(opened[index] for index in range(6)):
    count = len(preference["scores"])
    assert batch["id"][row] == preference["id"]
    assert batch["valid"][row].tolist() == [k < count for k in range(4)]
    np.testing.assert_array_equal(batch["scores"][row, :count], preference["scores"])
    np.testing.assert_array_equal(batch["candidates"][row, :count], preference["candidates"])
    assert not batch["scores"][row, count:].any() and not batch["candidates"][row, count:].any()


def test_two_processes_read_the_halves_of_each_batch_in_the_order_of_the_prompt_loader(built):
  opened = preferences.open_preferences(built, "train")
  whole = preferences.preference_loader(opened, batch_size=4, seed=5)
  parts = [preferences.preference_loader(opened, 4, 5, index, 2) for index in range(2)]
  order = prompts.prompt_loader(
    [examples.Prompt(id=p["id"], kind=0, image=np.zeros(1), mask=np.zeros(1)) for p in opened],
    batch_size=4,
    seed=5,
  )
  for _ in range(7):  # more than two epochs
    expected, halves = next(whole), [next(part) for part in parts]
    assert expected["id"].tolist() == next(order)["id"].tolist()
    for index, half in enumerate(halves):
      for name, value in half.items():
        np.testing.assert_array_equal(value, expected[name][2 * index : 2 * index + 2])


def test_a_restored_loader_continues_exactly(built):
  opened = preferences.open_preferences(built, "train")
  loader = preferences.preference_loader(opened, batch_size=5, seed=1)
  for _ in range(3):
    next(loader)
  state = loader.get_state()
  resumed = preferences.preference_loader(opened, batch_size=5, seed=1)
  resumed.set_state(state)
  for _ in range(6):
    ours, theirs = next(resumed), next(loader)
    for name, value in theirs.items():
      np.testing.assert_array_equal(ours[name], value)


def test_building_and_reading_import_no_tensorflow_and_annotations_no_jax(source, tmp_path):
  code = (
    "import sys; from prefpaint_jax.data import annotations;"
    "assert not {'jax', 'tensorflow_datasets'} & set(sys.modules);"
    "from prefpaint_jax.data import preferences as p;"
    f"p.build_preferences({str(source)!r}, {str(tmp_path)!r});"
    f"next(p.preference_loader(p.open_preferences({str(tmp_path)!r}, 'train'), 4, 0));"
    "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_main_prints_the_metadata_or_all_errors(source, tmp_path, capsys):
  config = runpy.run_path(str(CONFIG))["get_config"]()
  with pytest.raises(ValueError, match=r"config\.source is empty"):
    preferences.main(config, tmp_path)
  config.source = str(source)
  preferences.main(config, tmp_path)
  report = capsys.readouterr().out
  metadata = preferences.read_metadata(tmp_path)
  for text in (f"{metadata['mean']:.3f}", f"{metadata['alpha']['texture']:.3f}", str(tmp_path)):
    assert text in report
  assert (tmp_path / "config.json").is_file()
  ratings = [rating("a", 0, "mia", 9, 9, 1)]
  config.source = str(write_candidates_folder(tmp_path / "bad", {"a": 1}, ratings))
  with pytest.raises(SystemExit) as stopped:
    preferences.main(config, tmp_path / "other")
  assert str(stopped.value).splitlines()[1].startswith("annotations.jsonl:1: structure is 9")
  assert not (tmp_path / "other").exists()


def test_errors_are_one_line(source, built, tmp_path):
  def expect(pattern, function, *arguments, **options):
    with pytest.raises(ValueError, match=pattern) as error:
      function(*arguments, **options)
    assert "\n" not in str(error.value)

  expect("already contains preferences", preference_records.build_preferences, source, built)
  expect("test_share is 1", preference_records.build_preferences, source, tmp_path, test_share=1)
  expect("contains 0 datasets", preferences.open_preferences, tmp_path, "train")
  expect("has no split 'valid'; it has", preferences.open_preferences, built, "valid")
  same = write_candidates_folder(
    tmp_path, {"a": 2}, [rating("a", k, "mia", 1, 2, 3) for k in range(2)]
  )
  expect("express no preference", preference_records.build_preferences, same, tmp_path)
  (same / "train.txt").write_text("")
  expect("none of 1 prompts is for training", preference_records.build_preferences, same, tmp_path)
  opened = preferences.open_preferences(built, "train")
  expect("multiple of 2", preferences.preference_loader, opened, 3, 0, process_count=2)
  expect(
    "11 preferences are fewer than batch_size 13", preferences.preference_loader, opened, 13, 0
  )
  expect("p2 has 4 candidates, num_candidates is 2", preferences.stack, [opened[0], opened[1]], 2)
  other = preferences.open_preferences(built, "train", size=12)[1]
  expect("two sizes in one batch: p0 is 8x8, p2 is 12x12", preferences.stack, [opened[0], other], 4)
