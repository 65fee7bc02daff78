"""Runs that are killed at random times or meet a full disk resume exactly and write lines once."""

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax import testing, train
from prefpaint_jax.align import run
from prefpaint_jax.align.stages import Stages, make_stages
from prefpaint_jax.align.state import Scores
from prefpaint_jax.runtime import cli
from prefpaint_jax.runtime.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]

# A state with all optional parts, and a save after each iteration.
FIELDS = {
  "num_iterations": 4,
  "batch_size": 2,
  "num_samples": 2,
  "behaviour_refresh": 2,
  "ema_decay": 0.5,
  "checkpoint_every": 1,
  "keep_checkpoints": 2,
  "keep_best": "reward/mean",
  "sample_every": 2,
}

# ------------------------------------------------------------------------------ killed and resumed
KILLS = 6
SAVES_HIT = 2  # number of kills that must leave an incomplete checkpoint


def make_cheap_stages(*arguments) -> Stages:
  """Makes the programs of an iteration, with cheap functions instead of the networks.

  The results depend on all inputs of the real programs: policy, images, keys and timesteps.
  """

  def mean(tree) -> jax.Array:
    leaves = [x.ravel() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.mean(jnp.concatenate(leaves))

  def inpaint(policy, frozen, images, masks, key, context=None):
    return images + masks * jnp.tanh(mean(policy) * jax.random.normal(key, images.shape))

  def rollout(policy, frozen, images, masks, key, context=None, window=None):
    samples = inpaint(policy, frozen, images, masks, key)
    return images, masks, samples

  def score(frozen, prompts, samples, texts=None, on_host=None):
    reward = jnp.mean(samples, axis=(1, 2, 3))
    scores = Scores(reward, jnp.isfinite(reward), reward, reward)
    return scores, {"reward/mean": jnp.mean(reward), "reward/nan_fraction": jnp.zeros(())}

  @jax.jit
  def change_of(state, prompts, scores, indices):
    return 1e-2 * (jnp.mean(scores.reward) + mean(prompts) * jnp.sum(indices) + mean(state))

  def change_by(state, change):
    change_one = lambda x: x + change if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(change_one, state)

  stages = make_stages(*arguments)
  # A separate program: in one program XLA:CPU would recompute `change` for every array.
  change_by = jax.jit(change_by, donate_argnums=0, out_shardings=stages.layout)

  def update(state, frozen, experience, indices):
    change = change_of(state, experience.prompts, experience.scores, indices)
    return change_by(state, change), {"change": change}

  return stages._replace(
    inpaint=jax.jit(inpaint), rollout=jax.jit(rollout), score=jax.jit(score), update=update
  )


def use_cheap_stages() -> None:
  """Makes all later runs of this process use the cheap stages."""
  run.make_stages, train.compile_iteration = make_cheap_stages, lambda *_: None


def run_command() -> None:
  """Runs the command `python -m prefpaint_jax.train` with the cheap stages."""
  use_cheap_stages()
  cli.run_with_config(train.train)


def attempt(fields: dict, workdir: Path, compiled: Path) -> None:
  """Runs the training; the function that the processes of `start` call."""
  os.environ["XLA_FLAGS"] = ""  # one device
  jax.config.update("jax_disable_most_optimizations", True)
  jax.config.update("jax_compilation_cache_dir", str(compiled))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  config = runpy.run_path(str(ROOT / "configs" / "rl.py"))["get_config"]()
  config.update_from_flattened_dict(fields)
  use_cheap_stages()
  train.train(config.lock(), workdir)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Callable[[Path], multiprocessing.Process]:
  """Gives a function that starts a run in a workdir.

  The process of the run is forked from a process that has imported all modules.
  """
  server = multiprocessing.get_context("forkserver")
  lazy_imports = [
    "grain",
    "orbax.checkpoint",
    "tensorflow_datasets",
    "transformers.models.clip.tokenization_clip",
  ]
  server.set_forkserver_preload(["prefpaint_jax.train", *lazy_imports])
  compiled, world = (tmp_path_factory.mktemp(name) for name in ("compiled", "world"))
  fields = testing.tiny_training(testing.write_tiny_world(world)) | FIELDS

  def start(workdir: Path) -> multiprocessing.Process:
    process = server.Process(target=attempt, args=(fields, workdir, compiled), daemon=True)
    process.start()
    return process

  return start


def incomplete_saves(workdir: Path) -> set[tuple[str, int]]:
  """Returns names and inodes of incomplete checkpoints, of saves in progress or killed."""
  entries = os.scandir(workdir / "checkpoints") if (workdir / "checkpoints").exists() else []
  return {(entry.name, entry.inode()) for entry in entries if "orbax-checkpoint-tmp" in entry.name}


def wait_for_save(process: multiprocessing.Process, workdir: Path, count: int) -> None:
  """Waits until the process begins to write its `count`-th checkpoint, or ends."""
  before, seen = incomplete_saves(workdir), set()
  while len(seen) < count and process.is_alive():
    seen |= incomplete_saves(workdir) - before
    time.sleep(0.0005)


def complete_lines(workdir: Path) -> list[dict]:
  """Reads the complete lines of metrics, without fields that depend on the clock."""
  file = workdir / "metrics.jsonl"
  *lines, _ = file.read_text().split("\n") if file.exists() else [""]
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "images_per_s"))}
    for line in lines
  ]


