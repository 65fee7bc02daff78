"""Whole runs of tiny models: their files, and that a stopped run resumes exactly."""

import json
import logging
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard
from ml_collections import ConfigDict
from PIL import Image

from prefpaint_jax import testing
from prefpaint_jax.align import rollout
from prefpaint_jax.evaluation import drift
from prefpaint_jax.inpainter import Inpainter, open_policy
from prefpaint_jax.models import architectures
from prefpaint_jax.runtime import metrics, sharding
from prefpaint_jax.runtime.checkpoint import Checkpoints
from prefpaint_jax.train import train

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[1]
get_config = runpy.run_path(str(ROOT / "configs" / "rl.py"))["get_config"]

# Turns on every optional tree of the state. The checkpoint after iteration 3 is in the middle of a
# gradient accumulation and of a refresh of the behaviour policy.
RHYTHMS = {
  "num_iterations": 5,
  "checkpoint_every": 3,
  "gradient_accumulation": 2,
  "behaviour_refresh": 3,
  "ema_decay": 0.5,
  "keep_best": "reward/mean",
  "eval_every": 2,
  "eval_prompts": 8,
  "final_prompts": 8,
}
BARE = {"sample_every": 0, "eval_every": 0, "checkpoint_every": 0, "final_prompts": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
  return testing.write_tiny_world(tmp_path_factory.mktemp("world"), test=16)


def make_config(world: dict[str, str], **changes) -> ConfigDict:
  config = get_config()
  config.update_from_flattened_dict(testing.tiny_training(world) | changes)
  return config.lock()


class Run:
  """Trains a run, and counts how often each of its programs is compiled."""

  def __init__(self, config: ConfigDict, workdir: Path):
    self.config, self.workdir = config, workdir
    compiled = []
    handler = logging.Handler()
    handler.emit = lambda record: compiled.append(record.getMessage())
    logger = logging.getLogger("jax._src.dispatch")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
      self.state = train(config, workdir)
    finally:
      logger.removeHandler(handler)
      logger.setLevel(level)
      logger.propagate = propagate
    names = re.findall(r"Finished XLA compilation of jit\((\w+)\)", "\n".join(compiled))
    self.compiled = {name: names.count(name) for name in names}

  def all_lines(self) -> list[dict]:
    text = (self.workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]

  def lines(self) -> list[dict]:
    """Returns the lines of trained iterations, without that of iteration 0."""
    return [line for line in self.all_lines() if line["iteration"]]


def numbers(lines: list[dict]) -> list[dict]:
  """Returns the lines without the metrics that depend on the clock."""
  timed = ("time/", "images_per_s")
  return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Run:
  """Returns an uninterrupted run, with which other runs are compared."""
  return Run(make_config(world, **RHYTHMS), tmp_path_factory.mktemp("run") / "workdir")


def assert_same_run(workdir: Path, state, expected: Run) -> None:
  # Compare the lines first, because they show the first iteration that differs.
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  for ours, theirs in zip(numbers(lines), numbers(expected.all_lines()), strict=True):
    assert ours == theirs
  leaves, tree = jax.tree.flatten(jax.device_get(state))
  expected_leaves, expected_tree = jax.tree.flatten(jax.device_get(expected.state))
  assert tree == expected_tree
  for ours, theirs in zip(leaves, expected_leaves, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  images = sorted(path.name for path in (expected.workdir / "samples").iterdir())
  assert sorted(path.name for path in (workdir / "samples").iterdir()) == images
  for name in images:
    ours, theirs = (
      np.asarray(Image.open(w / "samples" / name)) for w in (workdir, expected.workdir)
    )
    np.testing.assert_array_equal(ours, theirs, err_msg=name)


def command(name: str, *arguments: str) -> list[str]:
  return [sys.executable, "-m", f"prefpaint_jax.{name}", *arguments]


def training_command(config: dict, workdir: Path) -> list[str]:
  fields = [f"--config.{name}={value}" for name, value in config.items()]
  return command("train", f"--config={ROOT}/configs/rl.py", f"--workdir={workdir}", *fields)


def run_command(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)


# ------------------------------------------------------------------------------------ a whole run
def test_run_writes_metrics_samples_checkpoints_and_config(finished):
  workdir, lines = finished.workdir, finished.lines()
  assert [line["iteration"] for line in finished.all_lines()] == [0, 1, 2, 3, 4, 5]
  expected = {
    "reward/mean",
    "reward/std",
    "reward/nan_fraction",
    "trust/mean",
    "trust/std",
    "ppo/clip_fraction",
    "ppo/approx_kl",
    "ppo/ratio_mean",
    "ppo/grad_norm",
    "ppo/learning_rate",
    "time/rollout_s",
    "time/update_s",
    "time/iteration_s",
    "time/images_per_s",
    "images_per_s",
  }
  assert all(expected <= line.keys() for line in lines)
  assert all(value is not None for line in lines for value in line.values())
  assert sorted(path.name for path in (workdir / "samples").iterdir()) == [
    f"{iteration:06d}.png" for iteration in (0, 2, 4, 5)
  ]
  assert Checkpoints(workdir / "checkpoints").latest() == 5
  (events,) = (workdir / "tensorboard").iterdir()
  tags = ("held_out/samples", "rollout/reward", "rollout/trust", "rollout/advantages")
  assert all(tag.encode() in events.read_bytes() for tag in tags)
  assert json.loads((workdir / "config.json").read_text())["ema_decay"] == 0.5


def test_iteration_0_is_the_base_against_itself(finished):
  first, second = finished.all_lines()[0], finished.all_lines()[2]
  assert first["held_out/reward_winrate"] == 0.5
  assert first["held_out/reward_gain"] == first["held_out/reward_gain_in_sd"] == 0.0
  measured = ("held_out/", "referee/")
  assert {key for key in second if key.startswith(measured)} == first.keys() - {"iteration"}
  assert second["held_out/reward_gain"] == pytest.approx(
    second["held_out/reward"] - first["held_out/reward"], abs=1e-6
  )


def test_held_out_metrics_have_the_level_of_the_base_and_intervals(finished):
  first, _, second = finished.all_lines()[:3]
  assert second["held_out/reward/base"] == pytest.approx(first["held_out/reward"], abs=1e-6)
  for suffix in ("", "_winrate", "_gain", "_gain_in_sd"):
    name = f"held_out/reward{suffix}"
    assert second[f"{name}/low"] <= second[name] <= second[f"{name}/high"]


@pytest.mark.slow
def test_run_that_ended_before_its_first_checkpoint_writes_iteration_0_once(
  world, finished, tmp_path, monkeypatch
):
  def power_cut(*_):
    raise RuntimeError("power cut")

  config = make_config(world, **RHYTHMS | {"num_iterations": 1, "final_prompts": 0})
  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
    patch.setattr(metrics.IterationLog, "scored", power_cut)
    train(config, tmp_path)
  lines = lambda: [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
  assert [line["iteration"] for line in lines()] == [0]
  train(config, tmp_path)
  assert numbers(lines()) == numbers(finished.all_lines()[:2])


def test_ratio_is_one_until_the_first_optimiser_step(finished):
  before, first_step = finished.lines()[:2]
  assert before["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
  assert before["ppo/clip_fraction"] == 0.0
  # The second iteration steps after each of its two updates: its second update has another policy.
  assert first_step["ppo/ratio_mean"] != before["ppo/ratio_mean"]


def test_every_program_is_compiled_once(finished):
  programs = ("rollout", "score", "update", "end_iteration", "inpaint")
  assert {name: finished.compiled.get(name) for name in programs} == dict.fromkeys(programs, 1)
  assert finished.compiled.get("_rewards_of", 0) <= 1  # an earlier run may have compiled it


@pytest.mark.slow
def test_another_seed_gives_other_rewards(world, finished, tmp_path):
  changes = {"seed": 1, "num_iterations": 1} | BARE
  other = Run(make_config(world, **RHYTHMS | changes), tmp_path)
  assert not any((tmp_path / name).exists() for name in ("samples", "checkpoints"))
  assert other.lines()[0]["reward/mean"] != finished.lines()[0]["reward/mean"]


# ------------------------------------------------------------------------------ killed and resumed
def crash_and_resume(config: ConfigDict, workdir: Path, monkeypatch, at: int):
  """Interrupts a run after the line of iteration `at`; returns the state of its second start."""
  write = metrics.MetricsWriter.write

  def write_and_crash(self, iteration, scalars):
    write(self, iteration, scalars)
    if iteration == at:
      raise RuntimeError("power cut")

  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
    patch.setattr(metrics.MetricsWriter, "write", write_and_crash)
    train(config, workdir)
  checkpoints = Checkpoints(workdir / "checkpoints")
  for _ in range(100):  # the crash may interrupt a save in the background
    if checkpoints.latest() == at - 1:
      break
    time.sleep(0.1)
  assert checkpoints.latest() == at - 1
  return train(config, workdir)


def test_crashed_and_resumed_equals_uninterrupted(world, finished, tmp_path, monkeypatch):
  state = crash_and_resume(make_config(world, **RHYTHMS), tmp_path, monkeypatch, at=4)
  assert_same_run(tmp_path, state, finished)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {"algorithm": "nft", "eta": 0.0, "kl_weight": 0.1, "nft.decay_rate": 0.1},
    {"ratio_normalisation": True, "window": 2, "window_iterations": 1, "train_timesteps": 2},
  ],
  ids=["nft", "window"],
)
def test_crashed_run_of_another_algorithm_resumes_exactly(world, tmp_path, monkeypatch, changes):
  fields = {"num_iterations": 4, "checkpoint_every": 2, "ema_decay": 0.5}
  config = make_config(world, **fields | {"sample_every": 2, "eval_every": 0} | changes)
  whole = Run(config, tmp_path / "whole")
  prefix = f"{config.algorithm}/"
  assert {f"{prefix}grad_norm", f"{prefix}learning_rate"} <= whole.lines()[-1].keys()
  assert whole.compiled["rollout"] == whole.compiled["update"] == 1  # also where the window slides
  passes = whole.lines()[-1]["count/unet_passes"] / whole.lines()[-1]["count/images"]
  K = config.train_timesteps
  assert passes == config.num_steps + K * (5 if config.algorithm == "nft" else 3)
  state = crash_and_resume(config, tmp_path / "crashed", monkeypatch, at=3)
  assert_same_run(tmp_path / "crashed", state, whole)


@pytest.mark.slow
def test_terminated_and_resumed_equals_uninterrupted(world, finished, tmp_path):
  arguments = training_command(testing.tiny_training(world) | RHYTHMS, tmp_path)
  started = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  for _ in range(1200):
    if (tmp_path / "samples" / "000000.png").exists() or started.poll() is not None:
      break
    time.sleep(0.1)
  started.send_signal(signal.SIGTERM)
  printed, _ = started.communicate(timeout=120)
  assert started.returncode == 0
  stopped_after = Checkpoints(tmp_path / "checkpoints").latest()
  assert stopped_after < 5
  assert f"stopped after iteration {stopped_after} and saved" in printed
  assert_same_run(tmp_path, train(make_config(world, **RHYTHMS), tmp_path), finished)


def signalled_at(monkeypatch, module, name: str, call: int, *signals: signal.Signals) -> None:
  """Patches a function to raise signals in this process at its `call`-th call."""
  function, calls = getattr(module, name), []

  def call_and_signal(*args, **kwargs):
    calls.append(name)
    if len(calls) == call:
      for number in signals:
        signal.raise_signal(number)
    return function(*args, **kwargs)

  monkeypatch.setattr(module, name, call_and_signal)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("module", "name", "call", "number", "stopped_after"),
  [
    (rollout, "rollout", 1, signal.SIGTERM, 1),  # while the first iteration is compiled
    (drift, "measure", 9, signal.SIGINT, 5),  # in the first chunk of the final comparison
  ],
)
def test_run_without_checkpoints_is_saved_on_a_signal(
  world, finished, module, name, call, number, stopped_after, tmp_path, monkeypatch, capsys
):
  config = RHYTHMS | {"final_prompts": 16}
  with monkeypatch.context() as patch:
    signalled_at(patch, module, name, call, number)
    train(make_config(world, **config | {"checkpoint_every": 0}), tmp_path)
  assert capsys.readouterr().out == (
    f"stopped after iteration {stopped_after} and saved; the same command goes on\n"
  )
  assert Checkpoints(tmp_path / "checkpoints").latest() == stopped_after
  state = train(make_config(world, **config), tmp_path)
  assert_same_run(tmp_path, state, finished)
  assert "16 held-out prompts (test), policy against base" in capsys.readouterr().out


@pytest.mark.slow
def test_second_signal_interrupts_the_run(interruptible, world, tmp_path, monkeypatch):
  signalled_at(monkeypatch, rollout, "rollout", 1, signal.SIGINT, signal.SIGINT)
  with pytest.raises(KeyboardInterrupt):
    train(make_config(world, **RHYTHMS), tmp_path)
  assert Checkpoints(tmp_path / "checkpoints").latest() is None


@pytest.mark.slow
def test_run_with_split_parameters_and_passes_resumes_on_another_mesh_with_the_whole_batch(
  world, finished, tmp_path, monkeypatch
):
  split = {"mesh.data": 2, "mesh.fsdp": 4, "samples_per_pass": 1, "num_iterations": 3}
  with monkeypatch.context() as patch:
    patch.setattr(sharding, "SMALL", 64)  # the tiny models then have arrays to split
    state = train(make_config(world, **RHYTHMS | split), tmp_path)
  for tree in (state.params, state.ema, state.behaviour, state.gradients):
    leaves = jax.tree.leaves(tree)
    assert sum("fsdp" in leaf.sharding.spec for leaf in leaves) > len(leaves) / 3
  state = train(make_config(world, **RHYTHMS), tmp_path)
  for ours, theirs in zip(*map(jax.tree.leaves, (state, finished.state)), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
  ours, theirs = (
    [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for folder in (tmp_path, finished.workdir)
  )
  assert [line["iteration"] for line in ours] == [0, 1, 2, 3, 4, 5]
  rewards = lambda lines: [line["reward/mean"] for line in lines[1:]]
  np.testing.assert_allclose(rewards(ours), rewards(theirs), atol=1e-4)


@pytest.mark.slow
def test_best_checkpoint_has_the_highest_metric(finished):
  rewards = {line["iteration"]: line["reward/mean"] for line in finished.lines()}
  best = max((3, 5), key=rewards.get)  # the iterations with a checkpoint
  expected = Checkpoints(finished.workdir / "checkpoints").load("ema", best)
  for step in ("best", str(best), best):
    opened = open_policy(str(finished.workdir), step=step).params["unet"]
    assert jax.tree.all(jax.tree.map(np.array_equal, opened, expected))


@pytest.mark.slow
def test_a_run_can_begin_with_another_run_and_keeps_the_checkpoint_that_it_began_with(
  world, finished, tmp_path
):
  first, second = tmp_path / "first", tmp_path / "second"
  shutil.copytree(finished.workdir, first)
  changes = {"policy": str(first), "num_iterations": 1, "lora.rank": 2, "checkpoint_every": 1}
  train(make_config(world, **BARE | changes), second)
  expected = Checkpoints(finished.workdir / "checkpoints").load("ema")
  opened = lambda: open_policy(str(second)).params["unet"]
  before, flat = opened(), jax.tree_util.tree_leaves_with_path
  for (path, ours), theirs in zip(flat(before), jax.tree.leaves(expected), strict=True):
    if "attn" not in jax.tree_util.keystr(path):  # without adapters
      np.testing.assert_array_equal(ours, theirs)
  train(make_config(world, **RHYTHMS | {"num_iterations": 6, "checkpoint_every": 6}), first)
  jax.tree.map(np.testing.assert_array_equal, opened(), before)
  assert (
    architectures.read_architecture(str(second))[0]
    == architectures.read_architecture(world["policy"])[0]
  )
  with pytest.raises(ValueError, match="the run's own workdir; give another --workdir"):
    train(make_config(world, policy=str(second)), second)


@pytest.mark.slow
def test_finished_run_can_be_longer_but_not_have_another_config(world, finished, tmp_path, capsys):
  workdir = tmp_path / "copy"
  shutil.copytree(finished.workdir, workdir)
  config = make_config(world, **RHYTHMS | {"learning_rate": 0.5, "trust.norm": "none"})
  with pytest.raises(ValueError, match=r"learning_rate was 0\.001, now 0\.5; trust\.norm was"):
    train(config, workdir)
  longer = {"num_iterations": 6, "checkpoint_every": 6, "sample_every": 0}
  state = train(make_config(world, **RHYTHMS | longer), workdir)
  assert int(state.iteration) == 6
  stored = lambda: json.loads((workdir / "config.json").read_text())["num_iterations"]
  assert stored() == 6
  assert "finished" not in capsys.readouterr().out
  train(make_config(world, **RHYTHMS | longer), workdir)
  assert f"{workdir}: finished after iteration 6, with metrics.jsonl" in capsys.readouterr().out
  (workdir / "checkpoints" / "6" / "run" / "metadata").unlink()
  with pytest.raises(ValueError, match=r"cannot be read .*; remove this folder to resume from the"):
    train(make_config(world, **RHYTHMS | longer | {"num_iterations": 9}), workdir)
  assert stored() == 6  # a refused resume changes nothing


def test_run_that_failed_to_start_can_start_with_another_config(world, tmp_path):
  with pytest.raises(ValueError, match="no such folder"):
    train(make_config(world, policy="/nowhere"), tmp_path)
  with pytest.raises(ValueError, match="no such folder"):
    train(make_config(world, policy="/elsewhere"), tmp_path)


# ------------------------------------------------------------------------------ errors in a config
def test_batch_that_does_not_divide_over_the_devices_is_an_error(world, tmp_path):
  with pytest.raises(ValueError, match="batch_size 12 does not divide over 8 devices"):
    train(make_config(world, batch_size=12), tmp_path)
  with pytest.raises(ValueError, match="num_samples 3 does not divide over 8 devices"):
    train(make_config(world, num_samples=3), tmp_path)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"prompts": ""}, r"config\.prompts is empty"),
    ({"prompts": "/nowhere"}, "/nowhere is not a folder"),
    ({"final_prompts": 24}, "final_prompts is 24, .* has 16 prompts for it; give at most 16"),
    ({"eval_prompts": 24, "eval_every": 1}, "eval_prompts is 24, .* has 16 prompts for it"),
    ({"batch_size": 24}, "16 prompts are fewer than batch_size 24"),
    ({"train_timesteps": 4}, "train_timesteps is 4; expected 1 to 3"),
    ({"updates_per_iteration": 3}, "updates_per_iteration is 3; expected a divisor of"),
    ({"eta": 0.0}, "eta is 0 with algorithm='ppo'"),
    ({"size": 9}, "images are 9x9: both sides must be multiples of 2"),
    ({"trust.norm": "l2"}, r"trust\.norm is 'l2'"),
    ({"keep_best": "reward/men"}, "keep_best is 'reward/men'; expected '' or one of reward"),
    ({"stop_on_hacking": True}, "stop_on_hacking needs judges, keep_best=held_out/judge/NAME and"),
    ({"keep_best": "held_out/judge/mini"}, "keep_best is 'held_out/judge/mini'; expected ''"),
    (
      {"keep_best": "held_out/reward", "eval_every": 4},
      "eval_every=4 .* make checkpoint_every=2 a multiple of eval_every",
    ),
  ],
)
def test_wrong_fields_are_errors_before_compilation(world, changes, match, tmp_path):
  with pytest.raises(ValueError, match=rf"\A[^\n]*{match}[^\n]*\Z"):
    train(make_config(world, **changes), tmp_path)
  assert not (tmp_path / "checkpoints").exists()


