"""Folders of Stable Diffusion XL that cannot work are refused in one line that names the part."""

import json
import shutil

import pytest

from prefpaint_jax import testing
from prefpaint_jax.inpainter import Inpainter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pipeline")
  testing.tiny_inpainter(generation="xl").save_pretrained(folder)
  return folder


FAULTS = {
  "no second encoder": (["text_encoder_2"], {}, "text_encoder_2/config.json"),
  "no weights": (["text_encoder_2/model.safetensors"], {}, "no model.safetensors"),
  "no second tokenizer": (["tokenizer_2"], {}, "tokenizer_2: no files; copy the tokenizer_2"),
  "refiner": (
    [],
    {"model_index.json": {"requires_aesthetics_score": True}},
    "requires_aesthetics_score is true",
  ),
  "four channels": (
    [],
    {"unet/config.json": {"in_channels": 4}},
    "4 input channels; expected 9; use an inpainting checkpoint",
  ),
  "other encoder": (
    [],
    {"text_encoder_2/config.json": {"hidden_size": 20}},
    "cross_attention_dim of the UNet is 28; expected 32, the hidden_size of text_encoder and",
  ),
  "other projection": (
    [],
    {"text_encoder_2/config.json": {"projection_dim": 8}},
    "projection_class_embeddings_input_dim of the UNet is 34; expected 32",
  ),
  "unet of another model": (
    [],
    {"unet/config.json": {"addition_embed_type": None}},
    "addition_embed_type of the UNet is None",
  ),
}


@pytest.mark.parametrize(("removed", "changes", "message"), FAULTS.values(), ids=FAULTS)
def test_bad_folder_is_refused_in_one_line(folder, tmp_path, removed, changes, message):
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  for name in removed:
    path = tmp_path / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  for name, fields in changes.items():
    config = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(config | fields))
  with pytest.raises(ValueError) as error:
    Inpainter.from_pretrained(tmp_path)
  assert message in str(error.value) and "\n" not in str(error.value)
