"""Configs of the models, read from the `config.json` of diffusers and transformers.

A missing field gets its default. An unknown field is ignored, unless it would change the model's
output in a way that is not implemented; it then raises ValueError.
"""

import dataclasses
from typing import Any

from prefpaint_jax.models.stock_fields import REWARD, TEXT, UNET, VAE, VISION
from prefpaint_jax.weights import fields


def _check_positive(config: Any, what: str, *names: str) -> None:
  """Raises ValueError unless all integers of these fields are 1 or more."""
  for name in names:
    value = getattr(config, name)
    values = value if isinstance(value, tuple) else (value,)
    if not values or not all(v is None or v >= 1 for v in values):
      raise ValueError(f"{what} config: {name} is {value!r}; expected 1 or more")


def _check_divides(what: str, width: int, count: int, name: str) -> None:
  """Raises ValueError unless `count`, the value of the field `name`, divides `width`."""
  if width % count:
    raise ValueError(f"{what} config: {name} is {count}; expected a divisor of the width {width}")


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
  """`unet/config.json` of Stable Diffusion 1.x, 2.x and XL (diffusers' UNet2DConditionModel)."""

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
  transformer_layers_per_block: int | tuple[int, ...] = 1
  use_linear_projection: bool = False
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  flip_sin_to_cos: bool = True
  freq_shift: float = 0
  downsample_padding: int = 1
  # "text_time" (SDXL): the pooled text and the sizes of the image are added to the time embedding.
  addition_embed_type: str | None = None
  addition_time_embed_dim: int | None = None
  projection_class_embeddings_input_dim: int | None = None

  @classmethod
  def from_dict(cls, config: dict[str, Any]) -> "UNetConfig":
    """Reads a config; raises ValueError if the UNet needs a feature that is not implemented."""
    self = fields.read(cls, config, UNET)
    _check_positive(self, "UNet", "in_channels", "out_channels", "block_out_channels")
    _check_positive(self, "UNet", "sample_size", "norm_num_groups", "cross_attention_dim")
    _check_positive(self, "UNet", "transformer_layers_per_block")
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
            f"UNet config: {side}_block_types has {name!r}, which is not supported; expected "
            f"{' and '.join(known[side])}"
          )
    if self.addition_embed_type not in (None, "text_time"):
      raise ValueError(
        f"UNet config: addition_embed_type is {self.addition_embed_type!r}, which is not "
        "supported; expected None or 'text_time'; use a checkpoint that has it"
      )
    if self.addition_embed_type:
      for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if getattr(self, name) is None:
          raise ValueError(f"UNet config: {name} is missing; addition_embed_type needs it")
        _check_positive(self, "UNet", name)
    levels = zip(self.block_out_channels, self.heads, self.layers, self.depths, strict=True)
    for width, heads, layers, _ in levels:
      for count, name in ((heads, "attention_head_dim"), (layers, "layers_per_block")):
        if count < 1:
          raise ValueError(f"UNet config: {name} has {count}; expected 1 or more")
      _check_divides("UNet", width, heads, "attention_head_dim")
      _check_divides("UNet", width, self.norm_num_groups, "norm_num_groups")
    return self

  @property
  def heads(self) -> tuple[int, ...]:
    """Number of attention heads at each level."""
    heads = self.num_attention_heads or self.attention_head_dim
    return _per_level(heads, len(self.block_out_channels), "attention_head_dim", "UNet")

  @property
  def depths(self) -> tuple[int, ...]:
    """Number of transformer blocks of each attention layer, by level."""
    levels, name = len(self.block_out_channels), "transformer_layers_per_block"
    return _per_level(self.transformer_layers_per_block, levels, name, "UNet")

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
  down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
  up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  latent_channels: int = 4
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  force_upcast: bool = True  # encodes in float32 in every precision, in pipelines of SDXL alone

  @classmethod
  def from_dict(cls, config: dict[str, Any]) -> "VAEConfig":
    """Reads a config; raises ValueError if the VAE needs a feature that is not implemented."""
    self = fields.read(cls, config, VAE)
    _check_positive(self, "VAE", "in_channels", "out_channels", "block_out_channels")
    _check_positive(self, "VAE", "layers_per_block", "latent_channels", "norm_num_groups")
    for name, block in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
      blocks = getattr(self, f"{name}_block_types")
      if blocks != (block,) * len(self.block_out_channels):
        raise ValueError(
          f"VAE config: {name}_block_types is {list(blocks)}; expected "
          f"{len(self.block_out_channels)} times {block}, one per entry of block_out_channels"
        )
    for width in self.block_out_channels:
      _check_divides("VAE", width, self.norm_num_groups, "norm_num_groups")
    if not self.scaling_factor:
      raise ValueError("VAE config: scaling_factor is 0; expected a positive number")
    return self

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
  projection_dim: int | None = 512  # of the pooled text, which SDXL uses
  # The pooled text is that of the first such token; 2, of old files, means that of the largest id.
  eos_token_id: int = 49407
  # Tokens of the padding are not attended to, as stock pipelines of such an encoder do.
  use_attention_mask: bool | None = None

  @classmethod
  def from_dict(cls, config: dict[str, Any]) -> "CLIPTextConfig":
    """Reads the config of a text encoder, or the `text_config` of a whole CLIP model."""
    outer = {k: config[k] for k in ("projection_dim",) if k in config}
    inner = nested(config, "text_config") | outer
    return _checked_clip(fields.read(cls, inner, TEXT), "text encoder")


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
    outer = {k: config[k] for k in ("projection_dim",) if k in config}
    config = fields.read(cls, nested(config, "vision_config") | outer, VISION)
    _check_positive(config, "CLIP vision", "image_size", "patch_size", "projection_dim")
    return _checked_clip(config, "CLIP vision")


