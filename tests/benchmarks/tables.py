"""Writes the tables of docs/performance.md from measurements.

  python tests/benchmarks/tables.py --results=results.json --startup=startup.json

A table stands between `<!-- NAME -->` and `<!-- end -->`; what was not measured stays as it is.
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
  """A table whose columns but the first are numbers."""
  line = lambda cells: f"| {' | '.join(cells)} |"
  rule = ["---", *["---:"] * (len(header) - 1)]
  return "\n".join(map(line, [header, rule, *rows]))


def by_stage(
  results: Results, ours: Callable[[dict], str], theirs: Callable[[dict], str]
) -> str | None:
  """A row for each stage: what `ours` says of it, and `theirs` of each opponent."""
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
  """Medians in seconds; of opponents with the ratio and its quartiles."""

  def theirs(one: dict[str, Any]) -> str:
    ratio = one["ratio"]
    spread = f"{ratio['q1']:.2f} to {ratio['q3']:.2f}"
    return f"{one['theirs']['seconds']['median']:.3g} (**{ratio['median']:.2f}**, {spread})"

  return by_stage(results, lambda one: f"{one['ours']['seconds']['median']:.3g}", theirs)


def memory(results: Results) -> str | None:
  """MiB above the loaded weights and inputs, or of the whole process on the GPU.

  Here with what was kept since compiling before any of it was at work, in brackets.
  """

  def mebibytes(side: dict[str, Any], name: str) -> str:
    used = side["memory"]
    return f"{used.get('device_peak', used[name] - used['loaded']) / 2**20:,.0f}"

  def ours(one: dict[str, Any]) -> str:
    most, before = (mebibytes(one["ours"], name) for name in ("peak_running", "compiled"))
    return most if "device_peak" in one["ours"]["memory"] else f"{most} ({before})"

  return by_stage(results, ours, lambda one: mebibytes(one["theirs"], "peak_running"))


def compiling(results: Results) -> str | None:
  """Seconds that the first run took longer than the others."""
  of = lambda side: f"{side['compile_s']:.3g}"
  return by_stage(results, lambda one: of(one["ours"]), lambda one: of(one["theirs"]))


def describe_machine(results: Results) -> str | None:
  if not results:
    return None
  one = results[0]["machine"]
  versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
  return f"{one['device']}, {one['processor']}, {one['cores']} cores; {versions}."


def startup(found: dict[str, Any] | None) -> str | None:
  if found is None:
    return None

  def seconds(one: dict[str, float] | None) -> str:
    if one is None:
      return ""
    median, low, high = (f"{max(one[name], 0.0):.2f}" for name in ("median", "q1", "q3"))
    return f"{median} ({low} to {high})"

  helps = {f"prefpaint_jax.{name}": values for name, values in found["helps"].items()}
  rows = [
    [f"`{module}`", seconds(values), seconds(helps.get(module))]
    for module, values in found["imports"].items()
  ]
  return markdown(["", "import, s", "--help, s"], rows)


def first_iteration(found: dict[str, Any] | None) -> str | None:
  if found is None:
    return None
  rows = [[name, f"{one['median']:.1f}"] for name, one in found["first_iteration"].items()]
  return markdown(["compilation cache", "seconds to the first iteration"], rows)


def all_tables(results: Results, started: dict[str, Any] | None) -> dict[str, str | None]:
  """Every table by the name that the document has for it, such as "speed mini cpu"."""
  tables = {"startup": startup(started), "first iteration": first_iteration(started)}
  for kind in ("cpu", "gpu"):
    here = [one for one in results if (one["machine"]["device"] == "cpu") == (kind == "cpu")]
    tables[f"machine {kind}"] = describe_machine(here)
    for size in ("mini", "medium", "sd15"):
      chosen = [one for one in here if one["size"] == size]
      for table in (speed, memory, compiling):
        tables[f"{table.__name__} {size} {kind}"] = table(chosen)
  return tables


def fill(document: str, tables: dict[str, str | None]) -> str:
  """The document with the tables replaced that there are; an unknown name is a KeyError."""

  def put(match: re.Match) -> str:
    table = tables[match[2]]
    return match[0] if table is None else f"{match[1]}{table}\n\n{match[3]}"

  return re.sub(r"(<!-- (?!end)([\w ]+) -->\n).*?(<!-- end -->)", put, document, flags=re.DOTALL)


if __name__ == "__main__":
  _RESULTS = flags.DEFINE_multi_string("results", [], "json files of run.py.")
  _STARTUP = flags.DEFINE_string("startup", None, "json file of startup.py.")

  def main(argv: list[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"unexpected argument {argv[1]!r}")
    results = [one for file in _RESULTS.value for one in json.loads(Path(file).read_text())]
    started = json.loads(Path(_STARTUP.value).read_text()) if _STARTUP.value else None
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), all_tables(results, started)))

  app.run(main)
