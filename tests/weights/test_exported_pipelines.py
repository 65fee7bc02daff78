"""Stock diffusers opens an exported folder and inpaints as the Inpainter does."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from prefpaint_jax import testing
from prefpaint_jax.diffusion.schedule import CLASSES
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models.architectures import SIZE, tiny_configs
from prefpaint_jax.models.assembly import make_modules

pytestmark = pytest.mark.usefixtures("quick_compilation")


def of_scheduler(inpainter: Inpainter, **fields) -> Inpainter:
  """Makes the tiny pipeline with another scheduler_config.json."""
  betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
  configs = tiny_configs() | {"scheduler": betas | fields}
  modules = make_modules(configs)
  return Inpainter(modules, inpainter.params, configs, inpainter.tokenizer_files)


def edit(path, **changes) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def open_stock(monkeypatch):
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  diffusers = pytest.importorskip("diffusers")
  from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

  monkeypatch.setattr(
    DiagonalGaussianDistribution, "sample", lambda self, *args, **kwargs: self.mode()
  )

  def opened(folder, **options):
    pipe = diffusers.AutoPipelineForInpainting.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe

  return opened


def inpaint_stock(pipe, latents: np.ndarray, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  import torch
  from PIL import Image

  noise = torch.tensor(latents).permute(0, 3, 1, 2).to(pipe.unet.dtype)
  return pipe(
    prompt="",
    image=Image.fromarray(image),
    mask_image=Image.fromarray(mask),
    height=SIZE,
    width=SIZE,
    strength=1.0,
    num_inference_steps=10,
    latents=noise,
    output_type="np",
  ).images


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, None])
@pytest.mark.parametrize("name", [*CLASSES, "FlaxPNDMScheduler", "FlaxDDIMScheduler"])
def test_stock_inpaints_an_export_as_the_inpainter_does(
  inpainter, tmp_path, open_stock, name, offset
):
  # The steps of stock, which do not meet with the linspace spacing that many classes have.
  ours = of_scheduler(inpainter, _class_name=name, steps_offset=offset, steps_meet=False)
  ours.save_pretrained(tmp_path / "exported")
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
  mask = np.zeros((SIZE, SIZE), np.uint8)
  mask[:, : SIZE // 2] = 255
  latents = rng.normal(size=(1, SIZE // 2, SIZE // 2, 4)).astype(np.float32)
  expected = inpaint_stock(open_stock(tmp_path / "exported"), latents, image, mask)
  found = ours(image, mask, num_steps=10, latents=latents, paste_back=False)
  np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("name", [*CLASSES, "FlaxPNDMScheduler", "FlaxDDIMScheduler"])
def test_export_names_a_scheduler_of_stock_and_reads_as_the_same_schedule(
  inpainter, tmp_path, name
):
  ours = of_scheduler(inpainter, _class_name=name)
  ours.save_pretrained(tmp_path / "exported")
  index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
  written = json.loads((tmp_path / "exported/scheduler/scheduler_config.json").read_text())
  assert (
    index["scheduler"] == ["diffusers", written["_class_name"]] == ["diffusers", "DDIMScheduler"]
  )
  reopened = Inpainter.from_pretrained(tmp_path / "exported")
  assert reopened.modules.schedule == ours.modules.schedule


@pytest.mark.parametrize(
  "field, stored",
  [("dtype", "float32"), (None, "float16"), ("torch_dtype", "float16"), (None, "bfloat16")],
)
@pytest.mark.slow
def test_stock_computes_an_export_in_one_type(inpainter, tmp_path, open_stock, field, stored):
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  base = of_scheduler(inpainter, _class_name="DDIMScheduler")
  base.configs["text_encoder"] |= {field: "float16"} if field else {}
  base.save_pretrained(tmp_path / "exported", dtype=stored)
  written = load_file(tmp_path / "exported/unet/diffusion_pytorch_model.safetensors")
  assert {x.dtype.name for x in written.values()} == {stored}
  asked = getattr(torch, stored)
  latents = np.zeros((1, SIZE // 2, SIZE // 2, 4), np.float32)
  image, mask = np.zeros((SIZE, SIZE, 3), np.uint8), np.full((SIZE, SIZE), 255, np.uint8)
  for options, computed in (({}, torch.float32), ({"torch_dtype": asked}, asked)):
    pipe = open_stock(tmp_path / "exported", **options)
    networks = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {x.dtype for network in networks for x in network.parameters()} == {computed}
    assert np.isfinite(inpaint_stock(pipe, latents, image, mask)).all()


@pytest.mark.parametrize("model", ["inpainter", "reward"])
def test_failed_save_leaves_nothing_and_a_second_one_succeeds(
  inpainter, tmp_path, monkeypatch, model
):
  from prefpaint_jax.weights import files, folder

  saved = inpainter if model == "inpainter" else testing.tiny_reward()

  def full(path, *args):
    raise OSError(28, "No space left on device", str(path))

  with monkeypatch.context() as patch:
    patch.setattr(folder, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
      saved.save_pretrained(tmp_path / "model")
  assert os.listdir(tmp_path) == []
  saved.save_pretrained(tmp_path / "model")
  assert os.listdir(tmp_path) == ["model"]
  assert files.load_file(next((tmp_path / "model").rglob("*.safetensors")))


def test_failed_replacement_keeps_the_earlier_weights_with_their_bound(tmp_path, monkeypatch):
  from prefpaint_jax import reward

  first, second = testing.tiny_reward(1), testing.tiny_reward(2)
  first.save_pretrained(tmp_path / "model")
  before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
  with monkeypatch.context() as patch:
    patch.setattr(reward, "save_bound", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      second.save_pretrained(tmp_path / "model")
  assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
  second.bound = None
  second.save_pretrained(tmp_path / "model")
  assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]


def test_save_refuses_a_folder_with_other_files(inpainter, tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  for model in (inpainter, testing.tiny_reward()):
    with pytest.raises(ValueError, match=r"is not empty, it has notes\.txt; name a new folder"):
      model.save_pretrained(tmp_path)
  assert os.listdir(tmp_path) == ["notes.txt"]
