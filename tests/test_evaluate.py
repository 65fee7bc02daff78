"""Tests of the evaluation command: scores, resumption, and a policy against itself."""

import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from lpips_world import by_definition, write_files
from PIL import Image
from preference_world import load_config

from prefpaint_jax import evaluate, testing
from prefpaint_jax.data.examples import stack
from prefpaint_jax.data.images import save_png, to_bytes
from prefpaint_jax.data.prompts import open_prompts
from prefpaint_jax.evaluation import fidelity, tables
from prefpaint_jax.evaluation.batches import read_batch
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models import architectures
from prefpaint_jax.preference import simulation
from prefpaint_jax.reward import RewardModel
from prefpaint_jax.rewards.objective import load_rewards
from prefpaint_jax.runtime import interrupts

JUDGE = """
def says(images, texts):
  return [len(text) for text in texts]

says.host = True
"""

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp("evaluate")
  paths = testing.write_tiny_world(folder, train=8, test=20)
  testing.tiny_inpainter(seed=9).save_pretrained(folder / "aligned")
  testing.tiny_reward(seed=4).save_pretrained(folder / "other")
  return paths | {"aligned": str(folder / "aligned"), "other": str(folder / "other")}


def config_of(world, **fields):
  config = load_config("eval", "mini")
  config.update(
    policy=world["aligned"],
    baseline=world["policy"],
    prompts=world["prompts"],
    judges=(world["reward"], world["other"]),
    size=architectures.SIZE,
    num_prompts=20,
    samples_per_prompt=3,
    num_steps=2,
    batch_size=8,
    gallery=4,
  )
  config.update(fields)
  return config


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, evaluate.evaluate(config_of(world), workdir)