def test_trust_norm_without_a_bound_is_an_error(world, tmp_path):
  shutil.copytree(world["reward"], tmp_path / "reward")
  (tmp_path / "reward" / "bound.safetensors").unlink()
  config = make_config(world, reward=str(tmp_path / "reward"))
  with pytest.raises(ValueError, match=r"trust\.norm='mahalanobis' needs a bound, .* has none"):
    train(config, tmp_path / "workdir")


@pytest.mark.slow
def test_rewards_that_are_not_finite_stop_the_run_and_save_it(world, tmp_path):
  reward_model = testing.tiny_reward()
  reward_model.params["mlp"]["last_layer"]["kernel"][:] = 3e38  # the sum overflows
  reward_model.save_pretrained(tmp_path / "reward")
  changes = BARE | {"checkpoint_every": 2, "weight_decay": 0.0}
  config = make_config(world, reward=str(tmp_path / "reward"), **changes)
  with pytest.raises(ValueError, match="iteration 1: 100% of the rewards are not finite"):
    train(config, tmp_path / "workdir")
  checkpoints = Checkpoints(tmp_path / "workdir" / "checkpoints")
  assert checkpoints.latest() == 1
  # Without a finite reward no parameter changes.
  base = Inpainter.from_pretrained(world["policy"]).params["unet"]
  assert jax.tree.all(jax.tree.map(np.array_equal, checkpoints.load("params"), base))
  (line,) = (tmp_path / "workdir" / "metrics.jsonl").read_text().splitlines()
  assert json.loads(line)["reward/nan_fraction"] == 1.0


