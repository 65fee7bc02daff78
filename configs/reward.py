"""Reward model: `python -m prefpaint_jax.train_reward --config=configs/reward.py[:mini]
--workdir=DIR --config.preferences=DIR`.

No preset: the released PrefPaint architecture on CLIP ViT-B/32. `mini`: the small one of the mini
world, minutes on two CPU cores.
"""

from ml_collections import ConfigDict, config_dict


def get_config(preset: str = "") -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.dtype = "bfloat16"  # what the network computes in; parameters stay float32

  config.preferences = ""  # what prefpaint_jax.data.preferences wrote
  config.size = 0  # pixels along each side that pictures are resized to when read; 0: as stored
  config.augmentation = "mirror"  # none, mirror, dihedral (all symmetries of the square)
  config.simulated_preference = False  # judge by the simulated annotators too (mini world only)

  # Network. What is left out of `network` is as released.
  config.clip = "openai/clip-vit-base-patch32"  # its tower to begin with; "": a fresh one
  config.frozen_share = 0.7  # of the tower's blocks, the first ones; 1: the whole tower
  config.network = ConfigDict()
  config.network.fusion = "late"  # late (released): each picture by itself; early: in one tower
  config.network.num_tokens = 1  # 1: both embeddings in one token (released); 2: one each
  config.network.activation = "identity"  # between the last layers; released: none. Or gelu
  config.network.num_heads = 16
  config.network.feedforward_dim = 1024
  config.network.hidden_dim = 512
  config.network.feature_dim = 256  # D, the width of z
  config.network.encoder_dropout = 0.1
  config.network.dropout = 0.2
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
  config.iterations = 5000
  config.batch_size = 64  # prompts, each with all its candidates
  config.learning_rate = 1e-5
  config.warmup_iterations = 200
  config.weight_decay = 0.01
  config.score_weight = 1.0  # of the squared error
  config.pair_weight = 1.0  # of Bradley-Terry's loss over the pairs of one prompt
  config.ema_decay = 0.0  # moving average of the parameters; 0: none

  # Bound.
  config.ridge = 1.0  # λ of the closed-form last layer and of V
  # R and S of the bound's constant; None: from held-out residuals, and the norm of the last layer.
  config.noise_scale = config_dict.placeholder(float)
  config.norm_bound = config_dict.placeholder(float)
  config.trust = ConfigDict()
  config.trust.k = 0.05  # the trust weight exp(b - k ‖z‖) that the report shows
  config.trust.b = 0.7

  config.mesh = ConfigDict()
  config.mesh.data = -1  # devices that split the batch; -1: what is left
  config.mesh.fsdp = 1  # devices that also split the parameters
  config.checkpoint_every = 500  # iterations
  config.judge_every = 500  # iterations between looks at held-out preferences; the best is kept
  config.log_every = 50

  if preset == "mini":
    _mini(config)
  elif preset:
    raise ValueError(f"configs/reward.py has no preset {preset!r}; it has mini")
  return config


def _mini(config: ConfigDict) -> None:
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
