"""Writes tests/manifests/*.txt: names and shapes of the tensors of real checkpoints.

  python tests/make_manifests.py

The first line of a file is the checkpoint's config, with the fields of older files; the others are
`name shape`, one per tensor. The script makes the classes of diffusers and transformers on torch's
meta device and downloads nothing.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "manifests"
_CROSS_ATTENTION_LEVELS = {
  "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
  "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_UNET = {
  "_class_name": "UNet2DConditionModel",
  "act_fn": "silu",
  "block_out_channels": [320, 640, 1280, 1280],
  "center_input_sample": False,
  "downsample_padding": 1,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "in_channels": 9,
  "layers_per_block": 2,
  "mid_block_scale_factor": 1,
  "norm_eps": 1e-05,
  "norm_num_groups": 32,
  "out_channels": 4,
  "sample_size": 64,
  **_CROSS_ATTENTION_LEVELS,
}
CONFIGS = {
  "sd15_inpainting_unet": _UNET | {"attention_head_dim": 8, "cross_attention_dim": 768},
  "sd2_inpainting_unet": _UNET
  | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
  },
  "sdxl_inpainting_unet": _UNET
  | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "use_linear_projection": True,
  },
  "sd_vae": {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
  },
  "clip_l_text": {
    "model_type": "clip_text_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
  },
  "openclip_h_text": {
    "model_type": "clip_text_model",
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "vocab_size": 49408,
  },
  "openclip_bigg_text": {
    "model_type": "clip_text_model",
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "vocab_size": 49408,
  },
  "clip_b32_vision": {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 32,
    "projection_dim": 512,
  },
}


def build(config: dict):
  """Makes the stock torch model of a config."""
  import diffusers
  import transformers

  if "_class_name" in config:
    return getattr(diffusers, config["_class_name"]).from_config(config)
  if "eos_token_id" in config:  # SDXL's second encoder
    text = transformers.CLIPTextConfig(**config)
    return transformers.CLIPTextModelWithProjection(text)
  if config["model_type"] == "clip_text_model":
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
  return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))


def main() -> None:
  import torch

  FOLDER.mkdir(exist_ok=True)
  for name, config in CONFIGS.items():
    with torch.device("meta"):
      tensors = build(config).state_dict()
    lines = [json.dumps(config)]
    lines += [f"{key} {'x'.join(map(str, value.shape))}" for key, value in tensors.items()]
    (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n")
    count = sum(value.numel() for value in tensors.values())
    print(f"{name}: {len(tensors)} tensors, {count:,} parameters")


if __name__ == "__main__":
  main()
