"""Reward model: `python -m prefpaint_jax.train_reward --config=configs/reward.py --workdir=DIR`.

`mini`: candidates painted by the embedded policy on crops of its photographs, scored by the
simulated annotators.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "mini") -> ConfigDict:
  if preset != "mini":
    raise ValueError(f"configs/reward.py has no preset {preset!r}; it has mini")
  config = ConfigDict()
  config.seed = 0

  # Candidates.
  config.photos = "mini"  # folder of pictures
  config.train_share = 0.78  # left share of each picture to learn from; the rest is held out
  config.size = 32
  config.crop = (48, 176)
  config.policies = ("mini",)  # who paints; they take turns
  config.num_steps = 10
  config.eta = 1.0
  config.num_prompts = 4000
  config.painted = 3  # candidates of each prompt that a policy paints
  config.perturbed = 2  # and that are perturbations of those, or of the picture itself
  config.num_annotators = 3
  config.annotator_noise = 0.7  # standard deviation of one annotator's error, of scores 0 to 7
  config.held_out_prompts = 384  # with four painted candidates each

  # Network.
  config.dtype = "float32"
  config.network = ConfigDict(
    {
      "vision": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 128,
        "hidden_act": "quick_gelu",
      },
      "fusion": "early",
      "num_heads": 8,
      "feedforward_dim": 256,
      "hidden_dim": 128,
      "feature_dim": 64,
      "activation": "gelu",
      "encoder_dropout": 0.0,
      "dropout": 0.0,
    }
  )

  # Fit.
  config.iterations = 3000
  config.batch_size = 16  # prompts, each with all its candidates
  config.learning_rate = 1e-3
  config.warmup_iterations = 200
  config.weight_decay = 0.05
  config.pair_weight = 1.0  # of the pairwise loss, beside the squared error
  config.ridge = 1.0  # λ of the closed-form last layer and of the bound
  config.log_every = 200
  return config
