"""What every command shares: flags, a locked config, one-line errors, and the working folder."""

import difflib
import json
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

if TYPE_CHECKING:
  from prefpaint_jax.inpainter import Inpainter


_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error came from.")


def run(main: Callable[[], None]) -> None:
  """Runs a command; an error that a user can cause ends in one line."""

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1:
      sys.exit(f"error: unexpected argument {argv[1]!r}; options begin with --")
    logging.set_verbosity(logging.WARNING)
    try:
      main()
    except (ValueError, OSError, ImportError) as error:
      if _TRACEBACK.value:
        raise
      sys.exit(f"error: {_one_line(error)}")

  app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
  """What is left of the command line once its flags are read."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    reason = _one_line(error)
  except (AttributeError, KeyError):  # of ml_collections, for a field that the config lacks
    reason = _unknown_field(argv)
    if reason is None:
      raise
  sys.exit(f"error: {reason}")


def _unknown_field(argv: list[str]) -> str | None:
  """The first `--config.field` that the config lacks, and the nearest that it has."""
  lines = "\n".join(argv)
  source = re.search(r"^--?config[=\n](.+)$", lines, re.MULTILINE)
  known = flatten(flags.FLAGS["config"].parser.parse(source[1]).to_dict()) if source else {}
  for name in re.findall(r"^--?(?:no)?config\.([\w.]+)", lines if known else "", re.MULTILINE):
    if name not in known:
      nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
      return f"--config.{name}: no such field; the nearest is --config.{nearest}"
  return None


def _one_line(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  first, *others = lines or [type(error).__name__]
  # Where a library quotes a traceback, only its end tells what is wrong.
  others = others[-1:] if any(line.startswith("Traceback") for line in others) else others
  return " ".join([first, *others])


def run_with_config(main: Callable[[ConfigDict, Path], None]) -> None:
  """Runs `main(config, workdir)` for `--config=FILE[:PRESET] --workdir=DIR [--config.field=x]`."""
  config = config_flags.DEFINE_config_file("config", None, "Configuration file[:preset].")
  workdir = flags.DEFINE_string("workdir", None, "Folder of the run; the same folder resumes it.")
  flags.mark_flags_as_required(["config", "workdir"])
  run(lambda: main(config.value, Path(workdir.value)))


def open_workdir(
  config: ConfigDict,
  workdir: Path,
  free: Collection[str] = (),
  progress: str = "checkpoints/*",
) -> None:
  """Writes `config.json`, or checks that a resumed run has the same config.

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
  workdir.mkdir(parents=True, exist_ok=True)
  partial = file.with_suffix(".partial")
  partial.write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")
  partial.replace(file)


def read_workdir(workdir: Path) -> ConfigDict:
  """The config of a run."""
  file = workdir / "config.json"
  if not file.is_file():
    raise ValueError(f"{workdir}: no config.json; give the --workdir of a run")
  return ConfigDict(json.loads(file.read_text()))


def open_policy(name: str, dtype: str = "float32", step: int | None = None) -> "Inpainter":
  """The policy of a run's workdir at a checkpoint (default: the latest), or of any folder or name.

  A run that kept a moving average of the parameters gives that.
  """
  # They bring JAX along, which commands that paint nothing do without.
  from prefpaint_jax.checkpoint import Checkpoints
  from prefpaint_jax.inpainter import Inpainter

  workdir = Path(name)
  if (workdir / "model_index.json").is_file() or not (workdir / "config.json").is_file():
    return Inpainter.from_pretrained(name, dtype)
  config = read_workdir(workdir)
  inpainter = Inpainter.from_pretrained(config.policy, dtype)
  kept = "ema" if config.ema_decay else "params"
  inpainter.params["unet"] = Checkpoints(workdir / "checkpoints").load(kept, step)
  return inpainter


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dictionaries -> {"outer.inner": value}, as json would hold the values."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = json.loads(json.dumps(value))
  return flat
