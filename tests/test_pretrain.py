"""Denoising training: makes a pipeline from random parameters and resumes exactly."""

import importlib.util
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from prefpaint_jax import pretrain, testing
from prefpaint_jax.data.images import save_png
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models import architectures
from prefpaint_jax.runtime import checkpoint

CONFIG = Path(__file__).parent.parent / "configs" / "pretrain.py"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp("photos")
  for i, image in enumerate(testing.tiny_prompts(3, size=40)[0]):
    save_png(folder / f"{i}.png", np.round(255 * image).astype(np.uint8))
  return str(folder)


def test_bad_inputs_and_outputs_are_refused_before_networks_are_made(photos, tmp_path, monkeypatch):
  monkeypatch.setattr(pretrain, "new_inpainter", lambda config: pytest.fail("made networks"))
  config = tiny_config(str(tmp_path / "none"))
  with pytest.raises(ValueError, match="none"):
    pretrain.pretrain(config, tmp_path / "run")
  config = tiny_config(photos)
  workdir = tmp_path / "foreign"
  (workdir / "pipeline").mkdir(parents=True)
  (workdir / "config.json").write_text('{"command": "pretrain"}')
  (workdir / "pipeline" / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"pipeline is not empty, it has notes\.txt"):
    pretrain.pretrain(config, workdir)


def tiny_config(photos: str):
  spec = importlib.util.spec_from_file_location("pretrain_config", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config("mini")
  architecture = architectures.tiny_configs()
  with config.unlocked():
    config.architecture = architecture
  config.update_from_flattened_dict(
    {
      "pictures": photos,
      "size": architectures.SIZE,
      "crop": (8, 20),
      "log_every": 1,
      "checkpoint_every": 2,
      "warmup_iterations": 1,
      "vae.iterations": 2,
      "vae.batch_size": 8,
      "unet.iterations": 4,
      "unet.batch_size": 8,
    }
  )
  return config


@pytest.mark.slow
def test_killed_and_resumed_training_writes_the_pipeline_of_an_uninterrupted_one(
  compiled_once, tmp_path, photos, monkeypatch
):
  save, saved = checkpoint.Checkpoints.save, []

  def save_and_copy(self, step, *rest):
    save(self, step, *rest)
    saved.append(step)
    if saved == [2, 2]:  # the VAE's last checkpoint and the UNet's first, as after a kill
      self.wait()
      shutil.copytree(tmp_path / "whole", tmp_path / "killed")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "save", save_and_copy)
    pretrain.pretrain(tiny_config(photos), tmp_path / "whole")
  pretrain.pretrain(tiny_config(photos), tmp_path / "killed")

  whole, resumed = (
    Inpainter.from_pretrained(tmp_path / name / "pipeline") for name in ("whole", "killed")
  )
  jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
  assert whole.configs["vae"]["scaling_factor"] == resumed.configs["vae"]["scaling_factor"] != 1.0


def test_empty_folder_name_raises_an_error(tmp_path):
  with pytest.raises(ValueError, match=r"config\.pictures is empty"):
    pretrain.pretrain(tiny_config(""), tmp_path)
