"""Compiles the stages of an iteration for devices that need not be present, and measures them."""

import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prefpaint_jax.align.run import Run, context_shapes, image_shapes, outline, reward_shapes
from prefpaint_jax.align.settings import check_batch, compares_with_base
from prefpaint_jax.align.state import Experience, behaviour_params
from prefpaint_jax.planning import cost
from prefpaint_jax.planning.chips import GIB, Chip, find_chip, note
from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.text import first_line

STAGES = ("rollout", "score", "update")  # in the order in which an iteration runs them


def _bytes_per_chip(tree: Any) -> int:
  part = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(map(part, jax.tree.leaves(tree)))


class DoesNotFitError(Exception):
  """The program does not fit in device memory (required of available)."""


def compile_and_print(lowered: Any, device: jax.Device) -> tuple[Any, str]:
  """Compiles a lowered program for a kind of device and returns it with its HLO text.

  For GPUs that are not present, Triton matrix products are off. XLA chooses their tile sizes by
  timing them on the GPU; without one it guesses, and compilation fails for some products.
  """
  with tempfile.TemporaryDirectory() as folder:
    options = None
    if device.platform == "tpu":
      options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    elif device.platform == "gpu" and device not in jax.devices():
      options = {"xla_gpu_enable_triton_gemm": False}
    compiled = lowered.compile(options)
    try:
      return compiled, compiled.as_text()
    except jax.errors.JaxRuntimeError:
      # For v6e programs with overlapping loops `as_text` fails with "Async done requires its
      # operand to be an asynchronous op". The dump of the TPU compiler has the text.
      dumps = list(Path(folder).glob("*.after_codegen.txt"))
      if not dumps:
        raise
      return compiled, dumps[0].read_text()


def _measure(program: Any, arguments: tuple, live: Any, mesh: Mesh) -> tuple[dict[str, Any], Any]:
  """Compiles a stage and measures its cost per chip.

  Args:
    program: has `trace`, like a jitted function.
    live: all arrays that are in memory while the stage runs, whether they are arguments or not.

  Returns:
    The measurements, and the shapes and shardings of the outputs.

  Raises:
    DoesNotFitError: if the compiler reports that the program needs more memory than the chip has.
  """
  began = time.perf_counter()
  traced = program.trace(*arguments)
  try:
    compiled, text = compile_and_print(traced.lower(), mesh.devices.flat[0])
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    sizes = re.findall(r"\(([\d.]+[KMGT])\)", str(error))
    raise DoesNotFitError(" of ".join(sizes) or first_line(error)) from error
  seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()
  parts = {
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "program": memory.generated_code_size_in_bytes,
    "others": max(0, _bytes_per_chip(live) - memory.argument_size_in_bytes),
  }
  stage = {
    "memory": parts | {"total": sum(parts.values())},
    "flops": cost.flops(traced.jaxpr) / mesh.size,
    "traffic": cost.memory_traffic(text),
    "collectives": cost.collectives(text),
    "compile_seconds": seconds,
  }
  return stage, sharding.with_shardings(traced.out_info, compiled.output_shardings)


def estimate(stage: Mapping[str, Any], chip: Chip) -> dict[str, float]:
  """Estimates the seconds of a stage at the chip's peak rates.

  Work and memory traffic overlap, so the longer of the two counts; the time of the links between
  chips is added to it.
  """
  seconds = {
    "work": stage["flops"] / chip.flops,
    "memory": stage["traffic"] / chip.bandwidth,
    "links": sum(sent for _, sent in stage["collectives"].values()) / chip.links,
  }
  return seconds | {"total": max(seconds["work"], seconds["memory"]) + seconds["links"]}


