"""Inpainter: samples equal those of stock diffusers; inputs, folders and errors."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from prefpaint_jax import testing
from prefpaint_jax.data.images import load_pairs
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models import architectures, sampling

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = 10


@pytest.fixture(scope="module")
def folder(inpainter, tmp_path_factory):
  folder = tmp_path_factory.mktemp("pipeline")
  inpainter.save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def prompt() -> tuple[np.ndarray, np.ndarray]:
  """Returns an image [8, 8, 3] of multiples of 1/255, and its mask [8, 8, 1]."""
  images, masks = testing.tiny_prompts(1)
  return (np.round(images[0] * 255) / 255).astype(np.float32), masks[0]


def to_pil(image: np.ndarray) -> Image.Image:
  return Image.fromarray(np.round(255 * image).astype(np.uint8).squeeze())


# ------------------------------------------------------------------------- against stock diffusers
@pytest.fixture(scope="module", params=[1, 2], ids=["sd1_epsilon", "sd2_v_prediction"])
def both(request, tmp_path_factory):
  """Returns our pipeline, and that of stock diffusers from the folder that ours wrote."""
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  torch.set_num_threads(1)  # more threads are slower for layers this small
  diffusers = pytest.importorskip("diffusers")
  from diffusers.models.autoencoders import vae

  folder = tmp_path_factory.mktemp("pipeline")
  testing.tiny_inpainter(generation=request.param).save_pretrained(folder)
  ours = Inpainter.from_pretrained(folder, mask_latents="corner")
  stock = diffusers.AutoPipelineForInpainting.from_pretrained(folder)
  assert type(stock) is diffusers.StableDiffusionInpaintPipeline
  assert type(stock.scheduler) is diffusers.DDIMScheduler
  stock.set_progress_bar_config(disable=True)
  with pytest.MonkeyPatch.context() as patch:
    # diffusers samples the latents of the masked image; this package takes the mode.
    patch.setattr(vae.DiagonalGaussianDistribution, "sample", lambda self, _: self.mode())
    yield ours, stock


@pytest.mark.parametrize(
  ("text", "guidance_scale", "negative_text"),
  [
    pytest.param("", 7.5, None, marks=pytest.mark.slow),
    pytest.param("a red Tree!", 1.0, None, marks=pytest.mark.slow),
    pytest.param("a red Tree!", 7.5, None, marks=pytest.mark.slow),
    pytest.param("", 3.0, "a blurred sky", marks=pytest.mark.slow),
    ("a red Tree!", 3.0, "a blurred sky"),
  ],
)
def test_pipeline_equals_stock_diffusers(both, prompt, text, guidance_scale, negative_text):
  import torch

  ours, stock = both
  image, _ = prompt
  mask = np.zeros((*image.shape[:2], 1), np.float32)
  mask[3:8, 1:6] = 1.0  # cuts latents on all sides
  latents = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
  expected = stock(
    prompt=text,
    image=to_pil(image),
    mask_image=to_pil(mask),
    height=architectures.SIZE,
    width=architectures.SIZE,
    strength=1.0,
    num_inference_steps=STEPS,
    guidance_scale=guidance_scale,
    negative_prompt=negative_text,
    eta=0.0,
    latents=torch.tensor(latents).permute(0, 3, 1, 2),
    output_type="np",
  ).images
  samples = ours(
    image,
    mask,
    num_steps=STEPS,
    text=text,
    guidance_scale=guidance_scale,
    negative_text=negative_text,
    latents=latents,
    paste_back=False,
  )
  assert samples.shape == expected.shape == (1, architectures.SIZE, architectures.SIZE, 3)
  assert expected.std() > 0.05  # the image is not saturated
  np.testing.assert_allclose(samples, expected, atol=1e-3)


@pytest.mark.parametrize("option", ["cells", "corner"])
def test_latents_of_every_cell_with_a_missing_pixel_or_corner_are_told_as_missing(
  inpainter, option
):
  modules = dataclasses.replace(inpainter.modules, mask_latents=option)
  factor, side = modules.vae.config.factor, architectures.SIZE
  masks = jnp.asarray(np.random.default_rng(0).random((5, side, side, 1)) < 0.15, jnp.float32)
  images = jnp.full((5, side, side, 3), 0.8)
  prompts = modules.encode_prompts(inpainter.params["vae"], images, masks, None)
  expected = np.zeros_like(prompts.mask_latents)
  for b, y, x, _ in np.argwhere(masks):
    if option == "cells" or (y % factor == 0 and x % factor == 0):
      expected[b, y // factor, x // factor] = 1
  assert 0 < expected.mean() < 1
  np.testing.assert_array_equal(prompts.mask_latents, expected)
  # The VAE and the reward model see all known pixels, also those of cells that the hole cuts.
  np.testing.assert_array_equal(prompts.masked_image, images * (1 - masks))


def test_unknown_mask_latents_raise_an_error(folder):
  with refused("mask_latents is 'nearest'; expected 'cells' or 'corner'"):
    Inpainter.from_pretrained(folder, mask_latents="nearest")


@pytest.mark.slow
def test_text_and_guidance_change_the_samples(inpainter, prompt):
  inpaint = lambda **kwargs: inpainter(*prompt, num_steps=STEPS, paste_back=False, **kwargs)
  without, with_text = inpaint(), inpaint(text="a tree", guidance_scale=1.0)
  guided = inpaint(text="a tree", guidance_scale=7.5)
  assert np.abs(without - with_text).max() > 1e-3
  assert np.abs(guided - with_text).max() > 1e-3


def test_all_texts_share_one_compiled_program(inpainter):
  compiled = sampling.encode_text._cache_size()
  a, b = (inpainter.encode_text([text]).tokens for text in ("a door", "a wall"))
  assert np.abs(a - b).max() > 0.01
  assert sampling.encode_text._cache_size() - compiled <= 1


@pytest.mark.parametrize("text", ["", "A red tree, 3 m high!", "größer — 木", "x" * 200])
def test_byte_tokenizer_gives_the_ids_of_transformers_and_of_the_definition(
  folder, inpainter, text
):
  transformers = pytest.importorskip("transformers")
  stock = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
  settings = {"padding": "max_length", "max_length": 77, "truncation": True}
  ids = inpainter.tokenizers[0]([text], **settings)["input_ids"][0]
  assert ids == stock(text, **settings)["input_ids"]
  # The definition: a token for each byte of a word; the last byte of a word has the suffix </w>.
  words = re.findall(r"[^\W\d_]+|\d|[^\s\w]+", text.lower())
  tokens = []
  for word in words:
    *bytes_before, last = word.encode()
    tokens += [_symbol(byte) for byte in bytes_before] + [_symbol(last) + "</w>"]
  vocabulary = json.loads(inpainter.tokenizer_files["tokenizer"]["vocab.json"])
  start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
  expected = [start, *(vocabulary[token] for token in tokens)][:76]
  assert ids == expected + [end] * (77 - len(expected))


def _symbol(byte: int) -> str:
  """Returns the character by which GPT-2's tokenizer represents a byte."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [other for other in range(256) if other not in printable]
  return chr(byte) if byte in printable else chr(256 + rest.index(byte))


