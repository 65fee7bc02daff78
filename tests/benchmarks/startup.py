"""Times the start of the commands: imports, --help, and the first iteration of the mini run.

  python tests/benchmarks/startup.py --repeats=5 --output=startup.json

The time to the first iteration is from the start of the process to the first line of metrics.jsonl,
with a new workdir: once with an empty compilation cache ("cold"), once with the cache of that run
("warm").
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags
from run import machine, quartiles

ROOT = Path(__file__).resolve().parents[2]
MAINS = (
  *("train", "train_reward", "pretrain", "evaluate", "collect", "inpaint", "export"),
  *("plan", "benchmark", "plot", "annotate"),
)
WITH_CONFIG = {
  "train": "rl",
  "train_reward": "reward",
  "pretrain": "pretrain",
  "evaluate": "eval",
  "collect": "collect",
  "plan": "rl",
  "benchmark": "rl",
}


def timed(command: list[str], **options: Any) -> float:
  """Runs a command and returns its seconds."""
  began = time.perf_counter()
  subprocess.run(command, cwd=ROOT, capture_output=True, **options)
  return time.perf_counter() - began


def imports(repeats: int) -> dict[str, dict[str, float]]:
  """Times the import of each module, without the start of Python."""
  python = lambda code: timed([sys.executable, "-c", code], check=True)
  modules = ["prefpaint_jax", *(f"prefpaint_jax.{name}" for name in MAINS)]
  bare = quartiles([python("pass") for _ in range(repeats)])["median"]
  return {
    name: quartiles([python(f"import {name}") - bare for _ in range(repeats)]) for name in modules
  }


def helps(repeats: int) -> dict[str, dict[str, float]]:
  """Times `--help` of each command."""
  found = {}
  for name in MAINS:
    command = [sys.executable, "-m", f"prefpaint_jax.{name}"]
    if name in WITH_CONFIG:
      command.append(f"--config=configs/{WITH_CONFIG[name]}.py")
    found[name] = quartiles([timed([*command, "--help"]) for _ in range(repeats)])
  return found


def slowest_imports(number: int = 12) -> dict[str, float]:
  """Returns the top-level packages that take longest when `train` is imported, with seconds.

  The seconds include the imports that a package triggers.
  """
  command = [sys.executable, "-X", "importtime", "-c", "import prefpaint_jax.train"]
  lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
  found: dict[str, float] = {}
  for line in lines.splitlines():
    if match := re.match(r"import time:\s*\d+ \|\s*(\d+) \|\s*([\w]+)$", line):
      found[match[2]] = int(match[1]) / 1e6
  slowest = sorted(found, key=found.get, reverse=True)[:number]
  return {name: found[name] for name in slowest}


def first_iteration(cache: Path) -> float:
  """Returns the seconds from the start of a mini run to the end of its first iteration."""
  folder = Path(tempfile.mkdtemp(prefix="run"))
  measurements = ("sample_every", "eval_every", "checkpoint_every", "final_prompts")
  command = [sys.executable, "-m", "prefpaint_jax.train", "--config=configs/rl.py:mini"]
  command += [f"--workdir={folder}", "--config.num_iterations=1"]
  command += [f"--config.{name}=0" for name in measurements]
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
  lines = folder / "metrics.jsonl"
  began = time.perf_counter()
  process = subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
  )
  try:
    while not (lines.is_file() and lines.stat().st_size):
      if process.poll() not in (None, 0):
        raise RuntimeError(process.stderr.read().decode())
      time.sleep(0.01)
    return time.perf_counter() - began
  finally:
    process.wait()
    process.stderr.close()
    shutil.rmtree(folder)


def first_iterations(repeats: int) -> dict[str, dict[str, float]]:
  """Times the first iteration with an empty and with a full compilation cache."""
  seconds: dict[str, list[float]] = {"cold": [], "warm": []}
  for _ in range(repeats):
    with tempfile.TemporaryDirectory(prefix="cache") as cache:
      seconds["cold"].append(first_iteration(Path(cache)))
      seconds["warm"].append(first_iteration(Path(cache)))
  return {name: quartiles(values) for name, values in seconds.items()}


if __name__ == "__main__":
  _REPEATS = flags.DEFINE_integer("repeats", 5, "Runs of each command.", lower_bound=1)
  _OUTPUT = flags.DEFINE_string("output", None, "JSON file for the results.")

  def main(argv: list[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"unexpected argument {argv[1]!r}")
    found = {
      "imports": imports(_REPEATS.value),
      "helps": helps(_REPEATS.value),
      "slowest_imports_of_train": slowest_imports(),
      "first_iteration": first_iterations(min(_REPEATS.value, 3)),
      "machine": machine([]),
    }
    print(json.dumps(found, indent=1))
    if _OUTPUT.value:
      Path(_OUTPUT.value).write_text(json.dumps(found, indent=1) + "\n")

  app.run(main)
