"""Runs of train_dpo: exact resume, meshes, texts, trust; and other commands on its workdir."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alignment_world import assert_trees_close
from flax.traverse_util import flatten_dict
from preference_world import load_config, write_scored

from prefpaint_jax import testing, train_dpo
from prefpaint_jax.data.images import load_image, save_png, to_bytes
from prefpaint_jax.data.pairs import Pairs
from prefpaint_jax.data.preferences import open_preferences
from prefpaint_jax.evaluation import model_card
from prefpaint_jax.inpainter import Inpainter, open_policy
from prefpaint_jax.models import architectures
from prefpaint_jax.runtime import checkpoint
from prefpaint_jax.runtime.runs import open_run

ROOT = Path(__file__).parents[1]
SMALL = {
  "size": architectures.SIZE,
  "num_iterations": 4,
  "batch_size": 8,
  "gradient_accumulation": 2,
  "learning_rate": 1e-3,
  "warmup_updates": 1,
  "ema_decay": 0.5,
  "checkpoint_every": 3,  # in the middle of an accumulation
  "judge_every": 2,
  "log_every": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
  folder = tmp_path_factory.mktemp("world")
  testing.tiny_inpainter().save_pretrained(folder / "policy")
  testing.tiny_reward().save_pretrained(folder / "reward")
  scores = np.random.default_rng(0).normal(size=(22, 3))
  return {
    "policy": str(folder / "policy"),
    "preferences": str(write_scored(folder / "plain", scores)),
    "with_texts": str(write_scored(folder / "texts", scores, texts=("a door", "", "sky"))),
    "reward": str(folder / "reward"),
  }


def make_config(world: dict[str, str], **fields):
  paths = {name: world[name] for name in ("policy", "preferences")}
  return load_config("dpo", "mini", **(SMALL | paths | fields)).lock()


def lines_of(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------- bad inputs
@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"preferences": ""}, r"config\.preferences is empty; give the folder"),
    ({"preferences": "nowhere"}, "nowhere: no such folder"),
    ({"num_iterations": 5}, r"num_iterations is 5; expected a multiple of gradient_accumulation=2"),
    ({"checkpoint_every": 0}, r"config\.checkpoint_every is 0; expected an integer from 1"),
    ({"loss": "ipo"}, r"config\.loss is 'ipo'; expected one of dpo, capo"),
    ({"beta": 0.0}, r"config\.beta is 0\.0; expected"),
    ({"region": "rim"}, r"config\.region is 'rim'; expected one of all, hole, masked"),
    ({"pairs": "best"}, r"config\.pairs is 'best'; expected one of extremes, all"),
    ({"batch_size": 9}, "batch_size 9 does not divide over 8 devices"),
    ({"lora.init": "x"}, r"lora\.init is x with lora\.rank=0"),
    ({"trust.norm": "novelty"}, r"config\.trust\.norm is 'novelty'; expected one of mahalanobis"),
    ({"trust.norm": "mahalanobis"}, r"config\.reward is empty with trust\.norm='mahalanobis'"),
    ({"reward": "mini"}, r"config\.reward is mini with trust\.norm='none', which reads no reward"),
    ({"size": 15}, "images are 15x15: both sides must be multiples of"),
    ({"batch_size": 64}, r"\d+ pairs are fewer than batch_size 64"),
    (
      {"reward": "seam", "trust.norm": "mahalanobis"},
      r"reward is seam, which has no bound",
    ),
  ],
  ids=lambda x: str(x)[:25],
)
def test_bad_input_is_refused_in_one_line_and_leaves_no_workdir(world, tmp_path, fields, message):
  config = make_config(world)
  config.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=message) as error:
    train_dpo.train_dpo(config, tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


def test_policy_that_is_the_runs_own_workdir_is_refused(world, tmp_path):
  with pytest.raises(ValueError, match=r"the run's own workdir; give another --workdir\Z"):
    train_dpo.train_dpo(make_config(world, policy=str(tmp_path)), tmp_path)


def test_dataset_of_ties_is_refused_in_one_line(tmp_path, world):
  scores = np.repeat(np.arange(8.0)[:, None], 3, axis=1)
  config = make_config(world, preferences=str(write_scored(tmp_path, scores)))
  with pytest.raises(ValueError, match=r"no two candidates of a prompt with different [^\n]*\Z"):
    train_dpo.train_dpo(config, tmp_path / "run")


@pytest.mark.parametrize("preset", ["", "mini", "sd15", "sdxl"])
def test_presets_are_accepted(preset):
  train_dpo.check(load_config("dpo", preset, preferences="x"))


@pytest.mark.slow
def test_accumulated_gradients_step_like_the_batch_of_all_of_them():
  config = load_config("dpo", "mini", gradient_accumulation=3, warmup_updates=2)
  params = {"w": jnp.array([1.0, -2.0])}
  parts = [{"w": jnp.array(x)} for x in ([1.0, 2.0], [0.5, -1.0], [3.0, 0.0])] * 2
  many, whole = (train_dpo.make_optimizer(config) for _ in range(2))
  config.gradient_accumulation = 1
  whole = train_dpo.make_optimizer(config)
  states, found, expected = [many.init(params), whole.init(params)], params, params
  for number, part in enumerate(parts):
    changes, states[0] = many.update(part, states[0], found)
    found = optax.apply_updates(found, changes)
    if number % 3 == 2:
      mean = jax.tree.map(lambda *x: sum(x) / 3, *parts[number - 2 : number + 1])
      changes, states[1] = whole.update(mean, states[1], expected)
      expected = optax.apply_updates(expected, changes)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)
  assert not np.array_equal(found["w"], params["w"])


def test_card_of_an_export_names_loss_and_preferences_and_no_path(tmp_path):
  config = load_config("dpo", "sd15", preferences="/home/me/votes", loss="capo")
  model_card.write_card(tmp_path, model_card.Source(tmp_path, config, 30), "me/aligned")
  card = (tmp_path / "README.md").read_text()
  assert "30 iterations of\nCaPO on the preferences `votes`" in card and "/home" not in card
  assert "| preferences | `votes` |" in card and "| lora.rank | 16 |" in card
  assert "reinforcement" not in card and "{" not in card.split("---")[-1]
  compile(re.search(r"```python\n(.*?)```", card, re.S)[1], "card", "exec")


# ------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def finished(world, tmp_path_factory, compiled_once) -> Path:
  """An uninterrupted run, and in "killed" beside it what a run killed after iteration 3 leaves."""
  folder = tmp_path_factory.mktemp("runs")
  save = checkpoint.Checkpoints.save

  def save_and_copy(self, step, *rest):
    save(self, step, *rest)
    if step == 3:
      self.wait()
      shutil.copytree(folder / "whole", folder / "killed")

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "save", save_and_copy)
    train_dpo.train_dpo(make_config(world), folder / "whole")
  return folder / "whole"


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(world, finished):
  train_dpo.train_dpo(make_config(world), finished.parent / "killed")
  both = [finished, finished.parent / "killed"]
  assert lines_of(both[0]) == lines_of(both[1])
  for tree in ("params", "average", "opt_state"):
    trees = [open_run(str(workdir))[1].load(tree, 4) for workdir in both]
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.slow
def test_metrics_begin_at_log_2_and_hold_the_validation_split(finished):
  lines = lines_of(finished)
  assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
  for line in lines[:2]:  # the first update comes after two iterations
    # Without remat the program rounds the two forward passes differently; beta multiplies it.
    np.testing.assert_allclose(line["dpo/loss"], np.log(2), atol=1e-3)
  assert ["validation/implicit_accuracy" in line for line in lines] == [False, True] * 2
  assert lines[3]["dpo/loss"] != lines[0]["dpo/loss"]


def command(name: str, *arguments: object) -> str:
  """Runs a command in a new process; returns its standard output."""
  line = [sys.executable, "-m", f"prefpaint_jax.{name}", *map(str, arguments)]
  run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  return run.stdout


@pytest.mark.slow
def test_workdir_holds_the_policy_and_inpaint_and_export_open_it(finished, tmp_path):
  trained = open_run(str(finished))[1].load("average")
  policy = open_policy(str(finished))
  jax.tree.map(np.testing.assert_array_equal, policy.params["unet"], trained)
  assert policy.modules.mask_latents == "cells"
  command("export", f"--workdir={finished}", f"--output={tmp_path / 'out'}")
  exported = Inpainter.from_pretrained(tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, exported.params["unet"], trained)
  image, mask = (x[0] for x in testing.tiny_prompts(1))
  save_png(tmp_path / "i.png", to_bytes(image))
  save_png(tmp_path / "m.png", to_bytes(mask[..., 0]))
  flags = f"--image={tmp_path}/i.png", f"--mask={tmp_path}/m.png", "--num_steps=2"
  for name in (finished, tmp_path / "out"):
    command("inpaint", f"--model={name}", f"--output={tmp_path / name.name}.png", *flags)
  np.testing.assert_array_equal(*(load_image(tmp_path / f"{x}.png") for x in ("whole", "out")))


@pytest.mark.slow
def test_adapters_of_a_run_on_a_run_are_exported_and_added_to_its_base(finished, world, tmp_path):
  fields = {"lora.rank": 2, "num_iterations": 2, "ema_decay": 0.0, "judge_every": 0}
  config = make_config(world, policy=str(finished), preferences=world["with_texts"], **fields)
  train_dpo.train_dpo(config, tmp_path / "lora")
  assert json.loads((tmp_path / "lora" / "checkpoints.json").read_text()) == {"policy": 4}
  assert not any(name.startswith("validation") for name in lines_of(tmp_path / "lora")[1])
  file = tmp_path / "adapters.safetensors"
  command("export", f"--workdir={tmp_path / 'lora'}", "--lora=diffusers", f"--output={file}")
  base, merged = open_policy(str(finished)), open_policy(str(tmp_path / "lora"))
  base.add_lora(file)
  assert_trees_close(base.params["unet"], merged.params["unet"], 1e-6)


@pytest.mark.slow
def test_sdxl_with_texts_and_trust_trains_its_adapters(world, tmp_path, compiled_once):
  testing.tiny_inpainter(generation="xl").save_pretrained(tmp_path / "policy")
  fields = {
    "policy": str(tmp_path / "policy"),
    "preferences": world["with_texts"],
    "pairs": "all",
    "loss": "capo",
    "region": "masked",
    "num_iterations": 2,
    "lora.rank": 2,
    "reward": world["reward"],
    "trust.norm": "mahalanobis",
    "ema_decay": 0.0,
  }
  adapters = train_dpo.train_dpo(make_config(world, **fields), tmp_path / "run")
  ups = [x for name, x in flatten_dict(adapters, sep="/").items() if name.endswith("/up")]
  assert ups and all(np.abs(x).max() > 0 for x in ups)
  line = lines_of(tmp_path / "run")[-1]
  assert line["trust/std"] > 0 and 0 < line["trust/mean"] < np.exp(0.7)
  # Margins are about 0 at the start: the loss is the mean of the squared gaps.
  gaps = [
    pair["score_gap"] for pair in Pairs(open_preferences(world["with_texts"], "train"), "all")
  ]
  assert 0 < lines_of(tmp_path / "run")[0]["dpo/loss"] < 1.5 * np.max(gaps) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"mesh.fsdp": 8}, {"mesh.data": 2, "mesh.fsdp": 4}])
def test_meshes_give_the_same_run(world, finished, tmp_path, fields):
  train_dpo.train_dpo(make_config(world, **fields), tmp_path / "run")
  for ours, theirs in zip(lines_of(tmp_path / "run"), lines_of(finished), strict=True):
    for name, value in theirs.items():
      np.testing.assert_allclose(ours[name], value, rtol=2e-3, atol=2e-3, err_msg=name)
