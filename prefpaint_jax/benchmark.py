"""Times an iteration of alignment on the devices at hand, stage by stage.

  python -m prefpaint_jax.benchmark --config=configs/rl.py:mini

Nothing is read but the architectures: parameters and pictures are random, which takes as long.
Operations are those of products and convolutions, counted in the program before it is compiled;
what rematerialisation computes again is counted again. The share of the peak is that of dense
bfloat16, whatever the config's dtype.
"""
# Shapes: P prompts of an iteration, H W pixels.

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from prefpaint_jax import alignment, app, cost, plan, sharding, testing
from prefpaint_jax.chips import find_chip
from prefpaint_jax.compilation import fast_jit
from prefpaint_jax.inpainter import make_modules
from prefpaint_jax.settings import settings_from

MIB = 2**20


def quartiles(values: Sequence[float]) -> dict[str, float]:
  low, median, high = np.percentile(values, [25, 50, 75])
  return {"q1": float(low), "median": float(median), "q3": float(high)}


def materialise(shapes: Any) -> Any:
  """Arrays for a tree of shapes with shardings: random parameters, as `testing` draws them."""
  layout = jax.tree.map(lambda x: x.sharding, shapes)
  return sharding.place(layout, testing.random_params(shapes))


def _materialise_frozen(frozen: alignment.Frozen) -> alignment.Frozen:
  place = lambda array, shape: sharding.place(shape.sharding, array)
  normal = np.random.default_rng(0).normal(size=frozen.context.shape).astype(np.float32)
  whitening = frozen.whitening
  if whitening is not None:
    whitening = place(np.eye(len(whitening), dtype=np.float32), whitening)
  return alignment.Frozen(
    vae=materialise(frozen.vae),
    reward=materialise(frozen.reward),
    whitening=whitening,
    context=place(normal, frozen.context),
    base=None if frozen.base is None else materialise(frozen.base),
  )