# ------------------------------------------------------------------------------------ samples
def test_samples_depend_only_on_the_key(inpainter, prompt):
  inpaint = lambda seed: inpainter(*prompt, key=jax.random.key(seed), num_steps=STEPS, eta=1.0)
  first, again, other = inpaint(3), inpaint(3), inpaint(4)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.01


def test_known_pixels_are_kept_exactly_and_missing_pixels_change(inpainter, prompt):
  image, mask = prompt
  (sample,) = inpainter(image, mask, num_steps=STEPS)
  known = np.broadcast_to(mask == 0, image.shape)
  np.testing.assert_array_equal(sample[known], image[known])
  assert (sample[~known] != image[~known]).mean() > 0.9
  assert sample.dtype == np.float32
  assert sample.min() >= 0.0 and sample.max() <= 1.0


def test_pixels_under_the_mask_do_not_change_the_samples(inpainter, prompt):
  image, mask = prompt
  other = np.where(mask > 0, 1.0 - image, image)
  inpaint = lambda image: inpainter(image, mask, num_steps=STEPS)
  np.testing.assert_array_equal(inpaint(image), inpaint(other))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(16, 16), (13, 22)])
def test_pixels_under_the_mask_do_not_change_the_samples_of_a_resized_image(inpainter, size):
  rng = np.random.default_rng(0)
  mask = np.zeros((*size, 1), np.float32)
  mask[3:9, 7:8] = 1.0  # narrower than a pixel of the working size
  image = rng.uniform(size=(*size, 3)).astype(np.float32)
  samples = [
    inpainter(np.where(mask > 0, content, image), mask, num_steps=STEPS)
    for content in (np.float32(0), np.float32(1))
  ]
  np.testing.assert_array_equal(*samples)


