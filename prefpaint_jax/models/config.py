"""Configurations of the models, read from the `config.json` of diffusers and transformers.

Old files lack newer fields (their defaults apply) and carry fields unknown here (ignored). A field
that would change the result in a way that is not implemented is refused by name.
"""

import dataclasses
from typing import Any


def _read(cls, config: dict[str, Any], fixed: dict[str, Any], what: str):
  """Builds dataclass `cls` from `config`; a field of `fixed` must be absent or hold its value."""
  for name, value in fixed.items():
    if name in config and config[name] != value:
      raise ValueError(
        f"{what} config: {name}={config[name]!r} is not supported; only {value!r} is implemented"
      )
  names = {field.name for field in dataclasses.fields(cls)}
  # Only the sequence-valued fields become tuples, so that the configuration can be hashed.
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}
  return cls(**values)


def _per_level(value: int | tuple[int, ...], levels: int, name: str, what: str) -> tuple[int, ...]:
  values = (value,) * levels if isinstance(value, int) else tuple(value)
  if len(values) != levels:
    raise ValueError(f"{what} config: {name} has {len(values)} entries for {levels} blocks")
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
  # The number of heads, in spite of its name (a historic misnomer that the files keep).
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
        f"blocks and {levels} block_out_channels; give as many of each"
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
          f"UNet config: {name}={getattr(self, name)!r} is not supported; one integer is"
        )
    _ = self.heads, self.layers
    return self

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads at each level."""
    heads = self.num_attention_heads or self.attention_head_dim
    return _per_level(heads, len(self.block_out_channels), "attention_head_dim", "UNet")

  @property
  def layers(self) -> tuple[int, ...]:
    """Residual blocks at each level of the way down (the way up has one more)."""
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
    """Pixels per latent along each side."""
    return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """`text_encoder/config.json`; Stable Diffusion 2 has its penultimate layer as the last of 23."""

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
    return _check_activation(_read(cls, config.get("text_config", config), {}, "text encoder"))


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """CLIP's vision tower with its projection; may be the `vision_config` of a whole CLIP model."""

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
    if "vision_config" in config:
      outer = {k: config[k] for k in ("projection_dim",) if k in config}
      config = config["vision_config"] | outer
    return _check_activation(_read(cls, config, {"num_channels": 3}, "CLIP vision"))


def _check_activation(config):
  if config.hidden_act not in ("quick_gelu", "gelu"):
    raise ValueError(f"CLIP config: hidden_act={config.hidden_act!r}; give 'quick_gelu' or 'gelu'")
  return config


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """The reward network: a CLIP tower and a head. The defaults are the released PrefPaint reward."""

  vision: CLIPVisionConfig = CLIPVisionConfig()
  # How the inpainted and the masked image meet. "late" (released): each is embedded by itself.
  # "early": the tower sees one picture of 13 channels, the filling beside its surroundings.
  fusion: str = "late"
  num_tokens: int = 1  # of late fusion; 1: both embeddings in one token (released); 2: one each
  num_heads: int = 16  # of the encoder layer
  feedforward_dim: int = 1024  # of the encoder layer
  hidden_dim: int = 512
  feature_dim: int = 256  # length of z
  activation: str = "identity"  # between the last layers; "identity" is released, "gelu" is not
  encoder_dropout: float = 0.1
  dropout: float = 0.2
  shift: float = 0.0  # reward = (head output - shift) / scale
  scale: float = 1.0

  @classmethod
  def from_dict(cls, config: dict[str, Any]) -> "RewardConfig":
    config = dict(config, vision=CLIPVisionConfig.from_dict(config.get("vision", {})))
    self = _read(cls, config, {}, "reward")
    if self.fusion not in ("late", "early"):
      raise ValueError(f"reward config: fusion={self.fusion!r}; give 'late' or 'early'")
    if self.num_tokens not in (1, 2):
      raise ValueError(f"reward config: num_tokens={self.num_tokens}; give 1 or 2")
    if self.activation not in ("identity", "gelu"):
      raise ValueError(f"reward config: activation={self.activation!r}; give 'identity' or 'gelu'")
    return self

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)