@pytest.mark.parametrize(
  ("argument", "expected"),
  [
    (
      "--config.learning_rat=3",
      "--config.learning_rat: no such field; .* --config.learning_rate.*",
    ),
    ("--config.trust.nrm=none", "--config.trust.nrm: no such field; .* --config.trust.norm.*"),
    ("--config.seed=abc", "flag --config.seed=abc: .*"),
    ("--config.prompts=", "config.prompts is empty.*"),
  ],
)
def test_wrong_command_line_is_an_error_of_one_line(argument, expected, tmp_path):
  ended = run_command(*training_command({}, tmp_path), argument)
  assert ended.returncode == 1
  assert re.fullmatch(f"error: {expected}\n", ended.stderr), ended.stderr


# -------------------------------------------------------------------------- export and inpainting
@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory) -> Path:
  output = tmp_path_factory.mktemp("exported") / "model"
  ended = run_command(*command("export", f"--workdir={finished.workdir}", f"--output={output}"))
  assert ended.returncode == 0, ended.stderr
  return output


@pytest.mark.slow
def test_export_has_the_moving_average_and_other_networks_of_the_base(world, finished, exported):
  ours, base = Inpainter.from_pretrained(exported), Inpainter.from_pretrained(world["policy"])
  same = lambda a, b: jax.tree.all(jax.tree.map(np.array_equal, a, b))
  assert same(ours.params["unet"], jax.device_get(finished.state.ema))
  assert not same(ours.params["unet"], jax.device_get(finished.state.params))
  assert same(ours.params["vae"], base.params["vae"])
  assert same(ours.params["text_encoder"], base.params["text_encoder"])
  assert ours.configs == base.configs and ours.tokenizer_files == base.tokenizer_files


