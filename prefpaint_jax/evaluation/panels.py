"""Draws the curves of runs, a panel for each metric."""
# Shapes: N iterations that wrote a line.

import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from prefpaint_jax.evaluation.curves import HELD_OUT, Curve, Group, base_levels, curve, positions
from prefpaint_jax.evaluation.overoptimisation import KL, draw_gains, judged_scores

# Metrics and titles of the first panels; the panels of held-out metrics follow.
PANELS = {
  "reward/mean": "reward",
  "ppo/approx_kl": "approximate KL of the updates",
  "ppo/clip_fraction": "clip fraction",
  "trust/mean": "trust weight γ",
  "time/images_per_s": "images per second",
  "train/loss": "training loss",
  "dpo/loss": "loss of the pairs",
  "dpo/margin": "margin of the pairs",
  "dpo/implicit_accuracy": "implicit accuracy",
  "validation/implicit_accuracy": "implicit accuracy, validation",
  "ppo/learning_rate": "learning rate",
  "nft/change": "squared change from the old policy",
  "nft/learning_rate": "learning rate of NFT",
  "awm/clip_fraction": "clip fraction of AWM",
  "awm/learning_rate": "learning rate of AWM",
}
AXES = {"iteration": "iteration", "images": "images", "unet_passes": "UNet passes"}
# Parts of a metric, which are drawn in its panel: spread, ends of its interval, base policy.
PARTS = ("/std", "/low", "/high", "/base")
# Parts of the names of held-out metrics, and the words for them in titles.
WORDS = {
  "drift/": "change of ",
  "winrate": "WinRate",
  "gain_in_sd": "gain in SD",
  "kl_to_base": "KL to the base policy",
}
FROM_ZERO = ("/clip_fraction", "time/images_per_s", "/learning_rate")  # ends of metrics
LOGARITHMIC = ("ppo/approx_kl",)  # if all values are positive

# The colours of Okabe and Ito without yellow, which is too pale for a line.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")  # curves with the same colour differ in their dashes
GREY = "#8a8f98"
BASE = {"color": "#4a4f57", "linewidth": 1.1, "linestyle": (0, (1, 1.6))}
SHADE = 0.18  # opacity
SHADED_RUNS = 3  # the largest number of runs with shades; more would overlap unreadably
STEPS = (1, 2, 2.5, 5, 10)  # distances between ticks, times a power of 10
WIDTH = 9.0  # inches: 1800 pixels at 200 dpi


def choose_panels(
  groups: Sequence[Group], smooth: int = 1, only: str = ""
) -> dict[str, tuple[str, list[Curve]]]:
  """Chooses the metrics to draw; a metric that is constant is left out if there is another one.

  Returns:
    {metric: (title, one curve per group)}; see `draw` for the arguments.

  Raises:
    ValueError: there is no value to draw.
  """
  titles = dict(PANELS)
  for key in (key for group in groups for run in group.runs for key in run.columns):
    if key.startswith(HELD_OUT) and not key.endswith(PARTS):
      title = key.removeprefix(HELD_OUT).removesuffix("/mean")
      for part, word in WORDS.items():
        title = title.replace(part, word)
      titles[key] = "held-out " + title.replace("/", " ").replace("_", " ")
  panels, constant = {}, {}
  for key in (key for key in titles if re.search(only, key)):
    window = 1 if key.startswith(HELD_OUT) else smooth
    curves = [curve(group, key, window) for group in groups]
    values = np.concatenate([one.values for one in curves])
    values = values[np.isfinite(values)]
    if len(values):
      chosen = constant if len(values) > 1 and np.ptp(values) == 0 else panels
      chosen[key] = titles[key], curves
  if not (panels or constant):
    names = ", ".join(str(run.workdir) for group in groups for run in group.runs)
    raise ValueError(
      f"{names}: nothing to draw; expected values of {', '.join(PANELS)} or {HELD_OUT}*"
    )
  return panels or constant


