"""Runs of several processes equal runs of one process, stop together and end together.

They compare two processes of two CPU devices each with one process of four devices.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from two_processes import free_port

from prefpaint_jax import testing
from prefpaint_jax.data.records import endless_batches
from prefpaint_jax.models import architectures
from prefpaint_jax.runtime import distributed, sharding
from prefpaint_jax.runtime.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
FIELDS = {
  "num_iterations": 4,
  "checkpoint_every": 2,
  "sample_every": 2,
  "eval_every": 2,
  "eval_prompts": 8,
  "ema_decay": 0.5,
  "behaviour_refresh": 2,
}
LIMIT = 240  # timeout of each process, in seconds


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
  """Environment variables with which all runs of this file share one compilation cache."""
  return {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
  }


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
  return testing.write_tiny_world(tmp_path_factory.mktemp("world"))


@contextlib.contextmanager
def started(
  command: list[str], processes: int, devices: int, environment: dict[str, str], log: Path
) -> Iterator[list[subprocess.Popen]]:
  """Starts the processes of a command, which print to log/0, log/1, ...; kills them at the end."""
  port = free_port()
  log.mkdir(parents=True, exist_ok=True)
  environment = os.environ | environment | {"PYTHONPATH": str(ROOT)}
  environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
  running = []
  for index in range(processes):
    if processes > 1:
      values = f"localhost:{port}", str(processes), str(index)
      environment |= dict(zip(distributed.VARIABLES, values, strict=True))
    with (log / str(index)).open("w") as output:
      running.append(
        subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=environment)
      )
  try:
    yield running
  finally:
    for process in running:
      process.kill()
      process.wait()


def log_of(log: Path, index: int) -> str:
  return (log / str(index)).read_text(errors="replace")


def finish(running: list[subprocess.Popen], log: Path) -> None:
  for index, process in enumerate(running):
    assert process.wait(LIMIT) == 0, log_of(log, index)[-3000:]


def training(world: dict[str, str], workdir: Path, **changes) -> list[str]:
  config = testing.tiny_training(world) | FIELDS | changes
  fields = [f"--config.{name}={value}" for name, value in config.items()]
  command = [sys.executable, "-m", "prefpaint_jax.train", f"--config={ROOT}/configs/rl.py"]
  return [*command, f"--workdir={workdir}", *fields]


def run(world, workdir, processes, devices, environment, **changes) -> None:
  log = workdir.with_suffix(".log")
  command = training(world, workdir, **changes)
  with started(command, processes, devices, environment, log) as running:
    finish(running, log)


@pytest.fixture(scope="module")
def together(world, cache, tmp_path_factory) -> Path:
  """The workdir of an uninterrupted run of two processes."""
  workdir = tmp_path_factory.mktemp("together") / "workdir"
  new_cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.with_name("compiled"))}
  run(world, workdir, 2, 2, cache | new_cache)
  return workdir


@pytest.fixture(scope="module")
def alone(world, cache, tmp_path_factory) -> Path:
  """The workdir of the same run in one process."""
  workdir = tmp_path_factory.mktemp("alone") / "workdir"
  run(world, workdir, 1, 4, cache)
  return workdir


def lines(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(ours: Path, theirs: Path, step: int, rtol: float, atol: float) -> None:
  """Compares the lines up to `step`, and the parameters and their moving average at `step`."""
  for line, expected in zip(lines(ours)[: step + 1], lines(theirs)[: step + 1], strict=True):
    timed = lambda name: name.startswith("time/") or name == "images_per_s"
    names = [name for name in expected if not timed(name)]
    assert names == [name for name in line if not timed(name)]
    for name in names:
      tolerances = {"rel": 10 * rtol, "abs": 10 * atol}
      assert line[name] == pytest.approx(expected[name], **tolerances), (line["iteration"], name)
  for tree in ("params", "ema"):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol),
      *(Checkpoints(workdir / "checkpoints").load(tree, step) for workdir in (ours, theirs)),
    )


# Sums over two processes run in a different order than sums within one process, so that the last
# bits of a float32 differ. AdamW divides by the size of a gradient, which may enlarge this.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 0.0, "atol": 0.0}


# ------------------------------------------------------------------ equality with one process
@pytest.mark.slow
def test_two_processes_equal_one_process_with_as_many_devices(together, alone):
  assert_same_run(together, alone, 2, **ROUNDING)
  assert_same_run(together, alone, 4, **ROUNDING)


@pytest.mark.slow
def test_evaluation_by_two_processes_equals_that_by_one(world, cache, tmp_path):
  command = [
    sys.executable,
    "-m",
    "prefpaint_jax.evaluate",
    f"--config={ROOT}/configs/eval.py:mini",
  ]
  fields = {"policy": world["policy"], "baseline": world["policy"], "prompts": world["prompts"]}
  fields |= {"judges": f"('{world['reward']}',)", "size": architectures.SIZE, "num_prompts": 6}
  fields |= {"num_steps": 2, "batch_size": 2, "samples_per_prompt": 2}
  command += [f"--config.{name}={value}" for name, value in fields.items()]
  results = []
  for processes in (1, 2):
    workdir, log = tmp_path / str(processes), tmp_path / f"{processes}.log"
    with started([*command, f"--workdir={workdir}"], processes, 1, cache, log) as running:
      finish(running, log)
    results.append(json.loads((workdir / "eval.json").read_text()))
  names = ("judges", "witnesses", "drift")
  alone, together = ([result[name] for name in names] for result in results)
  assert together == alone


@pytest.mark.slow
def test_only_process_0_writes(together):
  log = together.with_suffix(".log")
  assert "iteration 4/4" in log_of(log, 0) and "iteration" not in log_of(log, 1)
  assert [line["iteration"] for line in lines(together)] == [0, 1, 2, 3, 4]
  assert len(list((together / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_processes_on_cpus_use_no_compilation_cache(together):
  """With a cache, process 0 would start its programs early, and Gloo would time out."""
  assert not list(together.with_name("compiled").glob("jit_*"))


@pytest.mark.slow
def test_run_of_two_processes_resumes_in_one(world, cache, together, alone, tmp_path):
  workdir = tmp_path / "workdir"
  shutil.copytree(together, workdir)
  shutil.rmtree(workdir / "checkpoints" / "4")
  run(world, workdir, 1, 4, cache)
  assert_same_run(workdir, alone, 4, **ROUNDING)


# ------------------------------------------------------------------------ signals and errors
@pytest.mark.slow
def test_signal_to_one_process_stops_all_and_the_run_resumes_exactly(
  world, cache, together, tmp_path
):
  workdir, log = tmp_path / "workdir", tmp_path / "log"
  with started(training(world, workdir), 2, 2, cache, log) as running:
    wait_for(workdir / "samples" / "000000.png", running, log)
    running[1].send_signal(signal.SIGTERM)
    finish(running, log)
  stopped_after = Checkpoints(workdir / "checkpoints").latest()
  assert stopped_after < 4
  assert f"stopped after iteration {stopped_after} and saved" in log_of(log, 0)
  assert "stopped" not in log_of(log, 1)
  run(world, workdir, 2, 2, cache)
  assert_same_run(workdir, together, 4, **EXACT)


@pytest.mark.slow
def test_process_ends_with_a_message_when_another_is_killed(world, cache, together, tmp_path):
  del together  # requested because it fills the compilation cache
  workdir, log = tmp_path / "workdir", tmp_path / "log"
  command = training(world, workdir, num_iterations=10_000, checkpoint_every=0, sample_every=0)
  with started(command, 2, 2, cache, log) as running:
    wait_for(workdir / "metrics.jsonl", running, log)
    running[0].kill()
    assert running[1].wait(120) != 0
  assert "another task died" in log_of(log, 1) or "has lost another" in log_of(log, 1)


def wait_for(file: Path, running: list[subprocess.Popen], log: Path) -> None:
  """Waits until a file has content; fails if a process ends or after LIMIT seconds."""
  end = time.monotonic() + LIMIT
  while not file.exists() or not file.stat().st_size:
    ended = [index for index, process in enumerate(running) if process.poll() is not None]
    assert not ended, log_of(log, ended[0])[-3000:]
    assert time.monotonic() < end, f"{file} did not appear"
    time.sleep(0.05)


FAILS_IN_ONE = """
  from prefpaint_jax.runtime import cli
  import jax
  from jax.experimental import multihost_utils

  def main():
    multihost_utils.sync_global_devices("both processes")
    if jax.process_index() == 0:
      raise ValueError("this host lacks a file")
    multihost_utils.sync_global_devices("process 1 alone")

  cli.run(main, several_processes=True)
