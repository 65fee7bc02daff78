"""Compares the time and memory of alignment stages in this package and in PyTorch.

  python tests/benchmarks/run.py --size=mini --stage=iteration --opponent=tuned --repeats=5

Each side ("ours", "theirs") runs in a separate process, so that the threads, the allocator and the
compiler of one do not disturb the other, and their memory is measured separately. The sides run in
turn (A B A B ...); one is idle while the other works. Both have the same weights, shapes, dtype,
cores and numbers of samples, steps and updates. The first run of each side compiles and is timed
separately; its outputs must agree with the other side's before anything else is timed.
"""
# A timing sample is the mean time of a run, over as many runs as take `least_seconds`.

import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import worlds
from absl import app, flags

STAGES = (
  *("unet_forward", "unet_gradient", "encode", "decode"),
  *("rollout", "score", "update", "iteration"),
)
OPPONENTS = ("reference", "tuned", "compiled")  # `theirs` explains them

# Largest relative error, by Euclidean norms: of an output, and of the change of the parameters. The
# second is larger, because AdamW's first step has the same length for every parameter, even for a
# gradient that is only rounding error.
TOLERANCES = {"float32": (1e-3, 1e-2), "bfloat16": (5e-2, 0.6)}

# The same with `reference`, where PIL rounds resized images to bytes before they are scored.
TOLERANCES_AFTER_BYTES = (5e-2, 0.2)


### A side, in its process.
def serve(connection, side: str, folder: Path, opponent: str, cores: list[int]) -> None:
  """Answers messages until the connection closes.

  A message is ("make",) or (name of a method of `Side`, *arguments). The answer is ("done", result)
  or ("failed", traceback).
  """
  if cores:
    os.sched_setaffinity(0, cores)
  os.environ |= {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # both sides share the memory of one GPU
    "OMP_NUM_THREADS": str(len(cores) or os.cpu_count()),
    "HF_HUB_OFFLINE": "1",
  }
  implementation = None
  while True:
    try:
      name, *arguments = connection.recv()
    except EOFError:  # the other end closed the connection
      return
    try:
      if name == "make":
        implementation, answer = Side(side, folder, opponent), None
      else:
        answer = getattr(implementation, name)(*arguments)
      connection.send(("done", answer))
    except Exception:
      connection.send(("failed", traceback.format_exc()))


class Side:
  """Runs and measures the stages of one side."""

  def __init__(self, side: str, folder: Path, opponent: str):
    world = worlds.read(folder)
    if side == "ours":
      from ours import Ours

      from prefpaint_jax.runtime import compilation

      compilation.keep_memory()  # every command calls it
      self.stages = Ours(world)
    else:
      import torch
      from theirs import Theirs

      torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
      self.stages = Theirs(world, opponent)

  def prepare(self, stage: str) -> dict[str, int]:
    """Computes the inputs of a stage; returns the memory with weights and inputs loaded."""
    self.stages.prepare(stage)
    release_free_memory()
    return memory()

  def check(self, stage: str) -> tuple[float, dict[str, np.ndarray]]:
    """Runs the stage for the first time, which compiles it; returns its seconds and outputs."""
    began = time.perf_counter()
    outputs = self.stages.work(stage)
    seconds = time.perf_counter() - began
    outputs = self.stages.read(outputs)
    self.stages.checks = False
    release_free_memory()
    return seconds, outputs

  def before(self) -> np.ndarray | None:
    """Returns the parameters before the first update, where the side has them."""
    return self.stages.before if hasattr(self.stages, "before") else None

  def sample(self, stage: str, number: int) -> float:
    """Returns the mean seconds of `number` runs."""
    began = time.perf_counter()
    for _ in range(number):
      self.stages.work(stage)
    return (time.perf_counter() - began) / number

  def memory(self) -> dict[str, int]:
    """Returns `memory()` of this process."""
    return memory()

  def machine(self) -> dict[str, Any]:
    """Returns `device()` of this process."""
    return device()


def release_free_memory() -> None:
  """Returns freed memory of loading and compilation to the system, so that it is not counted."""
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).malloc_trim(0)


def memory() -> dict[str, int]:
  """Returns bytes of this process in use now and at most since the last call; and of its GPU."""
  with open("/proc/self/status") as status:
    fields = dict(line.split(":", 1) for line in status)
  with contextlib.suppress(OSError):  # resets the peak; some containers forbid it
    Path("/proc/self/clear_refs").write_text("5")
  in_bytes = lambda name: int(fields[name].split()[0]) * 1024
  return {"now": in_bytes("VmRSS"), "peak": in_bytes("VmHWM")} | _device_memory()


