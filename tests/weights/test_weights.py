"""Weights: names and shapes of real checkpoints, file formats of all versions, errors, export."""

import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import params_of, randomise, template_of, tensors_of

from prefpaint_jax.models import architectures
from prefpaint_jax.models.clip import CLIPTextModel, CLIPVisionModelWithProjection, PooledTextModel
from prefpaint_jax.models.config import (
  CLIPTextConfig,
  CLIPVisionConfig,
  RewardConfig,
  UNetConfig,
  VAEConfig,
)
from prefpaint_jax.models.reward import RewardNetwork
from prefpaint_jax.models.unet import UNet2DConditionModel
from prefpaint_jax.models.vae import AutoencoderKL
from prefpaint_jax.runtime.files import write_json
from prefpaint_jax.weights import folder as weights
from prefpaint_jax.weights import names

MANIFESTS = Path(__file__).parents[1] / "manifests"
STEM = "diffusion_pytorch_model"


def unet_template(config: dict):
  model = UNet2DConditionModel(UNetConfig.from_dict(config))
  sample = jnp.zeros((1, 8, 8, config["in_channels"]))
  inputs = [sample, jnp.zeros(1), jnp.zeros((1, 1, config["cross_attention_dim"]))]
  if "addition_embed_type" in config:
    inputs += [jnp.zeros((1, 1280)), jnp.zeros((1, 6))]
  return template_of(model, *inputs)


def vae_template(config: dict):
  return template_of(AutoencoderKL(VAEConfig.from_dict(config)), jnp.zeros((1, 16, 16, 3)))


def text_template(config: dict):
  model = CLIPTextModel(CLIPTextConfig.from_dict(config))
  return template_of(model, jnp.zeros((1, 2), jnp.int32))


def projected_text_template(config: dict):
  model = PooledTextModel(CLIPTextConfig.from_dict(config), projection=True)
  return template_of(model, jnp.zeros((1, 2), jnp.int32))


def vision_template(config: dict):
  model = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(config))
  return template_of(model, jnp.zeros((1, config["image_size"], config["image_size"], 3)))


# Name: (function from config to template, number of tensors, number of parameters).
CHECKPOINTS = {
  "sd15_inpainting_unet": (unet_template, 686, 859_535_364),
  "sd2_inpainting_unet": (unet_template, 686, 865_925_124),
  "sdxl_inpainting_unet": (unet_template, 1680, 2_567_478_084),
  "sd_vae": (vae_template, 248, 83_653_863),
  "clip_l_text": (text_template, 196, 123_060_480),
  "openclip_h_text": (text_template, 372, 340_387_840),
  "openclip_bigg_text": (projected_text_template, 517, 694_659_840),
  "clip_b32_vision": (vision_template, 200, 87_849_216),
}


def manifest(name: str) -> tuple[dict, dict[str, tuple[int, ...]]]:
  """Reads the config and the shapes by name of a real checkpoint."""
  first, *lines = (MANIFESTS / f"{name}.txt").read_text().splitlines()
  pairs = (line.split() for line in lines)
  return json.loads(first), {key: tuple(map(int, shape.split("x"))) for key, shape in pairs}


