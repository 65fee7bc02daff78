"""From photographs to a reward model: collect candidates, score them, fit, and ask the model.

Cells of a notebook (`# %%`), and a script: python docs/examples/label_and_fit.py [PROMPTS]
"""

# %% A function that runs a command of the package
import subprocess
import sys
from pathlib import Path

from prefpaint_jax import RewardModel
from prefpaint_jax.data.prompts import open_prompts

ROOT = Path(__file__).parents[2]
prompts = int(sys.argv[1]) if sys.argv[1:] else 200


def run(command: str, *arguments: str) -> None:
  """Runs a command; its output is shown."""
  subprocess.run([sys.executable, "-m", f"prefpaint_jax.{command}", *arguments], check=True)


# %% Three candidates of each prompt, from the photographs of the mini world
run(
  "collect",
  f"--config={ROOT}/configs/collect.py:mini",
  "--workdir=label/candidates",
  f"--config.num_prompts={prompts}",
  f"--config.num_test_prompts={prompts // 5}",
)

# %% Scores. People score on a page: python -m prefpaint_jax.label --candidates=label/candidates
# Here simulated annotators take their place.
run("annotate", "--candidates=label/candidates")

# %% The dataset, and the reward model with the bound on its error
run(
  "data.preferences",
  f"--config={ROOT}/configs/preferences.py",
  "--workdir=label/preferences",
  "--config.source=label/candidates",
)
run(
  "train_reward",
  f"--config={ROOT}/configs/reward.py:mini",
  "--workdir=label/reward",
  "--config.preferences=label/preferences",
  f"--config.iterations={2 * prompts}",
  f"--config.warmup_iterations={prompts // 10}",
)

# %% Ask it: a photograph whose hole is filled as it was, and filled with grey
model = RewardModel.from_pretrained("label/reward/reward")
prompt = open_prompts("mini", "unseen")[0]
image, mask = prompt["image"], prompt["mask"]
for name, sample in (("true", image), ("grey", image * (1 - mask) + 0.5 * mask)):
  rewards, _ = model.score(sample[None], (image * (1 - mask))[None])
  print(f"{name}: reward {rewards[0]:+.2f}")
