"""Checkpoints in a single file open as stock `from_single_file` opens them, or are refused."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from prefpaint_jax.inpainter import Inpainter, open_policy
from prefpaint_jax.models.architectures import random_params, read_architecture
from prefpaint_jax.models.assembly import make_modules
from prefpaint_jax.models.tokenizer import byte_tokenizer
from prefpaint_jax.weights import compvis
from prefpaint_jax.weights import folder as weights
from prefpaint_jax.weights.names import to_torch

pytestmark = pytest.mark.usefixtures("quick_compilation")

LEVELS, LAYERS = 2, 1  # of the tiny networks


def configs_of(generation: int) -> dict[str, dict]:
  """Configs of Stable Diffusion 1 or 2 with the smallest widths that have their head sizes."""
  second = generation == 2
  width = 64 if second else 32
  unet = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 9,
    "out_channels": 4,
    "block_out_channels": [width, 2 * width],
    "layers_per_block": LAYERS,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    # Stock tells version 2 by this width of the text encoder.
    "cross_attention_dim": 1024 if second else 64,
    "attention_head_dim": [1, 2] if second else 8,
    "use_linear_projection": second,
  }
  vae = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * LEVELS,
    "up_block_types": ["UpDecoderBlock2D"] * LEVELS,
    "layers_per_block": LAYERS,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
  }
  text = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 514,
    "hidden_size": 1024 if second else 64,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 16 if second else 1,
    "max_position_embeddings": 77,
    "hidden_act": "gelu" if second else "quick_gelu",
    "projection_dim": 512 if second else 768,
    "eos_token_id": 2,
  }
  scheduler = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "prediction_type": "epsilon",
  }
  return {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": scheduler}


# From the names of diffusers and transformers to those of CompVis and OpenCLIP.
RESNET = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}
UNET = {
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "conv_in": "input_blocks.0.0",
  "conv_norm_out": "out.0",
  "conv_out": "out.2",
  "down_blocks.0.resnets.0": "input_blocks.1.0",
  "down_blocks.0.attentions.0": "input_blocks.1.1",
  "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
  "down_blocks.1.resnets.0": "input_blocks.3.0",
  "mid_block.resnets.0": "middle_block.0",
  "mid_block.attentions.0": "middle_block.1",
  "mid_block.resnets.1": "middle_block.2",
  "up_blocks.0.resnets.0": "output_blocks.0.0",
  "up_blocks.0.resnets.1": "output_blocks.1.0",
  "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
  "up_blocks.1.resnets.0": "output_blocks.2.0",
  "up_blocks.1.attentions.0": "output_blocks.2.1",
  "up_blocks.1.resnets.1": "output_blocks.3.0",
  "up_blocks.1.attentions.1": "output_blocks.3.1",
}
VAE = {
  "encoder.down_blocks.0.resnets.": "encoder.down.0.block.",
  "encoder.down_blocks.1.resnets.": "encoder.down.1.block.",
  "down_blocks.0.downsamplers.0": "down.0.downsample",
  "decoder.up_blocks.0.resnets.": "decoder.up.1.block.",
  "decoder.up_blocks.1.resnets.": "decoder.up.0.block.",
  "up_blocks.0.upsamplers.0": "up.1.upsample",
  "mid_block.resnets.0": "mid.block_1",
  "mid_block.resnets.1": "mid.block_2",
  "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
  "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
  "mid_block.attentions.0.to_": "mid.attn_1.",
  "conv_shortcut": "nin_shortcut",
  "conv_norm_out": "norm_out",
}
OPEN_CLIP = {
  "text_model.encoder.layers.": "transformer.resblocks.",
  "text_model.embeddings.position_embedding.weight": "positional_embedding",
  "text_model.embeddings.token_embedding": "token_embedding",
  "text_model.final_layer_norm": "ln_final",
  "self_attn": "attn",
  "layer_norm": "ln_",
  "fc1": "c_fc",
  "fc2": "c_proj",
}


def replaced(name: str, table: dict[str, str]) -> str:
  for new, old in table.items():
    name = name.replace(new, old)
  return name


def compvis_tensors(inpainter: Inpainter, generation: int) -> dict[str, np.ndarray]:
  """The tensors of a pipeline as CompVis and Stability AI wrote theirs, with those of training."""
  tensors = {}
  for name, x in to_torch(inpainter.params["unet"]).items():
    new = replaced(name, UNET)
    new = replaced(new, RESNET) if "resnets" in name else new
    tensors[f"model.diffusion_model.{new}"] = x
  for name, x in to_torch(inpainter.params["vae"]).items():
    x = x[..., None, None] if re.search(r"attentions.*to_.*weight", name) else x
    tensors[f"first_stage_model.{replaced(name, VAE)}"] = x
  text = to_torch(inpainter.params["text_encoder"])
  if generation == 1:
    tensors |= {f"cond_stage_model.transformer.{name}": x for name, x in text.items()}
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    tensors[ids] = np.arange(77)[None]
  else:
    prefix = "cond_stage_model.model."
    for i in range(2):
      attention = f"text_model.encoder.layers.{i}.self_attn"
      for leaf in ("weight", "bias"):
        fused = [text.pop(f"{attention}.{x}_proj.{leaf}") for x in "qkv"]
        text[f"{attention}.in_proj_{leaf}"] = np.concatenate(fused)
    tensors |= {prefix + replaced(name, OPEN_CLIP): x for name, x in text.items()}
    tensors[f"{prefix}transformer.resblocks.23.ln_1.weight"] = np.ones(1024, np.float32)
    tensors[f"{prefix}text_projection"] = np.eye(1024, dtype=np.float32)
    tensors[f"{prefix}logit_scale"] = np.ones((), np.float32)
  schedule = ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1")
  tensors |= {name: np.ones(1000, np.float32) for name in schedule}
  moving_average = {"model_ema.decay": np.ones(()), "model_ema.diffusion_modelout2bias": np.ones(4)}
  return tensors | moving_average


def write_tokenizer(folder: Path) -> None:
  (folder / "tokenizer").mkdir()
  for name, content in byte_tokenizer().items():
    (folder / "tokenizer" / name).write_bytes(content)


@dataclasses.dataclass(frozen=True)
class World:
  generation: int
  inpainter: Inpainter
  tensors: dict[str, np.ndarray]
  file: Path


@pytest.fixture(scope="module", params=[1, 2])
def world(request, tmp_path_factory) -> World:
  configs = configs_of(request.param)
  modules = make_modules(configs)
  params = random_params(modules.shapes())
  inpainter = Inpainter(modules, params, configs, {"tokenizer": byte_tokenizer()})
  folder = tmp_path_factory.mktemp(f"single{request.param}")
  tensors = compvis_tensors(inpainter, request.param)
  save_file(
    {name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "a.safetensors"
  )
  write_tokenizer(folder)
  return World(request.param, inpainter, tensors, folder / "a.safetensors")


def assert_same_model(found: Inpainter, expected: Inpainter) -> None:
  assert found.modules == expected.modules
  for part in expected.params:
    ours, theirs = to_torch(found.params[part]), to_torch(expected.params[part])
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
      np.testing.assert_array_equal(ours[name], x)


def test_single_file_has_the_networks_and_every_parameter_of_its_folder(world):
  opened = open_policy(str(world.file))
  assert_same_model(opened, world.inpainter)
  assert opened.tokenizer_files == {"tokenizer": byte_tokenizer()}


def test_plan_reads_the_architecture_of_a_single_file(world):
  configs, _ = read_architecture(str(world.file))
  assert make_modules(configs) == world.inpainter.modules


@pytest.mark.parametrize("world, nested", [(1, 0), (2, 2)], indirect=["world"])
def test_ckpt_is_read_with_the_numbers_of_its_training(world, tmp_path, nested):
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  content = {name: torch.tensor(x) for name, x in world.tensors.items()}
  for _ in range(nested):
    content = {"epoch": 3, "pytorch-lightning_version": "1.4.2", "state_dict": content}
  torch.save(content, tmp_path / "a.ckpt")
  write_tokenizer(tmp_path)
  assert_same_model(Inpainter.from_pretrained(tmp_path / "a.ckpt"), world.inpainter)


def test_ckpt_with_objects_of_the_training_is_refused_by_their_name(tmp_path):
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  content = {"state_dict": {}, "callbacks": {Path: 3}}
  torch.save(content, tmp_path / "a.ckpt")
  with pytest.raises(ValueError, match=r"a\.ckpt: holds pathlib\S*Path; expected tensors alone"):
    Inpainter.from_pretrained(tmp_path / "a.ckpt")


def test_names_of_a_full_size_unet_are_those_of_diffusers():
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  utils = pytest.importorskip("diffusers.loaders.single_file_utils")
  resnet = [f"0.{name}.bias" for name in RESNET.values()]
  attention = ["1.norm.bias", "1.proj_in.bias", "1.transformer_blocks.0.ff.net.0.proj.bias"]
  parts = ["time_embed.0.bias", "time_embed.2.bias", "out.0.bias", "out.2.bias"]
  parts += [f"middle_block.{i}.in_layers.0.bias" for i in (0, 2)] + ["middle_block.1.norm.bias"]
  parts += ["input_blocks.0.0.bias"]
  for i in range(1, 12):
    halves, attends = i % 3 == 0, i < 9
    block = ["0.op.weight", "0.op.bias"] if halves else resnet + attention * attends
    parts += [f"input_blocks.{i}.{name}" for name in block]
  for i in range(12):
    attends, doubles = i >= 3, i in (2, 5, 8)
    parts += [f"output_blocks.{i}.{name}" for name in resnet + attention * attends]
    parts += [f"output_blocks.{i}.{1 + attends}.conv.{x}" for x in ("weight", "bias") if doubles]
  tensors = {name: np.full(1, i) for i, name in enumerate(parts)}
  prefixed = {f"model.diffusion_model.{name}": x for name, x in tensors.items()}
  expected = utils.convert_ldm_unet_checkpoint(prefixed, {"layers_per_block": 2})
  found = compvis.convert("unet", tensors, "a.ckpt")
  assert found == expected and len(found) == len(tensors)


def stock_from_single_file(world: World, folder: Path):
  """Stock's pipeline of the file; it reads configs and tokenizer from a local folder."""
  diffusers = pytest.importorskip("diffusers")
  world.inpainter.save_pretrained(folder)
  pipe = diffusers.StableDiffusionInpaintPipeline.from_single_file(
    str(world.file), config=str(folder), local_files_only=True
  )
  pipe.set_progress_bar_config(disable=True)
  return pipe