def _device_memory() -> dict[str, int]:
  import sys

  if "jax" in sys.modules:
    statistics = sys.modules["jax"].devices()[0].memory_stats() or {}
    return {"device_peak": statistics["peak_bytes_in_use"]} if statistics else {}
  if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
    return {"device_peak": sys.modules["torch"].cuda.max_memory_allocated()}
  return {}


def device() -> dict[str, Any]:
  """Returns the kind of JAX's device."""
  import jax

  return {"device": jax.devices()[0].device_kind}


### The comparison.
class Remote:
  """A side in another process; a call sends a message and returns the answer."""

  def __init__(self, side: str, folder: Path, opponent: str, cores: list[int]):
    context = multiprocessing.get_context("spawn")
    self.connection, other = context.Pipe()
    self.process = context.Process(target=serve, args=(other, side, folder, opponent, cores))
    self.process.start()
    other.close()

  def __call__(self, *message: Any) -> Any:
    self.connection.send(message)
    try:
      outcome, answer = self.connection.recv()
    except EOFError:
      self.process.join()
      raise RuntimeError(
        f"a benchmark process ended with exit status {self.process.exitcode}; read its output above"
      ) from None
    if outcome == "failed":
      raise RuntimeError(answer)
    return answer

  def close(self) -> None:
    self.connection.close()
    self.process.join(timeout=30)
    if self.process.is_alive():
      self.process.kill()


def disagreements(
  ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], before: np.ndarray | None
) -> dict[str, float]:
  """Computes the relative error of every output, by Euclidean norms.

  Args:
    before: the parameters before the update; the error of "params" is relative to their change.
  """
  if ours.keys() != theirs.keys():
    raise AssertionError(f"outputs are {sorted(ours)} here; expected {sorted(theirs)}")
  errors = {}
  for name, value in theirs.items():
    start = before if name == "params" else 0.0
    difference, size = np.linalg.norm(ours[name] - value), np.linalg.norm(value - start)
    errors[name] = float(difference / size)
  return errors


def check(errors: dict[str, float], dtype: str, opponent: str) -> None:
  """Raises AssertionError if the outputs of the two sides differ by more than the tolerance."""
  for name, error in errors.items():
    is_change = name == "params"
    tolerance = TOLERANCES[dtype][is_change]
    if opponent == "reference" and name in ("reward", "trust", "advantages", "params"):
      tolerance = max(tolerance, TOLERANCES_AFTER_BYTES[is_change])
    if not error <= tolerance:
      raise AssertionError(
        f"{name} differs by {error:.2e} of its size; expected {tolerance:g} or less"
      )


def quartiles(values: list[float]) -> dict[str, float]:
  """Computes the quartiles of some values."""
  low, median, high = np.percentile(values, [25, 50, 75])
  return {"q1": float(low), "median": float(median), "q3": float(high)}


