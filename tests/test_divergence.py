"""An alignment that diverges stops with one line before it saves."""

import json
import runpy
from pathlib import Path

import optax
import pytest

from prefpaint_jax import testing
from prefpaint_jax.align import run
from prefpaint_jax.runtime.checkpoint import Checkpoints
from prefpaint_jax.train import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]
get_config = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "rl.py"))["get_config"]


@pytest.mark.parametrize(("rate", "iterations"), [(float("nan"), 1), (1e30, 1), (1e10, 4)])
def test_diverged_run_stops_before_it_saves(rate, iterations, tmp_path, monkeypatch):
  config = get_config()
  changes = {"num_iterations": iterations, "checkpoint_every": 1, "sample_every": 0}
  world = testing.write_tiny_world(tmp_path / "world")
  config.update_from_flattened_dict(testing.tiny_training(world) | changes)
  monkeypatch.setattr(run, "optimizer_from", lambda config: optax.sgd(rate))
  with pytest.raises(ValueError, match=r"\Aiteration \d: [^\n]*finite[^\n]*\Z"):
    train(config.lock(), tmp_path / "run")
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[0])["iteration"] == 1
  latest = Checkpoints(tmp_path / "run" / "checkpoints").latest()
  assert latest is None or latest < len(lines)