def nested(config: dict[str, Any], part: str) -> dict[str, Any]:
  """Returns the config of a half of a whole CLIP model, or the config itself."""
  inner = config.get(part) or config
  if not isinstance(inner, dict):
    raise ValueError(f"CLIP config: {part} is {inner!r}; expected an object; download it again")
  outer = "quantization_config"
  return inner | ({outer: config[outer]} if outer in config else {})


def _checked_clip(config: Any, what: str) -> Any:
  """Returns the config; raises ValueError if the transformer cannot be built."""
  if config.hidden_act not in ("quick_gelu", "gelu"):
    raise ValueError(
      f"{what} config: hidden_act is {config.hidden_act!r}; expected quick_gelu or gelu"
    )
  names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
  if isinstance(config, CLIPTextConfig):
    names += ["vocab_size", "max_position_embeddings"]
  _check_positive(config, what, *names)
  _check_divides(what, config.hidden_size, config.num_attention_heads, "num_attention_heads")
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
    vision = config.get("vision", {})
    if not isinstance(vision, dict):
      raise ValueError(f"reward config: vision is {vision!r}; expected an object")
    self = fields.read(cls, config | {"vision": CLIPVisionConfig.from_dict(vision)}, REWARD)
    _check_positive(self, "reward", "num_heads", "feedforward_dim", "hidden_dim", "feature_dim")
    joined = self.fusion == "late" and self.num_tokens == 1  # both embeddings in one token
    width = self.vision.projection_dim * (2 if joined else 1)
    _check_divides("reward", width, self.num_heads, "num_heads")
    if not self.scale > 0:
      raise ValueError(f"reward config: scale is {self.scale}; expected above 0")
    choices = {
      "fusion": ("late", "early"),
      "num_tokens": (1, 2),
      "activation": ("identity", "gelu"),
    }
    for name, values in choices.items():
      if getattr(self, name) not in values:
        expected = " or ".join(map(str, values))
        raise ValueError(f"reward config: {name} is {getattr(self, name)!r}; expected {expected}")
    return self

  def to_dict(self) -> dict[str, Any]:
    """Returns the config as a JSON object; `from_dict` is the inverse."""
    return dataclasses.asdict(self)
