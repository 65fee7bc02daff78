"""Curves of runs from their metrics.jsonl."""
# Shapes: N iterations that wrote a line, R runs of a group.

import functools
import json
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from prefpaint_jax.runtime.workdir import flatten, read_workdir

# What is drawn, in this order, before what was measured on held-out prompts.
PANELS = {
  "reward/mean": "reward",
  "ppo/approx_kl": "approximate KL of the updates",
  "ppo/clip_fraction": "clip fraction",
  "trust/mean": "trust weight γ",
  "images_per_s": "images per second",
  "train/loss": "training loss",
}
HELD_OUT = "held_out/"  # written every so often: points, joined
FROM_ZERO = ("ppo/clip_fraction", "images_per_s")
LOGARITHMIC = ("ppo/approx_kl",)  # where all of it is positive

# Okabe and Ito's colours without their yellow, which is too pale for a line.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")  # the next one when the colours are used up
GREY = "#8a8f98"
SHADE = 0.18  # opacity
SHADED_RUNS = 3  # more shades on each other cannot be told apart
STEPS = (1, 2, 2.5, 5, 10)  # between ticks
WIDTH = 9.0  # inches; at 200 dpi 1800 pixels, to be shown at 900


class Run(NamedTuple):
  config: dict[str, Any]  # flat: {"trust.norm": "none"}
  iterations: np.ndarray  # ascending [N]
  columns: dict[str, np.ndarray]  # by key, float64 [N]; NaN where null or not written
  workdir: Path


class Group(NamedTuple):
  """Runs that are drawn as one curve."""

  label: str
  runs: list[Run]


class Curve(NamedTuple):
  iterations: np.ndarray  # [N]
  values: np.ndarray  # [N]
  low: np.ndarray | None = None  # the shade [N]; None: there is none
  high: np.ndarray | None = None