def plan(
  config: ConfigDict,
  devices: Sequence[jax.Device],
  after_stage: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
  """Compiles the stages of an iteration for `devices` and measures them.

  Args:
    config: of `configs/rl.py`.
    devices: need not be present.
    after_stage: called with the unfinished report after every stage, because the compilation of a
      large program takes minutes.

  Returns:
    A report that can be written as JSON. `report["stages"]` has, for rollout, score and update,
    per chip: memory in bytes, flops, traffic, collectives, estimated seconds, and `times`, the runs
    of the stage in an iteration. The first stage that does not fit in memory ends the plan, and
    `report["does_not_fit"]` names it.
  """
  check_fields(config, "rl")
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
  check_batch(config, mesh)
  run, _, source = outline(config, mesh)
  kind = devices[0].device_kind
  chip = find_chip(kind)
  fields = ("batch_size", "samples_per_prompt", "samples_per_pass", "size", "num_steps", "dtype")
  report = {
    "policy": config.policy,
    "architecture": source,
    "parameters": run.parameters,
    "chip": kind,
    "note": note(kind),
    "chips": mesh.size,
    "mesh": dict(mesh.shape),
    "config": {name: config[name] for name in (*fields, "remat")},
    "stages": {},
  }
  try:
    _measure_stages(config, run, mesh, report, after_stage)
  except DoesNotFitError as error:
    report["does_not_fit"] = f"{STAGES[len(report['stages'])]}: {error}"
  return report | (fit_to_chip(report, chip) if chip else {})


def _measure_stages(
  config: ConfigDict,
  run: Run,
  mesh: Mesh,
  report: dict[str, Any],
  after_stage: Callable[[dict[str, Any]], None],
) -> None:
  """Adds the measurements of every stage to `report["stages"]`."""
  stages, state, frozen = run.stages, run.state_shapes, run.frozen
  images, masks = image_shapes(config, mesh)
  replicated = sharding.replicated(mesh)
  key = sharding.with_shardings(jax.eval_shape(jax.random.key, 0), replicated)
  window = stages.window(0)
  indices = jax.eval_shape(stages.draw_timesteps, key, window)[0]
  context = context_shapes(config, mesh, frozen) if run.has_texts else None
  live = [state, frozen, run.judge_params, images, masks, context]
  # A run that compares with the base policy keeps its parameters; with a KL term `frozen.base` is
  # the same arrays.
  if compares_with_base(config) and frozen.base is not run.begin:
    live.append(run.begin)

  def measure(name: str, program: Any, *arguments: Any, times: int = 1) -> Any:
    measured, outputs = _measure(program, arguments, live, mesh)
    report["stages"][name] = measured | {"times": times}
    after_stage(report)
    live.append(outputs)
    return outputs

  inputs = behaviour_params(state), frozen, images, masks, key, context, window
  prompts, record, samples = measure("rollout", stages.rollout, *inputs)
  read = reward_shapes(run.objective, config, mesh)
  scores, _ = measure("score", stages.score, frozen, prompts, samples, *read)
  arguments = (
    state,
    frozen,
    Experience(prompts, record, scores),
    sharding.with_shardings(indices, replicated),
  )
  measure("update", stages.update, *arguments, times=run.settings.updates_per_iteration)


def fit_to_chip(report: Mapping[str, Any], chip: Chip) -> dict[str, Any]:
  """Computes the part of a report that depends on the chip.

  Returns:
    "available", the chip's memory in bytes, and "stages", with estimated seconds. A report of all
    stages also gets "seconds" and "images_per_s" of an iteration, and "does_not_fit" if a stage
    needs more memory than the chip has.
  """
  stages = {
    name: stage | {"seconds": estimate(stage, chip)} for name, stage in report["stages"].items()
  }
  found = {"available": chip.memory, "stages": stages}
  if "does_not_fit" in report:
    return found
  seconds = sum(stage["seconds"]["total"] * stage["times"] for stage in stages.values())
  images = report["config"]["batch_size"] * report["config"]["samples_per_prompt"]
  found |= {"seconds": seconds, "images_per_s": images / seconds}
  largest = max(stages, key=lambda name: stages[name]["memory"]["total"])
  most = stages[largest]["memory"]["total"]
  if most > chip.memory:
    found["does_not_fit"] = f"{largest}: {most / GIB:.2f} of {chip.memory / GIB:.2f} GiB"
  return found