@pytest.mark.slow
def test_stock_reads_the_same_parameters_from_the_file(world, tmp_path):
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  pipe = stock_from_single_file(world, tmp_path / "config")
  opened = Inpainter.from_pretrained(world.file)
  for part in ("unet", "vae", "text_encoder"):
    theirs = {
      name.removeprefix("text_model."): x for name, x in getattr(pipe, part).state_dict().items()
    }
    for name, x in to_torch(opened.params[part]).items():
      np.testing.assert_array_equal(x, theirs.pop(name.removeprefix("text_model.")).numpy(), name)
    assert not theirs.keys() - {"embeddings.position_ids"}


@pytest.mark.slow
def test_stock_inpaints_a_single_file_as_the_inpainter_does(world, tmp_path, monkeypatch):
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
  from PIL import Image

  mode = lambda self, *args, **kwargs: self.mode()
  monkeypatch.setattr(DiagonalGaussianDistribution, "sample", mode)
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (128, 128, 3)).astype(np.uint8)
  mask = np.zeros((128, 128), np.uint8)
  mask[:, :64] = 255
  latents = rng.normal(size=(1, 64, 64, 4)).astype(np.float32)
  expected = stock_from_single_file(world, tmp_path / "config")(
    prompt="a cat",
    image=Image.fromarray(image),
    mask_image=Image.fromarray(mask),
    height=128,
    width=128,
    strength=1.0,
    num_inference_steps=4,
    guidance_scale=3.0,
    latents=torch.tensor(latents).permute(0, 3, 1, 2),
    output_type="np",
  ).images
  found = Inpainter.from_pretrained(world.file)(
    image, mask, text="a cat", guidance_scale=3.0, num_steps=4, latents=latents, paste_back=False
  )
  np.testing.assert_allclose(found, expected, atol=1e-4)


