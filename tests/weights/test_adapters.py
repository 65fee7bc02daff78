"""Files of LoRA adapters: computed as stock diffusers does; one-line errors for other files."""

import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from prefpaint_jax import testing
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models import architectures, lora
from prefpaint_jax.weights import adapters, names
from prefpaint_jax.weights.adapter_names import COMPVIS, LAYOUTS, modules, torch_module

pytestmark = pytest.mark.usefixtures("quick_compilation")
RANK = 2
ATTENTION = {name: {"kernel": np.ones((6, 4), np.float32)} for name in ("to_q", "to_out_0")}
BASE = {
  "conv_in": {"kernel": np.ones((3, 3, 9, 5), np.float32), "bias": np.ones(5, np.float32)},
  "down_blocks_0": {
    "resnets_0": {"conv1": {"kernel": np.ones((3, 3, 5, 5), np.float32)}},
    "attentions_0": {"transformer_blocks_0": {"attn1": ATTENTION}},
  },
  "mid_block": {"resnets_0": {"conv1": {"kernel": np.ones((3, 3, 5, 5), np.float32)}}},
}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
QUERY, KOHYA_QUERY = f"unet.{BLOCK}.to_q", f"lora_unet_{BLOCK.replace('.', '_')}_to_q"


def random_adapters(base, rank: int = RANK, targets: str = "", seed: int = 0):
  shapes = jax.eval_shape(lambda key: lora.init(key, base, rank, targets), jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 8, shapes)


def pair(rank: int = RANK, inputs: int = 6, outputs: int = 4, seed: int = 0):
  """Returns down [rank, inputs] and up [outputs, rank]."""
  rng = np.random.default_rng(seed)
  down, up = rng.normal(size=(rank, inputs)), rng.normal(size=(outputs, rank))
  return down.astype(np.float32), up.astype(np.float32)


def peft(module: str = QUERY, **shape) -> dict[str, np.ndarray]:
  down, up = pair(**shape)
  return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def kohya(alpha: float | None = None, module: str = KOHYA_QUERY) -> dict[str, np.ndarray]:
  down, up = pair()
  scale = {} if alpha is None else {f"{module}.alpha": np.array(alpha, np.float32)}
  return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up} | scale


def added(tmp_path, tensors, scale: float = 1.0, **metadata):
  """Returns what the adapters of a file add to the kernels, by path."""
  path = tmp_path / "lora.safetensors"
  stored = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
  save_file(tensors, path, metadata={"format": "pt"} | stored)
  base = jax.tree.map(np.zeros_like, BASE)
  merged = flatten_dict(lora.merge(base, adapters.load(path, base, scale)), sep="/")
  return {name: kernel for name, kernel in merged.items() if kernel.any()}


def only_query(found):
  (name, kernel), *others = found.items()
  assert name == "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel" and not others
  return kernel


# -------------------------------------------------------------------------------- without diffusers
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_adapters_are_read_bit_identically(layout, tmp_path):
  written = random_adapters(BASE)
  adapters.save(tmp_path / "lora.safetensors", written, BASE, layout)
  read = adapters.load(tmp_path / "lora.safetensors", BASE)
  jax.tree.map(np.testing.assert_array_equal, read, written)
  assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_saved_tensors_have_the_names_and_shapes_of_the_layout(tmp_path):
  shapes = {}
  for layout in LAYOUTS:
    path = tmp_path / f"{layout}.safetensors"
    adapters.save(path, random_adapters(BASE, targets="to_out|conv_in"), BASE, layout)
    shapes[layout] = {name: tensor.shape for name, tensor in load_file(path).items()}
  out = KOHYA_QUERY.replace("to_q", "to_out_0")
  assert shapes["diffusers"] == {
    "unet.conv_in.lora_A.weight": (RANK, 9, 3, 3),
    "unet.conv_in.lora_B.weight": (5, RANK, 1, 1),
    f"unet.{BLOCK}.to_out.0.lora_A.weight": (RANK, 6),
    f"unet.{BLOCK}.to_out.0.lora_B.weight": (4, RANK),
  }
  assert shapes["kohya"] == {
    "lora_unet_conv_in.lora_down.weight": (RANK, 9, 3, 3),
    "lora_unet_conv_in.lora_up.weight": (5, RANK, 1, 1),
    "lora_unet_conv_in.alpha": (),
    f"{out}.lora_down.weight": (RANK, 6),
    f"{out}.lora_up.weight": (4, RANK),
    f"{out}.alpha": (),
  }


