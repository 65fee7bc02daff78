"""Preference pairs: `python -m prefpaint_jax.train_dpo --config=configs/dpo.py[:PRESET]
--workdir=DIR --config.preferences=DIR`.
"""

from ml_collections import ConfigDict, config_dict

PRESETS = {
  "": "Stable Diffusion 1.5 inpainting with the settings of Diffusion-DPO: all parameters, 2048 "
  "pairs an update",
  "mini": "the embedded model; about three minutes on two CPU cores",
  "sd15": "Stable Diffusion 1.5 with LoRA on one GPU; not tuned",
  "sdxl": "Stable Diffusion XL inpainting at 1024 pixels with LoRA; not tuned",
}


def get_config(preset: str = "") -> ConfigDict:
  """Returns the config of a preset."""
  config = ConfigDict()
  config.seed = 0  # of everything that is drawn
  config.num_iterations = 64000  # batches of pairs; a multiple of gradient_accumulation
  config.dtype = "bfloat16"  # of the networks' computation, or float32; parameters stay float32

  # Model and data.
  config.policy = "stable-diffusion-v1-5/stable-diffusion-inpainting"  # folder, hub name, run, mini
  config.preferences = ""  # folder that prefpaint_jax.data.preferences wrote; required
  config.pairs = "extremes"  # best and worst candidate of a prompt, or all with different scores
  config.size = 512  # pixels of each side of an image
  config.batch_size = 64  # pairs of an iteration, over all devices
  config.mask_latents = "cells"  # missing latents: cells with any missing pixel, or corner (stock)

  # Loss; the reference is the policy before the training.
  config.loss = "dpo"  # dpo, or capo: regression to the gap of the pair's calibrated scores
  config.beta = 5000.0  # β: how strongly the reference holds the policy
  # Latents whose errors count: all (Diffusion-DPO), hole (mean over the hole), or masked (sum over
  # the hole divided by all latents, as Follow-Your-Preference: small holes count less).
  config.region = "all"

  # Trust: each pair's loss is multiplied by the mean weight exp(b - k norm) of its candidates.
  config.reward = ""  # reward model whose features and bound give the norm; "": none
  config.trust = ConfigDict()
  config.trust.norm = "none"  # mahalanobis (paper), released, or none
  config.trust.k = 0.5  # how fast the weight falls with the norm
  config.trust.b = 0.7  # logarithm of the weight at norm 0
  config.trust.minimum = config_dict.placeholder(float)  # lowest weight; None: no limit
  config.trust.maximum = config_dict.placeholder(float)  # highest weight; None: no limit

  # Update.
  config.gradient_accumulation = 32  # iterations whose mean gradient makes one optimiser update
  config.optimizer = "adamw"  # or sgd, which ignores adam_b1, adam_b2, adam_eps and weight_decay
  # After the warm-up: 1e-8 times 2048, by which the code of Diffusion-DPO multiplies it.
  config.learning_rate = 2.048e-5
  config.warmup_updates = 500  # updates in which the learning rate rises to its value
  # Decay of the moving average of the parameters in an iteration, for export; 0: no average.
  config.ema_decay = 0.0
  config.adam_b1 = 0.9  # decay of AdamW's mean of gradients
  config.adam_b2 = 0.999  # decay of AdamW's mean of squared gradients
  config.adam_eps = 1e-8  # added to the root of AdamW's mean of squares
  config.weight_decay = 0.01  # of AdamW, times the learning rate
  config.moments_dtype = "float32"  # dtype of AdamW's moments; bfloat16 halves their memory
  config.clip_norm = 1.0  # largest gradient norm; None: no clipping
  config.remat = True  # rematerialise the UNet's blocks in the backward pass: less memory

  config.lora = ConfigDict()  # LoRA adapters; the reference is then the base without adapters
  config.lora.rank = 0  # 0: train all parameters, and keep a copy of them as the reference
  config.lora.init = ""  # file of adapters to begin with, as export --lora writes them
  config.lora.targets = r"attn[12]/to_(q|k|v|out_0)/"  # regular expression: kernels with adapters

  config.mesh = ConfigDict()  # how the devices share arrays
  config.mesh.data = -1  # devices over which the batch is split; -1: all / mesh.fsdp
  config.mesh.fsdp = 1  # devices over which the batch, parameters and moments are split

  # Checkpoints and measurements.
  config.checkpoint_every = 1600  # iterations; also at the end
  config.judge_every = 1600  # iterations between measurements on the validation split; 0: none
  config.log_every = 32  # iterations between lines of metrics

  if preset == "mini":
    _mini(config)
  elif preset == "sd15":
    _lora(config, rank=16)
  elif preset == "sdxl":
    _lora(config, rank=32)
    config.update(policy="diffusers/stable-diffusion-xl-1.0-inpainting-0.1", size=1024)
  elif preset:
    raise ValueError(
      f"configs/dpo.py has no preset {preset!r}; expected one of {', '.join(filter(None, PRESETS))}"
    )
  return config


def _mini(config: ConfigDict) -> None:
  config.update(
    policy="mini",
    size=32,
    dtype="float32",
    remat=False,
    region="hole",
    # With β = 200 the policy leaves the images that it can denoise: the reward of its samples falls
    # while the implicit accuracy rises.
    beta=1000.0,
    num_iterations=300,
    batch_size=32,
    gradient_accumulation=1,
    learning_rate=2e-5,
    warmup_updates=20,
    checkpoint_every=100,
    judge_every=50,
    log_every=10,
  )


def _lora(config: ConfigDict, rank: int) -> None:
  config.update(
    region="hole",
    num_iterations=16000,
    batch_size=8,
    gradient_accumulation=8,
    learning_rate=1e-5,
    warmup_updates=100,
    checkpoint_every=400,
    judge_every=400,
    log_every=8,
  )
  config.lora.rank = rank
