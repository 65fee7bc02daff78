"""Evaluation: `python -m prefpaint_jax.evaluate --config=configs/eval.py[:mini] --workdir=DIR
--config.policy=A --config.baseline=B`.

`mini`: the embedded prompts, base and reward, and the simulated preference as a second judge.
"""

from ml_collections import ConfigDict, config_dict


def get_config(preset: str = "") -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.dtype = "bfloat16"  # what the networks compute in

  # Who is compared: folders, hub names, workdirs of runs, or "mini".
  config.policy = ""
  # Checkpoints of a workdir: an iteration, or best, which keep_best kept; None: the latest.
  config.policy_step = config_dict.placeholder(str)
  config.baseline = "stable-diffusion-v1-5/stable-diffusion-inpainting"
  config.baseline_step = config_dict.placeholder(int)
  config.judges = ("kd5678/prefpaintReward",)  # reward models: folders, hub names, or "mini"
  config.simulated_preference = False  # the simulated annotators judge too (mini world only)

  # On what.
  config.prompts = ""  # folder of prompts, or pictures to draw them from
  config.split = "test"
  config.kind = ""  # only prompts of this kind: outpainting, warping, box, brush; "": all
  config.num_prompts = 0  # the first ones; 0: all
  config.size = 512  # pixels along each side
  config.samples_per_prompt = 10  # S
  config.num_steps = 50
  config.eta = 1.0
  config.batch_size = 4  # prompts painted at a time, each S times

  config.gallery = 18  # prompts that the report shows: wins, losses, and between

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
    raise ValueError(f"configs/eval.py has no preset {preset!r}; it has mini")
  return config
