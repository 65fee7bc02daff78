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
SIZES = {"cpu": ("mini", "medium"), "NVIDIA H200": ("sd15",)}  # by device
Results = Sequence[dict[str, Any]]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Formats a table; all columns but the first are aligned to the right."""
  line = lambda cells: f"| {' | '.join(cells)} |"
  rule = ["---", *["---:"] * (len(header) - 1)]
  return "\n".join(map(line, [header, rule, *rows]))


def measurements(results: Results) -> str | None:
  """Makes a table with rows per stage and a column per side; None without results.

  - seconds: medians; an opponent's has the median ratio of pairs and its quartiles in brackets.
  - MiB at the peak: on a CPU what the process has above the loaded weights and inputs, and for this
    package in brackets what remains after compilation; on a GPU the memory of the device.
  - seconds to compile: the first run's less the median run's.
  """
  found = {(one["stage"], one["opponent"]): one for one in results}
  opponents = [name for name in OPPONENTS if any(name == opponent for _, opponent in found)]
  rows = []
  for stage in STAGES:
    pairs = [found.get((stage, name)) for name in opponents]
    measured = [pair for pair in pairs if pair]
    for quantity, ours, theirs in QUANTITIES if measured else ():
      cells = [theirs(pair) if pair else "" for pair in pairs]
      rows.append([f"{TITLES[stage]}{quantity}", ours(measured[-1]), *cells])
  return markdown(["", "here", *opponents], rows) if rows else None


def speed(one: dict[str, Any]) -> str:
  """Formats an opponent's seconds."""
  ratio = one["ratio"]
  spread = f"{ratio['q1']:.2f} to {ratio['q3']:.2f}"
  return f"{one['theirs']['seconds']['median']:.3g} (**{ratio['median']:.2f}**, {spread})"


def memory(side: dict[str, Any]) -> str:
  """Formats the peak of a side."""
  used = side["memory"]
  peak = used.get("device_peak", used["peak_running"] - used["loaded"])
  return f"{peak / 2**20:,.0f}"


def our_memory(one: dict[str, Any]) -> str:
  """Formats the peak of this package."""
  used = one["ours"]["memory"]
  if "device_peak" in used:
    return memory(one["ours"])
  return f"{memory(one['ours'])} ({(used['compiled'] - used['loaded']) / 2**20:,.0f})"


# Of a result: what is measured, and the cells of this package and of an opponent.
QUANTITIES: Sequence[tuple[str, Callable[[dict], str], Callable[[dict], str]]] = (
  (", seconds", lambda one: f"{one['ours']['seconds']['median']:.3g}", speed),
  (", MiB at the peak", our_memory, lambda one: memory(one["theirs"])),
  (
    ", seconds to compile",
    lambda one: f"{one['ours']['compile_s']:.3g}",
    lambda one: f"{one['theirs']['compile_s']:.3g}",
  ),
)


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
  """Makes every table of the document by its name, such as "mini cpu".

  Args:
    results: of run.py.
    started: the measurements of startup.py, if any.
  """
  tables = {"first iteration": first_iteration(started)}
  for device, sizes in SIZES.items():
    here = [one for one in results if one["machine"]["device"] == device]
    tables[f"machine {device}"] = describe_machine(here)
    for size in sizes:
      tables[f"{size} {device}"] = measurements([one for one in here if one["size"] == size])
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
