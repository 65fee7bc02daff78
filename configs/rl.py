"""Alignment: `python -m prefpaint_jax.train --config=configs/rl.py[:PRESET] --workdir=DIR`."""

from ml_collections import ConfigDict, config_dict

PRESETS = {
  "": "Stable Diffusion 1.5 inpainting with the paper's settings; ESTIMATE: at least 17 minutes on "
  "eight H100; 18 s an iteration, so 5.1 hours, on one H200",
  "mini": "the embedded model and prompts; about 4 minutes on two CPU cores",
  "released": "the settings of the released PrefPaint code; prefpaint_jax.plan estimates the time",
  "sd2": "Stable Diffusion 2 inpainting; ESTIMATE: at least 17 minutes on eight H100",
  "sdxl": "Stable Diffusion XL inpainting at 1024 pixels with LoRA; ESTIMATE: at least 69 "
  "minutes on eight H100",
  "sd15_24gb": "Stable Diffusion 1.5 with LoRA on one device of 24 GB; ESTIMATE: at least 5.7 "
  "hours on an RTX 4090",
  "sd15_80gb": "Stable Diffusion 1.5 on one device of 80 GB; ESTIMATE: at least 6.4 hours "
  "on an A100",
}


def get_config(preset: str = "") -> ConfigDict:
  """Returns the config of a preset."""
  config = ConfigDict()
  config.seed = 0  # of everything that is drawn
  config.num_iterations = 1000  # rollouts, each followed by its updates
  config.dtype = "bfloat16"  # of the networks' computation, or float32; parameters stay float32

  # Models and data: folders, hub names or "mini"; the policy also a file.
  config.policy = "stable-diffusion-v1-5/stable-diffusion-inpainting"  # the model to align
  # Rewards as NAME*WEIGHT,NAME: a reward model (folder, hub name, prefpaint or mini), a public or
  # analytic one (docs/rewards.md), or a function FILE.py:FUNCTION.
  config.reward = "kd5678/prefpaintReward"
  config.combine = "sum"  # of several rewards: sum, gdpo or winrate (docs/rewards.md)
  config.bound = ""  # a bound.safetensors or a released V⁻¹; "": the bound in the reward folder
  config.prompts = ""  # a folder with masks/ID_mask.png and images/ID.png, or a tfds folder
  config.size = 512  # pixels of each side of an image

  # Rollout.
  config.batch_size = 128  # prompts per iteration, over all devices
  config.samples_per_prompt = 1  # above 1, advantages compare samples of the same prompt
  config.num_steps = 50  # T, DDIM steps
  config.mask_latents = "cells"  # missing latents: cells with any missing pixel, or corner (stock)
  config.eta = 1.0  # scale of the noise of each DDIM step; above 0 for ppo
  config.window = 0  # steps with noise, which are trained (ppo); it slides (MixGRPO); 0: all steps
  config.window_iterations = 25  # iterations before the window moves by one step
  # Classifier-free guidance by the prompts' texts, in the rollout and in the update; 1: none. The
  # UNet then takes two inputs for each image.
  config.guidance_scale = 1.0
  config.text_dropout = 0.0  # share of the texts that are replaced by the empty text in training
  config.vae_posterior = "mean"  # of a prompt's latents: mean, or sample, as the released code
  config.samples_per_pass = 0  # images of a device at a time through the UNet; 0: all
  config.decode_batch = 16  # images that a device encodes, decodes and scores at a time; 0: all
  config.behaviour_refresh = 1  # n: every n-th iteration begins with a copy to the behaviour policy
  config.behaviour_dtype = "float32"  # type of its copy; bfloat16 (with dtype bfloat16) halves it

  # Reward: the trust weight exp(b - k norm) of each sample, and advantages.
  config.trust = ConfigDict()
  # mahalanobis (paper) or released (bound of the reward), novelty, ensemble, constant or none.
  config.trust.norm = "mahalanobis"
  config.trust.reference = 256  # samples of the base policy that novelty is relative to; 0: none
  # Slope: how fast the weight falls with the norm. The paper has 0.05 for a norm that is ten times
  # larger. With the released V, 0.5 gives about the
  # weights of the released code; 0.05 gives all samples the same weight within 1 to 2 %.
  config.trust.k = 0.5
  config.trust.b = 0.7  # logarithm of the weight at norm 0
  config.trust.minimum = config_dict.placeholder(float)  # lowest weight; None: no limit
  config.trust.maximum = config_dict.placeholder(float)  # highest weight; None: no limit
  config.trust.constant = 1.4  # the weight if trust.norm is constant
  config.advantage_clip = 10.0  # largest absolute advantage
  config.advantage_std = "batch"  # batch or group: standard deviation if samples_per_prompt > 1
  config.max_nan_fraction = 0.1  # the run stops if more of an iteration's rewards are not finite

  # Update.
  config.algorithm = "ppo"  # ppo, nft (DiffusionNFT) or awm (docs/algorithms.md)
  config.ratio_normalisation = False  # ppo: GRPO-Guard's importance ratio and weight of each step
  config.nft = ConfigDict()
  config.nft.beta = 1.0  # how far the two implicit policies are from the old policy
  # After an iteration the old policy is decay * old + (1 - decay) * policy. Published: rate 0.001,
  # start 0, maximum 0.5; or 0.0075, 75 and 0.999.
  config.nft.decay_rate = 0.001  # by which the decay grows in an update
  config.nft.decay_start = 0  # updates before it grows
  config.nft.decay_maximum = 0.5  # highest decay
  config.train_timesteps = 5  # K, steps of the chain to train in an iteration, drawn at random
  config.skip_steps = (0, 0)  # how many of the first and of the last steps are never drawn
  config.updates_per_iteration = 5  # optimiser updates that share the K steps; divides K
  config.timesteps_per_pass = 1  # steps per forward and backward pass; 0: all steps of the update
  config.gradient_accumulation = 1  # n: only every n-th iteration steps the optimiser
  config.optimizer = "adamw"  # or sgd, which ignores adam_b1, adam_b2, adam_eps and weight_decay
  config.learning_rate = 2e-6  # of the optimiser, after the warm-up
  config.warmup_updates = 0  # updates in which the learning rate rises to its value
  config.clip_range = 1e-4  # the importance ratio is clipped to 1 ± this value (ppo, awm)
  config.log_prob_region = "all"  # latents in the loss: all, or hole (missing ones)
  config.loss_reduction = "mean"  # mean or sum over samples and timesteps
  # Weight of the KL divergence from the base policy (ppo) or of the squared difference of the
  # network's outputs (nft, awm).
  config.kl_weight = 0.0
  config.ema_decay = 0.0  # decay of the moving average of the parameters, for export; 0: none
  config.adam_b1 = 0.9  # decay of AdamW's mean of gradients
  config.adam_b2 = 0.999  # decay of AdamW's mean of squared gradients
  config.adam_eps = 1e-8  # added to the root of AdamW's mean of squares
  config.weight_decay = 0.01  # of AdamW, times the learning rate
  config.moments_dtype = "float32"  # dtype of AdamW's moments; bfloat16 halves their memory
  config.clip_norm = config_dict.placeholder(float)  # largest gradient norm; None: no clipping
  config.remat = True  # rematerialise the UNet's blocks in the backward pass: less memory

  config.lora = ConfigDict()  # LoRA adapters on a frozen base policy
  config.lora.rank = 0  # 0: train all parameters
  config.lora.init = ""  # file of adapters to begin with, as export --lora writes them
  config.lora.targets = r"attn[12]/to_(q|k|v|out_0)/"  # regular expression: kernels with adapters

  config.mesh = ConfigDict()  # how the devices share arrays
  config.mesh.data = -1  # devices over which the batch is split; -1: all / mesh.fsdp
  config.mesh.fsdp = 1  # devices over which the batch, parameters and moments are split
  config.mesh.split_frozen = False  # also split the reward model, the VAE and the base policy

  # Checkpoints and measurements; 0 turns a measurement off.
  config.checkpoint_every = 50  # iterations; also at the end; 0: only on SIGTERM or Ctrl-C
  config.keep_checkpoints = 3  # how many of the latest checkpoints to keep
  # Also keep the best by held_out/reward(_winrate), held_out/judge/NAME(_winrate) or reward/mean.
  config.keep_best = ""
  config.sample_every = 50  # iterations between grids of samples of the same held-out prompts
  config.num_samples = 8  # held-out prompts in a grid, and that are sampled at a time
  config.eval_every = 0  # iterations between measurements on held-out prompts
  config.eval_prompts = 64  # held-out prompts of a measurement: reward, WinRate, drift
  config.final_prompts = 0  # held-out prompts of the comparison with the base policy at the end
  config.judges = ()  # rewards that are never optimised, on held-out prompts (docs/rewards.md)
  config.stop_on_hacking = False  # end the run when the reward rises while a judge falls
  config.simulated_preference = False  # also ask the simulated annotators (mini data only)

  if preset == "mini":
    _mini(config)
  elif preset == "released":
    _released(config)
  elif preset == "sd2":
    config.policy = "stabilityai/stable-diffusion-2-inpainting"
  elif preset == "sdxl":
    _sdxl(config)
  elif preset == "sd15_24gb":
    _sd15_24gb(config)
  elif preset == "sd15_80gb":
    _sd15_80gb(config)
  elif preset:
    raise ValueError(
      f"configs/rl.py has no preset {preset!r}; expected one of {', '.join(filter(None, PRESETS))}"
    )
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
    # Without it two samples of a prompt end at 0.35 to 0.38 of the base policy's distance; with it
    # at 0.56, at no loss in the true WinRate (docs/mini.md).
    kl_weight=0.1,
    checkpoint_every=20,
    sample_every=10,
    num_samples=16,
    eval_every=10,
    eval_prompts=64,
    final_prompts=256,
    simulated_preference=True,
  )
  # ‖z‖ of this reward model is about 0.02 ± 0.01, so the paper's k gives all samples the same
  # weight. These k and b spread the weight by about a quarter around 1.4.
  config.trust.update(k=33.9, b=1.09)


