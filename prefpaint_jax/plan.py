"""Plans a run for machines that are not there: memory, work, traffic and time of an iteration.

  python -m prefpaint_jax.plan --config=configs/rl.py --topology=v5e:4x4 --config.mesh.fsdp=4

Compiles the stages of `programs` for TPUs or GPUs (h100:8) that need not be there, or without
--topology for the devices at hand, from shapes alone: no weights are read or made.

What it says of memory is the compiler's own allotment. Operations are those of products and
convolutions, what collectives send and the traffic with memory are counted in the compiled
program. Time is an estimate: as if every chip ran at its peaks.
"""
# Shapes: L text tokens, D features.

import itertools
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, Sharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict, config_flags

from prefpaint_jax import app, cost, diffusion, lora, mini, sharding, testing
from prefpaint_jax.alignment import Frozen, TrainState
from prefpaint_jax.chips import GIB, Chip, find_chip, topology_devices
from prefpaint_jax.inpainter import NETWORKS, Modules, make_modules
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.models.reward import RewardNetwork
from prefpaint_jax.optimizer import optimizer_from
from prefpaint_jax.programs import Programs, make_programs
from prefpaint_jax.reward import network_shapes
from prefpaint_jax.settings import Settings, settings_from
from prefpaint_jax.weights import folder as weights

### The programs of a config, from shapes.

# Architectures of hub names, so that nothing is fetched: the generation of Stable Diffusion.
KNOWN = {
  "stable-diffusion-v1-5/stable-diffusion-inpainting": 1,
  "kd5678/prefpaint-v1.0": 1,
  "stabilityai/stable-diffusion-2-inpainting": 2,
}


def read_architecture(policy: str) -> tuple[dict[str, dict], str]:
  """The configs of a policy's networks, and a word on where they come from."""
  path = Path(mini.locate(policy, "policy")).expanduser()
  if (path / "model_index.json").is_file():
    configs = {part: weights.read_config(path / part) for part in NETWORKS}
    configs["scheduler"] = weights.read_config(path / "scheduler", "scheduler_config.json")
    return configs, "read from its folder"
  if policy not in KNOWN:
    raise ValueError(
      f"config.policy {policy}: no such pipeline folder, and not a hub name of known architecture; "
      f"give a folder, or one of {', '.join(KNOWN)}"
    )
  configs = testing.full_size_configs()
  if KNOWN[policy] == 1:
    return configs, "that of Stable Diffusion 1.5 inpainting"
  configs["unet"] |= {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
  }
  configs["text_encoder"] |= {"hidden_size": 1024, "num_attention_heads": 16}
  return configs, "that of Stable Diffusion 2 inpainting"


def read_reward(reward: str) -> RewardConfig:
  """The config of a reward folder; of any other name, the released reward's."""
  path = Path(mini.locate(reward, "reward")).expanduser()
  return RewardConfig.from_dict(weights.read_config(path) if path.is_dir() else {})


class Run(NamedTuple):
  """What `train` holds and runs for a config, as shapes with their shardings."""

  programs: Programs
  state: TrainState
  frozen: Frozen
  begin: Any  # parameters before the first iteration, kept to compare with; or None
  parameters: dict[str, int]


def outline(config: ConfigDict, settings: Settings, modules: Modules, mesh: Mesh) -> Run:
  """The programs of a config's run and all that it holds, as shapes: nothing is read or made."""
  network = RewardNetwork(read_reward(config.reward), jnp.dtype(config.dtype))
  steps = diffusion.ddim_steps(modules.schedule, settings.num_steps, settings.eta)
  optimizer = optimizer_from(config)
  shapes = jax.eval_shape(modules.init, jax.random.key(0))
  base = begin = shapes["unet"]
  if settings.lora:
    adapters = lambda key: lora.init(key, base, config.lora.rank, config.lora.targets)
    begin = jax.eval_shape(adapters, jax.random.key(0))
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  D, L = network.config.feature_dim, modules.text_encoder.config.max_position_embeddings
  frozen = Frozen(
    vae=shapes["vae"],
    reward=network_shapes(network.config),
    whitening=array(D, D) if settings.trust.needs_bound else None,
    context=array(1, L, modules.unet.config.cross_attention_dim),
    base=base if settings.lora else None,
  )
  trees = {"unet": base, "vae": frozen.vae, "reward": frozen.reward}
  trees |= {"adapters": begin} if settings.lora else {}
  parameters = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in trees.items()}

  split, whole = sharding.DEFAULT_RULES, ((r"", P()),)
  place = lambda tree, rules: _place(tree, sharding.specs(tree, rules, mesh))
  begin = place(begin, split)
  frozen = place(frozen, split if config.mesh.split_frozen else whole)
  if settings.kl_weight and not settings.lora:
    frozen = frozen._replace(base=begin)
  programs = make_programs(modules, network, settings, steps, optimizer, mesh, begin)
  compares = config.sample_every or config.eval_every or config.final_prompts
  state = _place(programs.shapes, programs.layout)
  return Run(programs, state, frozen, begin if compares else None, parameters)


