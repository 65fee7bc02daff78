"""Candidates: `python -m prefpaint_jax.collect --config=configs/collect.py --workdir=DIR`."""

from ml_collections import ConfigDict

PRESETS = {
  "": "three samples of Stable Diffusion for each prompt from a folder or a dataset of images",
  "mini": "the embedded policy on crops of the embedded photographs; minutes on two CPU cores",
}


def get_config(preset: str = "") -> ConfigDict:
  config = ConfigDict()
  config.seed = 0  # of everything that is drawn
  config.dtype = "bfloat16"  # of the activations; parameters are float32

  # Images, and the prompts drawn from them.
  config.pictures = ""  # required: a folder, tfds:NAME, or mixture "2*FOLDER,1*tfds:NAME"
  config.num_prompts = 1000  # to train the reward model on
  config.num_test_prompts = 100  # held out
  config.size = 512  # pixels along each side
  config.fit = "crop"  # crop (centre), pad (the border is missing too), random (square crops)
  config.crop = (512, 4096)  # sides of random crops
  config.test_share = 0.1  # held-out share of the images; with fit="random", of each image's width
  config.kinds = ConfigDict(  # weight of each kind; holes: like warping, but the image stays
    {"outpainting": 1.0, "warping": 1.0, "holes": 0.0, "box": 0.0, "brush": 0.0}
  )

  # Candidates. The samples take the policies in turn: folders, hub names, workdirs, or "mini".
  config.policies = (  # whose samples are the candidates
    "stable-diffusion-v1-5/stable-diffusion-inpainting",
  )
  config.samples_per_prompt = 3  # candidates of each prompt
  config.num_steps = 50  # DDIM steps
  config.eta = 1.0  # scale of the noise of each DDIM step; 0: none
  config.guidance_scale = 1.0  # of the texts of the prompts; 1: no guidance
  config.batch_size = 16  # prompts sampled at a time
  config.perturbed = 0  # additional candidates with random defects in the hole, for simulations

  # Rewards that score the candidates: names as in docs/rewards.md; they may be added later.
  config.rewards = ()  # their scores are written to scores.jsonl

  if preset == "mini":
    config.update(
      seed=1,  # crops that differ from the embedded prompts, which the policy is aligned on
      pictures="mini",
      dtype="float32",
      num_prompts=4000,
      num_test_prompts=384,
      size=32,
      fit="random",
      crop=(48, 176),
      test_share=0.22,
      policies=("mini",),
      num_steps=10,
      batch_size=128,
    )
    config.kinds.update(warping=0.0, holes=1.0)
  elif preset:
    raise ValueError(f"configs/collect.py has no preset {preset!r}; expected mini")
  return config
