"""The whole pipeline against stock diffusers on our saved folder, and what a user can give it."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from prefpaint_jax import inpainter as inpainter_module
from prefpaint_jax import testing
from prefpaint_jax.data.images import load_pairs
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models import architectures

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = 10


@pytest.fixture(scope="module")
def folder(inpainter, tmp_path_factory):
  folder = tmp_path_factory.mktemp("pipeline")
  inpainter.save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def prompt() -> tuple[np.ndarray, np.ndarray]:
  """A picture [8, 8, 3] of whole bytes, and its mask [8, 8, 1]."""
  pictures, masks = testing.tiny_prompts(1)
  return (np.round(pictures[0] * 255) / 255).astype(np.float32), masks[0]


def to_pil(image: np.ndarray) -> Image.Image:
  return Image.fromarray(np.round(255 * image).astype(np.uint8).squeeze())


# ------------------------------------------------------------------------- against stock diffusers
@pytest.fixture(scope="module", params=[1, 2], ids=["sd1_epsilon", "sd2_v_prediction"])
def both(request, tmp_path_factory):
  """Our pipeline, and stock diffusers' from the folder that ours wrote."""
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  torch.set_num_threads(1)  # threads that wait for each other cost more than these layers
  diffusers = pytest.importorskip("diffusers")
  from diffusers.models.autoencoders import vae

  ours = testing.tiny_inpainter(generation=request.param)
  folder = tmp_path_factory.mktemp("pipeline")
  ours.save_pretrained(folder)
  stock = diffusers.AutoPipelineForInpainting.from_pretrained(folder)
  assert type(stock) is diffusers.StableDiffusionInpaintPipeline
  assert type(stock.scheduler) is diffusers.DDIMScheduler
  stock.set_progress_bar_config(disable=True)
  with pytest.MonkeyPatch.context() as patch:
    # Stock samples the posterior of the masked image's latents; we take its mode.
    patch.setattr(vae.DiagonalGaussianDistribution, "sample", lambda self, _: self.mode())
    yield ours, stock


@pytest.mark.parametrize(
  ("text", "guidance_scale"), [("", 7.5), ("a red Tree!", 1.0), ("a red Tree!", 7.5)]
)
def test_pipeline_equals_stock_diffusers(both, prompt, text, guidance_scale):
  import torch

  ours, stock = both
  image, mask = prompt
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
    eta=0.0,
    latents=torch.tensor(latents).permute(0, 3, 1, 2),
    output_type="np",
  ).images
  painted = ours(
    image,
    mask,
    num_steps=STEPS,
    text=text,
    guidance_scale=guidance_scale,
    latents=latents,
    paste_back=False,
  )
  assert painted.shape == expected.shape == (1, architectures.SIZE, architectures.SIZE, 3)
  assert expected.std() > 0.05  # a picture, not a saturated field
  np.testing.assert_allclose(painted, expected, atol=1e-3)


def test_text_and_guidance_change_the_picture(inpainter, prompt):
  paint = lambda **kwargs: inpainter(*prompt, num_steps=STEPS, paste_back=False, **kwargs)
  without, with_text = paint(), paint(text="a tree", guidance_scale=1.0)
  guided = paint(text="a tree", guidance_scale=7.5)
  assert np.abs(without - with_text).max() > 1e-3
  assert np.abs(guided - with_text).max() > 1e-3


def test_all_texts_are_encoded_by_one_program(inpainter):
  compiled = inpainter_module._encode_text._cache_size()
  a, b = inpainter.encode_text(["a door"]), inpainter.encode_text(["a wall"])
  assert np.abs(a - b).max() > 0.01
  assert inpainter_module._encode_text._cache_size() - compiled <= 1