def assert_nothing_before_the_latest_checkpoint_is_lost(workdir: Path) -> int:
  """Checks the lines and images up to the latest checkpoint, whose step it returns."""
  latest = Checkpoints(workdir / "checkpoints").latest() or 0
  lines = [line["iteration"] for line in complete_lines(workdir)]
  assert lines[:latest] == list(range(1, latest + 1))
  due = {f"{i:06d}.png" for i in range(latest + 1) if i % FIELDS["sample_every"] == 0 and latest}
  assert due <= {path.name for path in workdir.glob("samples/*")}
  return latest


def assert_same_run(workdir: Path, expected: Path) -> None:
  """Compares state, position in the data, metrics and images, bit for bit."""
  last = str(FIELDS["num_iterations"])
  for name in ("params", "opt_state", "behaviour", "ema"):
    ours, theirs = (Checkpoints(w / "checkpoints").load(name) for w in (workdir, expected))
    flat, flat_expected = (dict(leaves_of(tree)) for tree in (ours, theirs))
    assert flat.keys() == flat_expected.keys()
    for path, leaf in flat.items():
      np.testing.assert_array_equal(leaf, flat_expected[path], err_msg=path)
  contents = lambda w, pattern: {path.name: path.read_bytes() for path in w.glob(pattern)}
  for pattern in (f"checkpoints/{last}/run/metadata", "samples/*", "config.json"):
    assert contents(workdir, pattern) == contents(expected, pattern)
  assert complete_lines(workdir) == complete_lines(expected)
  # A run that was killed after its last save may keep an older checkpoint, which only a further
  # save would have deleted.
  names = lambda w: {path.name for path in (w / "checkpoints").iterdir()}
  assert names(expected) <= names(workdir)


def leaves_of(tree: dict, prefix: str = ""):
  """Yields (path, leaf) of nested dictionaries."""
  for name, value in tree.items():
    path = f"{prefix}/{name}"
    yield from leaves_of(value, path) if isinstance(value, dict) else [(path, value)]


@pytest.mark.slow
def test_run_killed_at_random_times_equals_an_uninterrupted_run(start, tmp_path):
  expected = tmp_path / "uninterrupted"
  for workdir in (expected, tmp_path / "timed"):  # the first one compiles
    began = time.monotonic()
    process = start(workdir)
    process.join()
    assert process.exitcode == 0
    duration = time.monotonic() - began
  assert_same_run(tmp_path / "timed", expected)
  assert len(complete_lines(expected)) == FIELDS["num_iterations"]

  rng = np.random.default_rng(0)
  kills = saves_hit = attempts = latest = 0
  runs = [tmp_path / "killed_0"]
  while kills < KILLS or saves_hit < SAVES_HIT:
    attempts += 1
    assert attempts < 3 * KILLS, f"{kills} kills in {attempts} attempts, {saves_hit} of saves"
    left, began = incomplete_saves(runs[-1]), time.monotonic()
    process = start(runs[-1])
    if attempts % 2:
      process.join(rng.uniform(0.0, duration))
    else:
      wait_for_save(process, runs[-1], count=rng.integers(1, 4))
      time.sleep(rng.uniform(0.0, 0.02))
    process.kill()
    process.join()
    before, latest = latest, assert_nothing_before_the_latest_checkpoint_is_lost(runs[-1])
    assert before <= latest
    if process.exitcode == 0:  # the run ended before the kill
      duration = time.monotonic() - began
      runs.append(tmp_path / f"killed_{len(runs)}")
      latest = 0
    else:
      kills += 1
      saves_hit += bool(incomplete_saves(runs[-1]) - left)
  process = start(runs[-1])
  process.join()
  assert process.exitcode == 0
  for workdir in runs:
    assert_same_run(workdir, expected)
  print(f"{kills} kills, {saves_hit} during a save, in {attempts} attempts at {len(runs)} runs")


# -------------------------------------------------------------------------------------- full disks
@pytest.fixture
def on_small_disk(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
  """Gives a function that runs Python code; `disk` is a folder on a file system of `size` bytes."""
  disk = tmp_path / "disk"
  disk.mkdir()

  def run(code: str, size: int, *arguments: str) -> subprocess.CompletedProcess:
    mount = f'mount -t tmpfs -o size={size} none {disk} && exec "$@"'
    python = [sys.executable, "-c", f"disk = {str(disk)!r}\n" + textwrap.dedent(code), *arguments]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *python]
    environment = os.environ | {"XLA_FLAGS": ""}
    return subprocess.run(
      command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )

  if shutil.which("unshare") is None or run("", 4096).returncode:
    pytest.skip("needs the right to mount a file system")
  return run


