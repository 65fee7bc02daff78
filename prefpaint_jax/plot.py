"""Draws the curves of one or several runs from their metrics.jsonl.

  python -m prefpaint_jax.plot --workdir=runs/a --workdir=runs/b --output=curves.png [--mean]

Every run is a curve. Its label has the config fields in which the runs differ. With --mean, runs
that differ only in their seed become one curve, their mean, with a shade from the lowest to the
highest seed. With --reach=METRIC=LEVEL or --last=METRIC the command also prints a table of the
iterations until a metric reaches a level, and of last values.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from prefpaint_jax.evaluation.curves import group_runs, load_run, single_runs, table
from prefpaint_jax.evaluation.panels import AXES, draw
from prefpaint_jax.runtime import cli
from prefpaint_jax.runtime.cli import within
from prefpaint_jax.runtime.config_fields import COUNT
from prefpaint_jax.runtime.files import atomic_path, check_output
from prefpaint_jax.runtime.ranges import Number, Text, check


def _target(text: str) -> tuple[str, float]:
  """Parses "METRIC=LEVEL"."""
  key, _, level = text.rpartition("=")
  try:
    check("--reach", float(level), Number())
    return key, float(level)
  except ValueError:
    raise ValueError(
      f"--reach is {text}; give METRIC=LEVEL, for example held_out/reward=0.2"
    ) from None


def main(
  workdirs: Sequence[str],
  output: Path,
  mean: bool,
  smooth: int,
  only: str = "",
  reach: Sequence[str] = (),
  last: Sequence[str] = (),
  unit: str = "iteration",
) -> None:
  """Draws the curves of runs into a PNG, and prints the table of `reach` and `last`.

  Args:
    workdirs: folders of runs; an entry may be several folders separated by commas.
    output: the PNG to write.
    mean: average runs that differ only in their seed.
    smooth: odd number of iterations of a centred moving average.
    only: regular expression; draws only the metrics that it is found in.
    reach: "METRIC=LEVEL" entries of the table.
    last: metrics whose last value the table has.
    unit: the horizontal axis, one of `panels.AXES`.
  """
  if output.suffix.lower() != ".png":
    raise ValueError(f"--output is {output}; give a name that ends in .png")
  check_output(output)
  targets = [_target(text) for text in reach]
  names = [
    name for given in workdirs for name in ([given] if Path(given).is_dir() else given.split(","))
  ]
  runs = [load_run(name) for name in names]
  groups = group_runs(runs) if mean else single_runs(runs)
  lines = table(groups, targets, last) if reach or last else []
  figure = draw(groups, smooth, only, unit)
  with atomic_path(output) as partial:
    figure.savefig(partial, format="png")
  print(*lines, output, sep="\n")


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_multi(
    within(Text(empty=False)),
    flags.ArgumentSerializer(),
    "workdir",
    None,
    "Folder of a run; repeat the flag or separate folders by commas.",
    required=True,
  )
  _OUTPUT = flags.DEFINE_string("output", None, "PNG to write.", required=True)
  _MEAN = flags.DEFINE_bool("mean", False, "Average runs that differ only in their seed.")
  _SMOOTH = flags.DEFINE(
    within(COUNT), "smooth", 1, "Odd number of iterations of a centred moving average."
  )
  _ONLY = flags.DEFINE(
    within(Text(pattern=True)),
    "only",
    "",
    "Regular expression; draws only the metrics that it is found in.",
  )
  _REACH = flags.DEFINE_multi_string(
    "reach", [], "METRIC=LEVEL: print the iterations until the metric reaches the level."
  )
  _LAST = flags.DEFINE_multi_string("last", [], "METRIC: print its last value.")
  _X = flags.DEFINE_enum("x", "iteration", tuple(AXES), "The horizontal axis of the curves.")
  cli.run(
    lambda: main(
      _WORKDIR.value,
      Path(_OUTPUT.value),
      _MEAN.value,
      _SMOOTH.value,
      _ONLY.value,
      _REACH.value,
      _LAST.value,
      _X.value,
    )
  )
