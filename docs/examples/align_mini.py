"""Align the embedded model for a few iterations, and look at the same prompts before and after.

Cells of a notebook (`# %%`), and a script: python docs/examples/align_mini.py [ITERATIONS]
"""

# %% The settings of configs/rl.py:mini, for fewer iterations
import runpy
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from prefpaint_jax import Inpainter, RewardModel
from prefpaint_jax.data.grids import image_grid
from prefpaint_jax.data.images import save_png
from prefpaint_jax.data.prompts import open_prompts
from prefpaint_jax.evaluation.curves import load_run
from prefpaint_jax.inpainter import open_policy
from prefpaint_jax.train import train

workdir = Path("align_mini")
config = runpy.run_path(Path(__file__).parents[2] / "configs/rl.py")["get_config"]("mini")
config.num_iterations = int(sys.argv[1]) if sys.argv[1:] else 20
config.update(eval_every=0, final_prompts=0, sample_every=0)

# %% Train; the same cell resumes a run that was interrupted
train(config.lock(), workdir)

# %% The reward of the samples over the iterations
run = load_run(workdir)
plt.plot(run.iterations, run.columns["reward/mean"])
plt.xlabel("iteration")
plt.ylabel("mean reward")
plt.savefig("align_mini_reward.png")

# %% The same prompts and seeds, before and after
prompts = [open_prompts("mini", "unseen")[i] for i in range(6)]
images, masks = (np.stack([prompt[name] for prompt in prompts]) for name in ("image", "mask"))
options = {"key": jax.random.key(0), "num_steps": 10, "eta": 1.0}
before, after = (
  np.asarray(policy(list(images), list(masks), **options))
  for policy in (Inpainter.from_pretrained("mini"), open_policy(str(workdir)))
)
reward_model = RewardModel.from_pretrained("mini")
rewards = [reward_model.score(samples, images * (1 - masks))[0] for samples in (before, after)]
print(
  f"mean reward of six prompts: {rewards[0].mean():+.2f} before, {rewards[1].mean():+.2f} after"
)
grid = np.concatenate([images * (1 - masks), before, after])
labels = [*[""] * 6, *(f"{x:+.2f}" for x in np.concatenate(rewards))]
names = ("incomplete", "before", "after")
save_png("align_mini.png", image_grid(grid, columns=6, scale=3, labels=labels, rows=names))
