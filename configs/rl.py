"""Alignment: `python -m prefpaint_jax.train --config=configs/rl.py[:PRESET] --workdir=DIR`.

Presets: none = Stable Diffusion 1.5 inpainting with the paper's settings; `mini` = the embedded
model, minutes on two CPU cores; `released` = the arithmetic of the released PrefPaint code;
`sd2` = Stable Diffusion 2 inpainting.
"""

from ml_collections import ConfigDict, config_dict


def get_config(preset: str = "") -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.num_iterations = 1000
  config.dtype = "bfloat16"  # what the networks compute in; parameters stay float32

  # What is aligned, by what, on what: folders, hub names or "mini".
  config.policy = "stable-diffusion-v1-5/stable-diffusion-inpainting"
  config.reward = "kd5678/prefpaintReward"
  config.bound = ""  # bound.safetensors or a released V inverse; "": the reward folder's own
  config.prompts = ""  # folder of prompts: masks/ID_mask.png with images/ID.png, or a tfds folder
  config.size = 512  # pixels along each side

  # Rollout.
  config.batch_size = 128  # prompts per iteration, over all devices
  config.samples_per_prompt = 1  # above 1, advantages are relative to the prompt's own samples
  config.num_steps = 50  # T, DDIM steps
  config.eta = 1.0  # share of the full noise in each step; above 0
  config.decode_batch = 16  # images that a device decodes and scores at a time; 0: all
  config.behaviour_refresh = 1  # iterations between refreshes of the policy that paints
  config.behaviour_dtype = "float32"  # of its copy, there if not refreshed every time; or bfloat16

  # Reward: trust weight exp(b - k norm) of each sample, and advantages.
  config.trust = ConfigDict()
  config.trust.norm = "mahalanobis"  # mahalanobis (paper), released, constant, none
  config.trust.k = 0.05
  config.trust.b = 0.7
  config.trust.minimum = config_dict.placeholder(float)  # clamps of the weight; None: no clamp
  config.trust.maximum = config_dict.placeholder(float)
  config.trust.constant = 1.4  # the weight when trust.norm is constant
  config.advantage_clip = 10.0
  config.advantage_std = "batch"  # batch or group: the deviation when samples_per_prompt > 1
  config.max_nan_fraction = 0.1  # stop when more of an iteration's rewards are not finite

  # Update.
  config.train_timesteps = 5  # K, steps of the chain trained per iteration, drawn at random
  config.skip_steps = (0, 0)  # first and last steps of the chain that are never drawn
  config.updates_per_iteration = 5  # optimiser updates that share the K steps: 1 to K
  config.timesteps_per_pass = 1  # steps per forward and backward pass; 0: all of the update
  config.gradient_accumulation = 1  # n: only every n-th iteration's updates step the optimiser
  config.optimizer = "adamw"  # adamw, or sgd: no moments, no adam_*, no weight_decay
  config.learning_rate = 2e-6
  config.warmup_updates = 0
  config.clip_range = 1e-4  # of the importance ratio around 1
  config.log_prob_region = "all"  # all latents, or the hole's only
  config.loss_reduction = "mean"  # mean or sum over the batch
  config.kl_weight = 0.0  # weight of the KL divergence from the base policy
  config.ema_decay = 0.0  # moving average of the parameters, exported when on; 0: off
  config.adam_b1 = 0.9
  config.adam_b2 = 0.999
  config.adam_eps = 1e-8
  config.weight_decay = 0.01
  config.moments_dtype = "float32"  # what AdamW's moments are kept in; or bfloat16: half the memory
  config.clip_norm = config_dict.placeholder(float)  # of the whole gradient; None: no clipping
  config.remat = True  # recompute the UNet's blocks in the backward pass: less memory

  config.lora = ConfigDict()  # adapters of a frozen base: little to keep in memory for each
  config.lora.rank = 0  # 0: train all parameters
  config.lora.targets = r"attn[12]/to_(q|k|v|out_0)/"  # regular expression: kernels adapted

  config.mesh = ConfigDict()
  config.mesh.data = -1  # devices that split the batch; -1: what is left
  config.mesh.fsdp = 1  # devices that also split parameters, moments and copies of them
  config.mesh.split_frozen = False  # split what is not trained, too: the reward, the VAE, the base

  config.checkpoint_every = 50  # iterations; also at the end; 0: only on SIGTERM or Ctrl-C
  config.keep_checkpoints = 3  # the last ones
  config.keep_best = ""  # also that of the highest held_out/reward(_winrate) or reward/mean
  config.sample_every = 50  # iterations between pictures of the same held-out prompts
  config.num_samples = 8  # pictures in that grid
  config.eval_every = 0  # iterations between looks at held-out prompts; 0: never
  config.eval_prompts = 64  # how many: reward, WinRate against the base, drift
  config.final_prompts = 0  # held-out prompts of the comparison with the base at the end; 0: none
  config.simulated_preference = False  # judge it by the simulated annotators too (mini world only)

  if preset == "mini":
    _mini(config)
  elif preset == "released":
    _released(config)
  elif preset == "sd2":
    config.policy = "stabilityai/stable-diffusion-2-inpainting"
  elif preset:
    raise ValueError(f"configs/rl.py has no preset {preset!r}; it has mini, released, sd2")
  return config


def _mini(config: ConfigDict) -> None:
  config.update(
    policy="mini",
    reward="mini",
    prompts="mini",
    size=32,
    dtype="float32",
    remat=False,
    num_iterations=60,
    batch_size=16,
    samples_per_prompt=8,
    num_steps=10,
    train_timesteps=8,
    skip_steps=(0, 2),
    updates_per_iteration=2,
    decode_batch=32,
    learning_rate=1e-4,
    warmup_updates=10,
    ema_decay=0.9,
    clip_range=1e-3,
    log_prob_region="hole",
    checkpoint_every=20,
    sample_every=10,
    num_samples=16,
    eval_every=10,
    eval_prompts=64,
    final_prompts=256,
    simulated_preference=True,
  )
  # ‖z‖ of this reward is about 0.02 ± 0.01: with the paper's k every sample would weigh the same.
  # These spread the weight by a quarter about 1.4.
  config.trust.update(k=33.9, b=1.09)


def _released(config: ConfigDict) -> None:
  config.update(
    batch_size=16,
    num_iterations=3000,
    behaviour_refresh=15,
    gradient_accumulation=3,
    loss_reduction="sum",
  )
  config.trust.update(norm="released", minimum=1.0, maximum=2.21)
