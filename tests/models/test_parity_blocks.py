"""Every block of the UNet and the VAE equals that of diffusers, with random weights."""
# Shapes: B images, H W pixels, C channels, L text tokens, D text width.

import jax
import numpy as np
import pytest

from prefpaint_jax.models import architectures, blocks, vae
from prefpaint_jax.weights import names

torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
from diffusers.models import (  # noqa: E402 - needs torch
  attention,
  attention_processor,
  downsampling,
  embeddings,
  resnet,
  transformers,
  upsampling,
)

pytestmark = pytest.mark.usefixtures("kernels")
B, H, W, C, L, D = 2, 6, 4, 16, 5, 12
rng = np.random.default_rng(0)
IMAGE = rng.normal(size=(B, H, W, C)).astype(np.float32)
TOKENS = rng.normal(size=(B, H * W, C)).astype(np.float32)
TEXT = rng.normal(size=(B, L, D)).astype(np.float32)
TIME = rng.normal(size=(B, 24)).astype(np.float32)


def transformer_2d(linear: bool):
  return transformers.Transformer2DModel(
    num_attention_heads=4,
    attention_head_dim=C // 4,
    in_channels=C,
    num_layers=2,
    norm_num_groups=8,
    cross_attention_dim=D,
    use_linear_projection=linear,
  )


def resnet_block(channels: int, time: bool):
  return resnet.ResnetBlock2D(
    in_channels=C, out_channels=channels, temb_channels=24 if time else None, groups=8, eps=1e-5
  )


def vae_attention():
  return attention_processor.Attention(
    C, heads=1, dim_head=C, norm_num_groups=8, eps=1e-6, bias=True, residual_connection=True
  )


CASES = {
  "resnet": (blocks.ResnetBlock2D(C, 8, 1e-5), (IMAGE, TIME), lambda: resnet_block(C, True)),
  "resnet with shortcut": (
    blocks.ResnetBlock2D(24, 8, 1e-5),
    (IMAGE, TIME),
    lambda: resnet_block(24, True),
  ),
  "resnet without time": (
    blocks.ResnetBlock2D(C, 8, 1e-5),
    (IMAGE, None),
    lambda: resnet_block(C, False),
  ),
  "downsample of the UNet": (
    blocks.Downsample2D((1, 1)),
    (IMAGE,),
    lambda: downsampling.Downsample2D(C, use_conv=True, padding=1, name="op"),
  ),
  "downsample of the VAE": (
    blocks.Downsample2D((0, 1)),
    (IMAGE,),
    lambda: downsampling.Downsample2D(C, use_conv=True, padding=0, name="op"),
  ),
  "upsample": (
    blocks.Upsample2D(),
    (IMAGE,),
    lambda: upsampling.Upsample2D(C, use_conv=True),
  ),
  "self-attention": (
    blocks.Attention(4),
    (TOKENS,),
    lambda: attention_processor.Attention(C, heads=4, dim_head=C // 4),
  ),
  "cross-attention": (
    blocks.Attention(4),
    (TOKENS, TEXT),
    lambda: attention_processor.Attention(C, D, heads=4, dim_head=C // 4),
  ),
  "feed-forward": (
    blocks.FeedForward(),
    (TOKENS,),
    lambda: attention.FeedForward(C, activation_fn="geglu"),
  ),
  "transformer": (
    blocks.Transformer2DModel(4, 2, 8, False),
    (IMAGE, TEXT),
    lambda: transformer_2d(linear=False),
  ),
  "transformer, linear projection": (
    blocks.Transformer2DModel(4, 2, 8, True),
    (IMAGE, TEXT),
    lambda: transformer_2d(linear=True),
  ),
  "attention of the VAE": (vae.VAEAttention(8), (IMAGE,), vae_attention),
  "time embedding": (
    blocks.TimestepEmbedding(24),
    (TIME,),
    lambda: embeddings.TimestepEmbedding(24, 24),
  ),
}


def to_torch(x: np.ndarray | None):
  return x if x is None else torch.from_numpy(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)


@pytest.mark.parametrize("name", CASES)
def test_block_equals_diffusers(name):
  ours, inputs, make_theirs = CASES[name]
  shapes = jax.eval_shape(ours.init, jax.random.key(0), *inputs)["params"]
  params = architectures.random_params(shapes, seed=1)
  theirs = make_theirs().eval()
  theirs.load_state_dict({k: torch.from_numpy(v) for k, v in names.to_torch(params).items()})
  with torch.no_grad():
    expected = theirs(*map(to_torch, inputs))
  expected = expected[0] if isinstance(expected, tuple) else expected
  expected = getattr(expected, "sample", expected).numpy()
  expected = np.moveaxis(expected, 1, -1) if expected.ndim == 4 else expected
  output = np.asarray(ours.apply({"params": params}, *inputs))
  np.testing.assert_allclose(output, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("flip, shift", [(True, 0), (False, 1)])
def test_timestep_sinusoids_equal_diffusers(flip, shift):
  t = np.array([0, 1, 20, 981])
  expected = embeddings.get_timestep_embedding(torch.from_numpy(t), 32, flip, shift)
  ours = blocks.timestep_embedding(t, 32, flip, shift)
  np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)