def load_run(workdir: str | Path) -> Run:
  """Reads config.json and metrics.jsonl. A last line that a killed run wrote by half is left out.

  Raises:
    ValueError: the folder is no run, or has written nothing yet, or a line is damaged.
  """
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise ValueError(f"{workdir}: no such folder; give the --workdir of a run")
  config = flatten(read_workdir(workdir).to_dict())
  file = workdir / "metrics.jsonl"
  if not file.is_file():
    raise ValueError(f"{workdir}: no metrics.jsonl; the run has not finished an iteration")
  lines = file.read_text().split("\n")
  found: dict[int, dict[str, float]] = {}
  for number, line in enumerate(lines, start=1):
    if not line:
      continue
    try:
      scalars = json.loads(line)
      iteration = int(scalars.pop("iteration"))
      numbers = {key: np.nan if x is None else float(x) for key, x in scalars.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
      if number == len(lines):  # no line break after it
        break
      raise ValueError(f"{file}, line {number}: no line of metrics: {line[:40]!r}") from None
    found.setdefault(iteration, {}).update(numbers)
  if not found:
    raise ValueError(f"{file}: no whole line; the run has not finished an iteration")
  iterations = np.array(sorted(found))
  keys = dict.fromkeys(key for numbers in found.values() for key in numbers)
  columns = {key: np.array([found[i].get(key, np.nan) for i in iterations]) for key in keys}
  return Run(config, iterations, columns, workdir)


def single_runs(runs: Sequence[Run]) -> list[Group]:
  """Each run for itself, labelled by the fields in which the runs differ, else by its folder."""
  labels = _differences([_settings(run) for run in runs])
  names = [run.workdir.resolve().name for run in runs]
  groups = []
  for run, label, name in zip(runs, labels, names, strict=True):
    name = name if names.count(name) == 1 else str(run.workdir)
    if label and labels.count(label) > 1:
      label = f"{label} ({name})"
    groups.append(Group(label or name, [run]))
  return groups


def group_runs(runs: Sequence[Run]) -> list[Group]:
  """Runs that differ in their seed only, together; labelled by the fields in which groups differ.

  How often a run saves, paints or evaluates (`*_every`) does not count as a difference.

  Raises:
    ValueError: two runs of a group have the same seed: one of them would count twice.
  """
  members: list[list[Run]] = []
  for run in runs:
    alike = [group for group in members if _settings(group[0], "seed") == _settings(run, "seed")]
    if not alike:
      members.append([run])
      continue
    for other in alike[0]:
      if other.config.get("seed") == run.config.get("seed"):
        raise ValueError(
          f"{other.workdir} and {run.workdir} have the same config and seed "
          f"{run.config.get('seed')}: leave one of them out of the mean"
        )
    alike[0].append(run)
  groups = []
  labels = _differences([_settings(group[0], "seed") for group in members])
  for group, label in zip(members, labels, strict=True):
    label = label or (group[0].workdir.resolve().name if len(group) == 1 else "mean")
    groups.append(Group(label if len(group) == 1 else f"{label} ({len(group)} seeds)", group))
  return groups


def curve(group: Group, key: str, smooth: int = 1) -> Curve:
  """The key's values of a run, shaded by ± std; of several runs their mean, shaded by their range.

  A mean is there only where all of its runs have a number: of fewer it would be another mean.

  Args:
    group: one run, or several that are averaged.
    key: column; of "x/mean" the standard deviation is "x/std".
    smooth: iterations of a centred moving average of each run, odd; 1: none.
  """
  iterations = functools.reduce(np.intersect1d, [run.iterations for run in group.runs])

  def values_of(run: Run, key: str) -> np.ndarray:
    values = run.columns.get(key, np.full(len(run.iterations), np.nan))
    return _moving_average(run.iterations, values, smooth)[np.isin(run.iterations, iterations)]

  values = np.stack([values_of(run, key) for run in group.runs])  # [R, N]
  mean = values.mean(axis=0)
  spread = key.removesuffix("/mean") + "/std"
  if len(group.runs) > 1:
    low, high = values.min(axis=0), values.max(axis=0)
  elif spread in group.runs[0].columns:
    std = values_of(group.runs[0], spread)
    low, high = mean - std, mean + std
  else:
    low = high = None
  return Curve(iterations, mean, low, high)


def draw(groups: Sequence[Group], smooth: int = 1, only: str = "") -> Figure:
  """A panel for each metric that any of the groups has, a curve in it for each that has it.

  `only`: a regular expression that metrics must contain to be drawn.
  Where a group is averaged, all shades are ranges over seeds and single runs have none; nor have
  they where there are more than three.
  """
  if smooth < 1 or smooth % 2 == 0:
    raise ValueError(f"smooth={smooth}: give an odd number, to average as much before as after")
  titles = dict(PANELS)
  for key in (key for group in groups for run in group.runs for key in run.columns):
    if key.startswith(HELD_OUT) and not key.endswith("/std"):
      title = key.removeprefix(HELD_OUT).removesuffix("/mean")
      titles[key] = "held-out " + title.replace("/", " ").replace("_", " ")
  panels = {}
  for key in (key for key in titles if re.search(only, key)):
    window = 1 if key.startswith(HELD_OUT) else smooth
    curves = [curve(group, key, window) for group in groups]
    if any(np.isfinite(one.values).any() for one in curves):
      panels[key] = curves
  if not panels:
    names = ", ".join(str(run.workdir) for group in groups for run in group.runs)
    raise ValueError(f"{names}: nothing to draw, no number of {', '.join(PANELS)}, {HELD_OUT}*")

  averaged = any(len(group.runs) > 1 for group in groups)
  columns = len(panels) if len(panels) < 3 else 2 if len(panels) == 4 else 3
  rows = -(-len(panels) // columns)
  figure = Figure(figsize=(WIDTH, 2.6 * rows + 0.6), dpi=200, layout="constrained")
  figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
  shaded, first = False, None
  for place, (key, curves) in enumerate(panels.items(), start=1):
    axes = first = figure.add_subplot(rows, columns, place, sharex=first)
    for index, (group, one) in enumerate(zip(groups, curves, strict=True)):
      if len(group.runs) == 1 and (averaged or len(groups) > SHADED_RUNS):
        one = one._replace(low=None, high=None)
      _draw_curve(axes, one, group.label, index, key.startswith(HELD_OUT))
      shaded |= one.low is not None
    _finish_axes(axes, key, curves)
    axes.set_title(titles[key], fontsize=10, loc="left")
    if place + columns > len(panels):  # nothing below it
      axes.set_xlabel("iteration", fontsize=9)
    if smooth > 1 and not key.startswith(HELD_OUT):
      axes.set_ylabel(f"average of {smooth} iterations", fontsize=8, color="#555555")

  labels = [textwrap.fill(group.label, 110) for group in groups]
  handles = [Line2D([], [], label=label, **_style(i)) for i, label in enumerate(labels)]
  if shaded:
    meaning = "lowest to highest seed" if averaged else "± standard deviation"
    handles.append(Patch(facecolor=GREY, alpha=2 * SHADE, label=meaning))
  widest = max(len(handle.get_label()) for handle in handles)
  figure.legend(
    handles=handles,
    loc="outside lower center",
    ncols=int(np.clip(120 // (widest + 8), 1, len(handles))),
    fontsize=9,
    frameon=False,
  )
  return figure


def reached_at(run: Run, key: str, level: float) -> float:
  """The iteration at which the metric first is at `level` or above; infinite if it never is.

  Between two numbers of the metric it is taken to rise evenly.
  """
  values = run.columns.get(key, np.empty(0))
  there = np.isfinite(values)
  iterations, values = run.iterations[there], values[there]
  above = np.flatnonzero(values >= level)
  if not len(above):
    return np.inf
  i = above[0]
  if i == 0:
    return float(iterations[0])
  share = (level - values[i - 1]) / (values[i] - values[i - 1])
  return float(iterations[i - 1] + share * (iterations[i] - iterations[i - 1]))


def table(
  groups: Sequence[Group], reach: Sequence[tuple[str, float]], last: Sequence[str]
) -> list[str]:
  """Markdown lines: a row for each group, with mean and range over its runs.

  Args:
    reach: (metric, level): iterations until the metric is there, and images painted until then.
    last: metrics whose last number is shown.
  """

  def spread(numbers: Sequence[float], form: str) -> str:
    mean = f"{np.mean(numbers):{form}}"
    if len(numbers) == 1:
      return mean
    return f"{mean} [{min(numbers):{form}}, {max(numbers):{form}}]"

  def effort(group: Group, key: str, level: float) -> str:
    iterations = [reached_at(run, key, level) for run in group.runs]
    if not np.isfinite(iterations).all():
      return f"{np.isfinite(iterations).sum()} of {len(iterations)} got there"
    per_iteration = math.prod(
      group.runs[0].config.get(field, 1) for field in ("batch_size", "samples_per_prompt")
    )
    return f"{spread(iterations, '.1f')}; {np.mean(iterations) * per_iteration:,.0f} images"

  for key in (*(key for key, _ in reach), *last):
    for run in (run for group in groups for run in group.runs):
      if not np.isfinite(run.columns.get(key, np.nan)).any():
        raise ValueError(f"{run.workdir}: has no {key}")
  titles = [f"iterations to {key} {level:g}" for key, level in reach] + [f"last {k}" for k in last]
  rows = [["", *titles], ["---"] * (1 + len(titles))]
  for group in groups:
    ends = [
      spread([run.columns[key][np.isfinite(run.columns[key])][-1] for run in group.runs], ".3f")
      for key in last
    ]
    rows.append([group.label, *(effort(group, *target) for target in reach), *ends])
  return [f"| {' | '.join(row)} |" for row in rows]


def _settings(run: Run, *ignored: str) -> dict[str, Any]:
  """The fields that decide what a run learns, without `ignored`."""
  return {
    name: value
    for name, value in run.config.items()
    if name not in ignored and not name.endswith("_every")
  }


def _differences(configs: Sequence[dict[str, Any]]) -> list[str]:
  """Of each config "field=value, ..." over the fields that are not the same in all."""

  def text(name: str, config: dict[str, Any]) -> str:
    if name not in config:  # another version's
      return f"no {name}"
    value = config[name]
    return f"{name}={value if isinstance(value, str) and value else json.dumps(value)}"

  names = sorted({name for config in configs for name in config}, key=lambda n: (n == "seed", n))
  first = configs[0]
  differ = [
    name
    for name in names
    if any((name in c, c.get(name)) != (name in first, first.get(name)) for c in configs)
  ]
  return [", ".join(text(name, config) for name in differ) for config in configs]


def _moving_average(iterations: np.ndarray, values: np.ndarray, window: int) -> np.ndarray:
  """Mean of the numbers at most window // 2 iterations away [N]; what is NaN stays NaN."""
  if window == 1:
    return values
  starts = np.searchsorted(iterations, iterations - window // 2, side="left")
  ends = np.searchsorted(iterations, iterations + window // 2, side="right")
  smooth = np.full_like(values, np.nan)
  for i in np.flatnonzero(np.isfinite(values)):
    smooth[i] = np.nanmean(values[starts[i] : ends[i]])
  return smooth


def _style(index: int) -> dict[str, Any]:
  """Of the curve with this index, in every panel."""
  dash = DASHES[index // len(COLOURS) % len(DASHES)]
  return {"color": COLOURS[index % len(COLOURS)], "linestyle": dash, "linewidth": 1.4}


def _draw_curve(axes: Axes, curve: Curve, label: str, index: int, sparse: bool) -> None:
  there = np.isfinite(curve.values)
  if not there.any():
    return
  if sparse:  # an iteration without an evaluation is no gap
    curve = Curve(*(None if field is None else field[there] for field in curve))
    marked = np.ones(there.sum(), bool)
  else:  # a number between gaps has no line to be seen by
    before, after = np.append(False, there[:-1]), np.append(there[1:], False)
    marked = there & ~before & ~after
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
  axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=STEPS, integer=True, min_n_ticks=1))
  axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=STEPS))
  drawn = np.concatenate([one.values for one in curves])
  if key in LOGARITHMIC and (drawn[np.isfinite(drawn)] > 0).all():
    axes.set_yscale("log")
  if key in FROM_ZERO:
    axes.set_ylim(bottom=0)
  if key.startswith(HELD_OUT) and "winrate" in key:
    axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":", zorder=0)  # no better than the base
  axes.margins(x=0.02)
  axes.grid(color="#e4e6ea", linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(which="both", labelsize=8.5)