def without_memory(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Makes tensors whose entries share one number, so that real sizes take no memory."""
  return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def zeros(template):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)


def older(name: str) -> str:
  """Converts a current tensor name to its name in files of 2022."""
  for new, old in (
    ("to_q", "query"),
    ("to_k", "key"),
    ("to_v", "value"),
    ("to_out.0", "proj_attn"),
  ):
    name = re.sub(
      rf"((?:en|de)coder\.mid_block\.attentions\.0)\.{re.escape(new)}\.", rf"\1.{old}.", name
    )
  return re.sub(r"^(?=embeddings\.|encoder\.layers\.|final_layer_norm\.)", "text_model.", name)


@pytest.mark.parametrize(
  ("name", "generation"),
  [
    pytest.param(name, "today", marks=[pytest.mark.slow] if name == "sdxl_inpainting_unet" else [])
    for name in CHECKPOINTS
  ]
  + [(name, "2022") for name in ("sd_vae", "clip_l_text", "openclip_h_text")],
)
def test_real_checkpoint_maps_one_to_one(name, generation):
  template_from, num_tensors, num_parameters = CHECKPOINTS[name]
  config, shapes = manifest(name)
  assert len(shapes) == num_tensors
  assert sum(map(math.prod, shapes.values())) == num_parameters
  tensors = without_memory(shapes)
  if generation == "2022":
    tensors = {older(key): tensor for key, tensor in tensors.items()}
    assert tensors.keys() != shapes.keys()
    if template_from is text_template:
      tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]

  template = template_from(config)
  params = names.to_tree(tensors, template, what=name)
  same = lambda leaf, expected: leaf.shape == expected.shape and leaf.dtype == expected.dtype
  assert jax.tree.all(jax.tree.map(same, params, template))
  assert len(jax.tree.leaves(params)) == num_tensors


SMALL_UNET = {
  "in_channels": 9,
  "out_channels": 4,
  "norm_num_groups": 4,
  "cross_attention_dim": 12,
  "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
  "block_out_channels": [8, 12],
  "layers_per_block": 1,
  "attention_head_dim": 2,
}


@pytest.fixture(scope="module")
def template():
  return unet_template(SMALL_UNET)


@pytest.fixture(scope="module")
def tensors(template) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  random = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)
  return names.to_torch(jax.tree.map(random, template))


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
  """Returns whether names, types, shapes and bits are equal."""
  bits = lambda tensor: (tensor.dtype, tensor.shape, tensor.tobytes())
  return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def test_round_trip_of_names_and_tensors_is_bit_identical(template, tensors):
  again = names.to_torch(names.to_tree(tensors, template, what="unet"))
  assert equal(again, tensors)
  assert all(tensor.flags.c_contiguous for tensor in again.values())
  assert "time_embedding.linear_1.weight" in again
  assert "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight" in again


def test_parameters_on_a_device_export_as_those_on_the_host(template, tensors):
  params = jax.tree.map(jnp.asarray, names.to_tree(tensors, template, what="unet"))
  assert equal(names.to_torch(params), tensors)


def test_one_error_names_every_kind_of_mismatch(template, tensors):
  wrong = dict(tensors)
  del wrong["conv_in.bias"]
  wrong["conv_out.gate"] = np.zeros(3, np.float32)
  wrong["conv_in.weight"] = wrong["conv_in.weight"][:, :4]
  with pytest.raises(ValueError) as error:
    names.to_tree(wrong, template, what="some/unet")
  message = str(error.value)
  assert message.startswith("some/unet: ") and "\n" not in message
  assert "1 missing: conv_in.bias" in message
  assert "1 unexpected: conv_out.gate" in message
  assert "1 of another shape: conv_in.weight is [8, 4, 3, 3], not [8, 9, 3, 3]" in message


def test_tensor_under_an_old_and_a_new_name_raises():
  config = {"block_out_channels": [4], "norm_num_groups": 2}
  template = vae_template(config)
  tensors = names.to_torch(zeros(template))
  name = "encoder.mid_block.attentions.0.to_q.weight"
  tensors[name.replace("to_q", "query")] = tensors[name]
  with pytest.raises(ValueError, match="two names"):
    names.to_tree(tensors, template, what="vae")


def test_unet_with_another_projection_raises_with_the_tensor_name(template, tensors):
  linear = unet_template(SMALL_UNET | {"use_linear_projection": True})
  with pytest.raises(ValueError, match=r"proj_in\.weight is \[8, 8, 1, 1\], not \[8, 8\]"):
    names.to_tree(tensors, linear, what="unet")


def test_text_encoder_with_more_layers_than_its_config_raises():
  config = {"vocab_size": 5, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1}
  deep, shallow = (text_template(config | {"num_hidden_layers": layers}) for layers in (2, 1))
  tensors = without_memory({name: leaf.shape for name, leaf in names.to_torch(zeros(deep)).items()})
  with pytest.raises(ValueError, match=r"16 unexpected: text_model\.encoder\.layers\.1\."):
    names.to_tree(tensors, shallow, what="text_encoder")


def test_tree_of_an_unknown_kind_raises():
  with pytest.raises(
    ValueError, match="parameters have dense at the root; expected one of conv_in, "
  ):
    names.kind_of({"dense": {}})


def test_saved_file_loads_bit_identical(tmp_path, tensors):
  weights.save_tensors(tmp_path / "new" / f"{STEM}.safetensors", tensors)
  assert equal(weights.load_tensors(tmp_path / "new", STEM), tensors)


@pytest.mark.parametrize("max_shard_size", ["10GB", "30KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_folder_written_by_diffusers_loads(tmp_path, max_shard_size, variant, safe):
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  diffusers = pytest.importorskip("diffusers")
  theirs = randomise(diffusers.UNet2DConditionModel.from_config(SMALL_UNET))
  theirs.save_pretrained(
    tmp_path, max_shard_size=max_shard_size, variant=variant, safe_serialization=safe
  )
  assert (len(list(tmp_path.glob(f"{STEM}*"))) > 2) == (max_shard_size == "30KB")
  loaded = weights.load_tensors(tmp_path, STEM)  # without `variant`, the only one present is read
  assert equal(loaded, tensors_of(theirs))
  assert equal(weights.load_tensors(tmp_path, STEM, variant), loaded)
  with pytest.raises(ValueError, match=r"no .*\.bf16\.safetensors, found config\.json, "):
    weights.load_tensors(tmp_path, STEM, "bf16")


@pytest.mark.parametrize("max_shard_size", ["10GB", "4KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_folder_written_by_transformers_loads(tmp_path, max_shard_size, variant):
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  transformers = pytest.importorskip("transformers")
  config = transformers.CLIPTextConfig(
    vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
  )
  theirs = randomise(transformers.CLIPTextModel(config))
  theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size, variant=variant)
  template = text_template(weights.read_config(tmp_path))
  params = weights.load_params(tmp_path, template, variant)
  tensors = {f"text_model.{name}": tensor for name, tensor in tensors_of(theirs).items()}
  assert equal(names.to_torch(params), tensors)


def test_full_precision_and_safetensors_are_preferred(tmp_path, tensors):
  wrong = {name: tensor + 1 for name, tensor in tensors.items()}
  for name in (f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"):
    weights.save_tensors(tmp_path / name, wrong)
  (tmp_path / f"{STEM}.bin").write_bytes(b"never read")
  weights.save_tensors(tmp_path / f"{STEM}.safetensors", tensors)
  assert equal(weights.load_tensors(tmp_path, STEM), tensors)
  assert equal(weights.load_tensors(tmp_path, STEM, "fp16"), wrong)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_float_dtypes_load_as_float32_of_equal_value(tmp_path, dtype):
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  from safetensors.torch import save_file

  tensor = torch.randn(5, 3).to(getattr(torch, dtype))
  counts = torch.arange(4)
  save_file({"tensor": tensor, "counts": counts}, tmp_path / "model.safetensors")
  torch.save({"tensor": tensor, "counts": counts}, tmp_path / "model.pt")
  for file in ("model.safetensors", "model.pt"):
    loaded = weights.load_file(tmp_path / file)
    assert loaded["tensor"].dtype == np.float32 and loaded["counts"].dtype == np.int64
    np.testing.assert_array_equal(loaded["tensor"], tensor.float().numpy())


@pytest.mark.parametrize("keep", [0, 5, 1000, -5])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_truncated_file_raises_one_line_with_its_path(tmp_path, tensors, suffix, keep):
  path = tmp_path / f"{STEM}.{suffix}"
  if suffix == "bin":
    torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
    torch.save({name: torch.tensor(tensor) for name, tensor in tensors.items()}, path)
  else:
    weights.save_tensors(path, tensors)
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match="truncated") as error:
    weights.load_tensors(tmp_path, STEM)
  assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["shard", "tensor"])
def test_incomplete_shards_raise(tmp_path, tensors, missing):
  names = sorted(tensors)
  shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
  weight_map = {name: shard for shard, part in shards.items() for name in part}
  index = {"metadata": {}, "weight_map": weight_map}
  (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
  for shard, part in shards.items():
    weights.save_tensors(tmp_path / shard, {name: tensors[name] for name in part})
  assert equal(weights.load_tensors(tmp_path, STEM), tensors)
  if missing == "shard":
    (tmp_path / "b.safetensors").unlink()
  else:
    weights.save_tensors(tmp_path / "b.safetensors", {names[9]: tensors[names[9]]})
  with pytest.raises(
    ValueError, match=r"b\.safetensors: not found|differ in \d+ tensors, such as "
  ):
    weights.load_tensors(tmp_path, STEM)


@pytest.mark.parametrize("text", [None, "{", "[1]", b"\xff"])
def test_invalid_config_raises_one_line_with_its_path(tmp_path, text):
  path = tmp_path / "config.json"
  if text is not None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(ValueError) as error:
    weights.read_config(tmp_path)
  assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_local_folder_is_returned_unchanged(tmp_path):
  assert weights.resolve(tmp_path, ["*"]) == tmp_path
  assert weights.resolve(str(tmp_path), ["*"]) == tmp_path


@pytest.mark.parametrize(
  "name",
  ["StableDiffusion3InpaintPipeline", "FluxFillPipeline", "StableDiffusionControlNetPipeline"],
)
def test_pipeline_of_another_class_is_named_before_anything_else_is_read(name, tmp_path):
  write_json(tmp_path / "model_index.json", {"_class_name": name})
  for read in (weights.resolve_pipeline, architectures.read_architecture):
    with pytest.raises(
      ValueError, match=f"{name}: not supported yet; supported: StableDiff"
    ) as error:
      read(str(tmp_path))
    assert "\n" not in str(error.value)


def test_only_the_index_of_an_unsupported_hub_model_is_downloaded(tmp_path, monkeypatch):
  write_json(tmp_path / "model_index.json", {"_class_name": "StableDiffusion3InpaintPipeline"})
  fetched = []
  monkeypatch.setattr(
    weights, "_fetch", lambda name, patterns: fetched.append(patterns) or str(tmp_path)
  )
  with pytest.raises(ValueError, match="not supported yet"):
    weights.resolve_pipeline("owner/sd3")
  assert fetched == [["model_index.json"]]


def test_folder_without_a_pipeline_or_reward_model_raises(tmp_path):
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(ValueError, match=r"no model_index\.json"):
    weights.resolve_pipeline(tmp_path)
  write_json(tmp_path / "config.json", {"_class_name": "UNet2DConditionModel"})
  with pytest.raises(ValueError, match="UNet2DConditionModel; no model_index"):
    weights.resolve_pipeline(tmp_path)
  (tmp_path / "config.json").unlink()
  with pytest.raises(
    ValueError, match=r"contains notes\.txt; expected config\.json or one \.pt file"
  ):
    weights.resolve_reward(tmp_path)


def test_reward_model_is_found_in_a_folder_and_as_a_released_file(tmp_path):
  released = tmp_path / "released" / "reward.pt"
  released.parent.mkdir()
  released.write_bytes(b"")
  saved = tmp_path / "saved"
  saved.mkdir()
  (saved / "config.json").write_text("{}")
  assert weights.resolve_reward(saved) == saved
  assert weights.resolve_reward(released) == released
  assert weights.resolve_reward(released.parent) == released


def test_saved_reward_loads_bit_identical(tmp_path):
  vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
  vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 8}
  network = RewardNetwork(RewardConfig.from_dict({"vision": vision, "num_heads": 2}))
  pixels = jnp.zeros((1, 8, 8, 3))
  template = template_of(network, pixels, pixels)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), template)
  weights.save_params(tmp_path, params)
  loaded = weights.load_reward(tmp_path, template)
  assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
  """Gives an empty hub cache and disables the network."""
  import huggingface_hub.constants

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  return tmp_path / "hub"


@pytest.mark.parametrize(
  "name", ["no/such-model", "nowhere", "./a/b/c", "/no/such/folder", "a/b c"]
)
def test_name_of_no_folder_or_hub_model_raises_one_line(hub_cache, name):
  with pytest.raises(ValueError) as error:
    weights.resolve(name, ["*.json"])
  assert str(error.value).startswith(f"{name}: no such ") and "\n" not in str(error.value)


def test_cached_model_is_found_without_a_network(hub_cache):
  snapshot = hub_cache / "models--someone--model" / "snapshots" / ("a" * 40)
  (snapshot / "unet").mkdir(parents=True)
  (snapshot / "unet" / "config.json").write_text("{}")
  refs = snapshot.parents[1] / "refs"
  refs.mkdir()
  (refs / "main").write_text("a" * 40)
  assert weights.resolve("someone/model", ["unet/*.json"]).samefile(snapshot)


def test_only_one_copy_of_the_weights_is_downloaded(monkeypatch, tmp_path):
  import huggingface_hub

  listed = [
    "model_index.json",
    "sd-v1-5-inpainting.ckpt",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.bf16.safetensors",
    "text_encoder/pytorch_model.bin",
    "vae/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
    "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
    "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model-00002-of-00002.fp16.safetensors",
    "safety_checker/model.safetensors",
  ]
  files = [huggingface_hub.hf_api.RepoSibling(rfilename=name) for name in listed]
  info = type("Info", (), {"siblings": files})
  downloaded = []
  monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name: info)
  monkeypatch.setattr(
    huggingface_hub,
    "snapshot_download",
    lambda name, allow_patterns: downloaded.extend(allow_patterns) or str(tmp_path),
  )
  kinds = ("json", "safetensors", "bin")
  folders = ("unet", "text_encoder", "vae")
  patterns = ["model_index.json", *(f"{folder}/*.{kind}" for folder in folders for kind in kinds)]
  assert weights.resolve("someone/model", patterns) == tmp_path
  assert sorted(downloaded) == [
    "model_index.json",
    "text_encoder/model.fp16.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
    "vae/diffusion_pytorch_model.safetensors.index.json",
  ]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory) -> Path:
  """A tiny inpainting pipeline, saved by stock diffusers."""
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  diffusers = pytest.importorskip("diffusers")
  transformers = pytest.importorskip("transformers")
  folder = tmp_path_factory.mktemp("pipeline")
  tokens = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
  (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (folder / "merges.txt").write_text("#version: 0.2\n")
  text_config = transformers.CLIPTextConfig(
    vocab_size=4,
    hidden_size=12,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=7,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
  )
  vae_config = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
  }
  diffusers.StableDiffusionInpaintPipeline(
    vae=randomise(diffusers.AutoencoderKL.from_config(vae_config)),
    text_encoder=randomise(transformers.CLIPTextModel(text_config)),
    tokenizer=transformers.CLIPTokenizer(
      str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=7
    ),
    unet=randomise(diffusers.UNet2DConditionModel.from_config(SMALL_UNET | {"sample_size": 8})),
    scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  ).save_pretrained(folder / "pipeline")
  return folder / "pipeline"


PARTS = {"unet": unet_template, "vae": vae_template, "text_encoder": text_template}
STEMS = {"unet": STEM, "vae": STEM, "text_encoder": "model"}


def reexport(source: Path, target: Path) -> None:
  """Imports the weights of a pipeline and exports them to a copy of its other files."""
  ignore = shutil.ignore_patterns("*.safetensors")
  shutil.copytree(source, target, ignore=ignore)
  for part, template_from in PARTS.items():
    template = template_from(weights.read_config(source / part))
    weights.save_params(target / part, weights.load_params(source / part, template))


def test_export_of_import_is_bit_identical(pipeline_folder, tmp_path):
  reexport(pipeline_folder, tmp_path / "once")
  reexport(tmp_path / "once", tmp_path / "twice")
  for part, stem in STEMS.items():
    source = weights.load_tensors(pipeline_folder / part, stem)
    prefix = "text_model." if part == "text_encoder" else ""
    source = {prefix + name.removeprefix(prefix): tensor for name, tensor in source.items()}
    assert equal(weights.load_tensors(tmp_path / "once" / part, stem), source)
    file = f"{part}/{stem}.safetensors"
    assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_exported_pipeline_opens_in_stock_diffusers_with_the_same_weights(
  pipeline_folder, tmp_path
):
  diffusers = pytest.importorskip("diffusers")
  reexport(pipeline_folder, tmp_path / "exported")
  load = diffusers.AutoPipelineForInpainting.from_pretrained
  original = load(pipeline_folder, safety_checker=None)
  exported = load(tmp_path / "exported", safety_checker=None)
  for part in PARTS:
    assert equal(tensors_of(getattr(exported, part)), tensors_of(getattr(original, part)))


def test_vision_encoder_round_trips_through_transformers(tmp_path):
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  transformers = pytest.importorskip("transformers")
  config = transformers.CLIPVisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
    projection_dim=3,
  )
  theirs = randomise(transformers.CLIPVisionModelWithProjection(config))
  theirs.config.save_pretrained(tmp_path)
  weights.save_params(tmp_path, params_of(theirs, vision_template(config.to_dict())))
  reopened = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path)
  assert equal(tensors_of(reopened), tensors_of(theirs))