# ----------------------------------------------------------------------------------------- errors


def without(prefix: str):
  return lambda x: {name: tensor for name, tensor in x.items() if not name.startswith(prefix)}


def with_tensor(name: str, tensor):
  return lambda tensors: tensors | {name: tensor}


CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
ONE = np.ones(1, np.float32)
BAD = [
  (lambda x: x | {CONV_IN: x[CONV_IN][:, :4]}, r"the UNet has 4 input channels; expected 9"),
  (with_tensor("conditioner.embedders.0.model.ln", ONE), "single file of Stable Diffusion XL"),
  (with_tensor("control_model.x", ONE), r"1 unknown tensors, such as control_model\.x"),
  (with_tensor("model.diffusion_model.label_emb.0.0.weight", ONE), "label_emb"),
  (without("first_stage_model."), r"no tensors first_stage_model\.\*"),
  (without("model.diffusion_model.out."), "shapes are not those of Stable Diffusion 1 or 2"),
  (without("model.diffusion_model.time_embed."), "4 missing: time_embedding"),
  (without("first_stage_model.decoder.up.1.block.1"), "vae: tensors .* missing"),
  (lambda x: {"unet.down_blocks.0.lora_A.weight": ONE}, "no tensors .* a whole checkpoint"),
  (lambda x: {}, "no tensors .* found nothing"),
  (lambda x: x | {CONV_IN: np.full_like(x[CONV_IN], np.nan)}, "not finite"),
]


