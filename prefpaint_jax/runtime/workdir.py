"""The workdir of a command: its config.json, and a lock that admits one process at a time."""

import contextlib
import fcntl
import functools
import json
import os
import socket
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from prefpaint_jax.runtime.config_check import check_stored
from prefpaint_jax.runtime.files import check_folder, check_is_folder, read_json, write_json

CONFIG = "config.json"
LOCK = ".lock"
COMMAND = "command"  # the key of config.json that names the command; the others are its fields

# Values of fields that config.json of earlier versions lacks: what those versions computed.
EARLIER = {
  "mask_latents": "corner",
  "vae_posterior": "mean",
  "network.differences": True,
  "lora.init": "",
  "guidance_scale": 1.0,
  "text_dropout": 0.0,
  "combine": "sum",
  "rewards": "",
  "judges": [],
  "stop_on_hacking": False,
  "rivals": [],
  "protocol": "",
  "blended": False,
  "lpips": "",
  "trust.reference": 256,
  "algorithm": "ppo",
  "ratio_normalisation": False,
  "window": 0,
  "window_iterations": 25,
  "nft.beta": 1.0,
  "nft.decay_start": 0,
  "nft.decay_rate": 0.001,
  "nft.decay_maximum": 0.5,
  "whiten": False,
}


@contextlib.contextmanager
def open_workdir(
  config: ConfigDict,
  workdir: Path,
  command: str,
  writes: Collection[str],
  free: Collection[str] = (),
  progress: str = "checkpoints/*",
  is_writer: bool = True,
) -> Iterator[Callable[[], None]]:
  """Holds the workdir of a command: checks its config.json, locks the folder, writes the file.

  Gives a function that writes the file. A run that has saved something calls it when it has
  restored its state, so that a refused start leaves the file unchanged; in other folders the file
  is written at once, and in all of them at the end of a command that succeeds.

  If the command raises an error before it has saved anything in a new folder, the folder is
  removed, so that a failed start leaves nothing.

  Args:
    config: the config of this start.
    workdir: folder of the run; created if missing.
    command: name of the command, such as "train".
    writes: files and folders that the command writes. A folder that has one of them and no
      config.json belongs to something else, and is refused.
    free: dotted names of fields that may change. Fields that end in `_every` may change too.
    progress: glob in `workdir`. If nothing matches it, the run has saved nothing yet and every
      field may change, so that a failed start can be repeated.
    is_writer: lock the folder and write the file; only one process of a run does.

  Raises:
    ValueError: the folder belongs to another command, another process holds it, or a field changed
      that may not; the message names it.
  """
  check = functools.partial(_check, config, workdir, command, writes, free, progress)
  check()
  if not is_writer:
    yield lambda: None
    return
  is_new = not workdir.exists()
  with exclusive(workdir):
    check()  # another process may have written since
    others = sorted(path.name for path in workdir.iterdir() if not path.name.startswith("."))
    if others and CONFIG not in others:
      logging.warning(
        "%s holds files of something else, such as %s; %s writes its own beside them",
        *(workdir, others[0], command),
      )
    content = {COMMAND: command} | config.to_dict()
    write = functools.partial(write_json, workdir / CONFIG, content, sort_keys=True)
    if not any(workdir.glob(progress)):
      write()
    try:
      yield write
      write()
    except BaseException:
      if is_new and {path.name for path in workdir.iterdir()} <= {CONFIG, LOCK}:
        for name in (CONFIG, LOCK):
          (workdir / name).unlink(missing_ok=True)
        workdir.rmdir()
      raise


def _check(
  config: ConfigDict,
  workdir: Path,
  command: str,
  writes: Collection[str],
  free: Collection[str],
  progress: str,
) -> None:
  """Raises ValueError if `workdir` cannot be resumed with this command and config."""
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"{workdir} is a file; give a folder as --workdir")
  file = workdir / CONFIG
  if not file.is_file():
    if present := [name for name in writes if (workdir / name).exists()]:
      raise ValueError(
        f"{workdir} has {', '.join(present)} but no {CONFIG}, so {command} did not make it; give "
        "another --workdir"
      )
    return
  stored, now = read_json(file), flatten(config.to_dict())
  owner, before = stored.pop(COMMAND, None), flatten(stored)
  before = {name: value for name, value in EARLIER.items() if name in now} | before
  # A config.json of earlier versions names no command, but has most of the same command's fields.
  if owner is None and 2 * len(before.keys() & now.keys()) < len(before.keys() | now.keys()):
    owner = "another program"
  if owner not in (None, command):
    raise ValueError(f"{workdir} is the workdir of {owner}; give another --workdir to {command}")
  if not any(workdir.glob(progress)):
    return
  changed = [
    f"{name} was {json.dumps(before.get(name))}, now {json.dumps(now.get(name))}"
    for name in sorted({*before, *now})
    if before.get(name) != now.get(name) and name not in free and not name.endswith("_every")
  ]
  if changed:
    raise ValueError(
      f"{workdir} is the workdir of a run with another config ({'; '.join(changed)}); give the "
      "same config to resume it, or another --workdir"
    )


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
  """Locks a folder for this process; makes it if need be.

  The lock is `flock` on the file `.lock`. The operating system releases it when the process ends,
  however it ends, and network file systems apply it to all hosts. On a file system without locks,
  a warning is logged instead.

  Raises:
    ValueError: another process holds the lock, or the folder takes no files; the message says so.
  """
  check_folder(folder)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / LOCK
  with contextlib.ExitStack() as stack:
    while True:
      file = stack.enter_context(path.open("a+"))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise ValueError(
          f"{folder} is in use by {owner}; wait until it ends, or give another folder"
        ) from None
      except OSError as error:
        logging.warning("%s cannot be locked (%s); use it in one process only", folder, error)
        break
      # The holder may have removed the file between `open` and `flock`: then lock the new file.
      if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
        break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def read_workdir(workdir: Path, *commands: str) -> ConfigDict:
  """Reads the config of a run.

  Args:
    workdir: folder of the run.
    commands: those that may have made it; none: any.

  Raises:
    ValueError: the folder has no config.json, is that of another command, or a field has a value
      that it cannot have.
  """
  check_is_folder(workdir, "the --workdir of a run")
  file = workdir / CONFIG
  if not file.is_file():
    raise ValueError(f"{workdir}: no config.json; give the --workdir of a run")
  stored = read_json(file)
  owner = stored.pop(COMMAND, next(iter(commands), None))
  if commands and owner not in commands:
    raise ValueError(f"{workdir} is the workdir of {owner}; give one of {' or '.join(commands)}")
  check_stored(stored, owner, file)
  try:
    return ConfigDict(stored)
  except ValueError as error:  # a name with a dot
    raise ValueError(f"{file}: {error}; restore the file, or give another run") from error


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens nested dictionaries to {"outer.inner": value}; values as JSON reads them back."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = json.loads(json.dumps(value))
  return flat