def draw(
  groups: Sequence[Group], smooth: int = 1, only: str = "", unit: str = "iteration"
) -> Figure:
  """Draws one panel per metric, with one curve per group that has the metric.

  If a group has several runs, shades are ranges over seeds, and single runs have no shade. More
  than three single runs have no shade either. Held-out metrics have the level of the base policy.

  Args:
    smooth: odd number of iterations of a centred moving average; held-out metrics are not averaged.
    only: regular expression; draws only the metrics that it is found in.
    unit: the horizontal axis, one of AXES.

  Raises:
    ValueError: if `smooth` is not odd or there is no value to draw.
  """
  if smooth < 1 or smooth % 2 == 0:
    raise ValueError(f"smooth is {smooth}; give an odd number, for a centred average")
  panels = choose_panels(groups, smooth, only)
  averaged = any(len(group.runs) > 1 for group in groups)
  scores = [] if only else judged_scores(groups)
  axis_of = {"iteration": "iteration"} if scores else {}
  if scores and any(KL in run.columns for group in groups for run in group.runs):
    axis_of[KL] = "KL to the base policy, nats"  # a run without noise has none
  number = len(panels) + len(axis_of)
  columns = number if number < 3 else 2 if number == 4 else 3
  rows = -(-number // columns)
  figure = Figure(figsize=(WIDTH, 2.6 * rows + 0.6), dpi=200, layout="constrained")
  figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
  shades, based, first = {}, False, None  # shades: their meanings, in order
  for place, (key, (title, curves)) in enumerate(panels.items(), start=1):
    axes = first = figure.add_subplot(rows, columns, place, sharex=first)
    for index, (group, one) in enumerate(zip(groups, curves, strict=True)):
      one = one._replace(iterations=positions(group, unit, one.iterations))
      if len(group.runs) == 1 and (averaged or len(groups) > SHADED_RUNS):
        one = one._replace(low=None, high=None)
      _draw_curve(axes, one, group.label, index, key.startswith(HELD_OUT))
      if one.low is not None:
        shades[_meaning(key, averaged)] = None
    for level in {round(x, 9) for group in groups for x in base_levels(group, key)}:
      axes.axhline(level, zorder=1, **BASE)
      based = True
    _finish_axes(axes, key, curves)
    axes.set_title(title, fontsize=9.5, loc="left")
    if place + columns > number:  # no panel below
      axes.set_xlabel(AXES[unit], fontsize=9)
    if smooth > 1 and not key.startswith(HELD_OUT):
      axes.set_ylabel(f"average of {smooth} iterations", fontsize=8, color="#555555")

  for place, (divergence, words) in enumerate(axis_of.items(), start=len(panels) + 1):
    axes = figure.add_subplot(rows, columns, place)
    draw_gains(axes, groups, scores, COLOURS, divergence)
    axes.axhline(0.0, zorder=1, **BASE)
    _finish_axes(axes, "", [])
    axes.set_title("held-out gains in SD", fontsize=9.5, loc="left")
    axes.set_xlabel(words, fontsize=9)

  labels = [textwrap.fill(group.label, 110) for group in groups]
  handles = [Line2D([], [], label=label, **_style(i)) for i, label in enumerate(labels)]
  if based:
    handles.append(Line2D([], [], label="base policy", **BASE))
  if shades:
    handles.append(Patch(facecolor=GREY, alpha=2 * SHADE, label=", ".join(shades)))
  widths = [len(handle.get_label()) + 8 for handle in handles]
  row = len(handles) if sum(widths) <= 130 else int(np.clip(120 // max(widths), 1, len(handles)))
  figure.legend(
    handles=handles,
    loc="outside lower center",
    ncols=row,
    fontsize=9,
    frameon=False,
  )
  return figure


def _style(index: int) -> dict[str, Any]:
  """Returns colour and dashes of the curve with this index, the same in every panel."""
  dash = DASHES[index // len(COLOURS) % len(DASHES)]
  return {"color": COLOURS[index % len(COLOURS)], "linestyle": dash, "linewidth": 1.4}


def _meaning(key: str, averaged: bool) -> str:
  """Returns what the shade of a metric means."""
  if averaged:
    return "lowest to highest seed"
  return "95 % interval (held-out)" if key.startswith(HELD_OUT) else "± standard deviation"


def _draw_curve(axes: Axes, curve: Curve, label: str, index: int, sparse: bool) -> None:
  """Draws a curve and its shade. A `sparse` curve has a marker at each value and no gaps."""
  finite = np.isfinite(curve.values)
  if not finite.any():
    return
  if sparse:
    curve = Curve(*(None if field is None else field[finite] for field in curve))
    marked = np.ones(finite.sum(), bool)
  else:  # mark isolated values, which no line shows
    before, after = np.append(False, finite[:-1]), np.append(finite[1:], False)
    marked = finite & ~before & ~after
  style = _style(index)
  axes.plot(
    curve.iterations,
    curve.values,
    label=label,
    marker="o",
    markersize=3.5,
    markevery=marked,
    **style,
  )
  if curve.low is not None:
    shade = {"color": style["color"], "alpha": SHADE, "linewidth": 0}
    axes.fill_between(curve.iterations, curve.low, curve.high, **shade)


def _finish_axes(axes: Axes, key: str, curves: Sequence[Curve]) -> None:
  """Sets scales, ticks, grid and reference lines of a panel."""
  axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=STEPS, integer=True, min_n_ticks=1))
  axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=STEPS))
  drawn = np.concatenate([np.empty(0), *(one.values for one in curves)])
  if key in LOGARITHMIC and (drawn[np.isfinite(drawn)] > 0).all():
    axes.set_yscale("log")
  elif key.endswith("/learning_rate"):
    axes.yaxis.set_major_formatter("{x:g}")
  else:  # an offset of the ticks would be drawn over the title
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")
  if key.endswith(FROM_ZERO):
    axes.set_ylim(bottom=0)
  axes.margins(x=0.02)
  axes.grid(color="#e4e6ea", linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(which="both", labelsize=8.5)