@pytest.mark.parametrize("world", [1], indirect=True)
@pytest.mark.parametrize("change, message", BAD)
def test_bad_single_file_is_refused_in_one_line(world, tmp_path, change, message):
  changed = {name: np.ascontiguousarray(x) for name, x in change(world.tensors).items()}
  save_file(changed, tmp_path / "b.safetensors")
  write_tokenizer(tmp_path)
  with pytest.raises(ValueError, match=message) as error:
    Inpainter.from_pretrained(tmp_path / "b.safetensors")
  assert "\n" not in str(error.value) and "b.safetensors" in str(error.value)


@pytest.mark.parametrize("suffix", ["gguf", "txt"])
def test_file_of_another_kind_is_refused(tmp_path, suffix):
  file = tmp_path / f"model.{suffix}"
  file.write_bytes(b"x")
  with pytest.raises(ValueError, match=rf"a file that ends in \.{suffix}; expected .*\.ckpt"):
    Inpainter.from_pretrained(file)


@pytest.mark.parametrize("suffix", compvis.SUFFIXES)
def test_damaged_single_file_is_refused(tmp_path, suffix):
  (tmp_path / f"model{suffix}").write_bytes(b"x")
  with pytest.raises(ValueError, match="truncated or not a weights file"):
    Inpainter.from_pretrained(tmp_path / f"model{suffix}")


def test_two_tensors_of_one_name_are_refused():
  tensors = {f"output_blocks.0.{i}.conv.weight": ONE for i in (1, 2)}
  with pytest.raises(ValueError, match=r"a second up_blocks\.0\.upsamplers\.0\.conv\.weight"):
    compvis.convert("unet", tensors, "a.ckpt")


@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_tokenizer_of_the_matching_hub_model_is_used(world, tmp_path, monkeypatch):
  file = tmp_path / "a.safetensors"
  file.symlink_to(world.file)
  fetched = []

  def fetch(name, patterns):
    fetched.append((name, patterns))
    return str(world.file.parent)

  monkeypatch.setattr(weights, "_fetch", fetch)
  assert Inpainter.from_pretrained(file).tokenizer_files == {"tokenizer": byte_tokenizer()}
  hub = [
    "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2-inpainting",
  ]
  assert fetched == [(hub[world.generation - 1], ["tokenizer/*"])]


@pytest.mark.parametrize("world", [1], indirect=True)
def test_single_file_without_a_tokenizer_says_where_to_put_one(world, tmp_path, monkeypatch):
  file = tmp_path / "a.safetensors"
  file.symlink_to(world.file)
  monkeypatch.setattr(weights, "_fetch", lambda *args: (_ for _ in ()).throw(OSError("no network")))
  with pytest.raises(
    ValueError, match=r"has no tokenizer.* no network.*copy .* to .*/tokenizer"
  ) as e:
    Inpainter.from_pretrained(file)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("world", [1], indirect=True)
def test_variant_of_a_single_file_is_refused(world):
  with pytest.raises(ValueError, match="variant is 'fp16'"):
    Inpainter.from_pretrained(world.file, variant="fp16")
