"""Runs with LoRA: adapters go out by export, and in by inpaint and lora.init."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from prefpaint_jax import testing
from prefpaint_jax.align.run import outline
from prefpaint_jax.align.settings import settings_from
from prefpaint_jax.data.images import load_image, save_png, to_bytes
from prefpaint_jax.inpainter import Inpainter, open_policy
from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.checkpoint import Checkpoints
from prefpaint_jax.runtime.workdir import open_workdir
from prefpaint_jax.train import train

ROOT = Path(__file__).parents[1]
RANK, TARGETS = 2, "attn1/to_(q|v)|conv_in/"
STANDARD = "pytorch_lora_weights.safetensors"
get_config = runpy.run_path(str(ROOT / "configs" / "rl.py"))["get_config"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
  return testing.write_tiny_world(tmp_path_factory.mktemp("world"))


def make_config(world: dict[str, str], **changes) -> ConfigDict:
  config = get_config()
  fields = {"num_iterations": 1, "checkpoint_every": 1, "sample_every": 0, "ema_decay": 0.5}
  fields |= {"lora.rank": RANK, "lora.targets": TARGETS, "learning_rate": 0.1}
  config.update_from_flattened_dict(testing.tiny_training(world) | fields | changes)
  return config.lock()


def run_command(name: str, *arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", f"prefpaint_jax.{name}", *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def load_params(workdir: Path, name: str = "params", step: int | None = None):
  return Checkpoints(workdir / "checkpoints").load(name, step)


@pytest.fixture(scope="module")
def workdir(world, compiled_once, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("lora") / "run"
  train(make_config(world), workdir)
  return workdir


@pytest.fixture(scope="module")
def files(workdir) -> dict[str, Path]:
  """The adapters of the run in both layouts, in a folder and in a file."""
  outputs = {"diffusers": workdir.parent / "folder", "kohya": workdir.parent / "a.safetensors"}
  for layout, output in outputs.items():
    ended = run_command("export", f"--workdir={workdir}", f"--lora={layout}", f"--output={output}")
    assert ended.returncode == 0, ended.stderr
  return {"diffusers": outputs["diffusers"] / STANDARD, "kohya": outputs["kohya"]}


def test_plan_and_benchmark_take_the_field_and_read_no_file(world):
  config = make_config(world, **{"lora.init": "nowhere.safetensors"})
  run, *_ = outline(config, sharding.make_mesh(1, 1, jax.devices()[:1]))
  assert run.parameters["adapters"] > 0


def test_file_of_adapters_without_a_rank_is_refused():
  config = get_config()
  config.lora.init = "a.safetensors"
  with pytest.raises(ValueError, match=r"lora.init is a.safetensors with lora.rank=0; expected"):
    settings_from(config)


def test_run_of_an_earlier_version_which_had_no_file_of_adapters_is_resumed(world, tmp_path):
  config = make_config(world)
  earlier = ConfigDict(config.to_dict())
  del earlier.lora["init"]
  with open_workdir(earlier, tmp_path, "train", ["checkpoints"]):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  with open_workdir(config, tmp_path, "train", ["checkpoints"]):
    pass


@pytest.mark.slow
def test_exported_adapters_are_the_moving_average_and_give_the_policy_of_the_run(
  world, workdir, files
):
  policy = open_policy(str(workdir)).params["unet"]
  for file in files.values():
    ours = Inpainter.from_pretrained(world["policy"])
    ours.add_lora(file)
    jax.tree.map(np.testing.assert_array_equal, ours.params["unet"], policy)
  assert "unet.conv_in.lora_A.weight" in load_file(files["diffusers"])
  assert "lora_unet_conv_in.alpha" in load_file(files["kohya"])


@pytest.mark.slow
def test_export_of_adapters_replaces_no_file_and_needs_a_run_with_adapters(
  world, workdir, files, tmp_path
):
  before = files["kohya"].read_bytes()
  for output in (files["kohya"], files["diffusers"].parent):
    ended = run_command("export", f"--workdir={workdir}", "--lora=kohya", f"--output={output}")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "exists; exports replace no file; name a new one" in ended.stderr
  assert files["kohya"].read_bytes() == before
  without = tmp_path / "without"
  shutil.copytree(workdir, without)
  text = (without / "config.json").read_text()
  (without / "config.json").write_text(text.replace(f'"rank": {RANK}', '"rank": 0'))
  output = tmp_path / "b.safetensors"
  ended = run_command("export", f"--workdir={without}", "--lora=kohya", f"--output={output}")
  assert ended.returncode == 1 and ended.stderr.count("\n") == 1
  assert "a run without LoRA adapters (lora.rank is 0)" in ended.stderr and not output.exists()


@pytest.mark.slow
def test_inpaint_adds_adapters_to_a_model(world, workdir, files, tmp_path):
  images, masks = testing.tiny_prompts(1)
  save_png(tmp_path / "image.png", to_bytes(images[0]))
  save_png(tmp_path / "mask.png", to_bytes(masks[0, ..., 0]))
  inputs = [f"--{name}={tmp_path}/{name}.png" for name in ("image", "mask")]
  samples = {}
  for name, arguments in {
    "base": [f"--model={world['policy']}"],
    "none": [f"--model={world['policy']}", f"--lora={files['kohya']}:0"],
    "file": [f"--model={world['policy']}", f"--lora={files['kohya']}"],
  }.items():
    output = tmp_path / f"{name}.png"
    ended = run_command("inpaint", *inputs, *arguments, "--num_steps=3", f"--output={output}")
    assert ended.returncode == 0, ended.stderr
    samples[name] = load_image(output)
  np.testing.assert_array_equal(samples["none"], samples["base"])
  assert np.abs(samples["file"] - samples["base"]).max() > 0.01


@pytest.mark.slow
def test_run_begins_with_the_adapters_of_a_file_and_resumes_without_it(
  world, workdir, files, tmp_path
):
  file = shutil.copy(files["kohya"], tmp_path / "begin.safetensors")
  still = {"learning_rate": 0.0, "weight_decay": 0.0, "mesh.fsdp": 4, "lora.init": str(file)}
  train(make_config(world, **still), tmp_path / "run")
  begun = load_params(tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, begun, load_params(workdir, "ema"))
  file.unlink()
  train(make_config(world, **still | {"num_iterations": 2}), tmp_path / "run")
  assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 2
  jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "run"), begun)
  with pytest.raises(ValueError, match=r"begin.safetensors: not found"):
    train(make_config(world, **still), tmp_path / "new")
  assert not (tmp_path / "new").exists()