@pytest.mark.parametrize("text", ["", "A red tree, 3 m high!", "größer — 木", "x" * 200])
def test_byte_tokenizer_gives_the_ids_of_transformers(folder, inpainter, text):
  transformers = pytest.importorskip("transformers")
  stock = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
  settings = {"padding": "max_length", "max_length": 77, "truncation": True}
  ids = inpainter.tokenizer([text], **settings)["input_ids"][0]
  assert ids == stock(text, **settings)["input_ids"]
  # By hand: every word is its bytes, the last one marked as the end of a word.
  words = re.findall(r"[^\W\d_]+|\d|[^\s\w]+", text.lower())
  tokens = []
  for word in words:
    *bytes_before, last = word.encode()
    tokens += [_symbol(byte) for byte in bytes_before] + [_symbol(last) + "</w>"]
  vocabulary = json.loads(inpainter.tokenizer_files["vocab.json"])
  start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
  expected = [start, *(vocabulary[token] for token in tokens)][:76]
  assert ids == expected + [end] * (77 - len(expected))


def _symbol(byte: int) -> str:
  """GPT-2's character for a byte."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [other for other in range(256) if other not in printable]
  return chr(byte) if byte in printable else chr(256 + rest.index(byte))


# ----------------------------------------------------------------------------- what comes back
def test_same_key_same_picture_and_another_key_another(inpainter, prompt):
  paint = lambda seed: inpainter(*prompt, key=jax.random.key(seed), num_steps=STEPS, eta=1.0)
  first, again, other = paint(3), paint(3), paint(4)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.01


def test_known_pixels_are_kept_exactly_and_the_hole_is_not(inpainter, prompt):
  image, mask = prompt
  (painted,) = inpainter(image, mask, num_steps=STEPS)
  known = np.broadcast_to(mask == 0, image.shape)
  np.testing.assert_array_equal(painted[known], image[known])
  assert (painted[~known] != image[~known]).mean() > 0.9
  assert painted.dtype == np.float32
  assert painted.min() >= 0.0 and painted.max() <= 1.0


def test_what_is_under_the_mask_does_not_matter(inpainter, prompt):
  image, mask = prompt
  other = np.where(mask > 0, 1.0 - image, image)
  paint = lambda image: inpainter(image, mask, num_steps=STEPS)
  np.testing.assert_array_equal(paint(image), paint(other))


def test_samples_of_an_image_come_in_a_row(inpainter):
  images, masks = testing.tiny_prompts(2)
  latents = np.random.default_rng(0).normal(size=(6, 4, 4, 4)).astype(np.float32)
  painted = inpainter(
    list(images), list(masks), num_steps=STEPS, latents=latents, num_samples=3, paste_back=False
  )
  assert painted.shape == (6, architectures.SIZE, architectures.SIZE, 3)
  for i, sample in enumerate(painted):
    pair, noise = (images[i // 3], masks[i // 3]), latents[i : i + 1]
    (alone,) = inpainter(*pair, num_steps=STEPS, latents=noise, paste_back=False)
    np.testing.assert_allclose(sample, alone, atol=1e-5)
  assert all(np.abs(painted[0] - sample).max() > 1e-3 for sample in painted[1:])


def test_report_is_called_at_each_step(inpainter, prompt):
  calls = []
  inpainter(*prompt, num_steps=STEPS, report=lambda: calls.append(1) and None)
  jax.effects_barrier()
  assert len(calls) == STEPS


@pytest.mark.parametrize("size", [(16, 16), (5, 9)])
def test_image_of_another_size_comes_back_at_its_size(inpainter, size):
  rng = np.random.default_rng(0)
  image = rng.uniform(size=(*size, 3)).astype(np.float32)
  mask = np.zeros((*size, 1), np.float32)
  mask[:, : size[1] // 2] = 1.0
  (painted,) = inpainter(image, mask, num_steps=STEPS)
  assert painted.shape == image.shape
  np.testing.assert_array_equal(painted[:, size[1] // 2 :], image[:, size[1] // 2 :])


def test_every_kind_of_input_gives_the_same_picture(inpainter, prompt, tmp_path):
  image, mask = prompt
  paint = lambda image, mask: inpainter(image, mask, num_steps=STEPS)
  expected = paint(image, mask)
  picture, hole = to_pil(image), to_pil(mask)
  picture.save(tmp_path / "image.png")
  hole.save(tmp_path / "mask.png")
  opaque = picture.copy()
  opaque.putalpha(255)
  # Turned by EXIF: stored lying on its side, with the tag that says so.
  turned, exif = picture.transpose(Image.Transpose.ROTATE_90), Image.Exif()
  exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
  turned.save(tmp_path / "turned.png", exif=exif)
  as_bytes = np.asarray(picture)
  cases = {
    "PIL": (picture, hole),
    "path": (tmp_path / "image.png", str(tmp_path / "mask.png")),
    "uint8": (as_bytes, np.asarray(hole)),
    "RGBA": (opaque, hole.convert("RGBA")),
    "EXIF": (tmp_path / "turned.png", hole),
    "list": ([image], [mask]),
    "bool mask": (image, mask[..., 0] > 0),
  }
  for kind, (some_image, some_mask) in cases.items():
    np.testing.assert_array_equal(paint(some_image, some_mask), expected, err_msg=kind)
  grey = np.repeat(image[..., :1], 3, axis=-1)
  np.testing.assert_array_equal(paint(image[..., 0], mask), paint(grey, mask))
  np.testing.assert_array_equal(paint(to_pil(image[..., 0]), mask), paint(grey, mask))


# ------------------------------------------------------------------------------------- folders
def test_saving_what_was_loaded_changes_nothing(folder, tmp_path):
  Inpainter.from_pretrained(folder).save_pretrained(tmp_path)
  names = lambda root: sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
  assert names(tmp_path) == names(folder)
  for name in names(folder):
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_loaded_parameters_and_configs_are_those_that_were_saved(folder, inpainter):
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
  np.testing.assert_allclose(ours.empty_context, expected, atol=1e-5)


# -------------------------------------------------------------------------------------- errors
def edited(folder, tmp_path, part: str, **changes):
  copy = tmp_path / "edited"
  shutil.copytree(folder, copy)
  file = copy / part
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  return copy


def refused(match: str):
  """The error that a user sees: one line that says this."""
  return pytest.raises(ValueError, match=rf"\A(?=[^\n]*\Z)(?s:.*){match}")


def test_unet_without_inpainting_channels_is_refused(folder, tmp_path):
  other = edited(folder, tmp_path, "unet/config.json", in_channels=4)
  with refused("4 input channels, an inpainting UNet has 9"):
    Inpainter.from_pretrained(other)


def test_text_encoder_of_another_model_is_refused(folder, tmp_path):
  other = edited(folder, tmp_path, "unet/config.json", cross_attention_dim=16)
  with refused("attends to 16 features, the text encoder gives 12"):
    Inpainter.from_pretrained(other)


def test_folder_that_is_no_pipeline_is_refused(tmp_path):
  with refused("no model_index.json"):
    Inpainter.from_pretrained(tmp_path)


def test_folder_without_tokenizer_is_refused(folder, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  shutil.rmtree(copy / "tokenizer")
  with refused("tokenizer: no files"):
    Inpainter.from_pretrained(copy)


@pytest.mark.parametrize("shape", [(1, 8, 8, 4), (2, 4, 4, 4), (1, 4, 4, 4, 1)])
def test_latents_of_a_wrong_shape_are_refused(inpainter, prompt, shape):
  with refused(r"these images need \(1, 4, 4, 4\)"):
    inpainter(*prompt, latents=np.zeros(shape, np.float32))


def test_masks_that_cannot_be_are_refused(inpainter, prompt):
  image, mask = prompt
  with refused("mask is 4x8, its image 8x8"):
    inpainter(image, mask[:4])
  with refused("mask is empty"):
    inpainter(image, np.zeros_like(mask))
  with refused("mask is full"):
    inpainter(image, np.ones_like(mask))


def test_one_mask_serves_all_images_which_are_of_one_size():
  images, masks = testing.tiny_prompts(3)
  loaded, holes = load_pairs(list(images), masks[0])
  np.testing.assert_array_equal(loaded, images)
  np.testing.assert_array_equal(holes, np.repeat(masks[:1], 3, axis=0))
  with refused("2 masks for 3 images"):
    load_pairs(list(images), list(masks[:2]))
  with refused("the image is 4x8, the first of the list 8x8"):
    load_pairs([images[0], images[1, :4]], masks[0])


def test_as_many_texts_as_images_or_one(inpainter, prompt):
  with refused("2 texts for 1 images"):
    inpainter(*prompt, text=["a", "b"])
