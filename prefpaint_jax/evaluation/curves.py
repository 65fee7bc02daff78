"""Curves and tables of runs, from their metrics.jsonl."""
# Shapes: N iterations that wrote a line, R runs of a group.

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefpaint_jax.runtime.files import check_is_folder
from prefpaint_jax.runtime.workdir import flatten, read_workdir

HELD_OUT = "held_out/"  # not written in every iteration, so drawn as joined points
RENAMED = {"images_per_s": "time/images_per_s"}  # names of earlier versions


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

  iterations: np.ndarray  # [N], or their `positions`
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
      numbers = {
        RENAMED.get(key, key): np.nan if x is None else float(x) for key, x in scalars.items()
      }
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


def positions(group: Group, unit: str, iterations: np.ndarray) -> np.ndarray:
  """Returns what a run of the group has cost at `iterations`, which its runs share.

  Args:
    unit: "iteration", "images" (samples of training) or "unet_passes" (forward passes; a backward
      pass counts as two).

  Raises:
    ValueError: the run did not write its cost.
  """
  if unit == "iteration":
    return iterations
  run = group.runs[0]
  cost = run.columns.get(f"count/{unit}", np.full(len(run.iterations), np.nan))
  cost = np.where(run.iterations > 0, cost, 0.0)[np.isin(run.iterations, iterations)]
  if np.isnan(cost).any():
    raise ValueError(f"{run.workdir}: has no values of count/{unit}; give --x=iteration")
  return cost


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
  """Computes the curve of a metric: one run with its interval or ± std, or a mean with the range.

  A mean is NaN where one of its runs has no value.

  Args:
    group: one run, or several to average.
    key: the metric. The interval of "x" is "x/low" to "x/high", the standard deviation of "x/mean"
      is "x/std".
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
  elif f"{key}/low" in group.runs[0].columns:
    low, high = (values_of(group.runs[0], f"{key}/{end}") for end in ("low", "high"))
  elif spread in group.runs[0].columns:
    std = values_of(group.runs[0], spread)
    low, high = mean - std, mean + std
  else:
    low = high = None
  return Curve(iterations, mean, low, high)


def base_levels(group: Group, key: str) -> list[float]:
  """Returns the level of the base policy for each run of a group that wrote it.

  The base policy has WinRate ½, gain 0 and change 0. Its score is the metric SCORE/base. Earlier
  versions wrote only the score of iteration 0, at which the policy is the base policy.
  """
  if not key.startswith(HELD_OUT):
    return []
  name = key.removeprefix(HELD_OUT)
  if "winrate" in name:
    return [0.5]
  if "gain" in name or name.startswith("drift/"):
    return [0.0]
  levels = []
  for run in group.runs:
    written = run.columns.get(f"{key}/base", run.columns.get(key, np.empty(0))[run.iterations == 0])
    levels += written[np.isfinite(written)][:1].tolist()
  return levels


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