def test_scale_and_alpha_over_rank_multiply_the_product(tmp_path):
  down, up = pair()
  for tensors, scale, factor in (
    (peft(), 1, 1),
    (peft(), -0.5, -0.5),
    (kohya(), 1, 1),
    (kohya(alpha=3), 2, 2 * 3 / RANK),
    (kohya(alpha=0.5), 1, 0.5 / RANK),
  ):
    kernel = only_query(added(tmp_path, tensors, scale))
    np.testing.assert_allclose(kernel, factor * (up @ down).T, rtol=1e-5)


def test_each_module_of_kohyas_layout_has_its_own_alpha(tmp_path):
  """As in the `forward` of kohya's scripts: lora_up(lora_down(x)) * alpha / lora_dim."""
  down, up = pair()
  for name, kernel in added(tmp_path, kohya(1) | kohya(5, KOHYA_QUERY[:-1] + "out_0")).items():
    alpha = 1 if "to_q" in name else 5
    np.testing.assert_allclose(kernel, alpha / RANK * (up @ down).T, rtol=1e-5)


@pytest.mark.parametrize(
  ("metadata", "factor"),
  [
    ({"r": 2, "lora_alpha": 6}, 3),
    ({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
    ({"r": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {f"^{BLOCK}.to_q": 5}}, 5 / 2),
    ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"to_k": 5}, "lora_dropout": 0.1}, 1),
  ],
)
def test_metadata_of_peft_gives_alpha_and_rank(metadata, factor, tmp_path):
  down, up = pair()
  metadata = {f"unet.{name}": value for name, value in metadata.items()}
  kernel = only_query(added(tmp_path, peft(), **metadata))
  np.testing.assert_allclose(kernel, factor * (up @ down).T, rtol=1e-5)


@pytest.mark.parametrize(
  "ends",
  [(".to_q.lora.down", ".to_q.lora.up"), (".processor.to_q_lora.down", ".processor.to_q_lora.up")],
)
def test_names_of_earlier_versions_are_read(ends, tmp_path):
  down, up = pair()
  tensors = {f"unet.{BLOCK}{end}.weight": x for end, x in zip(ends, (down, up), strict=True)}
  np.testing.assert_allclose(only_query(added(tmp_path, tensors)), (up @ down).T, rtol=1e-5)


def test_adapters_of_a_text_encoder_that_are_zero_are_accepted(tmp_path):
  text = peft("text_encoder.encoder.layers.0.self_attn.q_proj")
  text = {name: x * name.endswith("lora_A.weight") for name, x in text.items()}
  only_query(added(tmp_path, peft() | text))


def edited(tensors, name: str, change) -> dict[str, np.ndarray]:
  return tensors | {name: change(tensors[name])}


