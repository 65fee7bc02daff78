"""A run's folder: config.json, written once and compared when the run resumes."""

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
  """Writes `config.json`, if this is the writer, once a resumed run is found to have the same.

  Fields in `free`, and those that end in `_every`, may change; any field may where nothing matches
  the glob `progress` yet, so that a start that failed can be tried again.

  Raises:
    ValueError: another field changed; names it.
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
        f"{workdir} holds a run with another config ({'; '.join(changed)}); give the same config "
        "to resume it, or another --workdir"
      )
  if not is_writer:
    return
  write_json(file, config.to_dict(), sort_keys=True)


def read_workdir(workdir: Path) -> ConfigDict:
  """The config of a run."""
  file = workdir / "config.json"
  if not file.is_file():
    raise ValueError(f"{workdir}: no config.json; give the --workdir of a run")
  return ConfigDict(json.loads(file.read_text()))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dictionaries -> {"outer.inner": value}, as json would hold the values."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = json.loads(json.dumps(value))
  return flat
