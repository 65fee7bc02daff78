"""The frame of every command: flags, a locked config, one-line errors, compilation cache."""

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


def run(main: Callable[[], None], several_processes: bool = False) -> None:
  """Runs a command; prints an error that a user can cause as one line and exits with status 1.

  Args:
    main: the command.
    several_processes: the command may be one of the processes of a run; see `distributed`.
  """
  # Defined here, because an import must not change the flags of another program.
  show_traceback = flags.DEFINE_bool("traceback", False, "Show the traceback of an error.")

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1:
      sys.exit(f"error: unexpected argument {argv[1]!r}; options begin with --")
    logging.set_verbosity(logging.WARNING)
    try:
      if "jax" in sys.modules:  # a command that does not import JAX compiles nothing
        from prefpaint_jax.runtime import checkpoint, compilation

        enable_compilation_cache()
        compilation.keep_memory()
        checkpoint.silence_orbax()
      if several_processes:
        distributed.initialize()
      main()
    except (ValueError, OSError, ImportError) as error:
      if show_traceback.value:
        raise
      sys.exit(f"error: {_one_line(error)}")
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      sys.stdout.flush()
      sys.stderr.flush()
      # Threads of XLA and of the data loader may still run; Python's normal exit would crash.
      os._exit(130)

  if several_processes:
    # Imported here, because it imports JAX, which other commands do not need.
    from prefpaint_jax.runtime import distributed

    guarded = distributed.exit_on_error()(guarded)
  app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; returns the other arguments, or exits with a one-line error."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    reason = _one_line(error)
  except (AttributeError, KeyError):  # ml_collections raises them for an unknown config field
    reason = _unknown_field(argv)
    if reason is None:
      raise
  sys.exit(f"error: {reason}")


def _unknown_field(argv: list[str]) -> str | None:
  """Returns an error for the first unknown `--config.FIELD`, with the most similar known field."""
  lines = "\n".join(argv)
  source = re.search(r"^--?config[=\n](.+)$", lines, re.MULTILINE)
  known = flatten(flags.FLAGS["config"].parser.parse(source[1]).to_dict()) if source else {}
  for name in re.findall(r"^--?(?:no)?config\.([\w.]+)", lines if known else "", re.MULTILINE):
    if name not in known:
      nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
      return f"--config.{name}: no such field; the most similar one is --config.{nearest}"
  return None


def _one_line(error: Exception) -> str:
  """Joins the lines of an error's message."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  first, *others = lines or [type(error).__name__]
  # If a library quotes a traceback, only the last line states the error.
  others = others[-1:] if any(line.startswith("Traceback") for line in others) else others
  return " ".join([first, *others])


def run_with_config(
  main: Callable[[ConfigDict, Path], None], several_processes: bool = False
) -> None:
  """Runs `main(config, workdir)` for `--config=FILE[:PRESET] --workdir=DIR [--config.FIELD=x]`.

  Args:
    main: the command.
    several_processes: the command may be one of the processes of a run; see `distributed`.
  """
  config = config_flags.DEFINE_config_file("config", None, "Configuration file[:preset].")
  workdir = flags.DEFINE_string("workdir", None, "Folder of the run; the same folder resumes it.")
  flags.mark_flags_as_required(["config", "workdir"])

  def with_config() -> None:
    with _disk_errors_name(Path(workdir.value)):
      main(config.value, Path(workdir.value))

  run(with_config, several_processes)


@contextlib.contextmanager
def _disk_errors_name(workdir: Path) -> Iterator[None]:
  """Adds the workdir to an error of a full disk.

  An error of `write` has no file name, unlike an error of `open`.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename:
      raise
    raise OSError(
      f"{workdir}: {error.strerror}; make room and run the same command to resume from the latest "
      "checkpoint"
    ) from error


def enable_compilation_cache() -> None:
  """Enables JAX's persistent compilation cache, in the user's cache folder.

  JAX caches programs that take a second or more to compile. JAX_COMPILATION_CACHE_DIR chooses
  another folder; an empty value disables the cache.
  """
  # Imported here, because commands that compile nothing do not need JAX.
  import jax

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not jax.config.jax_compilation_cache_dir:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "prefpaint_jax"))
