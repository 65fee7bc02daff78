"""Damaged, foreign and unusual model folders: each is loaded rightly or refused in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prefpaint_jax import testing
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.reward import RewardModel
from prefpaint_jax.weights import folder as weights

STEM = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def world(inpainter, tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("good")
  inpainter.save_pretrained(folder / "policy")
  testing.tiny_reward().save_pretrained(folder / "reward")
  return folder


def of_json(file: str, **changes):
  def spoil(folder: Path):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return spoil


def of_text(file: str, content: str | bytes):
  content = content.encode() if isinstance(content, str) else content
  return lambda folder: (folder / file).write_bytes(content)


def of_tensors(file: str, change):
  def spoil(folder: Path):
    tensors = load_file(folder / file)
    name = sorted(tensors)[0]
    tensors[name] = change(tensors[name].copy())
    save_file(tensors, folder / file)

  return spoil


def with_one(value):
  def change(tensor):
    tensor.flat[0] = value
    return tensor

  return change


def truncated(file: str):
  return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-7])


def indexed(weight_map):
  def spoil(folder: Path):
    (folder / "unet" / STEM).unlink()
    index = {"weight_map": weight_map}
    (folder / "unet" / f"{STEM}.index.json").write_text(json.dumps(index))

  return spoil


UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
POLICIES = [
  (of_json("model_index.json", _class_name="StableDiffusion3InpaintPipeline"), "3Inpaint"),
  (of_json("model_index.json", _class_name="StableDiffusionXLInpaintPipeline"), "text_encoder_2"),
  (of_json("model_index.json", _class_name="FluxFillPipeline"), "FluxFillPipeline: not supported"),
  (of_json("model_index.json", _class_name=["x"]), "['x']: not supported"),
  (of_text("model_index.json", "[]"), "expected a JSON object"),
  (of_text("model_index.json", "{"), "not valid JSON"),
  (of_text(UNET, ""), "not valid JSON"),
  (of_text(UNET, b"\xff\xfe"), "not valid JSON"),
  (of_text(UNET, "[" * 100_000), "not valid JSON"),
  (of_json(UNET, in_channels="9"), "in_channels is '9'; expected an integer"),
  (of_json(UNET, in_channels=4), "expected 9"),
  (of_json(UNET, block_out_channels=None), "expected a list"),
  (of_json(UNET, quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
  (of_json(VAE, quantization_config={"quant_method": "gguf"}), "quantization_config"),
  (of_json(VAE, _class_name="AutoencoderTiny"), "_class_name is 'AutoencoderTiny'"),
  (of_json(TEXT, architectures=["T5EncoderModel"]), "architectures"),
  (of_json(TEXT, hidden_size=16), "cross_attention_dim"),
  (of_json(TEXT, vocab_size=600), "not [600, 12]"),
  (of_json("scheduler/scheduler_config.json", _class_name="LCMScheduler"), "LCMScheduler"),
  (of_json("scheduler/scheduler_config.json", beta_start="x"), "beta_start is 'x'"),
  (of_json("scheduler/scheduler_config.json", trained_betas={"a": 1}), "trained_betas"),
  (of_tensors(f"unet/{STEM}", lambda x: x.astype(np.int8)), "is int8"),
  (of_tensors(f"unet/{STEM}", with_one(np.nan)), "not finite"),
  (of_tensors(f"vae/{STEM}", with_one(np.inf)), "not finite"),
  (of_tensors("text_encoder/model.safetensors", with_one(-np.inf)), "not finite"),
  (truncated(f"unet/{STEM}"), "truncated"),
  (indexed({"conv_in.bias": "../vae/" + STEM}), "weight_map"),
  (indexed({"conv_in.bias": "/etc/passwd"}), "weight_map"),
  (indexed({"conv_in.bias": 3}), "weight_map"),
  (indexed(["a.safetensors"]), "weight_map"),
  (indexed({"conv_in.bias": "none.safetensors"}), "not found"),
  (lambda folder: (folder / UNET).unlink(), "not found"),
  (lambda folder: shutil.rmtree(folder / "tokenizer"), "no files"),
]


@pytest.mark.parametrize("spoil, message", POLICIES)
def test_bad_pipeline_is_refused_in_one_line_that_names_the_fault(world, tmp_path, spoil, message):
  folder = tmp_path / "model"
  shutil.copytree(world / "policy", folder)
  spoil(folder)
  with pytest.raises(ValueError) as error:
    Inpainter.from_pretrained(folder)
  assert message in str(error.value) and "\n" not in str(error.value)


def with_lambda(value: str):
  def spoil(folder: Path):
    path = folder / "bound.safetensors"
    save_file(load_file(path), path, {"lam": value})

  return spoil


@pytest.mark.parametrize(
  "spoil, message",
  [
    (with_lambda("nan"), "lam is nan"),
    (with_lambda("-1"), "lam is -1"),
    (of_tensors("model.safetensors", with_one(np.nan)), "not finite"),
    (of_json("config.json", scale=0), "scale is 0.0"),
    (of_json("config.json", vision=3), "vision is 3"),
    (truncated("model.safetensors"), "truncated"),
  ],
)
def test_bad_reward_model_is_refused_in_one_line(world, tmp_path, spoil, message):
  folder = tmp_path / "model"
  shutil.copytree(world / "reward", folder)
  spoil(folder)
  with pytest.raises(ValueError) as error:
    RewardModel.from_pretrained(folder)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_torch_file_of_parameters_loads(tmp_path):
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  weight = torch.nn.Parameter(torch.randn(3, 2))
  torch.save({"weight": weight}, tmp_path / "model.bin")
  loaded = weights.load_file(tmp_path / "model.bin")["weight"]
  np.testing.assert_array_equal(loaded, weight.detach().numpy())


def test_eight_bit_floats_are_refused_by_name(tmp_path):
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  from safetensors import torch as files

  tensors = {"weight": torch.zeros(3).to(torch.float8_e4m3fn)}
  files.save_file(tensors, tmp_path / "model.safetensors")
  torch.save(tensors, tmp_path / "model.bin")
  with pytest.raises(ValueError, match=r"weight is F8_E4M3; expected float32"):
    weights.load_file(tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"holds torch.float8_e4m3fn; .*quantised"):
    weights.load_file(tmp_path / "model.bin")


def test_released_normalisation_shifts_and_scales_the_scores(world):
  images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
  plain, _ = RewardModel.from_pretrained(world / "reward").score(images, images)
  model = RewardModel.from_pretrained(world / "reward", shift=0.4064, scale=2.3021)
  np.testing.assert_allclose(model.score(images, images)[0], (plain - 0.4064) / 2.3021, rtol=1e-5)