@pytest.mark.slow
def test_export_has_a_model_card_with_the_samples_of_the_run(world, finished, exported):
  card = ModelCard.load(exported / "README.md")
  assert card.data.library_name == "diffusers"
  iteration = int(finished.state.iteration)
  assert f"| iteration | {iteration} |" in card.text and world["policy"] not in card.content
  last = max((finished.workdir / "samples").glob("*.png"))
  assert (exported / "samples.png").read_bytes() == last.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags, message",
  [
    (["--push_to=model"], "--push_to is 'model'; expected a hub name owner/name"),
    (["--evaluation=none"], "none: no such file"),
    (
      ["--lora=kohya", "--push_to=a/b"],
      "--push_to applies to whole policies; leave it out",
    ),
    (["--push_to=a/b"], "a/b: not uploaded"),
  ],
)
def test_export_that_cannot_be_as_asked_says_so_in_one_line(
  finished, tmp_path, monkeypatch, flags, message
):
  output = tmp_path / "model"
  arguments = command("export", f"--workdir={finished.workdir}", f"--output={output}", *flags)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  ended = run_command(*arguments)
  assert ended.returncode == 1
  assert ended.stderr.startswith(f"error: {message}") and ended.stderr.count("\n") == 1
  assert output.exists() == (flags == ["--push_to=a/b"])


