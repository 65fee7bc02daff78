"""SDXL equals stock diffusers and transformers: UNet, text encoders, and the whole pipeline."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_parity, channels_last, params_of, randomise, template_of, tensors_of
from PIL import Image

from prefpaint_jax import testing
from prefpaint_jax.diffusion.ddim import ddim_steps
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models import architectures
from prefpaint_jax.models.assembly import make_modules
from prefpaint_jax.models.clip import CLIPTextModel, PooledTextModel
from prefpaint_jax.models.conditioning import Context, Guidance, Prompts
from prefpaint_jax.models.config import CLIPTextConfig, UNetConfig
from prefpaint_jax.models.unet import UNet2DConditionModel

torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = 10


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unet_with_pooled_text_and_sizes_equals_diffusers(dtype):
  config = architectures.tiny_configs("xl")["unet"] | {"layers_per_block": 2}
  # Fields that the published file has, and that stock classes ignore.
  config |= {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 37000, "power": 0.75}
  config |= {"min_decay": 0.0, "update_after_step": 0, "use_ema_warmup": False}
  theirs = randomise(diffusers.UNet2DConditionModel.from_config(config))
  parsed = UNetConfig.from_dict(config)
  ours = UNet2DConditionModel(parsed, jnp.dtype(dtype))
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  sample, context, pooled = draw(2, 8, 8, 9), draw(2, 5, 28), draw(2, 10)
  sizes = np.array([[1024, 768, 0, 0, 1024, 768], [512, 512, 3, 7, 640, 640]], np.float32)
  timesteps = np.array([1, 981])
  template = template_of(ours, sample, timesteps, context, pooled, sizes)
  params = params_of(theirs, template)
  with torch.no_grad():
    expected = theirs(
      torch.tensor(sample).permute(0, 3, 1, 2),
      torch.tensor(timesteps),
      torch.tensor(context),
      added_cond_kwargs={"text_embeds": torch.tensor(pooled), "time_ids": torch.tensor(sizes)},
    ).sample
  found = jax.jit(ours.apply)({"params": params}, sample, timesteps, context, pooled, sizes)
  tolerance = 1e-4 if dtype == "float32" else 3e-2
  assert_parity(found.astype(jnp.float32), channels_last(expected), tolerance)


TEXT = {
  "vocab_size": 60,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 3,
  "num_attention_heads": 3,
  "max_position_embeddings": 11,
  "projection_dim": 10,
}


@pytest.mark.parametrize("eos", [2, 58])
@pytest.mark.parametrize("projection", [False, True])
def test_penultimate_and_pooled_outputs_equal_transformers(projection, eos):
  """The token that ends the text is 58; of 58s that pad the text, the first one counts."""
  config = transformers.CLIPTextConfig(**TEXT, eos_token_id=eos, hidden_act="gelu")
  kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
  theirs = randomise(kind(config))
  ours = PooledTextModel(CLIPTextConfig.from_dict(theirs.config.to_dict()), projection)
  ids = np.array([[57, 3, 4, 58, 58, 58], [57, 5, 58, 0, 0, 0]])
  params = params_of(theirs, template_of(ours, jnp.zeros((1, 6), jnp.int32)))
  with torch.no_grad():
    expected = theirs(torch.tensor(ids), output_hidden_states=True)
  penultimate, pooled = jax.jit(ours.apply)({"params": params}, ids)
  assert_parity(penultimate, expected.hidden_states[-2])
  if projection:
    assert_parity(pooled, expected.text_embeds)
  else:
    assert pooled is None


def test_last_layer_of_the_first_encoder_is_not_computed():
  config = CLIPTextConfig.from_dict(TEXT)
  ids = jnp.zeros((1, 6), jnp.int32)

  def products(module) -> int:
    params = template_of(module, ids)
    return jax.jit(module.apply).lower({"params": params}, ids).as_text().count("dot_general")

  first, whole = PooledTextModel(config, projection=False), CLIPTextModel(config)
  assert 3 * products(first) == 2 * products(whole)  # two of three layers


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """Returns our pipeline, and that of stock diffusers from the folder that ours wrote."""
  torch.set_num_threads(1)
  from diffusers.models.autoencoders import vae

  folder = tmp_path_factory.mktemp("pipeline")
  painter = testing.tiny_inpainter(generation="xl")
  # Stock pipelines of SDXL take neither an attention mask nor 1 for another offset.
  painter.configs["text_encoder"]["use_attention_mask"] = True
  painter.configs["scheduler"]["steps_offset"] = 3
  painter.modules = make_modules(painter.configs)
  painter.save_pretrained(folder)
  ours = Inpainter.from_pretrained(folder, mask_latents="corner")
  stock = diffusers.AutoPipelineForInpainting.from_pretrained(folder)
  assert type(stock) is diffusers.StableDiffusionXLInpaintPipeline
  stock.set_progress_bar_config(disable=True)
  with pytest.MonkeyPatch.context() as patch:
    # diffusers samples the latents of the masked image; this package takes the mode.
    patch.setattr(vae.DiagonalGaussianDistribution, "sample", lambda self, _: self.mode())
    yield ours, stock


@pytest.mark.parametrize(
  ("text", "guidance_scale", "negative_text"),
  [
    pytest.param("a red Tree!", 1.0, None, marks=pytest.mark.slow),
    ("a red Tree!", 5.0, None),  # leads away from a context of zeros
    pytest.param("", 5.0, None, marks=pytest.mark.slow),
    pytest.param("a red Tree!", 5.0, "", marks=pytest.mark.slow),
    pytest.param("a red Tree!", 5.0, "a blurred sky", marks=pytest.mark.slow),
  ],
)
def test_pipeline_equals_stock_diffusers(both, text, guidance_scale, negative_text):
  ours, stock = both
  size = architectures.SIZE
  (image,), _ = testing.tiny_prompts(1)
  image = np.round(image * 255) / 255
  mask = np.zeros((size, size, 1), np.float32)
  mask[3:8, 1:6] = 1.0
  latents = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
  to_pil = lambda array: Image.fromarray(np.round(255 * array).astype(np.uint8).squeeze())
  expected = stock(
    prompt=text,
    negative_prompt=negative_text,
    image=to_pil(image),
    mask_image=to_pil(mask),
    height=size,
    width=size,
    strength=1.0,
    num_inference_steps=STEPS,
    guidance_scale=guidance_scale,
    eta=0.0,
    latents=torch.tensor(latents).permute(0, 3, 1, 2),
    output_type="np",
  ).images
  samples = ours(
    image,
    mask,
    num_steps=STEPS,
    text=text,
    negative_text=negative_text,
    guidance_scale=guidance_scale,
    latents=latents,
    paste_back=False,
  )
  assert expected.std() > 0.05  # the image is not saturated
  np.testing.assert_allclose(samples, expected, atol=1e-3)


def test_sizes_of_an_image_that_is_not_square_are_in_the_order_of_stock_diffusers(both):
  ours, stock = both
  size = 8, 16
  sizes = size, (0, 0), size, 6.0, 2.5, size, (0, 0), size
  expected = stock._get_add_time_ids(
    *sizes, torch.float32, stock.text_encoder_2.config.projection_dim
  )
  prompts = Prompts(jnp.zeros((1, *size, 1)), *(None,) * 4)
  negative = Guidance(jnp.float32(5.0), Context(jnp.ones((1, 2, 28)), jnp.ones((1, 10))))
  prompts = ours.modules.condition(prompts, Context(jnp.zeros((3, 2, 28))), negative)
  np.testing.assert_array_equal(prompts.context.time_ids, np.repeat(expected[0], 3, axis=0))
  np.testing.assert_array_equal(prompts.guidance.negative.time_ids, expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("upcast", [True, False])
def test_vae_in_bfloat16_encodes_in_the_precision_of_stock_diffusers(both, upcast):
  ours, stock = both
  configs = ours.configs | {"vae": ours.configs["vae"] | {"force_upcast": upcast}}
  modules = make_modules(configs, "bfloat16", mask_latents="corner")
  low = lambda x: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
  image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3)).astype(np.float32) / 256
  prompts = modules.encode_prompts(
    jax.tree.map(low, ours.params["vae"]), jnp.asarray(image), jnp.zeros((1, 8, 8, 1)), None
  )
  vae = copy.deepcopy(stock.vae).to(torch.bfloat16)
  vae.register_to_config(force_upcast=upcast)
  pixels = torch.tensor(2 * image - 1).permute(0, 3, 1, 2).to(torch.bfloat16)
  with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(stock, "vae", vae)
    expected = channels_last(stock._encode_vae_image(pixels, None).float())
  # Stock rounds the result to bfloat16; without the upcast, every layer rounds.
  error = np.abs(prompts.masked_latents - expected).max() / np.abs(expected).max()
  assert error <= 2**-7 if upcast else 2**-7 < error < 2**-4


# scheduler_config.json of the published pipeline.
EULER = {
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": False,
  "interpolation_type": "linear",
  "num_train_timesteps": 1000,
  "prediction_type": "epsilon",
  "sample_max_value": 1.0,
  "set_alpha_to_one": False,
  "skip_prk_steps": True,
  "steps_offset": 1,
  "timestep_spacing": "leading",
  "use_karras_sigmas": False,
}


@pytest.mark.slow
def test_folder_that_stock_diffusers_wrote_loads_and_stock_opens_its_export(both, tmp_path):
  ours, stock = both
  euler = diffusers.EulerDiscreteScheduler.from_config(EULER)
  written = diffusers.StableDiffusionXLInpaintPipeline(**stock.components | {"scheduler": euler})
  written.save_pretrained(tmp_path / "stock")
  loaded = Inpainter.from_pretrained(tmp_path / "stock")
  jax.tree.map(np.testing.assert_array_equal, loaded.params, ours.params)
  loaded.save_pretrained(tmp_path / "export")
  again = diffusers.AutoPipelineForInpainting.from_pretrained(tmp_path / "export")
  assert type(again) is diffusers.StableDiffusionXLInpaintPipeline
  assert again.tokenizer.pad_token == "<|endoftext|>" and again.tokenizer_2.pad_token == "!"
  for part in loaded.params:
    expected, found = (tensors_of(getattr(pipe, part)) for pipe in (stock, again))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
      np.testing.assert_array_equal(found[name], tensor, err_msg=name)
  # The sampler is DDIM at the noise levels and timesteps of the published scheduler.
  ddim = diffusers.DDIMScheduler.from_config(euler.config)
  for scheduler in (euler, ddim, again.scheduler):
    scheduler.set_timesteps(STEPS)
  steps = ddim_steps(loaded.modules.schedule, STEPS, 0.0)
  for scheduler in (euler, ddim, again.scheduler):
    np.testing.assert_array_equal(steps.timestep, scheduler.timesteps)
  np.testing.assert_array_equal(loaded.modules.schedule.alphas_cumprod, ddim.alphas_cumprod)


def test_export_of_import_is_bit_identical(both, tmp_path):
  ours, _ = both
  ours.save_pretrained(tmp_path / "again")
  again = Inpainter.from_pretrained(tmp_path / "again")
  assert again.configs == ours.configs and again.tokenizer_files == ours.tokenizer_files
  jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
