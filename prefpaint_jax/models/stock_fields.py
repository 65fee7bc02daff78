"""Fields of the stock libraries' configs that the models do not read, a table per component.

`models.config` reads the others. A test compares both with the config classes of the installed
diffusers and transformers, so that no field of theirs is overlooked.
"""

from prefpaint_jax.weights import fields

# Names of the file, of the library that wrote it, and options of loading and training.
_LIBRARY = frozenset({"_diffusers_version", "_name_or_path"})
_TRANSFORMERS = frozenset(
  {
    *(
      "_class_name",
      "transformers_version",
      "dtype",
      "torch_dtype",
      "attention_dropout",
      "dropout",
    ),
    *("initializer_range", "initializer_factor", "output_hidden_states", "output_attentions"),
    *("return_dict", "problem_type", "id2label", "label2id", "chunk_size_feed_forward"),
    *("bos_token_id", "pad_token_id"),
  }
)
_QUANTIZED = {"quantization_config": (None,)}
UNET = fields.Table(
  "UNet",
  fixed=_QUANTIZED
  | {
    "_class_name": ("UNet2DConditionModel", "FlaxUNet2DConditionModel", None),
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "mid_block_scale_factor": (1,),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "reverse_transformer_layers_per_block": (None,),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "attention_type": ("default",),
    "mid_block_only_cross_attention": (None, False),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
  },
  harmless=_LIBRARY
  | {
    "dropout",  # of training
    "upcast_attention",  # of half precision; the softmax is always computed in float32
    "addition_embed_type_num_heads",  # of an embedding that is refused
  },
)
VAE = fields.Table(
  "VAE",
  fixed=_QUANTIZED
  | {
    "_class_name": ("AutoencoderKL", "FlaxAutoencoderKL", None),
    "act_fn": ("silu", "swish"),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
  },
  harmless=_LIBRARY | {"sample_size", "force_upcast"},  # of tiling, and of half precision
)
TEXT = fields.Table(
  "text encoder",
  fixed=_QUANTIZED
  | {
    "is_encoder_decoder": (False,),
    "model_type": ("clip_text_model", "clip", None),
    "architectures": (
      *(None, ("CLIPTextModel",), ("CLIPTextModelWithProjection",)),
      *(("CLIPModel",), ("FlaxCLIPTextModel",)),
    ),
  },
  harmless=_LIBRARY | _TRANSFORMERS,
)
VISION = fields.Table(
  "CLIP vision",
  fixed=_QUANTIZED | {"num_channels": (3,), "is_encoder_decoder": (False,)},
  harmless=_LIBRARY | _TRANSFORMERS | {"architectures", "model_type", "eos_token_id"},
)
REWARD = fields.Table("reward", fixed=_QUANTIZED)
