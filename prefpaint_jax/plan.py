"""Plans a run for machines that need not be present: memory, work and time of an iteration.

  python -m prefpaint_jax.plan --config=configs/rl.py --topology=v5e:4x4 --config.mesh.fsdp=4

The command compiles the stages of an iteration for TPUs or GPUs (h100:8), or without --topology for
the devices of this machine. It uses shapes only: no weights are read or made.

The compiler reports the memory. Work counts the operations of matrix products and convolutions.
Memory traffic and the bytes of collectives are counted in the compiled program. Time is an
estimate: it assumes that every chip runs at its peak rates.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from prefpaint_jax.planning import cost
from prefpaint_jax.planning.chips import GIB, find_chip, topology_devices
from prefpaint_jax.planning.stages import plan
from prefpaint_jax.runtime import cli, sharding
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.files import check_output, write_json


def describe(report: Mapping[str, Any]) -> str:
  """Formats a report as a table with one column per stage."""
  config, stages, available = report["config"], report["stages"], report.get("available")
  images, chips = config["batch_size"] * config["samples_per_prompt"], report["chips"]
  mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
  counts = ", ".join(f"{name} {count:,}" for name, count in report["parameters"].items())
  head = [
    f"{report['policy']}, architecture {report['architecture']}",
    f"parameters: {counts}",
    f"{chips} x {report['chip']}, mesh of {mesh}: {images} images an iteration, {images / chips:g} "
    f"per chip, {config['samples_per_pass'] or 'all'} per pass; {config['size']} pixels, "
    f"{config['num_steps']} steps, {config['dtype']}, remat {'on' if config['remat'] else 'off'}",
  ]
  head += [report["note"]] if report["note"] else []
  rows = [("per chip", [f"{name} x{stage['times']}" for name, stage in stages.items()])]

  def add(title: str, value: Callable[[Mapping[str, Any]], float]) -> None:
    values = map(value, stages.values())
    rows.append((title, [f"{x:,.1f}" if abs(x) >= 100 else f"{x:.3g}" for x in values]))

  for name in ("arguments", "temporaries", "outputs", "program", "others", "total"):
    add(f"memory, GiB: {name}", lambda stage, name=name: stage["memory"][name] / GIB)
  if available:
    free = lambda stage: (available - stage["memory"]["total"]) / GIB
    add(f"memory, GiB: free of {available / GIB:.2f}", free)
  add("work, TFLOP", lambda stage: stage["flops"] / 1e12)
  add("memory traffic, GB", lambda stage: stage["traffic"] / 1e9)
  for kind in cost.SENT:
    found = [stage["collectives"].get(kind, (0, 0)) for stage in stages.values()]
    if any(count for count, _ in found):
      rows.append((f"{kind}, GB (number)", [f"{sent / 1e9:.3g} ({n})" for n, sent in found]))
  if available:
    for name in ("work", "memory", "links", "total"):
      add(f"ESTIMATE, seconds: {name}", lambda stage, name=name: stage["seconds"][name])
  width = max(len(title) for title, _ in rows)
  table = [f"{title:<{width}}" + "".join(f"{x:>18}" for x in values) for title, values in rows]
  tail = [_verdict(report)] if available or "does_not_fit" in report else []
  return "\n".join([*head, "", *table, *tail])


def _verdict(report: Mapping[str, Any]) -> str:
  """Says in one line whether a plan fits in memory, and how fast it is."""
  if "does_not_fit" in report:
    return f"DOES NOT FIT: {report['does_not_fit']}"
  most = max(stage["memory"]["total"] for stage in report["stages"].values())
  return (
    f"fits, {most / GIB:.2f} of {report['available'] / GIB:.2f} GiB; ESTIMATE at peak rates: "
    f"{report['seconds']:.3g} s an iteration, {report['images_per_s']:.3g} images per second"
  )


def search(config: ConfigDict, devices: Sequence[jax.Device]) -> Iterator[dict[str, Any]]:
  """Plans with parameters split over 1, 4 and all chips, with and without rematerialisation.

  For each of these, bisection over the divisors of a chip's samples finds the largest
  `samples_per_pass` that fits in memory. The most samples that fit are the fastest, or nearly so:
  every pass reads all parameters.

  Yields:
    The report of each plan.

  Raises:
    ValueError: the chips cannot share `batch_size`.
  """
  check_fields(config, "rl")
  sharding.check_batch(config.batch_size, sharding.make_mesh(devices=devices))
  chips = len(devices)
  samples = config.batch_size * config.samples_per_prompt // chips
  divisors = [n for n in range(1, samples + 1) if samples % n == 0]
  splits = {1, math.gcd(4, chips), chips}
  for fsdp, remat in itertools.product(sorted(splits), (False, True)):
    fit, exceed = 0, len(divisors)  # divisors before `fit` fit, those from `exceed` on do not
    while fit < exceed:
      middle = (fit + exceed) // 2
      tried = config.copy_and_resolve_references()
      mesh = {"data": -1, "fsdp": fsdp}
      tried.update(remat=remat, samples_per_pass=divisors[middle], mesh=mesh)
      report = plan(tried, devices)
      jax.clear_caches()  # the next plan needs none of these programs
      yield report
      if "does_not_fit" in report:
        exceed = middle
      else:
        fit = middle + 1


def _summary(report: Mapping[str, Any]) -> str:
  """Formats a report as one line."""
  config, fsdp = report["config"], report["mesh"]["fsdp"]
  tried = f"samples_per_pass={config['samples_per_pass']} mesh.fsdp={fsdp} remat={config['remat']}"
  return f"{tried:<48} {_verdict(report)}"


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file[:preset].")
  _TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x4, h100:8, ...; default: this machine.")
  _SEARCH = flags.DEFINE_bool("search", False, "Try samples_per_pass, mesh.fsdp and remat.")
  _OUTPUT = flags.DEFINE_string(
    "output", None, "JSON file for the report, or of a search the list of reports."
  )
  flags.mark_flag_as_required("config")

  def main() -> None:
    if _OUTPUT.value:
      check_output(_OUTPUT.value, {"--config": flags.FLAGS["config"].config_filename})
    if _TOPOLOGY.value:
      jax.config.update("jax_platforms", "cpu")  # do not open the chips of this machine
      # Only the devices themselves could load the compiled programs again.
      jax.config.update("jax_enable_compilation_cache", False)
    devices = topology_devices(_TOPOLOGY.value) if _TOPOLOGY.value else jax.devices()

    def keep(result: Any) -> None:
      if _OUTPUT.value:
        write_json(_OUTPUT.value, result)

    def after_stage(report: dict[str, Any]) -> None:
      name, stage = list(report["stages"].items())[-1]
      print(f"{name}: compiled in {stage['compile_seconds']:.0f} s", flush=True)
      keep(report)

    if _SEARCH.value:
      if not find_chip(devices[0].device_kind):
        raise ValueError(
          f"--search needs the peak rates of {devices[0].device_kind}, which are unknown; give "
          "--topology=NAME"
        )
      result = []
      for report in search(_CONFIG.value, devices):
        print(_summary(report), flush=True)
        result.append(report)
        keep(result)
      fitting = [report for report in result if "does_not_fit" not in report]
      fitting.sort(key=lambda report: -report["images_per_s"])
      title = "fastest first:" if fitting else "none of these fits"
      print("", title, *map(_summary, fitting), sep="\n")
    else:
      report = plan(_CONFIG.value, devices, after_stage)
      keep(report)
      print()
      print(describe(report))

  cli.run(main)
