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

from prefpaint_jax.align.rollout import decode, encode_prompts
from prefpaint_jax.align.run import outline
from prefpaint_jax.align.state import Experience, Frozen, behaviour_params
from prefpaint_jax.models import architectures
from prefpaint_jax.planning import cost
from prefpaint_jax.planning.chips import find_chip
from prefpaint_jax.runtime import cli, sharding
from prefpaint_jax.runtime.compilation import fast_jit
from prefpaint_jax.runtime.text import align_columns

MIB = 2**20


def quartiles(values: Sequence[float]) -> dict[str, float]:
  low, median, high = np.percentile(values, [25, 50, 75])
  return {"q1": float(low), "median": float(median), "q3": float(high)}


def materialise(shapes: Any) -> Any:
  """Arrays for a tree of shapes with shardings: random parameters, as `testing` draws them."""
  layout = jax.tree.map(lambda x: x.sharding, shapes)
  return sharding.place(layout, architectures.random_params(shapes))


def _materialise_frozen(frozen: Frozen) -> Frozen:
  place = lambda array, shape: sharding.place(shape.sharding, array)
  normal = np.random.default_rng(0).normal(size=frozen.context.shape).astype(np.float32)
  whitening = frozen.whitening
  if whitening is not None:
    whitening = place(np.eye(len(whitening), dtype=np.float32), whitening)
  return Frozen(
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
  sharding.check_batch(config.batch_size, mesh)
  run, modules, source = outline(config, mesh)
  settings, stages, frozen = run.settings, run.stages, _materialise_frozen(run.frozen)
  state = stages.init(materialise(run.state_shapes.params))
  shape = (config.batch_size, config.size, config.size)
  rng = np.random.default_rng(config.seed)
  made_up = rng.uniform(size=(*shape, 3)), rng.uniform(size=(*shape, 1)) < 0.5
  images, masks = sharding.place(
    sharding.batch_sharding(mesh), tuple(x.astype(np.float32) for x in made_up)
  )
  key = jax.random.key(config.seed)
  measured: dict[str, dict[str, Any]] = {}
  compiled: dict[str, Callable] = {}

  def stage(name: str, program: Any, *arguments: Any, times: int = 1, donates_state=False) -> Any:
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
      arguments = (outputs[0], *arguments[1:]) if donates_state else arguments
    memory = compiled[name].memory_analysis()
    measured[name] = {
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
    say(f"{name}: {measured[name]['seconds']['median']:.4g} s, compiled in {compile_seconds:.3g} s")
    return outputs

  ### Stage by stage; each one's outputs are the next one's arguments.
  prompts, trajectory, samples = stage(
    "rollout", stages.rollout, behaviour_params(state), frozen, images, masks, key
  )
  encode = functools.partial(encode_prompts, modules, settings, mesh=mesh)
  jit = fast_jit(mesh)
  stage("encode", jit(encode), frozen, images, masks)
  decode_all = functools.partial(decode, modules, chunk=settings.decode_batch, mesh=mesh)
  stage("decode", jit(decode_all), frozen.vae, trajectory.latents[-1], prompts)
  scores, _ = stage("score", stages.score, frozen, prompts, samples)
  indices, experience = stages.draw_timesteps(key)[0], Experience(prompts, trajectory, scores)
  updates = settings.updates_per_iteration
  arguments = state, frozen, experience, indices
  state, _ = stage("update", stages.update, *arguments, times=updates, donates_state=True)

  ### The whole iteration, as `train` runs it.
  seconds = []
  for _ in range(1 + repeats):
    began = time.perf_counter()
    behaviour = behaviour_params(state)
    prompts, trajectory, samples = compiled["rollout"](behaviour, frozen, images, masks, key)
    scores, _ = compiled["score"](frozen, prompts, samples)
    experience = Experience(prompts, trajectory, scores)
    for indices in stages.draw_timesteps(key):
      state, _ = compiled["update"](state, frozen, experience, indices)
    state = jax.block_until_ready(stages.end_iteration(state))
    seconds.append(time.perf_counter() - began)
  parts = [measured[name] for name in ("rollout", "score", "update")]
  measured["iteration"] = {
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
    "stages": measured,
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
  lines += align_columns(rows, right=True)
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

  cli.run(main, several_processes=True)
