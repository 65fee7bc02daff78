"""Times a stage of alignment here and in PyTorch, side by side, once both gave the same result.

  python tests/benchmarks/run.py --size=mini --stage=iteration --opponent=tuned --repeats=5

Each side is a process of its own, so that neither's threads, allocator or compiler disturbs the
other and memory can be told apart; while one works, the other waits for a message. They work in
turn (A B A B ...), with the same weights, shapes, dtype, number of cores and of samples, steps and
updates. The first run of each is checked against the other's and timed apart: it compiles.
"""
# A sample is the mean time of so many runs in a row that they take `least_seconds`.

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
OPPONENTS = ("reference", "tuned", "compiled")  # `theirs` says what they are

# Largest error of an output, and of the change of the parameters, by their Euclidean norms. AdamW
# begins with a step of the same length for every parameter, also where a gradient is mere rounding.
TOLERANCES = {"float32": (1e-3, 1e-2), "bfloat16": (5e-2, 0.6)}

# PIL rounds the reference's resized pictures to bytes before they are scored.
TOLERANCES_AFTER_BYTES = (5e-2, 0.2)


### A side, in its own process.
def serve(connection, side: str, folder: Path, opponent: str, cores: list[int]) -> None:
  """Answers (name of a function below, arguments) with its result, or with a traceback."""
  if cores:
    os.sched_setaffinity(0, cores)
  os.environ |= {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # both share the memory of one GPU
    "OMP_NUM_THREADS": str(len(cores) or os.cpu_count()),
    "HF_HUB_OFFLINE": "1",
  }
  made = None
  while True:
    try:
      name, *arguments = connection.recv()
    except EOFError:  # the other end is gone
      return
    try:
      if name == "make":
        made, answer = Side(side, folder, opponent), None
      else:
        answer = getattr(made, name)(*arguments)
      connection.send(("done", answer))
    except Exception:
      connection.send(("failed", traceback.format_exc()))


class Side:
  """One side at work on one stage."""

  def __init__(self, side: str, folder: Path, opponent: str):
    world = worlds.read(folder)
    if side == "ours":
      from ours import Ours

      from prefpaint_jax.runtime import compilation

      compilation.keep_memory()  # as every command does
      self.does = Ours(world)
    else:
      import torch
      from theirs import Theirs

      torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
      self.does = Theirs(world, opponent)

  def prepare(self, stage: str) -> dict[str, int]:
    self.does.prepare(stage)
    give_back()
    return memory()

  def check(self, stage: str) -> tuple[float, dict[str, np.ndarray]]:
    """Seconds of the first run, which compiles, and what it gave."""
    began = time.perf_counter()
    outputs = self.does.work(stage)
    seconds = time.perf_counter() - began
    outputs = self.does.read(outputs)
    self.does.checks = False
    give_back()
    return seconds, outputs

  def before(self) -> np.ndarray | None:
    """What an update changes."""
    return self.does.before if hasattr(self.does, "before") else None

  def sample(self, stage: str, number: int) -> float:
    """Mean seconds of `number` runs."""
    began = time.perf_counter()
    for _ in range(number):
      self.does.work(stage)
    return (time.perf_counter() - began) / number

  def memory(self) -> dict[str, int]:
    return memory()

  def machine(self) -> dict[str, Any]:
    return device()


def give_back() -> None:
  """Gives back what loading and compiling used: it is not counted as work's."""
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).malloc_trim(0)


def memory() -> dict[str, int]:
  """Bytes of this process: in use now, at most since the last call; and of its GPU, if any."""
  with open("/proc/self/status") as status:
    fields = dict(line.split(":", 1) for line in status)
  with contextlib.suppress(OSError):  # begins the next peak here; not every container allows it
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
  """Of the side with JAX: what it runs on."""
  import jax

  return {"device": jax.devices()[0].device_kind}


### Both sides.
class Remote:
  """A side in another process."""

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
      raise RuntimeError(f"a side ended with exit status {self.process.exitcode}") from None
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
  """Error of every output as a share of it, by their Euclidean norms."""
  if ours.keys() != theirs.keys():
    raise AssertionError(f"outputs {sorted(ours)} and {sorted(theirs)}")
  errors = {}
  for name, value in theirs.items():
    start = before if name == "params" else 0.0
    difference, size = np.linalg.norm(ours[name] - value), np.linalg.norm(value - start)
    errors[name] = float(difference / size)
  return errors


def check(errors: dict[str, float], dtype: str, opponent: str) -> None:
  """Raises AssertionError where the two sides did not compute the same."""
  for name, error in errors.items():
    is_change = name == "params"
    tolerance = TOLERANCES[dtype][is_change]
    if opponent == "reference" and name in ("reward", "trust", "advantages", "params"):
      tolerance = max(tolerance, TOLERANCES_AFTER_BYTES[is_change])
    if not error <= tolerance:
      raise AssertionError(f"{name} differs by {error:.2e} of its size, allowed is {tolerance:g}")


def quartiles(values: list[float]) -> dict[str, float]:
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
  """Times of both sides at a stage in the world of `folder`."""
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
    for name, side in sides.items():  # warm-up: not counted
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
  """One line for people."""
  used = lambda side, name: (side["memory"][name] - side["memory"]["loaded"]) / 2**20
  sides = [
    f"{name} {side['seconds']['median']:.4g} s [{side['seconds']['q1']:.4g}, "
    f"{side['seconds']['q3']:.4g}], compiling {side['compile_s']:.3g} s, "
    f"{used(side, 'peak_running'):.0f} MiB above its weights, {used(side, 'compiled'):.0f} of them "
    "before it works"
    for name, side in (("ours", result["ours"]), (result["opponent"], result["theirs"]))
  ]
  ratio = result["ratio"]
  return (
    f"{result['size']} {result['stage']}: {'; '.join(sides)}; {result['opponent']} / ours "
    f"{ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]"
  )


def save(path: Path, results: list[dict[str, Any]]) -> None:
  """Adds results to a json file, in place of those of the same measurement."""
  what = lambda one: (
    *(one[k] for k in ("size", "stage", "opponent", "dtype")),
    one["machine"]["device"],
  )
  kept = json.loads(path.read_text()) if path.is_file() else []
  new = {what(one) for one in results}
  kept = [one for one in kept if what(one) not in new] + results
  path.write_text(json.dumps(kept, indent=1) + "\n")


def in_another_process(function: Callable, *arguments: Any) -> None:
  process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
  process.start()
  process.join()
  if process.exitcode:
    raise RuntimeError(f"{function.__name__} ended with exit status {process.exitcode}")


if __name__ == "__main__":
  _SIZE = flags.DEFINE_enum("size", "mini", worlds.SIZES, "What to run; sd15 is for a GPU.")
  _STAGE = flags.DEFINE_multi_enum("stage", ["iteration"], (*STAGES, "all"), "What to time.")
  _OPPONENT = flags.DEFINE_multi_enum("opponent", ["tuned"], OPPONENTS, "Against whom.")
  _REPEATS = flags.DEFINE_integer("repeats", 5, "Samples of each side.", lower_bound=1)
  _LEAST = flags.DEFINE_float("least_seconds", 0.5, "A sample repeats its work for so long.")
  _DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: the size's own.")
  _CORES = flags.DEFINE_integer("cores", 0, "CPU cores of each side; 0: all that there are.")
  _WORLD = flags.DEFINE_string("world", None, "Folder for the weights, kept and used again.")
  _OUTPUT = flags.DEFINE_string("output", None, "json to add the results to.")

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