@pytest.mark.slow
def test_scores_equal_those_of_samples_from_the_public_interface(world, whole):
  workdir, result = whole
  found = json.loads((workdir / "eval.json").read_text())
  assert found["judges"] == result["judges"]
  assert found["about"]["prompts"].endswith(", test")  # these prompts have no split "unseen"
  prompts = open_prompts(world["prompts"], "test", architectures.SIZE)
  policy, judge = (
    Inpainter.from_pretrained(world["aligned"]),
    RewardModel.from_pretrained(world["reward"]),
  )
  learned, truth, errors = [], [], []
  for number in range(3):  # batches of 8; the last batch repeats its last prompt
    indices = [min(i, 19) for i in range(8 * number, 8 * number + 8)]
    batch = stack([prompts[i] for i in indices])
    samples = policy(
      batch["image"],
      batch["mask"],
      key=jax.random.fold_in(jax.random.key(0), number),
      num_steps=2,
      eta=1.0,
      num_samples=3,
    )
    masked = batch["image"] * (1 - batch["mask"])
    learned.append(judge.score(samples, masked)[0].reshape(8, 3))
    masks = np.repeat(batch["mask"], 3, axis=0)
    differences = np.abs(samples - np.repeat(batch["image"], 3, axis=0)) * masks
    errors.append(differences.sum((1, 2, 3)) / (3 * masks.sum((1, 2, 3))))
    truth.append(simulation.true_preference(samples, masks)["combined"].reshape(8, 3))
  label = next(iter(found["judges"]))
  for name, scores in ((label, learned), (tables.SIMULATED, truth)):
    mean = np.concatenate(scores)[:20].mean()
    np.testing.assert_allclose(
      found["judges"][name]["all"]["reward/mean"]["value"], mean, rtol=1e-3
    )
  assert found["judges"][label]["all"]["prompts"] == found["witnesses"]["prompts"] == 20
  error = np.concatenate(errors)[: 20 * 3].mean()
  assert found["witnesses"]["measures"]["error"]["policy"] == pytest.approx(error, rel=1e-3)
  assert (workdir / "report.html").stat().st_size > 10_000
  assert "true image" in (workdir / "report.html").read_text()
  with Image.open(workdir / "examples.png") as grid:
    assert grid.width == 6 * (256 // architectures.SIZE * architectures.SIZE + 18)


def test_a_policy_against_itself_wins_exactly_half(world, tmp_path):
  result = evaluate.evaluate(config_of(world, policy=world["policy"], num_prompts=8), tmp_path)
  for groups in result["judges"].values():
    for group in groups.values():
      for statistic in ("winrate/s1", "winrate_paired/s1"):
        assert group[statistic] == {"value": 0.5, "low": 0.5, "high": 0.5}
      assert group["gain"]["value"] == group["gain_in_sd"]["value"] == 0.0
  for found in result["witnesses"]["measures"].values():
    assert found["change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
  assert not any(row["flagged"] for row in result["drift"]["measures"].values())


@pytest.mark.parametrize(("number", "line"), [(20, ""), (0, ""), (21, "has 20: compares those")])
def test_no_prompt_is_counted_twice(world, number, line, capsys):
  _, chosen = evaluate.choose_prompts(config_of(world, split="test", num_prompts=number))
  assert chosen == list(range(20))
  assert line in capsys.readouterr().out


def test_both_sides_sample_and_are_judged_with_the_texts_of_the_prompts(world, tmp_path):
  images, masks = testing.tiny_prompts(2)
  batch = {"id": np.array(["a", "b"]), "kind": np.zeros(2, np.int32), "complete": np.ones(2, bool)}
  batch |= {"image": images, "mask": masks, "text": np.array(["", "a red house"])}
  calls = []

  def policy(images, masks, num_samples, **options):
    calls.append(options)
    return np.repeat(images, num_samples, axis=0)

  (tmp_path / "mine.py").write_text(JUDGE)
  judges = load_rewards(["seam", f"{tmp_path}/mine.py:says", world["reward"]])
  config = config_of(world, guidance_scale=3.0)
  sides = dict.fromkeys(evaluate.SIDES, policy)
  results = evaluate.examine(sides, judges, batch, jax.random.key(0), config)
  for options in calls:
    assert (options["text"], options["guidance_scale"]) == (["", "a red house"], 3.0)
  assert len(calls) == 2 and results["text"].tolist() == ["", "a red house"]
  np.testing.assert_allclose(results["policy/score/says"], [[0] * 3, [11] * 3])
  masked = images * (1 - masks)
  seams = load_rewards(["seam"])["seam"](images, masked, masks)
  np.testing.assert_allclose(results["baseline/score/seam"], np.repeat(seams[:, None], 3, 1), 1e-5)
  scores, features = RewardModel.from_pretrained(world["reward"]).score(images, masked)
  label = Path(world["reward"]).parent.name + "/reward"
  np.testing.assert_allclose(results[f"policy/score/{label}"][:, 0], scores, atol=1e-5)
  assert features.shape[-1] and results["policy/measure/diversity"].shape == (2,)


@pytest.mark.parametrize("blended", [False, True])
def test_judges_score_whole_samples_from_jpeg_with_the_protocol(tmp_path, blended):
  images, masks = testing.tiny_prompts(2, size=24)
  batch = {"id": np.array(["a", "b"]), "kind": np.zeros(2, np.int32), "complete": np.ones(2, bool)}
  batch |= {"image": images, "mask": masks, "text": np.array(["", ""])}
  samples = np.random.default_rng(0).uniform(size=(6, 24, 24, 3)).astype(np.float32)
  (tmp_path / "mine.py").write_text(
    JUDGE.replace("len(text) for text in texts", "*images.mean((1, 2, 3))")
  )
  judges = load_rewards([f"{tmp_path}/mine.py:says"])
  config = config_of({"aligned": "", "policy": "", "prompts": "", "reward": "", "other": ""})
  config.update(protocol="brushnet", blended=blended, simulated_preference=False)
  asked = []
  policy = lambda *_, **options: asked.append(options) or samples
  results = evaluate.examine({"policy": policy}, judges, batch, jax.random.key(0), config)
  assert asked[0]["paste_back"] is False
  repeated = (np.repeat(x, 3, axis=0) for x in (masks, images))
  whole = fidelity.blend(samples, *repeated, "brushnet") if blended else samples
  expected = fidelity.through_jpeg(whole).mean((1, 2, 3)).reshape(2, 3)
  np.testing.assert_allclose(results["policy/score/says"], expected, rtol=1e-6)
  assert results["policy/fidelity/mse"].shape == (2, 3)


@pytest.mark.slow
def test_the_report_shows_the_texts_of_a_folder(world, tmp_path):
  images, masks = testing.tiny_prompts(8)
  for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
    save_png(tmp_path / "in" / "images" / f"{i}.png", to_bytes(image))
    save_png(tmp_path / "in" / "masks" / f"{i}_mask.png", to_bytes(mask[..., 0]))
  rows = [{"id": str(i), "text": f"a <b>text</b> {i}"} for i in range(8)]
  (tmp_path / "in" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
  config = config_of(world, prompts=str(tmp_path / "in"), num_prompts=0, guidance_scale=3.0)
  evaluate.evaluate(config, tmp_path / "out")
  page = (tmp_path / "out" / "report.html").read_text()
  assert page.count('<p class="text">a &lt;b&gt;text&lt;/b&gt; ') >= 3
  about = json.loads((tmp_path / "out" / "eval.json").read_text())["about"]
  assert about["sampler"].endswith("guidance scale 3")


def test_a_batch_of_an_earlier_version_is_computed_again(tmp_path):
  now = {"complete": np.ones(2, bool), "text": np.array(["", "a"])}
  now["policy/fidelity/mse"] = np.zeros((2, 3))
  np.savez(tmp_path / "now.npz", **now)
  assert read_batch(tmp_path / "now.npz").keys() == now.keys()
  for name in ("text", "policy/fidelity/mse"):  # which earlier versions did not write
    np.savez(tmp_path / "earlier.npz", **{key: x for key, x in now.items() if key != name})
    assert read_batch(tmp_path / "earlier.npz") is None


@pytest.mark.slow
def test_the_papers_protocol_scores_whole_samples_from_jpeg_for_every_rival(world, tmp_path):
  write_files(tmp_path)
  fields = {"size": 24, "num_prompts": 8, "rivals": (world["aligned"], world["policy"])}
  fields |= {"protocol": "brushnet", "blended": True, "lpips": str(tmp_path)}
  config = config_of(world, **fields, policy=world["aligned"], judges=(world["reward"],))
  result = evaluate.evaluate(config, tmp_path / "out")
  twin, base = (result["rivals"][world[name]] for name in ("aligned", "policy"))
  for part in ("judges", "witnesses", "drift", "fidelity"):
    assert twin[part] == result[part]  # a policy has the same seeds as its rival
  assert all(found["change"]["value"] == 0 for found in base["fidelity"]["measures"].values())
  prompts = open_prompts(world["prompts"], "test", 24)
  batch = stack([prompts[i] for i in range(8)])
  images, masks = batch["image"], batch["mask"]
  policy = Inpainter.from_pretrained(world["aligned"])
  key = jax.random.fold_in(jax.random.key(0), 0)
  options = {"num_steps": 2, "eta": 1.0, "num_samples": 3, "paste_back": False}
  samples = policy(images, masks, key=key, **options)[::3]  # the first of each prompt
  saved = fidelity.through_jpeg(fidelity.blend(samples, masks, images, "brushnet"))
  mse = (((saved - images) * (1 - masks)) ** 2).sum((1, 2, 3)) / (1 - masks).sum((1, 2, 3))
  found = {name: x["policy"]["value"] for name, x in result["fidelity"]["measures"].items()}
  assert found["mse"] == pytest.approx(mse.mean(), rel=1e-3)
  assert found["psnr"] == pytest.approx((-10 * np.log10(mse)).mean(), rel=1e-3)
  pair = (2 * x * (1 - masks) - 1 for x in (saved, images))
  assert found["lpips"] == pytest.approx(by_definition("squeeze", *pair).mean(), rel=1e-2)
  score = RewardModel.from_pretrained(world["reward"]).score(saved, images * (1 - masks))[0].mean()
  lines = (tmp_path / "out" / "table.tex").read_text().splitlines()
  cells = [line.removesuffix(r" \\").split(" & ") for line in lines if " & " in line]
  assert [len(row) for row in cells] == [6] * 5 and cells[0][-3:] == ["PSNR", "LPIPS", "MSE"]
  assert cells[1][1:] == cells[4][1:] and cells[2][1:] == cells[3][1:]
  assert float(cells[2][1].strip("$")) == pytest.approx(score, rel=1e-2)
  assert "All policies" in (tmp_path / "out" / "report.html").read_text()
  stored = json.loads((tmp_path / "out" / "eval.json").read_text())
  assert list(stored["rivals"]) == [world["aligned"], world["policy"]]
  (tmp_path / "out" / "batches" / "00000.npz").unlink()
  assert evaluate.evaluate(config, tmp_path / "out") == result


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(world, whole, tmp_path, monkeypatch):
  class Killed(Exception):
    pass

  original, calls = evaluate.examine, []

  def examine_then_die(*args):
    if calls:
      raise Killed
    calls.append(None)
    return original(*args)

  with monkeypatch.context() as patch:
    patch.setattr(evaluate, "examine", examine_then_die)
    with pytest.raises(Killed):
      evaluate.evaluate(config_of(world), tmp_path)
  assert len(list((tmp_path / "batches").glob("*.npz"))) == 1
  assert evaluate.evaluate(config_of(world), tmp_path) == whole[1]
  with pytest.raises(ValueError, match=r"eta was 1\.0, now 0\.5"):
    evaluate.evaluate(config_of(world, eta=0.5), tmp_path)


@pytest.mark.slow
def test_a_signal_keeps_finished_batches_and_damaged_ones_are_computed_again(
  world, whole, tmp_path, monkeypatch, capsys
):
  original = evaluate.examine

  def examine_and_signal(*args):
    signal.raise_signal(signal.SIGINT)
    return original(*args)

  with monkeypatch.context() as patch:
    patch.setattr(evaluate, "examine", examine_and_signal)
    assert evaluate.evaluate(config_of(world), tmp_path) == {}
  assert "stopped; finished batches are saved" in capsys.readouterr().out
  assert interrupts.status == 128 + signal.SIGINT
  (saved,) = (tmp_path / "batches").glob("*.npz")
  saved.write_bytes(saved.read_bytes()[:-100])  # as after a copy that was cut off
  assert evaluate.evaluate(config_of(world), tmp_path) == whole[1]
  assert "computes 1 damaged batches again, the first is 0" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"policy": ""}, r"config\.policy is empty"),
    ({"judges": (), "simulated_preference": False}, r"config\.judges is empty"),
    ({"judges": ("nowhere",)}, "reward 'nowhere': no such reward; give one of prefpaint"),
    ({"judges": ("seam,seem",)}, "reward 'seem': no such reward; did you mean seam?"),
    ({"kind": "brush"}, "none of the 20 prompts of 'test' is of kind brush"),
    ({"kind": "hole"}, "kind is 'hole'; expected one of outpainting"),
    ({"guidance_scale": 3.0}, "guidance_scale is 3, but .* has no texts to guide by; add captions"),
    ({"guidance_scale": 0.5}, "guidance_scale is 0.5; expected"),
    ({"samples_per_prompt": 0}, "samples_per_prompt is 0"),
    ({"samples_per_prompt": 1}, "samples_per_prompt is 1; expected an integer from 2"),
    ({"batch_size": 3}, "batch_size 3 does not divide over 8 devices"),
    ({"rivals": ("a", "b", "a")}, "rivals has a twice; expected different policies; keep one"),
    ({"protocol": "editbench"}, "protocol is 'editbench'; expected one of brushnet"),
    ({"lpips": "vgg@nowhere"}, "lpips is 'vgg@nowhere'; expected one of squeeze, alex"),
    ({"split": "val"}, r"val\.txt: no such list"),
  ],
)
def test_errors_name_the_field_in_one_line(world, tmp_path, change, message):
  with pytest.raises(ValueError, match=message) as error:
    evaluate.evaluate(config_of(world, **change), tmp_path)
  assert "\n" not in str(error.value)