"""


@pytest.mark.slow
def test_process_that_fails_prints_its_error_and_ends_both(tmp_path):
  command = [sys.executable, "-c", textwrap.dedent(FAILS_IN_ONE)]
  with started(command, 2, 1, {}, tmp_path) as running:
    assert running[0].wait(60) == 1
    assert running[1].wait(60) != 0
  assert "error: this host lacks a file\n" in log_of(tmp_path, 0)


AGREES = """
  import numpy as np, jax
  from prefpaint_jax.runtime import distributed, sharding
  distributed.initialize()
  mesh = sharding.make_mesh()
  index = jax.process_index()
  flags = False, index == 1, index == 0, True
  agreed = [bool(distributed.any_process(flag, mesh)) for flag in flags]
  assert agreed == [False, True, True, True], agreed
  rows = np.arange(24.0).reshape(8, 3)
  whole = sharding.place(sharding.batch_sharding(mesh), rows)
  joined = sharding.to_global(mesh, rows[4 * index : 4 * index + 4])
  for array in (whole, joined):
    assert array.shape == (8, 3)
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, rows[shard.index])
  print("agreed")
"""


@pytest.mark.slow
def test_processes_agree_on_flags_and_on_global_arrays(tmp_path):
  command = [sys.executable, "-c", textwrap.dedent(AGREES)]
  with started(command, 2, 2, {}, tmp_path) as running:
    finish(running, tmp_path)
  assert all("agreed" in log_of(tmp_path, index) for index in range(2))


# ------------------------------------------------------------------------- without other processes
def test_any_process_returns_the_flag_of_a_single_process():
  mesh = sharding.make_mesh()
  assert not distributed.any_process(False, mesh) and distributed.any_process(True, mesh)


ADDRESS = {"JAX_COORDINATOR_ADDRESS": "host:1"}


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({}, None),
    (ADDRESS | {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, ("host:1", 3, 2)),
    (ADDRESS | {"SLURM_STEP_NUM_TASKS": "2"}, None),  # JAX reads the other values from Slurm
  ],
)
def test_environment_gives_address_and_processes(environment, expected):
  assert distributed.read_environment(environment) == expected


@pytest.mark.parametrize(
  ("environment", "match"),
  [
    (ADDRESS, "JAX_COORDINATOR_ADDRESS set, but not JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
    (ADDRESS | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2; expected"),
    (ADDRESS | {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=two"),
  ],
)
def test_incomplete_or_invalid_environment_raises(environment, match):
  with pytest.raises(ValueError, match=match):
    distributed.read_environment(environment)


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({"TPU_SKIP_MDS_QUERY": "1"}, False),
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "TPU_SKIP_MDS_QUERY": "1"}, False),  # without srun
    ({"SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_STEP_NUM_TASKS": "8"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a-0,a-1"}, True),
    ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a-0"}, True),
  ],
)
def test_launchers_are_recognised(environment, expected):
  assert distributed.known_launcher(environment) == expected


@pytest.mark.parametrize("shuffle", [True, False])
def test_parts_of_all_processes_in_order_are_the_batch_of_one(shuffle):
  def loader(index: int, count: int):
    stack = lambda examples: {"id": np.array(examples)}
    return endless_batches(range(100, 110), 4, 3, index, count, shuffle, stack, "numbers")

  whole, parts = loader(0, 1), [[loader(i, count) for i in range(count)] for count in (2, 4)]
  for _ in range(7):  # more than two epochs
    expected = next(whole)["id"].tolist()
    for loaders in parts:
      assert np.concatenate([next(part)["id"] for part in loaders]).tolist() == expected
      assert all(part.get_state() == whole.get_state() for part in loaders)


def test_only_python_writes_to_the_standard_output_of_a_process_of_several():
  code = """
import os, sys
from prefpaint_jax.runtime import distributed
distributed.silence_gloo()
os.write(1, b"[Gloo] Rank 0 is connected\\n")
print("ours")
"""
  environment = os.environ | {"JAX_NUM_PROCESSES": "2"}
  ended = subprocess.run(
    [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
  )
  assert (ended.stdout, ended.stderr) == ("ours\n", "")
