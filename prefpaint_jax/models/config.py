"""Configs of the models, read from the `config.json` of diffusers and transformers.

A missing field gets its default. An unknown field is ignored, unless it would change the model's
output in a way that is not implemented; it then raises ValueError.
"""

import dataclasses
from typing import Any


def _read(cls, config: dict[str, Any], fixed: dict[str, Any], what: str):
  """Makes a dataclass from a config.

  Args:
    cls: the dataclass.
    config: JSON object; unknown fields are ignored.
    fixed: fields that must be absent or have this value, the only one implemented.
    what: the model, with which an error begins.
  """
  for name, value in fixed.items():
    if name in config and config[name] != value:
      raise ValueError(
        f"{what} config: {name}={config[name]!r} is not supported; only {value!r} is implemented"
      )
  names = {field.name for field in dataclasses.fields(cls)}
  # Lists become tuples, so that the config is hashable and can be a static argument of jax.jit.
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}
  return cls(**values)


def _per_level(value: int | tuple[int, ...], levels: int, name: str, what: str) -> tuple[int, ...]:
  """Repeats an integer for each level; raises ValueError if a tuple has another length."""
  values = (value,) * levels if isinstance(value, int) else tuple(value)
  if len(values) != levels:
    raise ValueError(
      f"{what} config: {name} has {len(values)} entries for {levels} blocks; give one per block"
    )
  return values


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """`unet/config.json` of Stable Diffusion 1.x and 2.x (diffusers' UNet2DConditionModel)."""

  sample_size: int | tuple[int, ...] | None = None
  in_channels: int = 4
  out_channels: int = 4
  down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
  up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int | tuple[int, ...] = 2
  cross_attention_dim: int = 1280
  # The number of heads in spite of the name, which diffusers keeps for old files.
  attention_head_dim: int | tuple[int, ...] = 8
  num_attention_heads: int | tuple[int, ...] | None = None
  transformer_layers_per_block: int = 1
  use_linear_projection: bool = False
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  flip_sin_to_cos: bool = True
  freq_shift: float = 0
  downsample_padding: int = 1

  @classmethod
  def from_dict(cls, config: dict[str, Any]) -> "UNetConfig":
    """Reads a config; raises ValueError if the UNet needs a feature that is not implemented."""
    fixed = {
      "act_fn": "silu",
      "center_input_sample": False,
      "mid_block_type": "UNetMidBlock2DCrossAttn",
      "mid_block_scale_factor": 1,
      "only_cross_attention": False,
      "dual_cross_attention": False,
      "class_embed_type": None,
      "num_class_embeds": None,
      "addition_embed_type": None,
      "encoder_hid_dim": None,
      "encoder_hid_dim_type": None,
      "time_embedding_type": "positional",
      "time_embedding_dim": None,
      "time_embedding_act_fn": None,
      "timestep_post_act": None,
      "time_cond_proj_dim": None,
      "resnet_time_scale_shift": "default",
      "resnet_skip_time_act": False,
      "resnet_out_scale_factor": 1.0,
      "reverse_transformer_layers_per_block": None,
      "class_embeddings_concat": False,
      "cross_attention_norm": None,
      "attention_type": "default",
      "mid_block_only_cross_attention": None,
      "conv_in_kernel": 3,
      "conv_out_kernel": 3,
      "dropout": 0.0,
    }
    self = _read(cls, config, fixed, "UNet")
    levels = len(self.block_out_channels)
    if not len(self.down_block_types) == len(self.up_block_types) == levels:
      raise ValueError(
        f"UNet config: {len(self.down_block_types)} down blocks, {len(self.up_block_types)} up "
        f"blocks and {levels} block_out_channels; give equal numbers"
      )
    known = {
      "down": ("CrossAttnDownBlock2D", "DownBlock2D"),
      "up": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    for side, types in (("down", self.down_block_types), ("up", self.up_block_types)):
      for name in types:
        if name not in known[side]:
          raise ValueError(
            f"UNet config: {side} block {name!r} is not supported; only {' and '.join(known[side])}"
          )
    for name in ("cross_attention_dim", "transformer_layers_per_block"):
      if not isinstance(getattr(self, name), int):
        raise ValueError(
          f"UNet config: {name}={getattr(self, name)!r} is not supported; give one integer"
        )
    _ = self.heads, self.layers
    return self

  @property
  def heads(self) -> tuple[int, ...]:
    """Number of attention heads at each level."""
    heads = self.num_attention_heads or self.attention_head_dim
    return _per_level(heads, len(self.block_out_channels), "attention_head_dim", "UNet")

  @property
  def layers(self) -> tuple[int, ...]:
    """Number of residual blocks at each level of the encoder (the decoder has one more)."""
    levels = len(self.block_out_channels)
    return _per_level(self.layers_per_block, levels, "layers_per_block", "UNet")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """`vae/config.json` (diffusers' AutoencoderKL)."""

  in_channels: int = 3
  out_channels: int = 3
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  latent_channels: int = 4
  norm_num_groups: int = 32
  sample_size: int = 32
  scaling_factor: float = 0.18215

  @classmethod
  def from_dict(cls, config: dict[str, Any]) -> "VAEConfig":
    """Reads a config; raises ValueError if the VAE needs a feature that is not implemented."""
    levels = len(config.get("block_out_channels", (64,)))
    fixed = {
      "act_fn": "silu",
      "down_block_types": ["DownEncoderBlock2D"] * levels,
      "up_block_types": ["UpDecoderBlock2D"] * levels,
      "shift_factor": None,
      "latents_mean": None,
      "latents_std": None,
      "use_quant_conv": True,
      "use_post_quant_conv": True,
      "mid_block_add_attention": True,
    }
    return _read(cls, config, fixed, "VAE")

  @property
  def factor(self) -> int:
    """Number of pixels per latent along each side."""
    return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """`text_encoder/config.json` (transformers' CLIPTextModel).

  Stable Diffusion 2 uses the penultimate layer of a CLIP model of 24; its files hold only 23.
  """

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5

  @classmethod
  def from_dict(cls, config: dict[str, Any]) -> "CLIPTextConfig":
    """Reads the config of a text encoder, or the `text_config` of a whole CLIP model."""
    return _check_activation(_read(cls, config.get("text_config", config), {}, "text encoder"))


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """CLIP's vision tower and visual projection."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  image_size: int = 224
  patch_size: int = 32
  projection_dim: int = 512
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5

  @classmethod
  def from_dict(cls, config: dict[str, Any]) -> "CLIPVisionConfig":
    """Reads the config of a vision tower, or the `vision_config` of a whole CLIP model."""
    if "vision_config" in config:
      outer = {k: config[k] for k in ("projection_dim",) if k in config}
      config = config["vision_config"] | outer
    return _check_activation(_read(cls, config, {"num_channels": 3}, "CLIP vision"))


def _check_activation(config):
  """Returns the config; raises ValueError if its activation is not implemented."""
  if config.hidden_act not in ("quick_gelu", "gelu"):
    raise ValueError(f"CLIP config: hidden_act={config.hidden_act!r}; give 'quick_gelu' or 'gelu'")
  return config


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """The reward network: a CLIP vision tower, an encoder layer and a head.

  The defaults describe the released PrefPaint reward model.
  """

  vision: CLIPVisionConfig = CLIPVisionConfig()
  # How the network combines the inpainted and the masked image. "late" (released): the tower embeds
  # each image. "early": the tower embeds one image of 13 channels, made from both images.
  fusion: str = "late"
  # Whether early fusion has the 6 channels of steps between neighbours; without them it has 7.
  differences: bool = True
  # Tokens of late fusion. 1 (released): one token of both embeddings; 2: one token per embedding.
  num_tokens: int = 1
  num_heads: int = 16  # attention heads of the encoder layer
  feedforward_dim: int = 1024  # width of the encoder layer's feed-forward network
  hidden_dim: int = 512  # width of the head's first layer
  feature_dim: int = 256  # length of the features z
  activation: str = "identity"  # between the head's layers: "identity" (released) or "gelu"
  encoder_dropout: float = 0.1  # of the encoder layer
  dropout: float = 0.2  # of the head
  shift: float = 0.0  # reward = (head output - shift) / scale
  scale: float = 1.0

  @classmethod
  def from_dict(cls, config: dict[str, Any]) -> "RewardConfig":
    """Reads a config; raises ValueError if a field has an unknown value."""
    config = dict(config, vision=CLIPVisionConfig.from_dict(config.get("vision", {})))
    self = _read(cls, config, {}, "reward")
    if self.fusion not in ("late", "early"):
      raise ValueError(f"reward config: fusion={self.fusion!r}; give 'late' or 'early'")
    if not isinstance(self.differences, bool):
      raise ValueError(f"reward config: differences={self.differences!r}; give true or false")
    if self.num_tokens not in (1, 2):
      raise ValueError(f"reward config: num_tokens={self.num_tokens}; give 1 or 2")
    if self.activation not in ("identity", "gelu"):
      raise ValueError(f"reward config: activation={self.activation!r}; give 'identity' or 'gelu'")
    return self

  def to_dict(self) -> dict[str, Any]:
    """Returns the config as a JSON object; `from_dict` is the inverse."""
    return dataclasses.asdict(self)