def _place(tree: Any, layout: Any) -> Any:
  """The shapes of `tree` with a sharding for all of them, or with a tree of shardings."""
  if isinstance(layout, Sharding):
    layout = jax.tree.map(lambda _: layout, tree)
  put = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(put, tree, layout)


def _bytes_per_chip(tree: Any) -> int:
  part = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(map(part, jax.tree.leaves(tree)))


### A plan.


class DoesNotFitError(Exception):
  """A compiler found no room for a program; says how much it needs of how much."""


def compile_and_print(lowered: Any, device: jax.Device) -> tuple[Any, str]:
  """A program compiled for a kind of device, and its text.

  `as_text` cannot print a v6e's loops where they overlap ("Async done requires its operand to be an
  asynchronous op"), but the compiler for TPUs can. Where a GPU is not there to time them on, tiles
  of XLA's own products are a guess that not every product can follow: all are cuBLAS's then.
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
      written = list(Path(folder).glob("*.after_codegen.txt"))
      if not written:
        raise
      return compiled, written[0].read_text()


def _measure(program: Any, arguments: tuple, live: Any, mesh: Mesh) -> tuple[dict[str, Any], Any]:
  """What a stage takes of each chip, and the shapes and shardings of its outputs.

  `live` is all that a run has in memory meanwhile, arguments or not.
  """
  began = time.perf_counter()
  traced = program.trace(*arguments)
  try:
    compiled, text = compile_and_print(traced.lower(), mesh.devices.flat[0])
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    sizes = re.findall(r"\(([\d.]+[KMGT])\)", str(error))
    raise DoesNotFitError(" of ".join(sizes) or str(error).splitlines()[0]) from error
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
  return stage, _place(traced.out_info, compiled.output_shardings)


def estimate(stage: Mapping[str, Any], chip: Chip) -> dict[str, float]:
  """Seconds of a stage at the chip's peaks: the longer of work and memory, then the links."""
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
  """Compiles the stages of an iteration for `devices`: a report that json can hold.

  `report["stages"]` has, of rollout, score and update, per chip: memory in bytes, flops, traffic,
  collectives, estimated seconds; and times, how often an iteration runs the stage. A stage that
  does not compile for want of memory ends the plan; `report["does_not_fit"]` says so.
  `after_stage` is called with the report as far as it is: a large program compiles for long.
  """
  settings = settings_from(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
  sharding.check_batch(config.batch_size, mesh)
  configs, source = read_architecture(config.policy)
  modules = make_modules(configs, config.dtype, config.remat, where=config.policy)
  modules.latent_shape(1, config.size, config.size)  # refuses a size that does not fit
  run = outline(config, settings, modules, mesh)
  kind = devices[0].device_kind
  chip = find_chip(kind)
  chosen = ("batch_size", "samples_per_prompt", "size", "num_steps", "dtype", "remat")
  report = {
    "policy": config.policy,
    "architecture": source,
    "parameters": run.parameters,
    "chip": kind,
    "chips": mesh.size,
    "mesh": dict(mesh.shape),
    "config": {name: config[name] for name in chosen},
    "stages": {},
  }

  along_batch, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  picture = lambda channels: jax.ShapeDtypeStruct(
    (config.batch_size, config.size, config.size, channels), jnp.float32, sharding=along_batch
  )
  images, masks = picture(3), picture(1)
  key = _place(jax.eval_shape(jax.random.key, 0), everywhere)
  live = [run.state, run.frozen, images, masks]
  # The base of a KL term is the same arrays as what the run began with.
  live += [run.begin] if run.frozen.base is not run.begin else []

  def stage(name: str, program: Any, arguments: tuple, times: int = 1) -> Any:
    measured, outputs = _measure(program, arguments, live, mesh)
    report["stages"][name] = measured | {"times": times}
    after_stage(report)
    live.append(outputs)
    return outputs

  ### The stages; each one's outputs are the next one's arguments.
  programs, state, frozen = run.programs, run.state, run.frozen
  behaviour = state.params if state.behaviour is None else state.behaviour
  indices = jax.eval_shape(programs.draw_timesteps, key)[0]
  try:
    prompts, trajectory, painted = stage(
      "rollout", programs.rollout, (behaviour, frozen, images, masks, key)
    )
    scores, _ = stage("score", programs.score, (frozen, prompts, painted))
    arguments = state, frozen, prompts, trajectory, scores, _place(indices, everywhere)
    stage("update", programs.update, arguments, settings.updates_per_iteration)
  except DoesNotFitError as error:
    report["does_not_fit"] = f"{('rollout', 'score', 'update')[len(report['stages'])]}: {error}"
  return report | (judge(report, chip) if chip else {})


def judge(report: Mapping[str, Any], chip: Chip) -> dict[str, Any]:
  """What a chip makes of a report: its memory, the stages with estimates, and what does not fit."""
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


def describe(report: Mapping[str, Any]) -> str:
  """A report as a table, a column for each stage."""
  config, stages, available = report["config"], report["stages"], report.get("available")
  images, chips = config["batch_size"] * config["samples_per_prompt"], report["chips"]
  mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
  counts = ", ".join(f"{name} {count:,}" for name, count in report["parameters"].items())
  head = [
    f"{report['policy']}, its architecture {report['architecture']}",
    f"parameters: {counts}",
    f"{chips} x {report['chip']}, mesh of {mesh}: {images} images an iteration, {images / chips:g} "
    f"per chip; {config['size']} pixels, {config['num_steps']} steps, {config['dtype']}, remat "
    f"{'on' if config['remat'] else 'off'}",
  ]
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
  if "does_not_fit" in report:
    return f"DOES NOT FIT: {report['does_not_fit']}"
  most = max(stage["memory"]["total"] for stage in report["stages"].values())
  return (
    f"fits, {most / GIB:.2f} of {report['available'] / GIB:.2f} GiB; ESTIMATE at the chips' peaks: "
    f"{report['seconds']:.3g} s an iteration, {report['images_per_s']:.3g} images per second"
  )


def search(config: ConfigDict, devices: Sequence[jax.Device]) -> Iterator[dict[str, Any]]:
  """Plans with the parameters split over 1, 4 and all chips, with and without rematerialisation.

  Of each, with 1, 2, 4, 8 and 16 prompts per chip, until it does not fit.
  """
  chips = len(devices)
  splits = {1, math.gcd(4, chips), chips}
  for fsdp, remat in itertools.product(sorted(splits), (False, True)):
    for per_chip in (1, 2, 4, 8, 16):
      tried = config.copy_and_resolve_references()
      tried.update(remat=remat, batch_size=per_chip * chips, mesh={"data": -1, "fsdp": fsdp})
      report = plan(tried, devices)
      jax.clear_caches()  # of programs that are not made again
      yield report
      if "does_not_fit" in report:
        break


def _summary(report: Mapping[str, Any]) -> str:
  """A report as one line."""
  config, fsdp = report["config"], report["mesh"]["fsdp"]
  tried = f"batch_size={config['batch_size']} mesh.fsdp={fsdp} remat={config['remat']}"
  return f"{tried:<44} {_verdict(report)}"


if __name__ == "__main__":
  _CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file[:preset].")
  _TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:4x4, h100:8, ...; default: these devices.")
  _SEARCH = flags.DEFINE_bool("search", False, "Try batch sizes, mesh.fsdp and remat.")
  _OUTPUT = flags.DEFINE_string(
    "output", None, "json to write, after every stage: the report, or the list of them."
  )
  flags.mark_flag_as_required("config")

  def main() -> None:
    if _TOPOLOGY.value:
      jax.config.update("jax_platforms", "cpu")  # a chip that is here is left alone
      jax.config.update("jax_enable_compilation_cache", False)  # only where they run are they read
    devices = topology_devices(_TOPOLOGY.value) if _TOPOLOGY.value else jax.devices()

    def keep(result: Any) -> None:
      if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(result, indent=2) + "\n")

    def after_stage(report: dict[str, Any]) -> None:
      name, stage = list(report["stages"].items())[-1]
      print(f"{name}: compiled in {stage['compile_seconds']:.0f} s", flush=True)
      keep(report)

    if _SEARCH.value:
      if not find_chip(devices[0].device_kind):
        raise ValueError(
          f"--search: how fast a {devices[0].device_kind} is, is not known; give a --topology"
        )
      result = []
      for report in search(_CONFIG.value, devices):
        print(_summary(report), flush=True)
        result.append(report)
        keep(result)
      fitting = [report for report in result if "does_not_fit" not in report]
      fitting.sort(key=lambda report: -report["images_per_s"])
      print("", "fastest first:", *map(_summary, fitting), sep="\n")
    else:
      report = plan(_CONFIG.value, devices, after_stage)
      keep(report)
      print()
      print(describe(report))

  app.run(main)
