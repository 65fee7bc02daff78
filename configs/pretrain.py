"""Denoising training: `python -m prefpaint_jax.pretrain --config=configs/pretrain.py[:mini]`."""

from ml_collections import ConfigDict

PRESETS = {
  "": "adapts Stable Diffusion 1.5 inpainting to a folder of images",
  "mini": "trains the model inside the package from random parameters, the VAE first; minutes on "
  "two CPU cores",
}


def get_config(preset: str = "") -> ConfigDict:
  config = ConfigDict()
  config.seed = 0  # of everything that is drawn
  config.dtype = "bfloat16"  # compute dtype of the networks; parameters stay float32
  config.policy = "stable-diffusion-v1-5/stable-diffusion-inpainting"  # "": a new one
  config.pictures = ""  # folder of images of any size; required
  config.test_share = 0.0  # right share of the width of each image, held out for tests
  config.size = 512  # pixels along each side of a crop after resizing
  config.crop = (512, 4096)  # least and greatest side of the square crops, pixels of the image
  config.faded_share = 0.0  # share of the targets with a faded hole, for a base of mixed quality

  config.vae = ConfigDict()  # training of the VAE, the first stage
  config.vae.iterations = 0  # updates; 0 keeps the VAE
  config.vae.batch_size = 8  # crops of an update, over all devices
  config.vae.learning_rate = 1e-4  # the highest, after the warm-up; it falls to 0
  config.vae.kl_weight = 1e-4  # weight of the posterior's KL per latent
  config.unet = ConfigDict()  # training of the UNet, the second stage
  config.unet.iterations = 5000  # updates; 0 keeps the UNet
  config.unet.batch_size = 32  # crops of an update, over all devices
  config.unet.learning_rate = 1e-5  # the highest, after the warm-up; it falls to 0

  # Both stages.
  config.warmup_iterations = 200  # in which the learning rate rises from 0
  config.ema_decay = 0.999  # moving average of the parameters, which is written
  config.remat = True  # rematerialise the UNet's blocks in the backward pass: less memory

  config.mesh = ConfigDict()  # how the devices share arrays
  config.mesh.data = -1  # devices over which the batch is split; -1: all / mesh.fsdp
  config.mesh.fsdp = 1  # devices over which parameters and batch are split

  # Checkpoints and measurements.
  config.checkpoint_every = 500  # iterations; 0: only on SIGTERM or Ctrl-C
  config.log_every = 50  # iterations

  # Networks of an empty policy: the config.json files of a diffusers pipeline, with the fields of
  # UNet2DConditionModel, AutoencoderKL and DDIMScheduler (diffusers) and CLIPTextModel
  # (transformers).
  config.architecture = ConfigDict()
  if preset == "mini":
    _mini(config)
  elif preset:
    raise ValueError(f"configs/pretrain.py has no preset {preset!r}; it has mini")
  return config


def _mini(config: ConfigDict) -> None:
  config.update(
    policy="",
    pictures="mini",
    test_share=0.22,
    size=32,
    crop=(48, 176),
    faded_share=0.5,
    dtype="float32",
    remat=False,
    checkpoint_every=1000,
    log_every=100,
  )
  config.vae.update(iterations=1800, batch_size=16, learning_rate=2e-3)
  config.unet.update(iterations=1800, batch_size=64, learning_rate=1e-3)
  config.architecture = ConfigDict(
    {
      "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "in_channels": 9,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
      },
      "vae": {
        "_class_name": "AutoencoderKL",
        "sample_size": 32,
        "block_out_channels": (16, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "scaling_factor": 1.0,
      },
      "text_encoder": {
        "_class_name": "CLIPTextModel",
        "architectures": ("CLIPTextModel",),
        "model_type": "clip_text_model",
        "vocab_size": 514,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "hidden_act": "quick_gelu",
        "projection_dim": 32,
        "bos_token_id": 512,
        "eos_token_id": 513,
        "pad_token_id": 513,
      },
      "scheduler": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
      },
    }
  )
