"""The autoencoder equals diffusers' AutoencoderKL, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_parity, channels_last, params_of, randomise, template_of, tensors_of

from prefpaint_jax.models.config import VAEConfig
from prefpaint_jax.models.vae import AutoencoderKL
from prefpaint_jax.weights import folder, names

torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
pytestmark = pytest.mark.usefixtures("kernels")
diffusers = pytest.importorskip("diffusers")
CONFIGS = {  # block_out_channels, layers_per_block, latent_channels
  "one_level": ([8], 1, 4),
  "two_levels": ([8, 12], 2, 3),
  "three_levels": ([12, 8, 16], 1, 4),
  "four_levels": ([4, 8, 12, 8], 2, 4),
}


def pair(channels: list[int], layers: int, latents: int):
  """Returns (torch model, our model, our parameters) with the same random weights."""
  config = {
    "block_out_channels": channels,
    "down_block_types": ["DownEncoderBlock2D"] * len(channels),
    "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    "layers_per_block": layers,
    "latent_channels": latents,
    "norm_num_groups": 4,
  }
  theirs = randomise(diffusers.AutoencoderKL.from_config(config))
  ours = AutoencoderKL(VAEConfig.from_dict(config))
  template = template_of(ours, jnp.zeros((1, 16, 16, 3)))
  return theirs, ours, params_of(theirs, template)


@pytest.mark.parametrize("name", CONFIGS)
def test_posterior_and_decoded_image_equal_diffusers(name):
  theirs, ours, params = pair(*CONFIGS[name])
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
  side = ours.config.factor
  latents = rng.normal(size=(2, 16 // side, 24 // side, ours.config.latent_channels))
  latents = latents.astype(np.float32)

  with torch.no_grad():
    posterior = theirs.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist
    decoded = theirs.decode(torch.tensor(latents).permute(0, 3, 1, 2)).sample

  encode = jax.jit(lambda params, x: ours.apply({"params": params}, x, method="encode"))
  decode = jax.jit(lambda params, x: ours.apply({"params": params}, x, method="decode"))
  mean, log_variance = encode(params, images)
  assert_parity(mean, channels_last(posterior.mean))
  assert_parity(log_variance, channels_last(posterior.logvar))
  assert_parity(decode(params, latents), channels_last(decoded))


@pytest.mark.slow
def test_posterior_of_an_odd_image_size_equals_diffusers():
  theirs, ours, params = pair(*CONFIGS["two_levels"])
  images = np.random.default_rng(0).uniform(-1, 1, (1, 11, 14, 3)).astype(np.float32)
  with torch.no_grad():
    posterior = theirs.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist
  mean, _ = ours.apply({"params": params}, images, method="encode")
  assert_parity(mean, channels_last(posterior.mean))


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_attention_names_load_as_diffusers_loads_them(tmp_path, as_convolution):
  theirs, _, params = pair(*CONFIGS["two_levels"])
  old_names = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
  }
  old = {}
  for name, tensor in tensors_of(theirs).items():
    for new_part, old_part in old_names.items():
      if new_part in name:
        name = name.replace(new_part, old_part)
        if as_convolution and tensor.ndim == 2:
          tensor = tensor[..., None, None]
    old[name] = tensor
  assert old.keys() != tensors_of(theirs).keys()

  template = jax.eval_shape(lambda: params)
  loaded = names.to_tree(old, template, what="old VAE")
  assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))
  if not as_convolution:
    theirs.save_config(tmp_path)
    folder.save_tensors(tmp_path / "diffusion_pytorch_model.safetensors", old)
    reopened = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    exported = names.to_torch(loaded)
    assert all(np.array_equal(exported[n], t) for n, t in tensors_of(reopened).items())
