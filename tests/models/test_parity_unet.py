"""The UNet equals diffusers' UNet2DConditionModel, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_parity, channels_last, params_of, randomise, template_of

from prefpaint_jax.models.config import UNetConfig
from prefpaint_jax.models.unet import UNet2DConditionModel
from prefpaint_jax.weights import names

torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
pytestmark = pytest.mark.usefixtures("kernels")
diffusers = pytest.importorskip("diffusers")
_COMMON = {"in_channels": 9, "out_channels": 4, "norm_num_groups": 4, "cross_attention_dim": 12}


def levels(down: str, up: str) -> dict:
  """Returns block types: letter c has cross-attention, letter p has not."""
  kinds = {"c": "CrossAttn", "p": ""}
  return {
    "down_block_types": [f"{kinds[letter]}DownBlock2D" for letter in down],
    "up_block_types": [f"{kinds[letter]}UpBlock2D" for letter in up],
  }


CONFIGS = {
  "one_level": {
    **levels("c", "c"),
    "block_out_channels": [8],
    "layers_per_block": 1,
    "attention_head_dim": 2,
  },
  "sd1_two_levels": {
    **levels("cp", "pc"),
    "block_out_channels": [16, 24],
    "layers_per_block": 1,
    "attention_head_dim": 4,
  },
  "sd2_three_levels": {
    **levels("ccp", "pcc"),
    "block_out_channels": [8, 16, 24],
    "layers_per_block": 2,
    "attention_head_dim": [1, 2, 3],
    "use_linear_projection": True,
  },
  "sd1_four_levels": {
    **levels("cccp", "pccc"),
    "block_out_channels": [8, 16, 16, 24],
    "layers_per_block": [1, 2, 1, 1],
    "attention_head_dim": 2,
  },
  "mixed_and_unusual": {
    **levels("pcp", "cpc"),
    "block_out_channels": [8, 12, 16],
    "layers_per_block": 3,
    "attention_head_dim": [2, 3, 4],
    "transformer_layers_per_block": 2,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-3,
    "downsample_padding": 0,
  },
}
LARGE = ("sd1_four_levels", "sd2_three_levels", "mixed_and_unusual")


def pair(config: dict):
  """Returns (torch model, our model, our parameters) with the same random weights."""
  config = _COMMON | config
  theirs = randomise(diffusers.UNet2DConditionModel.from_config(config))
  ours = UNet2DConditionModel(UNetConfig.from_dict(config))
  template = template_of(ours, jnp.zeros((1, 8, 8, 9)), jnp.zeros(1), jnp.zeros((1, 2, 12)))
  return theirs, ours, params_of(theirs, template)


def inputs(height: int = 8, width: int = 8):
  rng = np.random.default_rng(0)
  sample = rng.normal(size=(2, height, width, 9)).astype(np.float32)
  context = rng.normal(size=(2, 5, 12)).astype(np.float32)
  return sample, np.array([1, 981]), context


def torch_inputs(sample, timesteps, context):
  return torch.tensor(sample).permute(0, 3, 1, 2), torch.tensor(timesteps), torch.tensor(context)


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in CONFIGS],
)
def test_output_equals_diffusers(name):
  theirs, ours, params = pair(CONFIGS[name])
  arguments = inputs()
  with torch.no_grad():
    expected = channels_last(theirs(*torch_inputs(*arguments)).sample)
  assert_parity(jax.jit(ours.apply)({"params": params}, *arguments), expected)


@pytest.mark.slow
def test_output_at_a_size_that_is_not_a_power_of_two_equals_diffusers():
  theirs, ours, params = pair(CONFIGS["sd2_three_levels"])
  arguments = inputs(height=9, width=6)
  with torch.no_grad():
    expected = channels_last(theirs(*torch_inputs(*arguments)).sample)
  assert_parity(jax.jit(ours.apply)({"params": params}, *arguments), expected)


def test_one_timestep_and_one_context_broadcast_over_the_batch():
  _, ours, params = pair(CONFIGS["one_level"])
  sample, _, context = inputs()
  apply = jax.jit(ours.apply)
  shared = apply({"params": params}, sample, jnp.array(501), context[:1])
  repeated = apply({"params": params}, sample, jnp.full(2, 501), np.repeat(context[:1], 2, axis=0))
  assert_parity(shared, repeated, tolerance=1e-6)


@pytest.mark.parametrize(
  ("name", "remat"),
  [pytest.param("sd1_two_levels", False, marks=pytest.mark.slow), ("one_level", True)],
)
def test_gradients_of_input_and_parameters_equal_torch(name, remat):
  theirs, ours, params = pair(CONFIGS[name])
  ours = ours.clone(remat=remat)
  sample, timesteps, context = inputs()

  @jax.jit
  def gradients(params, sample):
    loss = lambda params, sample: ours.apply({"params": params}, sample, timesteps, context).sum()
    return jax.grad(loss, argnums=(0, 1))(params, sample)

  torch_sample, *rest = torch_inputs(sample, timesteps, context)
  torch_sample.requires_grad_()
  theirs(torch_sample, *rest).sample.sum().backward()
  params_gradient, sample_gradient = gradients(params, sample)
  assert_parity(sample_gradient, channels_last(torch_sample.grad))
  ours_by_name = names.to_torch(params_gradient)
  expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
  assert ours_by_name.keys() == expected.keys()
  largest = max(np.abs(gradient).max() for gradient in expected.values())
  for name, gradient in expected.items():
    assert np.abs(ours_by_name[name] - gradient).max() <= 1e-5 * largest, name