def benchmark(
  config: ConfigDict, mesh: Mesh, repeats: int = 5, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
  """Times `repeats` runs of every stage: a report that json can hold.

  `report["stages"]` has rollout, score, update and the whole iteration, and of the rollout the
  VAE's encode and decode: seconds (quartiles) of one run, times an iteration runs it, seconds to
  trace and compile it, flops of all devices, bytes of each device. Each run is waited for, the
  whole iteration once at its end.
  """
  settings = settings_from(config)
  sharding.check_batch(config.batch_size, mesh)
  configs, source = plan.read_architecture(config.policy)
  modules = make_modules(configs, config.dtype, config.remat, where=config.policy)
  modules.latent_shape(1, config.size, config.size)  # refuses a size that does not fit
  run = plan.outline(config, settings, modules, mesh)
  programs, frozen = run.programs, _materialise_frozen(run.frozen)
  state = programs.init(materialise(run.state.params))
  pictures = testing.tiny_prompts(config.batch_size, size=config.size)
  images, masks = sharding.place(sharding.batch_sharding(mesh), pictures)
  key = jax.random.key(config.seed)
  stages: dict[str, dict[str, Any]] = {}
  compiled: dict[str, Callable] = {}

  def stage(
    name: str, program: Any, *arguments: Any, times: int = 1, gives_away_state=False
  ) -> Any:
    """Compiles and times a program; its last outputs. It may give away a state, its first one."""
    began = time.perf_counter()
    traced = program.trace(*arguments)
    compiled[name] = traced.lower().compile()
    compile_seconds = time.perf_counter() - began
    seconds = []
    for _ in range(1 + repeats):
      began = time.perf_counter()
      outputs = jax.block_until_ready(compiled[name](*arguments))
      seconds.append(time.perf_counter() - began)
      arguments = (outputs[0], *arguments[1:]) if gives_away_state else arguments
    memory = compiled[name].memory_analysis()
    stages[name] = {
      "times": times,
      "seconds": quartiles(seconds[1:]),  # the first one warms up
      "compile_seconds": compile_seconds,
      "flops": cost.flops(traced.jaxpr),
      "memory": {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
      }
      | _peak(mesh),
    }
    say(f"{name}: {stages[name]['seconds']['median']:.4g} s, compiled in {compile_seconds:.3g} s")
    return outputs

  ### Stage by stage; each one's outputs are the next one's arguments.
  behaviour = lambda: state.params if state.behaviour is None else state.behaviour
  prompts, trajectory, painted = stage(
    "rollout", programs.rollout, behaviour(), frozen, images, masks, key
  )
  encode = functools.partial(alignment.encode_prompts, modules, settings, mesh=mesh)
  jit = fast_jit(mesh)
  stage("encode", jit(encode), frozen, images, masks)
  decode = functools.partial(alignment.decode, modules, chunk=settings.decode_batch, mesh=mesh)
  stage("decode", jit(decode), frozen.vae, trajectory.latents[-1], prompts)
  scores, _ = stage("score", programs.score, frozen, prompts, painted)
  indices = programs.draw_timesteps(key)[0]
  updates = settings.updates_per_iteration
  arguments = state, frozen, prompts, trajectory, scores, indices
  state, _ = stage("update", programs.update, *arguments, times=updates, gives_away_state=True)

  ### The whole, as `train` runs it.
  seconds = []
  for _ in range(1 + repeats):
    began = time.perf_counter()
    prompts, trajectory, painted = compiled["rollout"](behaviour(), frozen, images, masks, key)
    scores, _ = compiled["score"](frozen, prompts, painted)
    for indices in programs.draw_timesteps(key):
      state, _ = compiled["update"](state, frozen, prompts, trajectory, scores, indices)
    state = jax.block_until_ready(programs.end_iteration(state))
    seconds.append(time.perf_counter() - began)
  parts = [stages[name] for name in ("rollout", "score", "update")]
  stages["iteration"] = {
    "times": 1,
    "seconds": quartiles(seconds[1:]),
    "compile_seconds": sum(part["compile_seconds"] for part in parts),
    "flops": sum(part["flops"] * part["times"] for part in parts),
    "memory": _peak(mesh),
  }
  return {
    "policy": config.policy,
    "architecture": source,
    "parameters": run.parameters,
    "device": mesh.devices.flat[0].device_kind,
    "devices": mesh.size,
    "images": config.batch_size * settings.samples_per_prompt,
    "config": {name: config[name] for name in ("size", "num_steps", "dtype", "remat")},
    "stages": stages,
  }


def _peak(mesh: Mesh) -> dict[str, int]:
  """Bytes that a device had in use at most until now, where it says so."""
  statistics = mesh.local_devices[0].memory_stats() or {}
  return {"peak": statistics["peak_bytes_in_use"]} if "peak_bytes_in_use" in statistics else {}


def describe(report: Mapping[str, Any], peak_flops: float | None = None) -> str:
  """A report as a table, a row for each stage; `peak_flops` is that of one device."""
  settings, devices, images = report["config"], report["devices"], report["images"]
  counts = ", ".join(f"{name} {count:,}" for name, count in report["parameters"].items())
  lines = [
    f"{report['policy']}, its architecture {report['architecture']}; parameters random",
    f"parameters: {counts}",
    f"{devices} x {report['device']}: {images} images an iteration; {settings['size']} pixels, "
    f"{settings['num_steps']} steps, {settings['dtype']}, remat "
    f"{'on' if settings['remat'] else 'off'}",
    "",
  ]
  header = ["stage", "seconds", "quartiles", "images/s", "TFLOP", "TFLOP/s", "of peak", "compile"]
  header += ["arguments", "temporary", "peak MiB"]
  rows = [header]
  for name, stage in report["stages"].items():
    seconds, times = stage["seconds"], stage["times"]
    rate = stage["flops"] / devices / seconds["median"]
    in_mebibytes = lambda part, memory=stage["memory"]: (
      f"{memory[part] / MIB:,.0f}" if part in memory else ""
    )
    rows.append(
      [
        f"{name} x{times}" if times > 1 else name,
        f"{seconds['median']:.4g}",
        f"{seconds['q1']:.4g} to {seconds['q3']:.4g}",
        f"{images / (times * seconds['median']):.4g}",
        f"{stage['flops'] / 1e12:.4g}",
        f"{rate / 1e12:.3g}",
        f"{rate / peak_flops:.1%}" if peak_flops else "",
        f"{stage['compile_seconds']:.3g}",
        *map(in_mebibytes, ("arguments", "temporaries", "peak")),
      ]
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for row in rows:
    first, *others = (f"{x:>{width}}" for x, width in zip(row, widths, strict=True))
    lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
  return "\n".join(lines)


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file[:preset].")
  _REPEATS = flags.DEFINE_integer("repeats", 5, "Runs of each stage.", lower_bound=1)
  _PEAK = flags.DEFINE_float("peak_tflops", None, "Of a device; default: known by its name.")
  _OUTPUT = flags.DEFINE_string("output", None, "json to write the report to.")
  flags.mark_flag_as_required("config")

  def main() -> None:
    config = _CONFIG.value
    jax.config.update("jax_enable_compilation_cache", False)  # loading would pass for compiling
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    say = print if jax.process_index() == 0 else lambda *lines, **how: None
    report = benchmark(config, mesh, _REPEATS.value, lambda line: say(line, flush=True))
    chip = find_chip(report["device"])
    peak = 1e12 * _PEAK.value if _PEAK.value else chip and chip.flops
    say("", describe(report, peak), sep="\n")
    if _OUTPUT.value and jax.process_index() == 0:
      Path(_OUTPUT.value).write_text(json.dumps(report, indent=2) + "\n")

  app.run(main, several_processes=True)
