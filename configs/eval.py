"""Evaluation: `python -m prefpaint_jax.evaluate --config=configs/eval.py[:mini] --workdir=DIR
--config.policy=A --config.baseline=B`.
"""

from ml_collections import ConfigDict, config_dict

PRESETS = {
  "": "Stable Diffusion 1.5 inpainting as the baseline, judged by the released reward model",
  "mini": "prompts, base policy and reward model of the mini world, with the simulated annotators "
  "as a second judge; minutes on two CPU cores",
}


def get_config(preset: str = "") -> ConfigDict:
  """Returns the config of a preset; "" is Stable Diffusion with the released reward model."""
  config = ConfigDict()
  config.seed = 0  # of everything that is drawn
  config.dtype = "bfloat16"  # of the computation

  # Policy and baseline: folders, hub names, workdirs of runs, or "mini".
  config.policy = ""  # the policy to judge; required
  # Checkpoints of a workdir: an iteration, or best (kept by keep_best); None: the latest.
  config.policy_step = config_dict.placeholder(str)
  config.baseline = "stable-diffusion-v1-5/stable-diffusion-inpainting"  # what it is compared with
  config.baseline_step = config_dict.placeholder(int)  # an iteration of a workdir; None: the latest
  # More policies for the same comparison with the baseline: names as of policy, latest checkpoints.
  config.rivals = ()
  config.judges = ("kd5678/prefpaintReward",)  # rewards by name, as docs/rewards.md lists them
  config.simulated_preference = False  # judge by the simulated annotators too (mini world)

  # Prompts and samples.
  config.prompts = ""  # folder of prompts, or of images to draw prompts from; required
  config.split = ""  # "": unseen if the prompts have it (images that nothing learned), else test
  config.kind = ""  # outpainting, warping (with holes of collect), box, brush; "": all
  config.num_prompts = 0  # number of prompts, from the first on; 0: all
  config.size = 512  # side of the images, in pixels
  config.samples_per_prompt = 11  # S; one more than the best of 10, for a rival of another seed
  config.num_steps = 50  # DDIM steps
  config.eta = 1.0  # scale of the noise of each DDIM step; 0: none
  config.guidance_scale = 1.0  # of the texts of the prompts; 1: no guidance
  config.batch_size = 4  # prompts that are sampled at a time, S times each

  # Known pixels. Without a protocol or blending, samples keep them exactly.
  config.protocol = ""  # brushnet: JPEG, PSNR, MSE and LPIPS as in its paper; "": the true ones
  config.blended = False  # blend samples and images across the hole's border, over 10 pixels
  # squeeze@FOLDER or alex@FOLDER, with torchvision's and lpips' weights; "": no LPIPS
  config.lpips = ""

  # Report.
  config.gallery = 18  # prompts in the report: largest, median and smallest gains

  if preset == "mini":
    config.update(
      dtype="float32",
      baseline="mini",
      judges=("mini",),
      simulated_preference=True,
      prompts="mini",
      num_prompts=256,
      size=32,
      num_steps=10,
      batch_size=32,
    )
  elif preset:
    raise ValueError(f"configs/eval.py has no preset {preset!r}; give mini")
  return config