def _released(config: ConfigDict) -> None:
  config.update(
    batch_size=16,  # the authors had 16 on each of four devices: 64 for their batch statistics
    num_iterations=3000,
    behaviour_refresh=15,
    gradient_accumulation=3,
    vae_posterior="sample",
    loss_reduction="sum",
    mask_latents="corner",
  )
  config.trust.update(norm="released", k=0.05, minimum=1.0, maximum=2.21)


def _sdxl(config: ConfigDict) -> None:
  # Eight H100: 9.6 GiB of 79.1 each; 4.1 s an iteration, 15.6 images per second. Compiled for GPUs,
  # not run; not compiled for a v5e of 16 GB, for which one sample per pass is meant.
  config.update(
    policy="diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
    size=1024,
    batch_size=64,
    samples_per_pass=1,
    decode_batch=1,
  )
  config.lora.rank = 32
  config.learning_rate = 1e-4  # adapters need larger steps than whole kernels; not tuned


# Memory and time below are those of `plan`: compiled for the GPU, not run on one. The time is at
# the GPU's peak rates, which no run reaches; docs/plan.md has the table of all devices.
def _sd15_24gb(config: ConfigDict) -> None:
  # RTX 4090: 8.8 GiB of 23.5; 20.5 s an iteration, 3.1 images per second. `plan --search` found
  # that more samples per pass take more memory and no less time.
  config.update(batch_size=64, samples_per_pass=8, remat=False)
  config.lora.rank = 16
  config.learning_rate = 1e-4  # adapters need larger steps than whole kernels; not tuned


def _sd15_80gb(config: ConfigDict) -> None:
  # A100 80 GB, all parameters: 44.7 GiB of 79.3; 23.0 s an iteration, 5.6 images per second.
  config.update(samples_per_pass=32, remat=False)
