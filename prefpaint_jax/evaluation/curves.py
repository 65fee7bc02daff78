"""Curves and tables of runs, from their metrics.jsonl."""
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

from prefpaint_jax.runtime.files import check_is_folder
from prefpaint_jax.runtime.workdir import flatten, read_workdir

# Metrics and titles of the first panels; the panels of held-out metrics follow.
PANELS = {
  "reward/mean": "reward",
  "ppo/approx_kl": "approximate KL of the updates",
  "ppo/clip_fraction": "clip fraction",
  "trust/mean": "trust weight γ",
  "images_per_s": "images per second",
  "train/loss": "training loss",
}
HELD_OUT = "held_out/"  # not written in every iteration, so drawn as joined points
FROM_ZERO = ("ppo/clip_fraction", "images_per_s")
LOGARITHMIC = ("ppo/approx_kl",)  # if all values are positive

# The colours of Okabe and Ito without yellow, which is too pale for a line.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")  # curves with the same colour differ in their dashes
GREY = "#8a8f98"
SHADE = 0.18  # opacity
SHADED_RUNS = 3  # the largest number of runs with shades; more would overlap unreadably
STEPS = (1, 2, 2.5, 5, 10)  # distances between ticks, times a power of 10
WIDTH = 9.0  # inches: 1800 pixels at 200 dpi


class Run(NamedTuple):
  """Config and metrics of a run."""

  config: dict[str, Any]  # flat: {"trust.norm": "none"}
  iterations: np.ndarray  # ascending [N]
  columns: dict[str, np.ndarray]  # by key, float64 [N]; NaN if null or not written
  workdir: Path


class Group(NamedTuple):
  """Runs that are drawn as one curve."""

  label: str
  runs: list[Run]


class Curve(NamedTuple):
  """Values of a metric over the iterations, with a shaded range."""

  iterations: np.ndarray  # [N]
  values: np.ndarray  # [N]
  low: np.ndarray | None = None  # ends of the shaded range [N]; None: no shade
  high: np.ndarray | None = None


