"""Whole runs with texts, guidance and several rewards: they resume exactly, on every mesh."""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from prefpaint_jax import testing
from prefpaint_jax.rewards.objective import label_rewards
from prefpaint_jax.train import train

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[1]
get_config = runpy.run_path(str(ROOT / "configs" / "rl.py"))["get_config"]

REWARDS = """
import numpy as np

def length(images, masks, texts):
  return texts * (images * masks).mean((1, 2, 3))

length.tokenize = lambda texts: np.array([len(text) for text in texts], np.float32)

def grey(images, texts):
  assert len(images) == len(texts)
  return images.std(axis=-1).mean((1, 2))

grey.host = True
"""


def write_world(folder: Path, generation) -> dict[str, str]:
  """Returns the fields of a tiny run with texts."""
  fields = testing.write_tiny_world(folder, train=16, test=8, generation=generation)
  ids = [path.name.removesuffix("_mask.png") for path in Path(fields["prompts"]).glob("masks/*")]
  texts = [{"id": id_, "text": ["warm", "a cold sky", ""][i % 3]} for i, id_ in enumerate(ids)]
  captions = Path(fields["prompts"]) / "captions.jsonl"
  captions.write_text("".join(json.dumps(row) + "\n" for row in texts))
  (folder / "mine.py").write_text(REWARDS)
  names = f"{folder}/mine.py:length*0.5,{fields['reward']},{folder}/mine.py:grey"
  judges = f"{folder}/mine.py:length", fields["reward"]
  return fields | {"reward": names, "judges": judges}


def run(world: dict[str, str], workdir: Path, **changes):
  config = get_config()
  fields = {
    "num_iterations": 2,
    "batch_size": 8,
    "samples_per_prompt": 2,
    "combine": "gdpo",
    "updates_per_iteration": 1,
    "guidance_scale": 2.0,
    "text_dropout": 0.2,
    "checkpoint_every": 1,
    "eval_every": 1,
    "eval_prompts": 8,
    "num_samples": 8,
    "sample_every": 0,
    "ema_decay": 0.5,
  }
  config.update_from_flattened_dict(testing.tiny_training(world) | fields | changes)
  state = train(config.lock(), workdir)
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  timed = ("time/", "images_per_s")
  return jax.device_get(state), [
    {name: value for name, value in line.items() if not name.startswith(timed)} for line in lines
  ]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
  return write_world(tmp_path_factory.mktemp("world"), "xl")


@pytest.fixture(scope="module")
def measured() -> dict[tuple[int, int], list[dict[str, float]]]:
  """The metrics of the runs so far, by the sizes of their meshes."""
  return {}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1), (4, 2)])
def test_resumed_run_with_texts_equals_an_uninterrupted_one_and_that_of_another_mesh(
  sizes, world, measured, tmp_path, monkeypatch
):
  if sizes == (1, 1):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
  mesh = dict(zip(("mesh.data", "mesh.fsdp"), sizes, strict=True))
  whole, lines = run(world, tmp_path / "whole", **mesh)
  run(world, tmp_path / "parts", num_iterations=1, **mesh)
  resumed, again = run(world, tmp_path / "parts", **mesh)
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  assert again == lines
  assert lines[1]["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
  assert lines[1]["ppo/grad_norm"] > 0
  (label,) = label_rewards([world["reward"].split(",")[1]])
  means = {name: lines[1][f"reward/{name}/mean"] for name in ("length", label, "grey")}
  total = 0.5 * means["length"] + means[label] + means["grey"]
  assert lines[1]["reward/mean"] == pytest.approx(total, rel=1e-4)
  judged = {name for name in lines[1] if name.startswith("held_out/judge/")}
  assert {"held_out/judge/length_gain", f"held_out/judge/{label}_gain/low"} <= judged
  assert "referee/hacking" in lines[1]
  assert means["grey"] > 0 and means["length"] > 0
  measured[sizes] = lines
  for other in measured.values():
    for one, same in zip(lines, other, strict=True):
      assert one.keys() == same.keys()
      exact = {name: x for name, x in one.items() if name.startswith(("reward/", "trust/"))}
      assert exact == pytest.approx({name: same[name] for name in exact}, rel=1e-3, abs=1e-4)
