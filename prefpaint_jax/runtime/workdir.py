"""The workdir of a run, whose config.json guards against resuming with another config."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from prefpaint_jax.runtime.files import write_json


def open_workdir(
  config: ConfigDict,
  workdir: Path,
  free: Collection[str] = (),
  progress: str = "checkpoints/*",
  is_writer: bool = True,
) -> None:
  """Checks the config of a resumed run against its `config.json`, then writes the file.

  Args:
    config: the config of this start.
    workdir: folder of the run; created if missing.
    free: dotted names of fields that may change. Fields that end in `_every` may change too.
    progress: glob in `workdir`. If nothing matches it, the run has saved nothing yet and every
      field may change, so that a failed start can be repeated.
    is_writer: write the file; only one process of a run does.

  Raises:
    ValueError: a field changed that may not; the message names it.
  """
  now = flatten(config.to_dict())
  file = workdir / "config.json"
  if file.is_file() and any(workdir.glob(progress)):
    before = flatten(json.loads(file.read_text()))
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
  if not is_writer:
    return
  write_json(file, config.to_dict(), sort_keys=True)


def read_workdir(workdir: Path) -> ConfigDict:
  """Reads the config of a run.

  Raises:
    ValueError: the folder has no config.json.
  """
  file = workdir / "config.json"
  if not file.is_file():
    raise ValueError(f"{workdir}: no config.json; give the --workdir of a run")
  return ConfigDict(json.loads(file.read_text()))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens nested dictionaries to {"outer.inner": value}; values as JSON reads them back."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = json.loads(json.dumps(value))
  return flat
