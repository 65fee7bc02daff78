"""Times an iteration of alignment on the devices of this machine, stage by stage.

  python -m prefpaint_jax.benchmark --config=configs/rl.py:mini

Parameters and images are random, because the time does not depend on their values; only the
architectures are read. TFLOP counts the operations of matrix products and convolutions in the
program before it is compiled, with the operations that rematerialisation repeats. The share of the
peak is relative to the dense bfloat16 rate, whatever the config's dtype.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from prefpaint_jax.align.rollout import decode, encode_prompts
from prefpaint_jax.align.run import context_shapes, outline, reward_shapes
from prefpaint_jax.align.settings import check_batch
from prefpaint_jax.align.stages import Stages
from prefpaint_jax.align.state import Experience, Frozen, TrainState, behaviour_params
from prefpaint_jax.models import architectures
from prefpaint_jax.planning import cost
from prefpaint_jax.planning.chips import find_chip
from prefpaint_jax.runtime import cli, sharding
from prefpaint_jax.runtime.cli import within
from prefpaint_jax.runtime.compilation import fast_jit
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.config_fields import COUNT
from prefpaint_jax.runtime.files import check_output, write_json
from prefpaint_jax.runtime.ranges import Number
from prefpaint_jax.runtime.text import align_columns

MIB = 2**20


def quartiles(values: Sequence[float]) -> dict[str, float]:
  """Computes the quartiles of some values."""
  low, median, high = np.percentile(values, [25, 50, 75])
  return {"q1": float(low), "median": float(median), "q3": float(high)}


def materialise(shapes: Any) -> Any:
  """Makes random parameters for a tree of shapes with shardings."""
  layout = jax.tree.map(lambda x: x.sharding, shapes)
  return sharding.place(layout, architectures.random_params(shapes))


def _materialise_frozen(frozen: Frozen) -> Frozen:
  whitening = frozen.whitening
  if whitening is not None:
    whitening = sharding.place(whitening.sharding, np.eye(len(whitening), dtype=np.float32))
  return Frozen(
    vae=materialise(frozen.vae),
    reward=tuple(map(materialise, frozen.reward)),
    whitening=whitening,
    context=_normal(frozen.context),
    base=None if frozen.base is None else materialise(frozen.base),
    negative=_normal(frozen.negative),
  )


def _normal(shapes: Any) -> Any:
  """Draws normal arrays for a tree of shapes with shardings."""
  rng = np.random.default_rng(0)
  draw = lambda x: sharding.place(x.sharding, rng.normal(size=x.shape).astype(np.float32))
  return jax.tree.map(draw, shapes)


class _Timer:
  """Compiles programs, times their runs and holds the measurements."""

  def __init__(self, mesh: Mesh, repeats: int, say: Callable[[str], None]):
    self._mesh, self._repeats, self._say = mesh, repeats, say
    self.measured: dict[str, dict[str, Any]] = {}
    self.compiled: dict[str, Callable] = {}

  def stage(
    self, name: str, program: Any, *arguments: Any, times: int = 1, donates_state: bool = False
  ) -> Any:
    """Compiles and times a program.

    Args:
      times: the runs of the program in an iteration.
      donates_state: the program donates its first argument, a state, and its first output is the
        next state.

    Returns:
      The outputs of the last run.
    """
    began = time.perf_counter()
    traced = program.trace(*arguments)
    compiled = self.compiled[name] = traced.lower().compile()
    compile_seconds = time.perf_counter() - began
    seconds = []
    for _ in range(1 + self._repeats):
      began = time.perf_counter()
      outputs = jax.block_until_ready(compiled(*arguments))
      seconds.append(time.perf_counter() - began)
      arguments = (outputs[0], *arguments[1:]) if donates_state else arguments
    memory = compiled.memory_analysis()
    self.measured[name] = {
      "times": times,
      "seconds": quartiles(seconds[1:]),  # the first run is a warm-up
      "compile_seconds": compile_seconds,
      "flops": cost.flops(traced.jaxpr),
      "memory": {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
      }
      | _peak(self._mesh),
    }
    median = self.measured[name]["seconds"]["median"]
    self._say(f"{name}: {median:.4g} s, compiled in {compile_seconds:.3g} s")
    return outputs

  def iterations(self, stages: Stages, state: TrainState, frozen: Frozen, *prompts: Any) -> None:
    """Times whole iterations, in the order of `train`. `stage` must have compiled the programs."""
    seconds = []
    compiled = self.compiled
    for _ in range(1 + self._repeats):
      began = time.perf_counter()
      behaviour = behaviour_params(state)
      encoded, record, samples = compiled["rollout"](behaviour, frozen, *prompts)
      scores, _ = compiled["score"](frozen, encoded, samples, None, None)
      experience = Experience(encoded, record, scores)
      for indices in stages.draw_timesteps(jax.random.key(0), stages.window(0)):
        state, _ = compiled["update"](state, frozen, experience, indices)
      state = jax.block_until_ready(stages.end_iteration(state))
      seconds.append(time.perf_counter() - began)
    parts = [self.measured[name] for name in ("rollout", "score", "update")]
    self.measured["iteration"] = {
      "times": 1,
      "seconds": quartiles(seconds[1:]),
      "compile_seconds": sum(part["compile_seconds"] for part in parts),
      "flops": sum(part["flops"] * part["times"] for part in parts),
      "memory": _peak(self._mesh),
    }


def _random_prompts(config: ConfigDict, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
  """Makes random images and masks of an iteration, split over the mesh."""
  shape = (config.batch_size, config.size, config.size)
  rng = np.random.default_rng(config.seed)
  prompts = rng.uniform(size=(*shape, 3)), rng.uniform(size=(*shape, 1)) < 0.5
  batch = sharding.batch_sharding(mesh)
  return sharding.place(batch, tuple(x.astype(np.float32) for x in prompts))


def benchmark(
  config: ConfigDict, mesh: Mesh, repeats: int = 5, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
  """Times `repeats` runs of every stage of an iteration, after a warm-up.

  Each run of a stage ends when its outputs are ready; an iteration waits once, at its end.

  Args:
    config: of `configs/rl.py`.
    say: called with a line after every stage.

  Returns:
    A report that can be written as JSON. `report["stages"]` has rollout, score, update and the
    whole iteration, and two parts of the rollout: encode and decode. Each stage has `seconds`
    (quartiles of one run), `times` (its runs in an iteration), `compile_seconds` (trace and
    compilation), `flops` (of all devices) and `memory` (bytes per device).
  """
  check_batch(config, mesh)
  run, modules, source = outline(config, mesh)
  settings, stages, frozen = run.settings, run.stages, _materialise_frozen(run.frozen)
  state = stages.init(materialise(run.state_shapes.params))
  images, masks = _random_prompts(config, mesh)
  context = _normal(context_shapes(config, mesh, run.frozen)) if run.has_texts else None
  key = jax.random.key(config.seed)
  timer = _Timer(mesh, repeats, say)

  # The outputs of a stage are arguments of the next.
  window = stages.window(0)
  inputs = frozen, images, masks, key, context, window
  prompts, record, samples = timer.stage(
    "rollout", stages.rollout, behaviour_params(state), *inputs
  )
  encode = functools.partial(encode_prompts, modules, settings, mesh=mesh)
  jit = fast_jit(mesh)
  timer.stage("encode", jit(encode), frozen, images, masks)
  decode_all = functools.partial(decode, modules, chunk=settings.decode_batch, mesh=mesh)
  latents = record.latents[-1] if settings.keeps_chain else record.latents
  timer.stage("decode", jit(decode_all), frozen.vae, latents, prompts)
  if any(read := reward_shapes(run.objective, config, mesh)):
    raise ValueError("config.reward reads texts or runs on the host; give a reward that does not")
  scores, _ = timer.stage("score", stages.score, frozen, prompts, samples, *read)
  indices, experience = stages.draw_timesteps(key, window)[0], Experience(prompts, record, scores)
  updates = settings.updates_per_iteration
  arguments = state, frozen, experience, indices
  state, _ = timer.stage("update", stages.update, *arguments, times=updates, donates_state=True)
  del prompts, record, latents, samples, scores, experience, arguments
  timer.iterations(stages, state, *inputs)
  return {
    "policy": config.policy,
    "architecture": source,
    "parameters": run.parameters,
    "device": mesh.devices.flat[0].device_kind,
    "devices": mesh.size,
    "images": config.batch_size * settings.samples_per_prompt,
    "config": {name: config[name] for name in ("size", "num_steps", "dtype", "remat")},
    "stages": timer.measured,
  }


def _peak(mesh: Mesh) -> dict[str, int]:
  """Returns the peak bytes in use on a device so far, if the device reports them."""
  statistics = mesh.local_devices[0].memory_stats() or {}
  return {"peak": statistics["peak_bytes_in_use"]} if "peak_bytes_in_use" in statistics else {}


def describe(report: Mapping[str, Any], peak_flops: float | None = None) -> str:
  """Formats a report as a table with one row per stage.

  Args:
    peak_flops: peak operations per second of one device; None: leave out the share of the peak.
  """
  settings, devices, images = report["config"], report["devices"], report["images"]
  counts = ", ".join(f"{name} {count:,}" for name, count in report["parameters"].items())
  lines = [
    f"{report['policy']}, architecture {report['architecture']}; random parameters",
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
  _REPEATS = flags.DEFINE(within(COUNT), "repeats", 5, "Timed runs of each stage.")
  _PEAK = flags.DEFINE(
    within(Number(0, 1e9, excluded=(0,))),
    "peak_tflops",
    None,
    "Of one device; default: by the device's name.",
  )
  _OUTPUT = flags.DEFINE_string("output", None, "JSON file for the report.")
  flags.mark_flag_as_required("config")

  def main() -> None:
    config = _CONFIG.value
    check_fields(config, "rl")
    if _OUTPUT.value and jax.process_index() == 0:
      check_output(_OUTPUT.value, {"--config": flags.FLAGS["config"].config_filename})
    # With the cache, the time to load a program would be reported as compilation time.
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    say = print if jax.process_index() == 0 else lambda *lines, **how: None
    report = benchmark(config, mesh, _REPEATS.value, lambda line: say(line, flush=True))
    chip = find_chip(report["device"])
    peak = 1e12 * _PEAK.value if _PEAK.value else chip and chip.flops
    say("", describe(report, peak), sep="\n")
    if _OUTPUT.value and jax.process_index() == 0:
      write_json(_OUTPUT.value, report)

  cli.run(main, several_processes=True)
