"""What every command shares: flags, a locked config, one-line errors, and the working folder."""

import contextlib
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from prefpaint_jax.runtime.workdir import flatten

_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error came from.")


def run(main: Callable[[], None], several_processes: bool = False) -> None:
  """Runs a command; an error that a user can cause ends in one line.

  `several_processes`: the command may be one process of a run of several; see `distributed`.
  """

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1:
      sys.exit(f"error: unexpected argument {argv[1]!r}; options begin with --")
    logging.set_verbosity(logging.WARNING)
    try:
      if "jax" in sys.modules:  # else the command compiles nothing
        from prefpaint_jax.runtime import checkpoint, compilation

        enable_compilation_cache()
        compilation.keep_memory()
        checkpoint.silence_orbax()
      if several_processes:
        distributed.initialize()
      main()
    except (ValueError, OSError, ImportError) as error:
      if _TRACEBACK.value:
        raise
      sys.exit(f"error: {_one_line(error)}")

  if several_processes:
    # It brings JAX along, which other commands do without.
    from prefpaint_jax.runtime import distributed

    guarded = distributed.failing_at_once()(guarded)
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


def run_with_config(
  main: Callable[[ConfigDict, Path], None], several_processes: bool = False
) -> None:
  """Runs `main(config, workdir)` for `--config=FILE[:PRESET] --workdir=DIR [--config.field=x]`."""
  config = config_flags.DEFINE_config_file("config", None, "Configuration file[:preset].")
  workdir = flags.DEFINE_string("workdir", None, "Folder of the run; the same folder resumes it.")
  flags.mark_flags_as_required(["config", "workdir"])

  def with_config() -> None:
    with _naming(Path(workdir.value)):
      main(config.value, Path(workdir.value))

  run(with_config, several_processes)


@contextlib.contextmanager
def _naming(workdir: Path) -> Iterator[None]:
  """Says where the disk is full: an error of `write`, unlike one of `open`, does not."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename:
      raise
    raise OSError(
      f"{workdir}: {error.strerror}; make room, and the same command goes on from its last "
      "checkpoint"
    ) from error


def enable_compilation_cache() -> None:
  """Keeps what takes a second or more to compile for the next start, in the user's cache folder.

  JAX_COMPILATION_CACHE_DIR chooses another folder; set to nothing, nothing is kept.
  """
  # It brings JAX along, which commands that compile nothing do without.
  import jax

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not jax.config.jax_compilation_cache_dir:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "prefpaint_jax"))
