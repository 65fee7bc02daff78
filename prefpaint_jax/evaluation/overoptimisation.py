"""Draws what runs gain by the reward that they optimise against what they gain by judges.

Over-optimisation is a reward that goes on rising while the judges fall (Gao et al. 2023, arXiv
2210.10760). Gains are in standard deviations of the base policy's scores, so that all fit one axis.
"""
# Shapes: N measurements.

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from prefpaint_jax.evaluation.curves import HELD_OUT, Group, Run

GAIN = "_gain_in_sd"
KL = "held_out/kl_to_base"
DASHES = ("-", "--", ":", "-.")


def judged_scores(groups: Sequence[Group]) -> list[str]:
  """Returns the scores with a gain, the reward first; none if no run has a judge."""
  keys = (key for group in groups for run in group.runs for key in run.columns)
  found = {
    key.removeprefix(HELD_OUT).removesuffix(GAIN)
    for key in keys
    if key.startswith(HELD_OUT) and key.endswith(GAIN)
  }
  has_judge = any(name.startswith("judge/") for name in found)
  return sorted(found, key=lambda name: (name != "reward", name)) if has_judge else []


def draw_gains(
  axes: Axes, groups: Sequence[Group], scores: Sequence[str], colours: Sequence[str], against: str
) -> None:
  """Draws the gain of each score of each run.

  A score has its dashes, and a group its colour; if there is one group, a score has its colour.

  Args:
    against: "iteration", or the metric of the horizontal axis.
  """
  styles = [
    {"linestyle": DASHES[i % len(DASHES)], "linewidth": 2.0 if score == "reward" else 1.2}
    for i, score in enumerate(scores)
  ]
  for number, (score, style) in enumerate(zip(scores, styles, strict=True)):
    label = score.replace("_", " ").replace("judge/", "judge ")
    own = colours[number % len(colours)] if len(groups) == 1 else "#4a4f57"
    axes.plot([], [], color=own, label=label, **style)  # for the legend
    for index, group in enumerate(groups, start=number if len(groups) == 1 else 0):
      for run in group.runs:
        points = _points(run, f"{HELD_OUT}{score}{GAIN}", against)
        axes.plot(*points, color=colours[index % len(colours)], marker="o", markersize=3, **style)
  axes.legend(fontsize=7.5, frameon=False)


def _points(run: Run, key: str, against: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns both axes [N] of a metric where it is written, in order of the iterations."""
  nothing = np.full(len(run.iterations), np.nan)
  y = run.columns.get(key, nothing)
  x = run.iterations if against == "iteration" else run.columns.get(against, nothing)
  known = np.isfinite(x) & np.isfinite(y)
  return x[known], y[known]
