"""Runs of `train` and `train_dpo` as other commands read them: config, checkpoints, fixed step."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from prefpaint_jax.runtime.checkpoint import Checkpoints
from prefpaint_jax.runtime.files import read_json, write_json
from prefpaint_jax.runtime.ranges import Integer, Optional, shorten
from prefpaint_jax.runtime.workdir import CONFIG, read_workdir

COMMANDS = ("train", "train_dpo")  # whose workdirs hold a policy
PINNED = "checkpoints.json"  # the file of `pin_steps` in the workdir of a command


def open_run(name: str) -> tuple[ConfigDict, Checkpoints] | None:
  """Returns config and checkpoints of a run; None if `name` is not a workdir.

  Raises:
    ValueError: `name` is the workdir of another command, or its config.json is damaged.
  """
  if not isinstance(name, str | os.PathLike) or not name:
    return None
  workdir = Path(name)
  if (workdir / "model_index.json").is_file() or not (workdir / CONFIG).is_file():
    return None
  config = read_workdir(workdir, *COMMANDS)
  for field in ("policy", "ema_decay"):
    if field not in config:
      raise ValueError(f"{workdir / CONFIG}: no field {field!r}; restore it, or give another run")
  return config, Checkpoints(workdir / "checkpoints", best=config.get("keep_best", ""))


def is_dpo(config: ConfigDict) -> bool:
  """Returns whether the config of a run is that of `train_dpo`."""
  return "preferences" in config


def trained_tree(config: ConfigDict) -> str:
  """Returns the name of the policy in a run's checkpoints: the moving average, if it has one."""
  if not config.ema_decay:
    return "params"
  return "average" if is_dpo(config) else "ema"  # as the state of `fitting` and of `align`


def base_of(name: str) -> str:
  """Returns the pipeline that a run began with; `name` itself if it is no workdir of a run."""
  run = open_run(name)
  return base_of(run[0].policy) if run else name


def pinned_step(workdir: str) -> int | None:
  """Returns the checkpoint that a run of another run's policy began with; None: it has none."""
  file = Path(workdir) / PINNED
  return read_json(file).get("policy") if file.is_file() else None


def pin_steps(
  file: Path, asked: Mapping[str, tuple[str, int | str | None]]
) -> dict[str, int | None]:
  """Chooses one checkpoint of each run, and keeps the choice for every later start.

  The latest checkpoint of a run in progress changes. Without the file, a resumed evaluation would
  mix samples of two checkpoints. All processes of a command call this function and get the steps of
  process 0.

  Args:
    file: JSON file of the choice, in the workdir of the command; delete it to choose again.
    asked: (name, step) by role, such as "baseline"; the step is an iteration, "best", or None for
      the latest checkpoint.

  Returns:
    {role: step}; the step is None if the name is that of a pipeline, which has no checkpoints.

  Raises:
    ValueError: a run has no such checkpoint.
  """
  steps = read_json(file) if file.is_file() else {}
  for role, (name, step) in asked.items():
    if not Optional(Integer(1)).contains(steps.get(role)):
      raise ValueError(
        f"{file}: {role} is {shorten(steps[role])}; expected an iteration or null; delete the file "
        "to choose again"
      )
    if role not in steps:
      run = open_run(name)
      steps[role] = run[1].resolve(step) if run else None
  if jax.process_count() > 1:
    numbers = np.array([-1 if steps[role] is None else steps[role] for role in asked])
    numbers = multihost_utils.broadcast_one_to_all(numbers)
    steps = {role: None if n < 0 else int(n) for role, n in zip(asked, numbers, strict=True)}
  if jax.process_index() == 0:
    write_json(file, steps)
  return steps


def base_step(policy: str, workdir: Path, is_new: bool) -> int | None:
  """Returns the checkpoint of a policy that is a run; a resumed run keeps that of its start."""
  if open_run(policy) is None:
    return None
  if is_new:
    if jax.process_index() == 0:
      (workdir / PINNED).unlink(missing_ok=True)  # of a failed start, perhaps of another policy
    multihost_utils.sync_global_devices("unpinned")  # before the other processes read the file
  return pin_steps(workdir / PINNED, {"policy": (policy, None)})["policy"]