def measure(
  folder: Path,
  stage: str,
  opponent: str,
  repeats: int,
  least_seconds: float,
  cores: list[int],
  report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Checks and times both sides at a stage.

  Args:
    folder: written by `worlds.write`.
    repeats: timing samples of each side.
    least_seconds: the shortest duration of a timing sample.
    cores: the CPU cores that both sides use; empty: all.
    report: called with lines about the progress.

  Returns:
    A result that can be written as JSON.
  """
  config = worlds.read(folder).config
  with contextlib.ExitStack() as stack:
    sides = {}
    for name in ("ours", "theirs"):
      sides[name] = Remote(name, folder, opponent, cores)
      stack.callback(sides[name].close)
    used: dict[str, dict] = {name: {} for name in sides}
    first, outputs = {}, {}
    for name, side in sides.items():
      side("make")
      used[name]["loaded"] = side("prepare", stage)["now"]
      first[name], outputs[name] = side("check", stage)
      compiled = side("memory")
      used[name] |= {"compiled": compiled["now"], "peak_compiling": compiled["peak"]}
      report(f"{name}: first run {first[name]:.3g} s")
    errors = disagreements(outputs["ours"], outputs["theirs"], sides["ours"]("before"))
    report(", ".join(f"{name} differs by {error:.1e}" for name, error in errors.items()))
    check(errors, config.dtype, opponent)

    numbers = {}
    for name, side in sides.items():  # a warm-up, then the number of runs per timing sample
      side("sample", stage, 1)
      numbers[name] = max(1, round(least_seconds / side("sample", stage, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
      for name, side in sides.items():
        seconds[name].append(side("sample", stage, numbers[name]))
      report(", ".join(f"{name} {values[-1]:.4g} s" for name, values in seconds.items()))
    for name, side in sides.items():
      now = side("memory")
      used[name] |= {"peak_running": now.pop("peak")} | {k: v for k, v in now.items() if k != "now"}
    machine = sides["ours"]("machine")
  ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
  side = lambda name: {
    "seconds": quartiles(seconds[name]) | {"samples": seconds[name]},
    "first_run_s": first[name],
    "compile_s": max(0.0, first[name] - float(np.median(seconds[name]))),
    "memory": used[name],
  }
  return {
    "stage": stage,
    "opponent": opponent,
    "dtype": config.dtype,
    "runs_per_sample": numbers,
    "images": config.batch_size * config.samples_per_prompt,
    "ours": side("ours"),
    "theirs": side("theirs"),
    "ratio": quartiles(ratios),
    "errors": errors,
    "machine": machine,
  }


def machine(cores: list[int]) -> dict[str, Any]:
  """Describes the CPU and the versions of the packages."""
  processor = platform.processor() or platform.machine()
  with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    processor = names[0] if names else processor
  packages = ("jax", "flax", "torch", "diffusers", "transformers")
  return {
    "processor": processor,
    "cores": len(cores) or os.cpu_count(),
    "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
  }


def describe(result: dict[str, Any]) -> str:
  """Formats a result as one line."""
  used = lambda side, name: (side["memory"][name] - side["memory"]["loaded"]) / 2**20
  sides = [
    f"{name} {side['seconds']['median']:.4g} s [{side['seconds']['q1']:.4g}, "
    f"{side['seconds']['q3']:.4g}], compiling {side['compile_s']:.3g} s, "
    f"peak {used(side, 'peak_running'):.0f} MiB above weights and inputs, of which "
    f"{used(side, 'compiled'):.0f} after compilation"
    for name, side in (("ours", result["ours"]), (result["opponent"], result["theirs"]))
  ]
  ratio = result["ratio"]
  return (
    f"{result['size']} {result['stage']}: {'; '.join(sides)}; {result['opponent']} / ours "
    f"{ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]"
  )


def save(path: Path, results: list[dict[str, Any]]) -> None:
  """Adds results to a JSON file and removes older results of the same measurement."""
  key = lambda one: (
    *(one[k] for k in ("size", "stage", "opponent", "dtype")),
    one["machine"]["device"],
  )
  kept = json.loads(path.read_text()) if path.is_file() else []
  new = {key(one) for one in results}
  kept = [one for one in kept if key(one) not in new] + results
  path.write_text(json.dumps(kept, indent=1) + "\n")


def in_another_process(function: Callable, *arguments: Any) -> None:
  """Calls a function in a new process and waits for its end."""
  process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
  process.start()
  process.join()
  if process.exitcode:
    raise RuntimeError(f"{function.__name__} ended with exit status {process.exitcode}")


if __name__ == "__main__":
  _SIZE = flags.DEFINE_enum("size", "mini", worlds.SIZES, "Models and settings; sd15 needs a GPU.")
  _STAGE = flags.DEFINE_multi_enum("stage", ["iteration"], (*STAGES, "all"), "Stages to time.")
  _OPPONENT = flags.DEFINE_multi_enum("opponent", ["tuned"], OPPONENTS, "Opponents to time.")
  _REPEATS = flags.DEFINE_integer("repeats", 5, "Timing samples of each side.", lower_bound=1)
  _LEAST = flags.DEFINE_float("least_seconds", 0.5, "Shortest duration of a timing sample.")
  _DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: of the size.")
  _CORES = flags.DEFINE_integer("cores", 0, "CPU cores that the sides use; 0: all.")
  _WORLD = flags.DEFINE_string("world", None, "Folder to keep weights and inputs in.")
  _OUTPUT = flags.DEFINE_string("output", None, "JSON file to add the results to.")

  def main(argv: list[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"unexpected argument {argv[1]!r}")
    cores = sorted(os.sched_getaffinity(0))[: _CORES.value] if _CORES.value else []
    dtype = _DTYPE.value or worlds.make_config(_SIZE.value).dtype
    if _WORLD.value:
      folder = Path(_WORLD.value) / f"{_SIZE.value}_{dtype}"
    else:
      folder = Path(tempfile.mkdtemp(prefix="world"))
    try:
      if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        in_another_process(worlds.write, _SIZE.value, dtype, folder)
      for stage in STAGES if "all" in _STAGE.value else _STAGE.value:
        for opponent in _OPPONENT.value:
          result = measure(
            folder,
            stage,
            opponent,
            _REPEATS.value,
            _LEAST.value,
            cores,
            lambda line: print("  " + line, flush=True),
          )
          result["size"] = _SIZE.value
          result["machine"] |= machine(cores)
          print(describe(result), flush=True)
          if _OUTPUT.value:
            save(Path(_OUTPUT.value), [result])
    finally:
      if not _WORLD.value:
        shutil.rmtree(folder)

  app.run(main)