@pytest.mark.slow
def test_diffusers_opens_the_export_and_inpaints(exported):
  torch = pytest.importorskip("torch", reason="stock diffusers needs torch: pip install torch")
  diffusers = pytest.importorskip("diffusers")
  torch.set_num_threads(1)
  pipeline = diffusers.AutoPipelineForInpainting.from_pretrained(exported)
  pipeline.set_progress_bar_config(disable=True)
  images, masks = testing.tiny_prompts(1)
  samples = pipeline(
    prompt="",
    image=Image.fromarray(np.uint8(255 * images[0])),
    mask_image=Image.fromarray(np.uint8(255 * masks[0, ..., 0])),
    height=architectures.SIZE,
    width=architectures.SIZE,
    num_inference_steps=2,
    output_type="np",
  ).images
  assert samples.shape == (1, architectures.SIZE, architectures.SIZE, 3)
  assert np.isfinite(samples).all()


@pytest.mark.slow
def test_export_to_a_folder_with_files_is_an_error(finished, exported):
  ended = run_command(*command("export", f"--workdir={finished.workdir}", f"--output={exported}"))
  assert ended.returncode == 1
  message = f"error: {exported} is not empty, it has README.md; name a new folder\n"
  assert ended.stderr == message


@pytest.mark.slow
def test_inpaint_command_writes_scored_samples_that_keep_the_known_pixels(world, tmp_path):
  images, masks = testing.tiny_prompts(1)
  image, mask = np.uint8(255 * images[0]), np.uint8(255 * masks[0, ..., 0])
  Image.fromarray(image).save(tmp_path / "image.png")
  Image.fromarray(mask).save(tmp_path / "mask.png")
  arguments = command(
    "inpaint",
    f"--model={world['policy']}",
    f"--image={tmp_path}/image.png",
    f"--mask={tmp_path}/mask.png",
    f"--output={tmp_path}/out/sample.png",
    f"--reward={world['reward']}",
    "--num_samples=2",
    "--num_steps=2",
    "--seed=3",
    "--eta=1",
    "--text=a tree",
  )
  ended = run_command(*arguments)
  assert ended.returncode == 0, ended.stderr
  names = [tmp_path / "out" / f"sample_{i}.png" for i in range(2)]
  samples = [np.asarray(Image.open(name)) for name in names]
  for sample in samples:
    np.testing.assert_array_equal(sample[mask == 0], image[mask == 0])
  assert (samples[0] != samples[1]).any()
  rewards = [Image.open(name).text["reward"] for name in names]
  assert ended.stdout == "".join(
    f"{name} reward {reward}\n" for name, reward in zip(names, rewards, strict=True)
  )
  # The Python API gives the same samples.
  inpainter = Inpainter.from_pretrained(world["policy"])
  again = inpainter(
    image, mask, key=jax.random.key(3), num_steps=2, eta=1.0, text="a tree", num_samples=2
  )
  np.testing.assert_allclose(np.stack(samples), 255 * again, atol=1)


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    (
      {"output": "out.tif"},
      r"--output=out\.tif: give a name that ends in \.png, \.jpg, .* or \.webp",
    ),
    ({"mask": "missing.png"}, r"missing\.png: no such file"),
  ],
)
def test_wrong_inpaint_command_is_an_error_of_one_line(changes, expected):
  given = {"image": "a.png", "mask": "b.png", "output": "c.png"} | changes
  ended = run_command(*command("inpaint", *(f"--{name}={value}" for name, value in given.items())))
  assert ended.returncode == 1
  assert re.fullmatch(f"error: {expected}\n", ended.stderr), ended.stderr
