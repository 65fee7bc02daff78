"""Tests of reading runs: one checkpoint for all starts of a command."""

import json

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from prefpaint_jax.runtime.checkpoint import BEST, Checkpoints
from prefpaint_jax.runtime.runs import open_run, pin_steps
from prefpaint_jax.runtime.workdir import open_workdir


@pytest.fixture
def run(tmp_path):
  """Makes a run of `train` with checkpoints 1 and 2, of which 1 is the best."""
  with open_workdir(ConfigDict({"keep_best": "reward/mean"}), tmp_path / "run", "train", ()):
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
