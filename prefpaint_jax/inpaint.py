"""Paints the missing part of a picture.

  python -m prefpaint_jax.inpaint --model=MODEL --image=I --mask=M --output=O.png

The mask is white where the picture is missing. Several samples go to O_0.png, O_1.png, ...
"""

import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from prefpaint_jax import app
from prefpaint_jax.data import images as image_io
from prefpaint_jax.metrics import save_png
from prefpaint_jax.reward import RewardModel

_MODEL = flags.DEFINE_string("model", "mini", "Folder, hub name, workdir of a run, or mini.")
_IMAGE = flags.DEFINE_string("image", None, "Picture to complete.", required=True)
_MASK = flags.DEFINE_string("mask", None, "Its mask, white = missing.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "PNG to write.", required=True)
_TEXT = flags.DEFINE_string("text", "", "What to paint; empty: what the picture suggests.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "How many.", lower_bound=1)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 50, "Denoising steps.", lower_bound=1)
_ETA = flags.DEFINE_float("eta", 0.0, "Noise in each step, 0 to 1.", 0.0, 1.0)
_GUIDANCE = flags.DEFINE_float("guidance_scale", 7.5, "Strength of the text; 1 is none.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed paints the same picture.")
_REWARD = flags.DEFINE_string("reward", None, "Reward model that scores the samples.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")


def main() -> None:
  output = Path(_OUTPUT.value)
  if output.suffix.lower() != ".png":
    raise ValueError(f"--output={output}: give a name that ends in .png")
  image = image_io.load_image(_IMAGE.value)
  mask = image_io.load_mask(_MASK.value, image.shape[:2])
  inpainter = app.open_policy(_MODEL.value, _DTYPE.value)
  judge = _REWARD.value and RewardModel.from_pretrained(_REWARD.value, dtype=_DTYPE.value)
  with tqdm(total=_NUM_STEPS.value, unit="step", disable=not sys.stderr.isatty()) as bar:
    painted = inpainter(
      image,
      mask,
      key=jax.random.key(_SEED.value),
      num_steps=_NUM_STEPS.value,
      eta=_ETA.value,
      text=_TEXT.value,
      guidance_scale=_GUIDANCE.value,
      num_samples=_NUM_SAMPLES.value,
      report=lambda: bar.update() and None,
    )
  rewards = judge.score(painted, (image * (1.0 - mask))[None])[0] if judge else None
  for i, picture in enumerate(painted):
    name = output if len(painted) == 1 else output.with_stem(f"{output.stem}_{i}")
    text = {"model": _MODEL.value, "seed": str(_SEED.value)}
    if rewards is not None:
      text["reward"] = f"{rewards[i]:.4f}"
    save_png(name, np.round(picture * 255.0).astype(np.uint8), text)
    print(name, *([] if rewards is None else [f"reward {rewards[i]:.4f}"]))


if __name__ == "__main__":
  app.run(main)