@pytest.mark.slow
def test_samples_of_an_image_are_consecutive(inpainter):
  images, masks = testing.tiny_prompts(2)
  latents = np.random.default_rng(0).normal(size=(6, 4, 4, 4)).astype(np.float32)
  samples = inpainter(
    list(images), list(masks), num_steps=STEPS, latents=latents, num_samples=3, paste_back=False
  )
  assert samples.shape == (6, architectures.SIZE, architectures.SIZE, 3)
  for i, sample in enumerate(samples):
    pair, noise = (images[i // 3], masks[i // 3]), latents[i : i + 1]
    (alone,) = inpainter(*pair, num_steps=STEPS, latents=noise, paste_back=False)
    np.testing.assert_allclose(sample, alone, atol=1e-5)
  assert all(np.abs(samples[0] - sample).max() > 1e-3 for sample in samples[1:])


def test_reports_and_numbers_of_steps_share_programs_and_reports_keep_every_bit(inpainter, prompt):
  calls = []
  inpaint = lambda steps, **options: inpainter(*prompt, num_steps=steps, eta=1.0, **options)
  silent = inpaint(STEPS)
  sizes = [program._cache_size() for program in sampling.programs()]
  np.testing.assert_array_equal(inpaint(STEPS, report=calls.append), silent)
  assert sum(calls) == STEPS and len(calls) > 1
  inpaint(STEPS + 1)
  assert [program._cache_size() for program in sampling.programs()] == sizes


@pytest.mark.parametrize("size", [(16, 16), (5, 9)])
def test_samples_have_the_size_of_the_image(inpainter, size):
  rng = np.random.default_rng(0)
  image = rng.uniform(size=(*size, 3)).astype(np.float32)
  mask = np.zeros((*size, 1), np.float32)
  mask[:, : size[1] // 2] = 1.0
  (sample,) = inpainter(image, mask, num_steps=STEPS)
  assert sample.shape == image.shape
  np.testing.assert_array_equal(sample[:, size[1] // 2 :], image[:, size[1] // 2 :])


def test_every_kind_of_input_gives_the_same_samples(inpainter, prompt, tmp_path):
  image, mask = prompt
  inpaint = lambda image, mask: inpainter(image, mask, num_steps=STEPS)
  expected = inpaint(image, mask)
  pil_image, pil_mask = to_pil(image), to_pil(mask)
  pil_image.save(tmp_path / "image.png")
  pil_mask.save(tmp_path / "mask.png")
  opaque = pil_image.copy()
  opaque.putalpha(255)
  # Stored rotated by 90 degrees, with the EXIF orientation that undoes it.
  rotated, exif = pil_image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
  exif[0x0112] = 6  # viewers rotate by 90 degrees clockwise
  rotated.save(tmp_path / "rotated.png", exif=exif)
  as_bytes = np.asarray(pil_image)
  cases = {
    "PIL": (pil_image, pil_mask),
    "path": (tmp_path / "image.png", str(tmp_path / "mask.png")),
    "uint8": (as_bytes, np.asarray(pil_mask)),
    "RGBA": (opaque, pil_mask.convert("RGBA")),
    "EXIF": (tmp_path / "rotated.png", pil_mask),
    "list": ([image], [mask]),
    "bool mask": (image, mask[..., 0] > 0),
  }
  for kind, (some_image, some_mask) in cases.items():
    np.testing.assert_array_equal(inpaint(some_image, some_mask), expected, err_msg=kind)
  grey = np.repeat(image[..., :1], 3, axis=-1)
  np.testing.assert_array_equal(inpaint(image[..., 0], mask), inpaint(grey, mask))
  np.testing.assert_array_equal(inpaint(to_pil(image[..., 0]), mask), inpaint(grey, mask))


# ------------------------------------------------------------------------------------- folders
def test_saving_a_loaded_folder_gives_identical_files(folder, tmp_path):
  Inpainter.from_pretrained(folder).save_pretrained(tmp_path)
  names = lambda root: sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
  assert names(tmp_path) == names(folder)
  for name in names(folder):
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_loaded_parameters_and_configs_equal_the_saved_ones(folder, inpainter):
  loaded = Inpainter.from_pretrained(folder)
  assert loaded.configs == inpainter.configs
  assert loaded.modules == inpainter.modules
  assert jax.tree.structure(loaded.params) == jax.tree.structure(inpainter.params)
  assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, inpainter.params))


def test_context_of_an_empty_text_equals_that_of_transformers(both):
  import torch

  ours, stock = both
  length = ours.modules.text_encoder.config.max_position_embeddings
  tokens = stock.tokenizer("", padding="max_length", max_length=length, return_tensors="pt")
  with torch.no_grad():
    expected = stock.text_encoder(tokens.input_ids).last_hidden_state.numpy()
  np.testing.assert_allclose(ours.empty_context.tokens, expected, atol=1e-5)


# -------------------------------------------------------------------------------------- errors
def edited(folder, tmp_path, part: str, **changes):
  """Copies the folder and changes fields of one JSON file."""
  copy = tmp_path / "edited"
  shutil.copytree(folder, copy)
  file = copy / part
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  return copy


def refused(match: str):
  """Expects a ValueError of one line that matches."""
  return pytest.raises(ValueError, match=rf"\A(?=[^\n]*\Z)(?s:.*){match}")


def test_unet_without_inpainting_channels_raises_an_error(folder, tmp_path):
  other = edited(folder, tmp_path, "unet/config.json", in_channels=4)
  with refused("4 input channels; expected 9"):
    Inpainter.from_pretrained(other)


def test_text_encoder_of_another_model_raises_an_error(folder, tmp_path):
  other = edited(folder, tmp_path, "unet/config.json", cross_attention_dim=16)
  with refused(
    "cross_attention_dim of the UNet is 16; expected 12, the hidden_size of text_encoder; use"
  ):
    Inpainter.from_pretrained(other)


def test_folder_that_is_no_pipeline_raises_an_error(tmp_path):
  with refused("no model_index.json"):
    Inpainter.from_pretrained(tmp_path)


def test_folder_without_tokenizer_raises_an_error(folder, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  shutil.rmtree(copy / "tokenizer")
  with refused("tokenizer: no files"):
    Inpainter.from_pretrained(copy)


@pytest.mark.parametrize("shape", [(1, 8, 8, 4), (2, 4, 4, 4), (1, 4, 4, 4, 1)])
def test_latents_of_a_wrong_shape_raise_an_error(inpainter, prompt, shape):
  with refused(r"these images need \(1, 4, 4, 4\)"):
    inpainter(*prompt, latents=np.zeros(shape, np.float32))


def test_invalid_masks_raise_errors(inpainter, prompt):
  image, mask = prompt
  with refused("mask is 8x4 pixels, its image 8x8 pixels"):
    inpainter(image, mask[:4])
  with refused("mask is empty"):
    inpainter(image, np.zeros_like(mask))
  with refused("mask is full"):
    inpainter(image, np.ones_like(mask))


def test_one_mask_applies_to_all_images_of_one_size():
  images, masks = testing.tiny_prompts(3)
  loaded, loaded_masks = load_pairs(list(images), masks[0])
  np.testing.assert_array_equal(loaded, images)
  np.testing.assert_array_equal(loaded_masks, np.repeat(masks[:1], 3, axis=0))
  with refused("2 masks for 3 images"):
    load_pairs(list(images), list(masks[:2]))
  with refused("the image is 8x4 pixels, the first of the list 8x8 pixels"):
    load_pairs([images[0], images[1, :4]], masks[0])


@pytest.mark.parametrize(
  ("options", "reason"),
  [
    ({"num_samples": 0}, "num_samples is 0; expected an integer from 1 to 1000000"),
    ({"text": None}, "text is None; expected a text"),
    ({"text": 3}, "text is 3; expected a text"),
    ({"text": [None]}, r"text is \[None\]; expected a text"),
    ({"text": []}, "0 texts for 1 images"),
  ],
)
def test_invalid_texts_and_numbers_of_samples_raise_errors(inpainter, prompt, options, reason):
  with refused(reason):
    inpainter(*prompt, **options)


def test_empty_lists_and_masks_that_fill_the_working_size_raise_errors(inpainter):
  with refused("images: the list is empty"):
    inpainter([], [])
  mask = np.ones((64, 64, 1), np.float32)
  mask[3, 3] = 0
  with refused("the 64x64 pixels leave no known pixel at 8x8 pixels"):
    inpainter(np.zeros((64, 64, 3), np.uint8), mask)


def test_number_of_texts_other_than_one_or_that_of_images_raises_an_error(inpainter, prompt):
  with refused("2 texts for 1 images"):
    inpainter(*prompt, text=["a", "b"])
