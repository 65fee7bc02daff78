"""Collecting candidates: the written files, the turns of the policies, and resuming."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from preference_world import collect_config

from prefpaint_jax import collect as command
from prefpaint_jax import testing
from prefpaint_jax.annotate import annotate
from prefpaint_jax.data import images as image_io
from prefpaint_jax.data.annotations import read_annotations
from prefpaint_jax.data.preference_records import build_preferences
from prefpaint_jax.data.preferences import open_preferences
from prefpaint_jax.data.prompts import open_prompts
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.rewards import candidates, load_reward
from prefpaint_jax.rewards.candidates import score_candidates
from prefpaint_jax.runtime import interrupts

TEXTS = {"0": "a “red” house", "1": "sea", "2": ""}  # by image

REWARDS = """
def says(images, texts):
  return [len(text) or float("nan") for text in texts]

says.host = True
"""

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp("collect")
  testing.tiny_inpainter(seed=5).save_pretrained(folder / "other")
  policies = (str(folder / "policy"), str(folder / "other"))
  more = {"samples_per_prompt": 2, "perturbed": 1, "guidance_scale": 3.0}
  config = collect_config(folder, policies=policies, **more)
  captions = [{"id": picture, "text": text} for picture, text in TEXTS.items() if text]
  (folder / "photos" / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
  command.collect(config, folder / "whole")
  return folder, config


def files(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def lines(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_prompt_has_its_images_and_candidates(world):
  folder = world[0] / "whole"
  prompts = {line["image_id"]: line for line in lines(folder / "prompts.jsonl")}
  listed = [(folder / f"{split}.txt").read_text().split() for split in ("train", "test")]
  assert [len(ids) for ids in listed] == [20, 6]
  assert set(prompts) == {*listed[0], *listed[1]}
  candidates = lines(folder / "candidates.jsonl")
  assert len(candidates) == 3 * len(prompts)
  for line in candidates:
    name = line["image_id"]
    image = image_io.load_image(folder / "images" / f"{name}.png")
    mask = image_io.load_mask(folder / "masks" / f"{name}_mask.png", image.shape[:2])
    masked = image_io.load_image(folder / "masks_color" / f"{name}_mask_color.png")
    sample = image_io.load_image(folder / "inpaint" / f"{line['candidate']}.png")
    np.testing.assert_array_equal(masked, image * (1 - mask))
    np.testing.assert_array_equal(sample * (1 - mask), image * (1 - mask))
    assert not np.array_equal(sample, image)
  assert {line["kind"] for line in prompts.values()} == {"outpainting", "warping"}


def test_texts_of_the_images_reach_prompts_and_annotations(world):
  folder, config = world[0] / "whole", world[1]
  rows = lines(folder / "prompts.jsonl")
  assert {row["picture"] for row in rows} == set(TEXTS)
  assert all(row.get("text") == (TEXTS[row["picture"]] or None) for row in rows)
  expected = {row["image_id"]: TEXTS[row["picture"]] for row in rows}
  opened = open_prompts(folder, "train", config.size)
  assert opened.has_texts
  assert all(prompt.get("text", "") == expected[prompt["id"]] for prompt in opened)
  annotate(folder, annotators=1, noise=0.5, seed=0)
  found = {prompt.image_id: prompt.text for prompt in read_annotations(folder).prompts}
  assert found == expected
  (folder / "annotations.jsonl").unlink()


def test_policies_sample_with_the_texts_and_the_guidance_of_the_config(world):
  calls = []

  def policy(images, masks, **options):
    calls.append(options)
    return images

  images, masks = testing.tiny_prompts(2)
  batch = {"image": images, "mask": masks, "text": np.array(["", "a red house"])}
  list(command.sample_candidates([("a", policy)], batch, 0, jax.random.key(0), world[1]))
  assert [options["text"] for options in calls] == [["", "a red house"]] * 2
  assert {options["guidance_scale"] for options in calls} == {3.0}


def test_killed_scoring_continues_and_scores_equal_the_rewards(world, tmp_path, monkeypatch):
  """Also after lines of other rewards, of a prompt with few candidates, and of half a line."""
  folder = tmp_path / "whole"
  shutil.copytree(world[0] / "whole", folder)
  (tmp_path / "mine.py").write_text(REWARDS)
  says, seam = load_reward(f"{tmp_path}/mine.py:says"), load_reward("seam")
  rewards = {"says": says, "seam": seam}
  assert score_candidates(folder, rewards, 8)
  file = folder / "scores.jsonl"
  rows, whole = lines(file), file.read_bytes()
  order = [line["candidate"] for line in lines(folder / "candidates.jsonl")]
  assert [row["candidate"] for row in rows] == order
  for row in rows[::7]:
    name = row["image_id"]
    text = TEXTS[name.rsplit("_", 1)[1]]
    # A host reward of the text: NaN, written as null, where there is none.
    assert row["scores"]["says"] == (len(text) if text else None)
    sample = image_io.load_image(folder / "inpaint" / f"{row['candidate']}.png")
    masked = image_io.load_image(folder / "masks_color" / f"{name}_mask_color.png")
    mask = image_io.load_mask(folder / "masks" / f"{name}_mask.png")
    assert row["scores"]["seam"] == pytest.approx(float(seam(sample, masked, [mask])[0]), abs=1e-5)

  parts = whole.splitlines(keepends=True)
  other = json.dumps(rows[-1] | {"scores": {"seam": 1.0}}).encode() + b"\n"
  file.write_bytes(b"".join(parts[:40]) + other + parts[41][:20])
  scored, score = [], candidates._score
  monkeypatch.setattr(candidates, "_score", lambda *args: scored.append(args[2]) or score(*args))
  assert score_candidates(folder, rewards, 8)
  assert file.read_bytes() == whole
  assert len(scored) == 3  # of four batches; the first has all its lines
  monkeypatch.setattr(candidates, "_score", None)  # nothing is left to score
  assert score_candidates(folder, rewards, 8)
  assert file.read_bytes() == whole


@pytest.mark.slow
def test_rewards_label_candidates_and_preferences_read_their_scores(world, tmp_path):
  folder, config = world
  config = config.copy_and_resolve_references()
  config.update(num_prompts=8, num_test_prompts=3)
  command.collect(config, tmp_path / "candidates")
  config.rewards = ("seam", "known-colour")  # added to a workdir that is collected
  command.collect(config, tmp_path / "candidates")
  rows = lines(tmp_path / "candidates" / "scores.jsonl")
  assert len(rows) == 33 and not (tmp_path / "candidates" / "annotations.jsonl").exists()
  built = build_preferences(
    tmp_path / "candidates", tmp_path / "built", rewards="known-colour*2,seam"
  )
  scores = {
    name: np.array([row["scores"][name] for row in rows]) for name in ("seam", "known-colour")
  }
  standardised = {name: (x - x.mean()) / x.std() for name, x in scores.items()}
  combined = 2 * standardised["known-colour"] + standardised["seam"]
  by_prompt = dict(
    zip([row["image_id"] for row in rows[::3]], combined.reshape(-1, 3), strict=True)
  )
  stored = open_preferences(built, "train")
  assert len(stored)
  for preference in stored:
    np.testing.assert_allclose(preference["raw_scores"], by_prompt[preference["id"]], atol=1e-5)


@pytest.mark.slow
def test_candidates_are_samples_with_the_text_of_their_prompt(world):
  folder, config = world
  prompts = command._draw_prompts(config)["train"]
  batch = [prompts[i] for i in range(8)]
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 0), 0)
  policy = Inpainter.from_pretrained(config.policies[0])
  images, masks = (np.stack([prompt[name] for prompt in batch]) for name in ("image", "mask"))
  sampler = {"num_steps": config.num_steps, "eta": config.eta, "guidance_scale": 3.0}
  texts = [TEXTS[prompt["picture"]] for prompt in batch]
  key = jax.random.fold_in(key, 0)
  expected = policy(images, masks, key=key, text=texts, **sampler)
  without = policy(images, masks, key=key, **sampler)
  for prompt, text, sample, other in zip(batch, texts, expected, without, strict=True):
    saved = image_io.load_image(folder / "whole" / "inpaint" / f"{prompt['id']}_0.png")
    np.testing.assert_allclose(saved, sample, atol=1.01 / 255)
    assert (np.abs(sample - other).max() > 3 / 255) == bool(text)


def test_policies_take_turns(world):
  folder, config = world
  policies = [line["policy"] for line in lines(folder / "whole" / "candidates.jsonl")]
  assert {name: policies.count(name) for name in policies} == {
    config.policies[0]: 26,
    config.policies[1]: 26,
    "perturbed": 26,
  }


def test_killed_and_resumed_equals_uninterrupted(world, monkeypatch):
  folder, config = world

  class Killed(Exception):
    pass

  original, written = command.write_prompt, []

  def write_then_die(*args):
    if len(written) == 13:  # in the second batch of eight
      raise Killed
    written.append(None)
    original(*args)

  with monkeypatch.context() as patch:
    patch.setattr(command, "write_prompt", write_then_die)
    with pytest.raises(Killed):
      command.collect(config, folder / "killed")
  with (folder / "killed" / "candidates.jsonl").open("a") as file:
    file.write('{"image_id": "train_0')  # an incomplete line
  command.collect(config, folder / "killed")
  assert files(folder / "killed") == files(folder / "whole")


@pytest.mark.parametrize("lacking", ["prompts", "candidates"])
def test_prompt_that_one_of_the_files_lacks_is_collected_again(world, tmp_path, lacking):
  for name in ("prompts", "candidates"):
    whole = (world[0] / "whole" / f"{name}.jsonl").read_text().splitlines(keepends=True)
    kept = whole[:-1] if name == lacking else whole
    (tmp_path / f"{name}.jsonl").write_text("".join(kept))
  ids = [line["image_id"] for line in lines(world[0] / "whole" / "prompts.jsonl")]
  assert command.recover(tmp_path, 3) == set(ids[:-1])
  assert [line["image_id"] for line in lines(tmp_path / "prompts.jsonl")] == ids[:-1]
  assert {line["image_id"] for line in lines(tmp_path / "candidates.jsonl")} == set(ids[:-1])


@pytest.mark.slow
def test_a_signal_keeps_finished_prompts_and_the_same_command_goes_on(world, monkeypatch, capsys):
  folder, config = world
  original = command.stack

  def stack_and_signal(*args):
    signal.raise_signal(signal.SIGINT)
    return original(*args)

  with monkeypatch.context() as patch:
    patch.setattr(command, "stack", stack_and_signal)
    command.collect(config, folder / "stopped")
  assert "stopped; finished prompts are saved" in capsys.readouterr().out
  assert interrupts.status == 128 + signal.SIGINT
  assert 0 < len(lines(folder / "stopped" / "prompts.jsonl")) < 26
  command.collect(config, folder / "stopped")
  assert f"prefpaint_jax.label --candidates={folder / 'stopped'}" in capsys.readouterr().err
  assert files(folder / "stopped") == files(folder / "whole")


@pytest.mark.slow
def test_a_larger_number_of_prompts_adds_to_the_workdir(world):
  folder, config = world
  before = files(folder / "whole")
  fewer = config.copy_and_resolve_references()
  fewer.num_prompts = 11
  command.collect(fewer, folder / "grown")
  command.collect(config, folder / "grown")
  after = files(folder / "grown")
  unordered = ("prompts.jsonl", "candidates.jsonl", "train.txt")
  assert {k: v for k, v in after.items() if k not in unordered} == {
    k: v for k, v in before.items() if k not in unordered
  }
  for name in unordered:
    assert sorted(after[name].splitlines()) == sorted(before[name].splitlines())
  fewer.eta = 0.5
  with pytest.raises(ValueError, match=r"eta was 1\.0, now 0\.5"):
    command.collect(fewer, folder / "grown")


def test_simulated_scores_can_be_read(world):
  folder = world[0] / "whole"
  assert annotate(folder, annotators=2, noise=0.5, seed=0) == 78
  annotations = read_annotations(folder)
  assert [len(prompt.candidates) for prompt in annotations.prompts] == [3] * 26
  assert annotations.annotators == 2
  first = (folder / "annotations.jsonl").read_bytes()
  annotate(folder, annotators=2, noise=0.5, seed=0)
  assert (folder / "annotations.jsonl").read_bytes() == first


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"pictures": ""}, r"config\.pictures is empty"),
    ({"pictures": "nowhere"}, "nowhere"),
    ({"pictures": "mini"}, r"guidance_scale is 3, but mini has no texts to guide by; add captions"),
    ({"policies": ()}, r"config\.policies is empty"),
    ({"policies": ("nowhere",)}, "nowhere: no such folder"),
    ({"rewards": ("seam@x",)}, "reward seam@x: it has no weights; give seam"),
    ({"kinds.holes": -1.0}, r"kinds\.holes is -1"),
    ({"batch_size": 3}, "batch_size 3 does not divide over 8 devices"),
  ],
)
def test_config_errors_are_one_line(world, tmp_path, change, message):
  config = world[1].copy_and_resolve_references()
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message) as error:
    command.collect(config, tmp_path)
  assert "\n" not in str(error.value)


def test_annotating_an_empty_folder_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"give the --workdir of prefpaint_jax\.collect"):
    annotate(tmp_path, annotators=1, noise=0.0, seed=0)


@pytest.fixture
def scored(tmp_path):
  """Returns a folder of one prompt with two candidates, without scores."""
  images, masks = testing.tiny_prompts(2)
  for k, image in enumerate(images):
    image_io.save_png(tmp_path / "inpaint" / f"a_{k}.png", image_io.to_bytes(image))
  image_io.save_png(tmp_path / "masks" / "a_mask.png", image_io.to_bytes(masks[0, ..., 0]))
  (tmp_path / "prompts.jsonl").write_text('{"image_id": "a", "source": "x", "kind": "box"}\n')
  rows = [{"image_id": "a", "candidate": f"a_{k}", "policy": "x"} for k in range(2)]
  (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return tmp_path


@pytest.mark.parametrize(
  "line",
  [
    '{"image_id": "a", "candidate": "a_0", "annotator": "ann", "structure": 5, "texture": 4}',
    '{"image_id": "a", "candidate": "a_0", "annotator": 7}',
    '{"image_id": "a", "candid',  # partly written
    '["simulated_0"]',
    "\xff",
  ],
)
def test_scores_of_people_are_never_replaced(scored, line):
  assert annotate(scored, annotators=1, noise=0.5, seed=0) == 2
  file = scored / "annotations.jsonl"
  simulated = file.read_bytes()
  mixed = simulated + line.encode("latin-1") + b"\n"
  file.write_bytes(mixed)
  message = (
    r"\A.*annotations\.jsonl: line 3 is not of a simulated annotator, .*; move the file .*\Z"
  )
  with pytest.raises(ValueError, match=message):
    annotate(scored, annotators=1, noise=0.5, seed=0)
  assert file.read_bytes() == mixed


@pytest.mark.parametrize("noise", [np.nan, np.inf, -1.0])
def test_noise_that_is_not_finite_leaves_the_scores_alone(scored, noise):
  annotate(scored, annotators=1, noise=0.5, seed=0)
  before = files(scored)
  with pytest.raises(ValueError, match=r"\Anoise is .*; expected a finite number from 0 on; .*\Z"):
    annotate(scored, annotators=1, noise=noise, seed=0)
  assert files(scored) == before


def test_wrong_candidates_are_an_error_of_one_line(scored):
  (scored / "candidates.jsonl").write_text('{"image_id": "b", "candidate": "b_0", "policy": "x"}\n')
  with pytest.raises(ValueError, match=r"\A.*candidates\.jsonl:1: unknown image id 'b'; .*\Z"):
    annotate(scored, annotators=1, noise=0.5, seed=0)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("nonsense", "is not JSON"),
    ("[1]", "type list"),
    ('{"id": 1}', "image_id is None; expected"),
    ('{"image_id": ["a"]}', r"image_id is \['a'\]; expected"),
    ("\udcff", "is not text in UTF-8"),
  ],
)
def test_damaged_line_of_an_interrupted_run_is_named_and_kept(tmp_path, line, message):
  file = tmp_path / "prompts.jsonl"
  content = f'{{"image_id": "a"}}\n{line}\n'.encode(errors="surrogateescape")
  file.write_bytes(content)
  with pytest.raises(ValueError, match=rf"prompts\.jsonl, line 2.*{message}"):
    command.recover(tmp_path, 1)
  assert file.read_bytes() == content
