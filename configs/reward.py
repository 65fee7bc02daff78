"""Reward model: `python -m prefpaint_jax.train_reward --config=configs/reward.py[:mini]
--workdir=DIR --config.preferences=DIR`.
"""

from ml_collections import ConfigDict, config_dict

PRESETS = {
  "": "the released PrefPaint architecture on CLIP ViT-B/32",
  "mini": "a small network for the mini world; minutes on two CPU cores",
}


def get_config(preset: str = "") -> ConfigDict:
  """Returns the config of a preset; "" is the released architecture."""
  config = ConfigDict()
  config.seed = 0  # of everything that is drawn
  config.dtype = "bfloat16"  # of the computation; parameters are float32

  config.preferences = ""  # folder that prefpaint_jax.data.preferences wrote; required
  config.size = 0  # side in pixels that images are resized to; 0: the stored size
  config.augmentation = "mirror"  # none, mirror or dihedral (all symmetries of the square)
  config.simulated_preference = False  # also compare with the simulated annotators (mini world)

  # Network. Fields missing from `network` have the released values.
  config.clip = "openai/clip-vit-base-patch32"  # initial tower; "": a random one
  config.frozen_share = 0.7  # share of the tower's blocks, from the input on; 1: all of it
  config.network = ConfigDict()
  config.network.fusion = "late"  # late (released): embeds each image; early: both at once
  config.network.differences = True  # early fusion sees steps between neighbours, 6 more channels
  config.network.num_tokens = 1  # 1: one token for both embeddings (released); 2: two tokens
  config.network.activation = "identity"  # between the last layers: identity (released) or gelu
  config.network.num_heads = 16  # attention heads of the fusion block
  config.network.feedforward_dim = 1024  # width of the feed-forward layer in the fusion block
  config.network.hidden_dim = 512  # width of the first layer after the fusion
  config.network.feature_dim = 256  # D, the width of z
  config.network.encoder_dropout = 0.1  # share of the fusion block's values dropped in training
  config.network.dropout = 0.2  # the same between the last layers
  # Tower: fields of transformers' CLIPVisionConfig.
  config.network.vision = ConfigDict(
    {
      "hidden_size": 768,
      "intermediate_size": 3072,
      "num_hidden_layers": 12,
      "num_attention_heads": 12,
      "image_size": 224,
      "patch_size": 32,
      "projection_dim": 512,
      "hidden_act": "quick_gelu",
    }
  )

  # Fit.
  config.iterations = 5000  # updates
  config.batch_size = 64  # prompts, each with all of its candidates
  config.learning_rate = 1e-5  # the highest, after the warm-up; it falls to 0
  config.warmup_iterations = 200  # in which the learning rate rises from 0
  config.weight_decay = 0.01  # of AdamW, times the learning rate
  config.score_weight = 1.0  # weight of the squared error
  config.pair_weight = 1.0  # weight of the Bradley-Terry loss over the pairs of one prompt
  config.ema_decay = 0.0  # decay of the parameters' moving average; 0: no average

  # Bound.
  config.whiten = False  # features of mean 0 and covariance I; needs network.activation=identity
  config.ridge = 1.0  # λ of the last layer's ridge regression and of V
  # R of the bound; None: estimated from the residuals on the test split.
  config.noise_scale = config_dict.placeholder(float)
  config.norm_bound = config_dict.placeholder(float)  # S; None: the norm of the last layer
  config.trust = ConfigDict()
  config.trust.k = 0.05  # of the trust weight exp(b - k ‖z‖) in the report
  config.trust.b = 0.7  # logarithm of the weight at norm 0

  config.mesh = ConfigDict()  # how the devices share arrays
  config.mesh.data = -1  # devices over which the batch is split; -1: all / mesh.fsdp
  config.mesh.fsdp = 1  # devices over which parameters and batch are split

  # Checkpoints and measurements.
  config.checkpoint_every = 500  # iterations
  config.judge_every = 500  # iterations between scores on the validation split; keeps the best
  config.log_every = 50  # iterations

  if preset == "mini":
    _mini(config)
  elif preset:
    raise ValueError(f"configs/reward.py has no preset {preset!r}; give mini")
  return config


def _mini(config: ConfigDict) -> None:
  """Changes the config to the preset `mini`."""
  config.update(
    dtype="float32",
    augmentation="dihedral",
    simulated_preference=True,
    clip="",
    frozen_share=0.0,
    iterations=3000,
    batch_size=16,
    learning_rate=1e-3,
    weight_decay=0.05,
    log_every=100,
  )
  config.network.update(
    fusion="early",
    activation="gelu",
    num_heads=8,
    feedforward_dim=256,
    hidden_dim=128,
    feature_dim=64,
    encoder_dropout=0.0,
    dropout=0.0,
  )
  config.network.vision.update(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    projection_dim=128,
  )
