"""Tests of reading runs: one checkpoint for all starts of a command."""

import json
import math

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from prefpaint_jax.runtime.checkpoint import BEST, Checkpoints
from prefpaint_jax.runtime.runs import open_run, pin_steps
from prefpaint_jax.runtime.workdir import open_workdir


@pytest.fixture
def run(tmp_path):
  """Makes a run of `train` with checkpoints 1 and 2, of which 1 is the best."""
  config = ConfigDict({"policy": "mini", "ema_decay": 0.0, "keep_best": "reward/mean"})
  with open_workdir(config, tmp_path / "run", "train", ()):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", best="reward/mean")
    for step in (1, 2):
      checkpoints.save(step, {"w": jnp.ones(2)}, None, {}, {"reward/mean": -step})
    checkpoints.close()
  return str(tmp_path / "run")


@pytest.mark.parametrize(("asked", "step"), [(None, 2), ("1", 1), (1, 1), (BEST, 1)])
def test_step_stays_the_same_when_training_goes_on(run, tmp_path, asked, step):
  file = tmp_path / "checkpoints.json"
  assert pin_steps(file, {"policy": (run, asked), "baseline": ("mini", None)}) == {
    "policy": step,
    "baseline": None,
  }
  checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", best="reward/mean")
  checkpoints.save(3, {"w": jnp.ones(2)}, None, {}, {"reward/mean": 0.0})
  checkpoints.close()
  assert pin_steps(file, {"policy": (run, asked)})["policy"] == step
  assert json.loads(file.read_text()) == {"policy": step, "baseline": None}


def test_step_that_a_run_does_not_have_is_named(run, tmp_path):
  with pytest.raises(ValueError, match=r"no checkpoint of step 7; complete ones: \[1, 2\]"):
    pin_steps(tmp_path / "checkpoints.json", {"policy": (run, "7")})
  assert not (tmp_path / "checkpoints.json").exists()


def test_workdir_of_another_command_is_no_run(tmp_path):
  with open_workdir(ConfigDict(), tmp_path / "eval", "evaluate", ()):
    pass
  with pytest.raises(ValueError, match="eval is the workdir of evaluate; give one of train"):
    open_run(str(tmp_path / "eval"))
  assert open_run(str(tmp_path)) is None


DAMAGED = [  # content of a config.json, and the start of the error after its name
  ([1], " holds a JSON value of type list; expected an object"),
  ({"policy": 7}, ": policy is 7; expected a text"),
  ({"policy": {"a": 1}}, ": policy is {'a': 1}; expected a text"),
  ({"lora": {"rank": -3}}, ": lora.rank is -3; expected an integer from 0 to 1024"),
  ({"lora": [8]}, ": lora is [8]; expected an object of fields"),
  ({"ema_decay": "much"}, ": ema_decay is 'much'; expected a number"),
  ({"keep_best": None}, ": keep_best is None; expected a text"),
  ({"mask_latents": "all"}, ": mask_latents is 'all'; expected one of"),
  ({"policy": None, "seed": math.nan}, ": seed is nan; expected an integer"),
  ({"seed": 0}, ": no field 'policy'"),
  ({"a.b": 1}, ": "),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED, ids=lambda x: str(x)[:30])
def test_damaged_config_of_a_run_is_one_line_with_file_and_field(tmp_path, content, message):
  file = tmp_path / "config.json"
  file.write_text(json.dumps({"command": "train"} | content if content != [1] else content))
  with pytest.raises(ValueError) as error:
    open_run(str(tmp_path))
  assert str(error.value).startswith(f"{file}{message}") and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1], {"policy": -1}, {"policy": "x"}, {"policy": [2]}])
def test_damaged_choice_of_checkpoints_is_one_line_with_the_file(run, tmp_path, content):
  file = tmp_path / "checkpoints.json"
  file.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r"checkpoints\.json.*expected an ") as error:
    pin_steps(file, {"policy": (run, None)})
  assert "\n" not in str(error.value)