META = {"unet.r": RANK, "unet.lora_alpha": 1}
WRONG = {  # tensors, metadata, error
  "no tensors": ({}, {}, "expected LoRA adapters of a UNet, has none; give"),
  "a whole UNet": (
    {"conv_in.weight": np.ones(3)},
    {},
    "1 tensors of another kind, such as conv_in",
  ),
  "a transformer": (
    peft("transformer.x_embedder"),
    {},
    "1 modules that the UNet does not have: tr",
  ),
  "no prefix": (peft(BLOCK), {}, "1 modules that the UNet does not have"),
  "other model": (peft(f"{QUERY}x"), {}, "1 modules that the UNet does not have: .*to_qx; give"),
  "two layouts": (peft() | kohya(), {}, "1 modules that the UNet does not have: .*in one layout"),
  "other width": (
    peft(inputs=8),
    {},
    r"\[2, 8\] and \[4, 2\]; expected \[rank, 6\] and \[4, rank\]",
  ),
  "other ranks": (
    edited(peft(), f"{QUERY}.lora_B.weight", lambda x: x[:, :1]),
    {},
    r"pair of \[2, 6\] and \[4, 1\]; expected",
  ),
  "a number": (
    edited(peft(), f"{QUERY}.lora_A.weight", lambda x: np.array(x[0, 0])),
    {},
    r"pair of \[\] and \[4, 2\]; expected",
  ),
  "rank 0": (peft(rank=0), {}, r"pair of \[0, 6\] and \[4, 0\]; expected"),
  "dense for a convolution": (
    peft("unet.conv_in", inputs=81, outputs=5),
    {},
    r"expected \[rank, 9, 3, 3\] and \[5, rank, 1, 1\]",
  ),
  "half": (
    {f"{QUERY}.lora_A.weight": pair()[0]},
    {},
    f"only the half 'down' of 1 pairs, such as {QUERY}; download",
  ),
  "twice": (
    peft() | {f"{QUERY}.lora.down.weight": pair()[0]},
    {},
    f"two tensors of {QUERY}, such as",
  ),
  "not finite": (
    edited(peft(), f"{QUERY}.lora_A.weight", lambda x: x * np.nan),
    {},
    "lora_A.weight of .* not finite",
  ),
  "alpha not finite": (kohya(alpha=np.inf), {}, r"to_q.alpha of \[\] has values .* not finite"),
  "alpha too large": (kohya(alpha=3e38), {}, "to_q of .* not finite"),
  "integers": (
    edited(peft(), f"{QUERY}.lora_A.weight", lambda x: x.astype(np.int8)),
    {},
    "lora_A.weight is int8; expected floating-point",
  ),
  "alpha of some": (
    kohya(alpha=1) | kohya(module=KOHYA_QUERY.replace("to_q", "to_out_0")),
    {},
    "alpha of 1 of 2 modules; expected all or none",
  ),
  "two alphas": (kohya(alpha=1), META, "alpha of 1 of 1 modules and in its metadata"),
  "alpha in PEFT's layout": (peft() | {f"{QUERY}.alpha": np.ones(())}, {}, "such as .*to_q.alpha"),
  "DoRA": (
    peft() | {f"{QUERY}.lora_magnitude_vector": np.ones(4)},
    {},
    "is of DoRA; expected pairs",
  ),
  "DoRA of kohya": (kohya() | {f"{KOHYA_QUERY}.dora_scale": np.ones(4)}, {}, "is of DoRA"),
  "LoHa": ({f"{KOHYA_QUERY}.hada_w1_a": np.ones((4, 2))}, {}, "hada_w1_a is of LoHa"),
  "LoKr": ({f"{KOHYA_QUERY}.lokr_w1": np.ones((2, 2))}, {}, "lokr_w1 is of LoKr"),
  "LoCon": (
    kohya() | {f"{KOHYA_QUERY}.lora_mid.weight": np.ones((2, 2, 3, 3))},
    {},
    "is of LoCon with a core",
  ),
  "bias": (peft() | {f"{QUERY}.lora_B.bias": np.ones(4)}, {}, "such as .*to_q.lora_B.bias"),
  "text encoder": (
    peft() | peft("text_encoder.encoder.layers.0.mlp.fc1"),
    {},
    "adapters of a text encoder, 1 tensors such as text_encoder.encoder.layers.0.mlp.fc1.lora_B",
  ),
  "text encoder of kohya": (
    kohya(1) | kohya(1, "lora_te_text_model_encoder_layers_0_mlp_fc1"),
    {},
    "adapters of a text encoder, 1 tensors",
  ),
  "DoRA in the metadata": (peft(), META | {"unet.use_dora": True}, "metadata has use_dora True"),
  "changed base": (
    peft(),
    META | {"unet.init_lora_weights": "pissa"},
    "init_lora_weights 'pissa', which is not supported; expected True or 'gaussian'",
  ),
  "other rank in the metadata": (
    peft(),
    META | {"unet.r": 4},
    "the rank 4 and alpha 1; expected 2",
  ),
  "no alpha": (
    peft(),
    META | {"unet.lora_alpha": "x"},
    "alpha 'x'; expected 2, that of the tensors",
  ),
  "bad pattern": (peft(), META | {"unet.alpha_pattern": {"(": 1}}, "alpha None; expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_files_are_refused_in_one_line(name, tmp_path):
  tensors, metadata, message = WRONG[name]
  with pytest.raises(ValueError, match=message) as error:
    added(tmp_path, tensors, **metadata)
  line = str(error.value)
  assert "\n" not in line and line.startswith(str(tmp_path / "lora.safetensors"))


def test_files_that_are_no_safetensors_are_refused_in_one_line(tmp_path):
  (tmp_path / "a.safetensors").write_bytes(b"no tensors")
  with pytest.raises(ValueError, match=r"a.safetensors: cannot be read at 10 bytes"):
    adapters.load(tmp_path / "a.safetensors", BASE)
  save_file(peft(), tmp_path / "b.safetensors", metadata={"lora_adapter_metadata": "{"})
  with pytest.raises(ValueError, match=r"b.safetensors: lora_adapter_metadata is not JSON"):
    adapters.load(tmp_path / "b.safetensors", BASE)


def test_file_and_scale_are_split_at_the_last_colon(tmp_path):
  file = tmp_path / "a:b.safetensors"
  file.touch()
  (tmp_path / "folder").mkdir()
  standard = tmp_path / "folder" / "pytorch_lora_weights.safetensors"
  standard.touch()
  assert adapters.parse(file) == (file, 1.0)
  assert adapters.parse(f"{file}:0.5") == (file, 0.5)
  assert adapters.parse(f"{tmp_path}/folder:-1e-1") == (standard, -0.1)
  for name, message in (
    (f"{file}:much", "its scale is 'much'; expected a number from -1000 to 1000; give FILE:0.8"),
    (f"{file}:nan", "its scale is 'nan'"),
    (f"{file}:", "its scale is ''"),
    (f"{tmp_path}/c:2", f"{tmp_path}/c: not found; give a file of LoRA adapters"),
    (str(tmp_path), f"{tmp_path}/pytorch_lora_weights.safetensors: not found"),
    ("", "lora is ''; expected"),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      adapters.parse(name)


def test_adapters_that_are_not_finite_are_not_written(tmp_path):
  written = random_adapters(BASE, targets="to_q")
  written = jax.tree.map(lambda x: x * np.inf, written)
  with pytest.raises(ValueError, match=r"not written: unet.*to_q.lora_A.weight of .* not finite"):
    adapters.save(tmp_path / "lora.safetensors", written, BASE, "diffusers")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("rank", "targets", "message"),
  [
    (3, "to_q|to_out", "has adapters of rank 2, lora.rank is 3; give the same rank"),
    (2, "to_q", "has adapters of 1 kernels that lora.targets does not choose: .*to_out_0/kernel;"),
    (2, "to_|conv_in", "no adapters of 1 kernels that lora.targets chooses: conv_in/kernel; give"),
  ],
)
def test_run_begins_only_with_adapters_of_its_rank_and_kernels(rank, targets, message, tmp_path):
  path = tmp_path / "lora.safetensors"
  written = random_adapters(BASE, 2, "to_q|to_out")
  adapters.save(path, written, BASE, "diffusers")
  read = lora.read(str(path), BASE, 2, random_adapters(BASE, 2, "to_q|to_out", seed=1))
  jax.tree.map(np.testing.assert_array_equal, read, written)
  with pytest.raises(ValueError, match=message):
    lora.read(str(path), BASE, rank, random_adapters(BASE, rank, targets))


# ------------------------------------------------------------------------- against stock diffusers
@pytest.fixture(scope="module")
def diffusers():
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  pytest.importorskip("peft", reason="diffusers reads LoRA files with peft: pip install peft")
  diffusers = pytest.importorskip("diffusers")
  torch.set_num_threads(1)  # more threads are slower for layers this small
  return diffusers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pipelines")
  for generation in (1, 2):
    testing.tiny_inpainter(generation=generation).save_pretrained(folder / str(generation))
  return folder


def open_stock(diffusers, folder):
  stock = diffusers.AutoPipelineForInpainting.from_pretrained(folder)
  stock.set_progress_bar_config(disable=True)
  return stock


def stock_kernels(diffusers, folder, file):
  """Returns the UNet's tensors after stock diffusers has added the adapters of a file to them."""
  stock = open_stock(diffusers, folder)
  stock.load_lora_weights(str(file))
  stock.fuse_lora()
  stock.unload_lora_weights()
  return {name: tensor.numpy() for name, tensor in stock.unet.state_dict().items()}


def assert_added_as_stock_does(diffusers, folder, file):
  ours = Inpainter.from_pretrained(folder)
  before = names.to_torch(ours.params["unet"])
  ours.add_lora(file)
  after, expected = names.to_torch(ours.params["unet"]), stock_kernels(diffusers, folder, file)
  assert after.keys() == expected.keys()
  assert any(np.abs(after[name] - before[name]).max() > 0.01 for name in after)
  for name, tensor in expected.items():
    np.testing.assert_allclose(after[name], tensor, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stock_diffusers_adds_our_files_to_every_kernel(
  layout, generation, diffusers, folders, tmp_path
):
  base = testing.tiny_inpainter(generation=generation).params["unet"]
  file = tmp_path / "lora.safetensors"
  adapters.save(file, random_adapters(base, 3), base, layout)
  assert_added_as_stock_does(diffusers, folders / str(generation), file)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stock_pipeline_with_our_file_paints_as_we_do(layout, diffusers, folders, tmp_path):
  import torch
  from diffusers.models.autoencoders import vae

  ours = Inpainter.from_pretrained(folders / "1", mask_latents="corner")
  base = ours.params["unet"]
  file = tmp_path / "lora.safetensors"
  adapters.save(file, random_adapters(base), base, layout)
  images, _ = testing.tiny_prompts(1)
  image = (np.round(images[0] * 255) / 255).astype(np.float32)
  mask = np.zeros((*image.shape[:2], 1), np.float32)
  mask[3:8, 1:6] = 1.0
  latents = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
  settings = {"num_steps": 5, "latents": latents, "paste_back": False}
  without = ours(image, mask, **settings)
  ours.add_lora(f"{file}:0.5")
  ours.save_pretrained(tmp_path / "merged")
  stock = open_stock(diffusers, folders / "1")
  stock.load_lora_weights(str(file), adapter_name="ours")
  stock.set_adapters(["ours"], [0.5])
  samples = ours(image, mask, **settings)
  with pytest.MonkeyPatch.context() as patch:
    # diffusers samples the latents of the masked image; this package takes the mode.
    patch.setattr(vae.DiagonalGaussianDistribution, "sample", lambda self, _: self.mode())
    for pipeline in (stock, open_stock(diffusers, tmp_path / "merged")):
      expected = pipeline(
        prompt="",
        image=torch.tensor(image).permute(2, 0, 1)[None],
        mask_image=torch.tensor(mask).permute(2, 0, 1)[None],
        height=architectures.SIZE,
        width=architectures.SIZE,
        strength=1.0,
        num_inference_steps=5,
        guidance_scale=1.0,
        eta=0.0,
        latents=torch.tensor(latents).permute(0, 3, 1, 2),
        output_type="np",
      ).images
      np.testing.assert_allclose(samples, expected, atol=1e-4)
  assert np.abs(samples - without).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("stores_config", [True, False])
@pytest.mark.parametrize(
  "options",
  [
    {"lora_alpha": 6},
    {"lora_alpha": 6, "use_rslora": True},
    {
      "rank_pattern": {"to_q": 2, "attn2.to_k": 3},
      "alpha_pattern": {"to_v": 1, "^mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 9},
    },
  ],
  ids=["alpha", "rslora", "patterns"],
)
def test_files_that_stock_diffusers_saves_are_read(
  options, stores_config, diffusers, folders, tmp_path
):
  import torch
  from peft import LoraConfig
  from peft.utils import get_peft_model_state_dict

  unet = diffusers.UNet2DConditionModel.from_pretrained(folders / "1" / "unet")
  targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
  unet.add_adapter(LoraConfig(r=4, target_modules=targets, **options))
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in unet.named_parameters():
      if "lora" in name:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
  config = unet.peft_config["default"].to_dict()
  diffusers.StableDiffusionInpaintPipeline.save_lora_weights(
    tmp_path,
    unet_lora_layers=get_peft_model_state_dict(unet),
    unet_lora_adapter_metadata=config if stores_config else None,
  )
  assert_added_as_stock_does(diffusers, folders / "1", tmp_path)


@pytest.mark.slow
def test_alpha_of_kohyas_layout_is_that_of_stock_diffusers(diffusers, folders, tmp_path):
  base = testing.tiny_inpainter().params["unet"]
  file = tmp_path / "lora.safetensors"
  adapters.save(file, random_adapters(base, 4, "attn|conv1"), base, "kohya")
  tensors = load_file(file)
  for name in tensors:
    if name.endswith(".alpha"):
      # diffusers 0.42 gives all attention layers the alpha that most modules of the file have.
      tensors[name] = np.array(3 if "attn" in name else 1.5, np.float32)
  save_file(tensors, file)
  assert_added_as_stock_does(diffusers, folders / "1", file)


@pytest.mark.slow
def test_compvis_names_of_sdxl_are_those_that_stock_diffusers_maps(diffusers):
  import torch
  from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin
  from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

  unet = diffusers.UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(8, 16, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=2,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=4,
    cross_attention_dim=8,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=32,
  )
  path_of = lambda name: re.sub(r"\.(\d+)", r"_\1", name.removesuffix(".weight")).split(".")
  kernels = (name for name, x in unet.named_parameters() if x.ndim > 1)
  base = unflatten_dict({(*path_of(name), "kernel"): np.zeros((1, 1)) for name in kernels})
  found = modules(base, COMPVIS)
  assert "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q" in found
  config = SimpleNamespace(layers_per_block=2)
  for name, kernel in found.items():
    tensors = {f"{name}.lora_{end}.weight": torch.zeros(1, 1) for end in ("down", "up")}
    converted = StableDiffusionXLLoraLoaderMixin.lora_state_dict(tensors, unet_config=config)[0]
    module = torch_module(kernel)
    expected = {f"unet.{module}.lora_{x}.weight" for x in "AB"}
    assert convert_unet_state_dict_to_peft(converted).keys() == expected
