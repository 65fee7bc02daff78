"""The end of a run: its comparison with the base policy, its files, and what to run next."""
# Shapes: N prompts, S samples of each.

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from prefpaint_jax.align.held_out import SAMPLES, HeldOut
from prefpaint_jax.align.referee import JUDGE, is_score
from prefpaint_jax.align.state import Scores, TrainState, current_params
from prefpaint_jax.data.images import save_png
from prefpaint_jax.data.prompts import final_split
from prefpaint_jax.evaluation import winrate
from prefpaint_jax.evaluation.tables import describe
from prefpaint_jax.runtime.metrics import MetricsWriter
from prefpaint_jax.runtime.text import print_next

SMALL_WEIGHT = 0.1  # mean of the trust weights below which a run warns
SMALL_SPREAD = 0.02  # of the trust weights, as a share of their mean
TITLES = {"reward": "learned reward", "true_preference": "true preference"}


def print_comparison(
  config: ConfigDict, policy: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]
) -> None:
  """Prints a line per score [N, S] of held-out prompts, policy against base."""
  count, split = config.final_prompts, final_split(config.prompts)
  print(f"{count} held-out prompts ({split}), policy against base, {SAMPLES} samples of each:")
  for name in filter(is_score, policy):
    group = winrate.estimate(winrate.Scores(policy[name], base[name]))
    print(describe(TITLES.get(name, name.removeprefix(JUDGE)), group))


def print_results(config: ConfigDict, workdir: Path, iteration: int) -> None:
  """Prints to standard error where the results of a run are, and the commands that use them."""
  names = [f"checkpoints/{iteration}"] if config.checkpoint_every else []
  names += ["metrics.jsonl", "tensorboard/"]
  names += [f"samples/{iteration:06d}.png"] if config.sample_every else []
  print(f"{workdir}: {', '.join(names)}", file=sys.stderr)
  evaluation = [
    f"--config=configs/eval.py{':mini' if config.prompts == 'mini' else ''}",
    f"--workdir={workdir}_eval",
    f"--config.policy={workdir}",
  ]
  if (config.policy, config.prompts) != ("mini", "mini"):
    evaluation += [f"--config.baseline={config.policy}", f"--config.prompts={config.prompts}"]
  print_next(
    ("plot", f"--workdir={workdir}", f"--output={workdir}_curves.png"),
    ("evaluate", *evaluation),
    ("export", f"--workdir={workdir}", f"--output={workdir}_aligned"),
  )


def write_sample(
  workdir: Path, writer: MetricsWriter, held_out: HeldOut, state: TrainState
) -> None:
  """Writes samples of held-out prompts as a PNG and a TensorBoard event."""
  iteration = int(state.iteration)
  grid = held_out.sample(current_params(state), iteration)
  if writer.is_writer:
    text = {"rows": "incomplete, base policy, policy", "iteration": str(iteration)}
    save_png(workdir / "samples" / f"{iteration:06d}.png", grid, text)
    writer.image(iteration, "held_out/samples", grid)


def write_histograms(writer: MetricsWriter, iteration: int, scores: Scores) -> None:
  """Writes the rewards, trust weights and advantages of a rollout's valid samples."""
  found = multihost_utils.process_allgather(scores, tiled=True)
  for name in ("reward", "trust", "advantages"):
    writer.histogram(iteration, f"rollout/{name}", getattr(found, name)[found.valid])


def warn_of_trust(trust: ConfigDict, line: Mapping[str, float]) -> None:
  """Warns if the trust weights of an iteration hardly differ, or almost vanish."""
  mean = line.get("trust/mean", 1.0)
  spread = line.get("trust/std", np.nan) / max(mean, 1e-30)
  norm = line.get("trust/norm", 0.0)  # 0 also if no sample counts
  if trust.norm not in ("constant", "none") and mean < SMALL_WEIGHT and norm > 0:
    logging.warning(
      "trust weights average %.2g, so updates almost vanish: the norm, %s, averages %.3g; "
      "lower trust.k=%g, to %.2g for example, or raise trust.b=%g",
      *(mean, trust.norm, norm, trust.k, 0.5 / norm, trust.b),
    )
  elif trust.norm not in ("constant", "none") and spread < SMALL_SPREAD:
    logging.warning(
      "trust weights spread by %.2g %% around %.3g, so trust.norm=%s acts as a constant; raise "
      "trust.k=%g until they spread by %g %% or more",
      *(100 * spread, line["trust/mean"], trust.norm, trust.k, 100 * SMALL_SPREAD),
    )
