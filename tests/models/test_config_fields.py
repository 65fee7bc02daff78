"""Every field of the stock configs is read, refused by name, or known not to change the result."""

import dataclasses
import inspect
import json

import pytest

from prefpaint_jax.models import stock_fields
from prefpaint_jax.models.architectures import tiny_configs
from prefpaint_jax.models.assembly import make_modules
from prefpaint_jax.models.config import (
  CLIPTextConfig,
  CLIPVisionConfig,
  RewardConfig,
  UNetConfig,
  VAEConfig,
)

# Our class, the table of the fields that it does not read, and the stock class.
COMPONENTS = {
  "unet": (UNetConfig, stock_fields.UNET, "diffusers.UNet2DConditionModel"),
  "vae": (VAEConfig, stock_fields.VAE, "diffusers.AutoencoderKL"),
  "text_encoder": (CLIPTextConfig, stock_fields.TEXT, "transformers.CLIPTextConfig"),
  "vision": (CLIPVisionConfig, stock_fields.VISION, "transformers.CLIPVisionConfig"),
}


def stock_signature(name: str) -> dict:
  """Returns the fields of a stock config class and their defaults; skips where torch is needed."""
  library, name = name.split(".")
  if library == "diffusers":
    pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  cls = getattr(pytest.importorskip(library), name)
  parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
  return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


@pytest.mark.parametrize("part", COMPONENTS)
def test_every_stock_field_is_in_exactly_one_list(part):
  cls, table, name = COMPONENTS[part]
  lists = {f.name for f in dataclasses.fields(cls)}, set(table.fixed), table.harmless
  for field in stock_signature(name):
    assert any(field in known for known in lists), f"{field} is in no list"
  assert sum(map(len, lists)) == len(set().union(*lists)), "a field is in two lists"


@pytest.mark.parametrize("part", COMPONENTS)
def test_missing_field_gets_the_default_of_the_stock_class(part):
  cls, table, name = COMPONENTS[part]
  stock = stock_signature(name)
  for field in dataclasses.fields(cls):
    if field.name in stock:
      assert field.default == stock[field.name], field.name
  for field, values in table.fixed.items():
    if field in stock:
      assert any(stock[field] == value for value in values), field


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_every_field_that_is_not_implemented_raises_one_line_that_names_it(part):
  cls, table, _ = COMPONENTS[part]
  config = tiny_configs()[part]
  for field in table.fixed:
    with pytest.raises(ValueError, match=f"config: {field} is 'something'.*; expected ") as error:
      cls.from_dict(config | {field: "something"})
    assert "\n" not in str(error.value)


BAD = {
  "unet": [
    ("in_channels", "nine", "expected an integer"),
    ("in_channels", 9.5, "expected an integer"),
    ("in_channels", True, "expected an integer"),
    ("block_out_channels", 8, "expected a list"),
    ("block_out_channels", [], "expected 1 or more"),
    ("block_out_channels", [8, 8], "block_out_channels; give equal numbers"),
    ("block_out_channels", [0], "expected 1 or more"),
    ("attention_head_dim", 3, "expected a divisor of the width 8"),
    ("attention_head_dim", 0, "expected 1 or more"),
    ("norm_num_groups", 3, "expected a divisor of the width 8"),
    ("norm_num_groups", None, "expected an integer"),
    ("norm_eps", float("nan"), "expected a finite number"),
    ("layers_per_block", [1, 1], "has 2 entries for 1 blocks"),
    ("cross_attention_dim", [12], "expected an integer"),
    ("transformer_layers_per_block", [1, 2, 10], "has 3 entries for 1 blocks"),
    ("transformer_layers_per_block", [[1]], "expected an integer or a list"),
    ("addition_embed_type", "text", "which is not supported"),
    ("addition_embed_type", "text_time", "addition_time_embed_dim is missing"),
    ("down_block_types", ["AttnDownBlock2D"], "has 'AttnDownBlock2D', which is not supported"),
    ("sample_size", -4, "expected 1 or more"),
    ("use_linear_projection", "yes", "expected true or false"),
    ("quantization_config", {"quant_method": "bitsandbytes"}, "which is not supported"),
    ("_class_name", "UNet2DModel", "which is not supported"),
    ("_diffusers_version", "newest", "expected a version"),
  ],
  "vae": [
    ("_class_name", "AsymmetricAutoencoderKL", "which is not supported"),
    ("block_out_channels", [8], "block_types is"),
    ("scaling_factor", 0, "scaling_factor is 0"),
    ("scaling_factor", "0.18", "expected a finite number"),
    ("latent_channels", 0, "expected 1 or more"),
    ("norm_num_groups", 5, "expected a divisor of the width 8"),
    ("latents_mean", [0.1], "which is not supported"),
  ],
  "text_encoder": [
    ("architectures", ["XLMRobertaModel"], "which is not supported"),
    ("model_type", "t5", "which is not supported"),
    ("hidden_act", "silu", "expected quick_gelu or gelu"),
    ("num_attention_heads", 5, "expected a divisor of the width 12"),
    ("vocab_size", 0, "expected 1 or more"),
    ("use_attention_mask", "yes", "expected true or false"),
    ("text_config", [1], "expected an object"),
    ("text_config", {"hidden_size": "x"}, "expected an integer"),
  ],
}


@pytest.mark.parametrize(
  "part, field, value, message", [(part, *case) for part, cases in BAD.items() for case in cases]
)
def test_value_that_no_network_can_have_raises_one_line_that_names_the_field(
  part, field, value, message
):
  configs = tiny_configs()
  configs[part][field] = value
  with pytest.raises(ValueError) as error:
    make_modules(configs)
  assert message in str(error.value) and "\n" not in str(error.value)
  assert field in str(error.value) or field == "text_config" or field.startswith("block_out")


@pytest.mark.parametrize(
  "config, message",
  [
    ({"vision": "x"}, "vision is 'x'; expected an object"),
    ({"scale": 0}, "scale is 0.0; expected above 0"),
    ({"shift": float("inf")}, "shift is inf; expected a finite number"),
    ({"num_heads": 7}, "num_heads is 7; expected a divisor of the width 1024"),
    ({"fusion": "middle"}, "fusion is 'middle'; expected late or early"),
    ({"feature_dim": -1}, "feature_dim is -1; expected 1 or more"),
    ({"vision": {"num_channels": 4}}, "num_channels is 4"),
    ({"dropout": "much"}, "dropout is 'much'; expected a finite number"),
  ],
)
def test_reward_config_of_a_wrong_value_raises_one_line_that_names_the_field(config, message):
  with pytest.raises(ValueError) as error:
    RewardConfig.from_dict(config)
  assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("version, size", [("0.6.0", 64), ("0.8.1", 64), ("0.9.0", 4), (None, 4)])
def test_sample_size_of_a_unet_of_an_early_diffusers_is_64(version, size):
  configs = tiny_configs()
  configs["unet"]["_diffusers_version"] = version
  assert make_modules(json.loads(json.dumps(configs))).native_size == 2 * size


@pytest.mark.parametrize("offset", [0, 1, 2, None])
def test_pipeline_starts_its_timesteps_at_one_as_stock_pipelines_do(offset):
  configs = tiny_configs()
  configs["scheduler"]["steps_offset"] = offset
  assert make_modules(configs).schedule.steps_offset == 1