def load_run(workdir: str | Path) -> Run:
  """Reads config.json and metrics.jsonl, without an incomplete last line of a killed run.

  Raises:
    ValueError: if the folder is not a workdir, has no metrics yet, or a line is damaged.
  """
  workdir = Path(workdir)
  check_is_folder(workdir, "the --workdir of a run")
  config = flatten(read_workdir(workdir).to_dict())
  file = workdir / "metrics.jsonl"
  if not file.is_file():
    raise ValueError(f"{workdir}: no metrics.jsonl; wait until the run has finished an iteration")
  lines = file.read_text().split("\n")
  by_iteration: dict[int, dict[str, float]] = {}
  for number, line in enumerate(lines, start=1):
    if not line:
      continue
    try:
      scalars = json.loads(line)
      iteration = int(scalars.pop("iteration"))
      numbers = {key: np.nan if x is None else float(x) for key, x in scalars.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
      if number == len(lines):  # it has no line break, so a killed run wrote a part of it
        break
      raise ValueError(
        f"{file}, line {number}: {line[:40]!r} is not a line of metrics; remove it"
      ) from None
    by_iteration.setdefault(iteration, {}).update(numbers)
  if not by_iteration:
    raise ValueError(f"{file}: no complete line; wait until the run has finished an iteration")
  iterations = np.array(sorted(by_iteration))
  keys = dict.fromkeys(key for numbers in by_iteration.values() for key in numbers)
  columns = {key: np.array([by_iteration[i].get(key, np.nan) for i in iterations]) for key in keys}
  return Run(config, iterations, columns, workdir)


def single_runs(runs: Sequence[Run]) -> list[Group]:
  """Makes one group per run.

  Its label lists the config fields in which the runs differ; without any, it is the folder's name.
  """
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
  """Groups runs that differ only in their seed. Labels have the fields in which groups differ.

  Fields that end in `_every` do not count as a difference.

  Raises:
    ValueError: if two runs of a group have the same seed, because the mean would count it twice.
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
          f"{run.config.get('seed')}; leave one of them out"
        )
    alike[0].append(run)
  groups = []
  labels = _differences([_settings(group[0], "seed") for group in members])
  for group, label in zip(members, labels, strict=True):
    label = label or (group[0].workdir.resolve().name if len(group) == 1 else "mean")
    groups.append(Group(label if len(group) == 1 else f"{label} ({len(group)} seeds)", group))
  return groups


def curve(group: Group, key: str, smooth: int = 1) -> Curve:
  """Computes the curve of a metric: one run with ± std, or the mean of several with their range.

  A mean is NaN where one of its runs has no value.

  Args:
    group: one run, or several to average.
    key: the metric. The standard deviation of "x/mean" is "x/std".
    smooth: odd number of iterations of each run's centred moving average; 1: no average.
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
  """Draws one panel per metric, with one curve per group that has the metric.

  If a group has several runs, shades are ranges over seeds, and single runs have no shade. More
  than three single runs have no shade either.

  Args:
    smooth: odd number of iterations of a centred moving average; held-out metrics are not averaged.
    only: regular expression; draws only the metrics that it is found in.

  Raises:
    ValueError: if `smooth` is not odd or there is no value to draw.
  """
  if smooth < 1 or smooth % 2 == 0:
    raise ValueError(f"smooth is {smooth}; give an odd number, for a centred average")
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
    raise ValueError(
      f"{names}: nothing to draw; expected values of {', '.join(PANELS)} or {HELD_OUT}*"
    )

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
    if place + columns > len(panels):  # no panel below
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
  """Returns the iteration at which a metric first reaches `level`; infinity if it never does.

  Between two iterations with a value, the metric is interpolated linearly.
  """
  values = run.columns.get(key, np.empty(0))
  finite = np.isfinite(values)
  iterations, values = run.iterations[finite], values[finite]
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
  """Makes a Markdown table: a row for each group, with mean and range over its runs.

  Args:
    reach: (metric, level) for columns with the number of iterations until the metric reaches the
      level, and the number of images sampled until then.
    last: metrics for columns with the last value.

  Raises:
    ValueError: if a run has no value of a metric.
  """

  def spread(numbers: Sequence[float], form: str) -> str:
    mean = f"{np.mean(numbers):{form}}"
    if len(numbers) == 1:
      return mean
    return f"{mean} [{min(numbers):{form}}, {max(numbers):{form}}]"

  def effort(group: Group, key: str, level: float) -> str:
    iterations = [reached_at(run, key, level) for run in group.runs]
    if not np.isfinite(iterations).all():
      return f"{np.isfinite(iterations).sum()} of {len(iterations)} reached it"
    per_iteration = math.prod(
      group.runs[0].config.get(field, 1) for field in ("batch_size", "samples_per_prompt")
    )
    return f"{spread(iterations, '.1f')}; {np.mean(iterations) * per_iteration:,.0f} images"

  for key in (*(key for key, _ in reach), *last):
    for run in (run for group in groups for run in group.runs):
      if not np.isfinite(run.columns.get(key, np.nan)).any():
        raise ValueError(f"{run.workdir}: has no values of {key}; give another metric")
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
  """Returns the config fields that influence training, without `ignored`."""
  return {
    name: value
    for name, value in run.config.items()
    if name not in ignored and not name.endswith("_every")
  }


def _differences(configs: Sequence[dict[str, Any]]) -> list[str]:
  """Returns "field=value, ..." for each config, with the fields that are not equal in all."""

  def text(name: str, config: dict[str, Any]) -> str:
    if name not in config:  # the config of another version
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
  """Computes the mean [N] of the values at most window // 2 iterations away; NaN stays NaN."""
  if window == 1:
    return values
  starts = np.searchsorted(iterations, iterations - window // 2, side="left")
  ends = np.searchsorted(iterations, iterations + window // 2, side="right")
  smooth = np.full_like(values, np.nan)
  for i in np.flatnonzero(np.isfinite(values)):
    smooth[i] = np.nanmean(values[starts[i] : ends[i]])
  return smooth


def _style(index: int) -> dict[str, Any]:
  """Returns colour and dashes of the curve with this index, the same in every panel."""
  dash = DASHES[index // len(COLOURS) % len(DASHES)]
  return {"color": COLOURS[index % len(COLOURS)], "linestyle": dash, "linewidth": 1.4}


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
  drawn = np.concatenate([one.values for one in curves])
  if key in LOGARITHMIC and (drawn[np.isfinite(drawn)] > 0).all():
    axes.set_yscale("log")
  if key in FROM_ZERO:
    axes.set_ylim(bottom=0)
  for name, as_good_as_the_base in (("winrate", 0.5), ("gain", 0.0)):
    if key.startswith(HELD_OUT) and name in key:
      axes.axhline(as_good_as_the_base, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
  axes.margins(x=0.02)
  axes.grid(color="#e4e6ea", linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(which="both", labelsize=8.5)
