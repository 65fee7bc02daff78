"""Paint the missing part of a photograph several times, and keep what the reward prefers.

Cells of a notebook (`# %%`), and a script: python docs/examples/paint.py
"""

# %% A prompt: a photograph of the mini world, and a mask that is 1 where it is missing
import jax
import numpy as np

from prefpaint_jax import Inpainter, RewardModel
from prefpaint_jax.data.grids import image_grid
from prefpaint_jax.data.images import save_png
from prefpaint_jax.data.prompts import open_prompts

prompt = open_prompts("mini", "unseen")[3]
image, mask = prompt["image"], prompt["mask"]  # [H, W, 3] and [H, W, 1], in [0, 1]
known = image * (1 - mask)

# %% Eight samples of the embedded model; another folder, file or hub name works as well
inpainter = Inpainter.from_pretrained("mini")
samples = inpainter(image, mask, key=jax.random.key(0), num_steps=10, eta=1.0, num_samples=8)

# %% What a reward model thinks of each; the features z give the bound on its error
reward_model = RewardModel.from_pretrained("mini")
rewards, features = reward_model.score(samples, known[None])
order = np.argsort(-np.asarray(rewards))
print("rewards, best first:", *(f"{rewards[i]:+.2f}" for i in order))

# %% The photograph with its hole, and the samples from the best to the worst
row = np.stack([known, *np.asarray(samples)[order]])
labels = ["incomplete", *(f"{rewards[i]:+.2f}" for i in order)]
save_png("paint.png", image_grid(row, columns=9, scale=3, labels=labels))
