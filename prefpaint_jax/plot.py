"""Draws the curves of one or several runs from their metrics.jsonl.

  python -m prefpaint_jax.plot --workdir=runs/a --workdir=runs/b --output=curves.png [--mean]

Every run is a curve, named by the config fields in which the runs differ. With --mean, runs that
differ in their seed only are one curve: their mean, shaded from the lowest to the highest seed.
With --reach=METRIC=LEVEL and --last=METRIC a table is printed too: what it took each of them to get
there, and where each of them ended.
"""
# Shapes: N iterations that wrote a line, R runs of a group.

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from prefpaint_jax.evaluation.curves import draw, group_runs, load_run, single_runs, table
from prefpaint_jax.runtime import cli


def _target(text: str) -> tuple[str, float]:
  key, _, level = text.rpartition("=")
  try:
    return key, float(level)
  except ValueError:
    raise ValueError(f"--reach={text}: give METRIC=LEVEL, such as held_out/reward=0.2") from None


def main(
  workdirs: Sequence[str],
  output: Path,
  mean: bool,
  smooth: int,
  only: str = "",
  reach: Sequence[str] = (),
  last: Sequence[str] = (),
) -> None:
  if output.suffix.lower() != ".png":
    raise ValueError(f"--output={output}: give a name that ends in .png")
  targets = [_target(text) for text in reach]
  names = [
    name for given in workdirs for name in ([given] if Path(given).is_dir() else given.split(","))
  ]
  runs = [load_run(name) for name in names]
  groups = group_runs(runs) if mean else single_runs(runs)
  lines = table(groups, targets, last) if reach or last else []
  figure = draw(groups, smooth, only)
  output.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(output, format="png")
  print(*lines, output, sep="\n")


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "Folder of a run; several, or separated by commas.", required=True
  )
  _OUTPUT = flags.DEFINE_string("output", None, "PNG to write.", required=True)
  _MEAN = flags.DEFINE_bool("mean", False, "Runs that differ in their seed only as their mean.")
  _SMOOTH = flags.DEFINE_integer("smooth", 1, "Iterations of a centred moving average, odd.")
  _ONLY = flags.DEFINE_string("only", "", "Regular expression: metrics that contain it.")
  _REACH = flags.DEFINE_multi_string("reach", [], "METRIC=LEVEL: what it took to get there.")
  _LAST = flags.DEFINE_multi_string("last", [], "METRIC: where it ended.")
  cli.run(
    lambda: main(
      _WORKDIR.value,
      Path(_OUTPUT.value),
      _MEAN.value,
      _SMOOTH.value,
      _ONLY.value,
      _REACH.value,
      _LAST.value,
    )
  )