def test_save_on_a_full_disk_raises_one_line_and_keeps_earlier_checkpoints(on_small_disk, tmp_path):
  code = """
    import jax.numpy as jnp, numpy as np
    from prefpaint_jax.runtime.checkpoint import Checkpoints, silence_orbax

    silence_orbax()
    state, too_much = {"params": jnp.arange(100.0)}, {"params": jnp.arange(4e5)}
    for found_by in ("wait", "close", "save"):
      checkpoints = Checkpoints(disk + "/run")
      step = (checkpoints.latest() or 0) + 1
      checkpoints.save(step, state, {"next": step}, {})
      try:
        checkpoints.save(step + 1, too_much, None, {})
        getattr(checkpoints, found_by)(*((step + 2, state, None, {}) if found_by == "save" else ()))
      except OSError as error:
        print(error)
      reader = Checkpoints(disk + "/run")
      assert reader.latest() == step
      restored, data_state, _ = reader.restore(state)
      np.testing.assert_array_equal(restored["params"], state["params"])
      assert data_state == {"next": step}
  """
  ended = on_small_disk(code, 2**20)
  assert ended.returncode == 0, ended.stderr
  assert not ended.stderr
  lines = ended.stdout.splitlines()
  assert len(lines) == 3
  for line in lines:
    assert f"checkpoints {tmp_path}/disk/run: cannot be written" in line
    assert "No space left on device" in line and "make room" in line


@pytest.mark.slow
def test_run_on_a_full_disk_prints_one_line_and_resumes_from_its_latest_checkpoint(
  on_small_disk, tmp_path
):
  code = """
    import os, subprocess, sys
    from prefpaint_jax.runtime.checkpoint import Checkpoints

    command = "import test_faults; test_faults.run_command()"
    arguments = [sys.executable, "-c", command, *sys.argv[1:]]
    for changes in [], ["--config.keep_checkpoints=1"]:
      ended = subprocess.run([*arguments, *changes], capture_output=True, text=True)
      error = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
      latest = Checkpoints(disk + "/run/checkpoints").latest()
      print(ended.returncode, latest, *error, sep="\\t")
      os.system(f"rm -rf {disk}/run/checkpoints/[123]")  # makes room
  """
  fields = testing.tiny_training(testing.write_tiny_world(tmp_path / "world")) | FIELDS
  fields |= {"num_iterations": 8, "keep_checkpoints": 100}
  arguments = [f"--config.{name}={value}" for name, value in fields.items()]
  run = f"{tmp_path}/disk/run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    ended = on_small_disk(
      code, 7 * 2**20, f"--config={ROOT}/configs/rl.py", f"--workdir={run}", *arguments
    )
  assert ended.returncode == 0, ended.stderr
  full, resumed = (line.split("\t") for line in ended.stdout.splitlines())
  status, latest, *error = full
  assert status == "1" and 2 < int(latest) < 8
  (message,) = error
  assert message.startswith("error: ") and run in message
  assert "No space left on device" in message
  assert resumed == ["0", "8"]


def test_metrics_on_a_full_disk_end_the_command_with_one_line(on_small_disk, tmp_path):
  code = """
    from prefpaint_jax.runtime import cli
    from prefpaint_jax.runtime.metrics import MetricsWriter

    def main(config, workdir):
      writer = MetricsWriter(workdir)
      try:
        for iteration in range(1, 10_000):
          writer.write(iteration, {f"name_{i}": iteration for i in range(50)})
      finally:
        writer.close()

    cli.run_with_config(main)
  """
  disk = f"{tmp_path}/disk"
  ended = on_small_disk(code, 2**19, f"--config={ROOT}/configs/rl.py", f"--workdir={disk}")
  assert ended.returncode == 1
  assert ended.stderr == (
    f"error: {disk}: No space left on device; make room and run the same command to resume from "
    "the latest checkpoint\n"
  )


# ---------------------------------------------------------------------------------- times in a log
@pytest.mark.slow
def test_rollout_and_update_times_do_not_overlap(tmp_path, monkeypatch):
  rollout_s, update_s = 0.2, 0.4

  def delayed(function: Callable, seconds: float) -> Callable:
    def call(*arguments):
      time.sleep(seconds)
      return jax.block_until_ready(function(*arguments))

    return call

  def make_slow_stages(*arguments) -> Stages:
    stages = make_cheap_stages(*arguments)
    return stages._replace(
      rollout=delayed(stages.rollout, rollout_s),
      score=delayed(stages.score, 0.0),
      update=delayed(stages.update, update_s),
    )

  monkeypatch.setattr(run, "make_stages", make_slow_stages)
  monkeypatch.setattr(train, "compile_iteration", lambda *_: None)
  config = runpy.run_path(str(ROOT / "configs" / "rl.py"))["get_config"]()
  world = testing.write_tiny_world(tmp_path / "world")
  never = {"checkpoint_every": 0, "sample_every": 0, "updates_per_iteration": 1}
  config.update_from_flattened_dict(testing.tiny_training(world) | never | {"num_iterations": 3})
  train.train(config.lock(), tmp_path / "run")
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  assert len(lines) == 3
  for line in lines:
    assert line["time/rollout_s"] > rollout_s and line["time/update_s"] > update_s
