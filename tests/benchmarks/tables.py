"""Writes the tables of docs/performance.md from measurements.

  python tests/benchmarks/tables.py --results=results.json --startup=startup.json

The command replaces the text between `<!-- NAME -->` and `<!-- end -->` by the table NAME. A table
without measurements keeps its text.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from run import OPPONENTS, STAGES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
TITLES = {
  "unet_forward": "UNet, forward",
  "unet_gradient": "UNet, forward and backward",
  "encode": "VAE, encode",
  "decode": "VAE, decode",
  "rollout": "rollout",
  "score": "reward",
  "update": "update",
  "iteration": "**iteration**",
}
Results = Sequence[dict[str, Any]]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Formats a table; all columns but the first are aligned to the right."""
  line = lambda cells: f"| {' | '.join(cells)} |"
  rule = ["---", *["---:"] * (len(header) - 1)]
  return "\n".join(map(line, [header, rule, *rows]))


def by_stage(
  results: Results, ours: Callable[[dict], str], theirs: Callable[[dict], str]
) -> str | None:
  """Makes a table with a row per stage and a column per side; None without results.

  Args:
    ours: formats the cell of this package from a result.
    theirs: formats the cell of an opponent from a result.
  """
  found = {(one["stage"], one["opponent"]): one for one in results}
  opponents = [name for name in OPPONENTS if any(name == opponent for _, opponent in found)]
  rows = []
  for stage in STAGES:
    pairs = [found.get((stage, name)) for name in opponents]
    measured = [pair for pair in pairs if pair]
    if measured:
      cells = [theirs(pair) if pair else "" for pair in pairs]
      rows.append([TITLES[stage], ours(measured[-1]), *cells])
  return markdown(["", "here", *opponents], rows) if rows else None


def speed(results: Results) -> str | None:
  """Makes the table of median seconds; opponents have the ratio and its quartiles in brackets."""

  def theirs(one: dict[str, Any]) -> str:
    ratio = one["ratio"]
    spread = f"{ratio['q1']:.2f} to {ratio['q3']:.2f}"
    return f"{one['theirs']['seconds']['median']:.3g} (**{ratio['median']:.2f}**, {spread})"

  return by_stage(results, lambda one: f"{one['ours']['seconds']['median']:.3g}", theirs)


def memory(results: Results) -> str | None:
  """Makes the table of peak MiB above the loaded weights and inputs.

  The cell of this package has in brackets the MiB that remain after compilation.
  """

  def mebibytes(side: dict[str, Any], name: str) -> str:
    used = side["memory"]
    return f"{(used[name] - used['loaded']) / 2**20:,.0f}"

  def ours(one: dict[str, Any]) -> str:
    peak, compiled = (mebibytes(one["ours"], name) for name in ("peak_running", "compiled"))
    return f"{peak} ({compiled})"

  return by_stage(results, ours, lambda one: mebibytes(one["theirs"], "peak_running"))


def compiling(results: Results) -> str | None:
  """Makes the table of compilation: the first run's seconds minus the median run's."""
  seconds = lambda side: f"{side['compile_s']:.3g}"
  return by_stage(results, lambda one: seconds(one["ours"]), lambda one: seconds(one["theirs"]))


def describe_machine(results: Results) -> str | None:
  """Describes the machine of the first result; None without results."""
  if not results:
    return None
  one = results[0]["machine"]
  versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
  return f"{one['device']}, {one['processor']}, {one['cores']} cores; {versions}."


def first_iteration(found: dict[str, Any] | None) -> str | None:
  """Makes the table of the time to the first iteration; None without measurements."""
  if found is None:
    return None
  rows = [[name, f"{one['median']:.1f}"] for name, one in found["first_iteration"].items()]
  return markdown(["compilation cache", "seconds to the first iteration"], rows)


def all_tables(results: Results, started: dict[str, Any] | None) -> dict[str, str | None]:
  """Makes every table of the document by its name, such as "speed mini cpu".

  Args:
    results: of run.py; only results of CPUs are used.
    started: the measurements of startup.py, if any.
  """
  results = [one for one in results if one["machine"]["device"] == "cpu"]
  tables = {"first iteration": first_iteration(started), "machine cpu": describe_machine(results)}
  for size in ("mini", "medium"):
    chosen = [one for one in results if one["size"] == size]
    for table in (speed, memory, compiling):
      tables[f"{table.__name__} {size} cpu"] = table(chosen)
  return tables


def fill(document: str, tables: dict[str, str | None]) -> str:
  """Returns the document with the tables that are not None.

  Raises:
    KeyError: if the document has the marker of an unknown table.
  """

  def put(match: re.Match) -> str:
    table = tables[match[2]]
    return match[0] if table is None else f"{match[1]}{table}\n\n{match[3]}"

  return re.sub(r"(<!-- (?!end)([\w ]+) -->\n).*?(<!-- end -->)", put, document, flags=re.DOTALL)


if __name__ == "__main__":
  _RESULTS = flags.DEFINE_multi_string("results", [], "JSON files of run.py.")
  _STARTUP = flags.DEFINE_string("startup", None, "JSON file of startup.py.")

  def main(argv: list[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"unexpected argument {argv[1]!r}")
    results = [one for file in _RESULTS.value for one in json.loads(Path(file).read_text())]
    started = json.loads(Path(_STARTUP.value).read_text()) if _STARTUP.value else None
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), all_tables(results, started)))

  app.run(main)
