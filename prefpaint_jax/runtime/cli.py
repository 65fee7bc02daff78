"""The frame of every command: flags, a locked config, one-line errors, compilation cache."""

import contextlib
import errno
import os
import re
import signal
import sys
import tokenize
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from prefpaint_jax.runtime import help_pages, interrupts
from prefpaint_jax.runtime.ranges import Range, Text
from prefpaint_jax.runtime.suggestions import suggest
from prefpaint_jax.runtime.workdir import flatten

_FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a full disk
_ADVICE = {
  errno.ENOENT: "check the path",
  errno.EACCES: "give a path with the right to read and write it",
  errno.EPERM: "give a path with the right to read and write it",
  errno.EROFS: "give a path on a disk that can be written",
  errno.ELOOP: "remove the loop of links",
  errno.ENOTDIR: "give a path below a folder",
  errno.EISDIR: "give a file",
  errno.EEXIST: "give another path",
  errno.ENAMETOOLONG: "give a shorter name",
  errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
_STDOUT = "standard output"


class within(flags.ArgumentParser):
  """Parses a flag whose value is in a range: `flags.DEFINE(within(RANGE), NAME, DEFAULT, HELP)`."""

  def __init__(self, allowed: Range):
    self.allowed = allowed
    self.syntactic_help = str(allowed)

  def parse(self, argument: Any) -> Any:
    value = argument
    with contextlib.suppress(ValueError):  # a text that is no number is in no range of numbers
      value = self.allowed.parse(argument) if isinstance(argument, str) else argument
    if not self.allowed.contains(value):
      raise ValueError(f"expected {self.allowed}")
    return value

  def flag_type(self) -> str:
    return str(self.allowed)


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
        from prefpaint_jax.runtime import checkpoint, compilation, waiting

        compilation.enable_cache()
        compilation.replace_damaged_cache_entries()
        compilation.keep_memory()
        checkpoint.silence_orbax()
      if several_processes:
        distributed.initialize()
      jax = sys.modules.get("jax")
      if jax and not (several_processes and jax.process_index()):
        waiting.speak()
      interrupts.raise_again()
      main()
      if output:
        output.flush()
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
      if show_traceback.value or _is_bug(error):
        raise
      sys.exit(f"error: {_describe(error)}")
    except KeyboardInterrupt:
      if output:
        output.flush()
      interrupts.exit_now()
    interrupts.exit_at_once()
    sys.exit(interrupts.status)

  if several_processes:
    # Imported here, because it imports JAX, which other commands do not need.
    from prefpaint_jax.runtime import distributed

    guarded = distributed.exit_on_error()(guarded)
    distributed.silence_gloo()
  output = sys.stdout and _Output(sys.stdout)  # None in a process without a standard output
  with contextlib.redirect_stdout(output):
    try:
      app.run(guarded, flags_parser=_parse_flags)
    finally:
      if output:  # --help, which ends before `guarded`
        output.flush()


class _Output:
  """The standard output, which names itself in an error; a closed pipe ends the process."""

  def __init__(self, stream: Any):
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    return self._name_errors(self._stream.write, text)

  def flush(self) -> None:
    self._name_errors(self._stream.flush)

  def _name_errors(self, function: Callable, *arguments: str) -> Any:
    try:
      return function(*arguments)
    except OSError as error:
      # The interpreter flushes it again at exit, and would print a second error.
      os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
      if isinstance(error, BrokenPipeError):  # the reader has seen enough, `head` for example
        sys.exit(128 + signal.SIGPIPE)
      error.filename = _STDOUT
      raise


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; returns the other arguments, prints help, or exits with a one-line error."""
  lines = "\n".join(argv)
  given = re.search(r"^--?config[=\n](.*)$", lines, re.MULTILINE)
  source = given[1] if given else ""
  if not source and help_pages.is_asked(argv):
    source = str(help_pages.config_file() or "")
  try:
    config = _read_config(source) if source and "config" in flags.FLAGS else None
  except ValueError as error:
    sys.exit(f"error: {error}")
  if help_pages.is_asked(argv):
    print(help_pages.page(source, config and flatten(config.to_dict())))
    sys.exit()
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    reason = _unknown_flag(error.flagname, config)
  except flags.Error as error:
    missing = help_pages.missing_flags() if "other than None" in str(error) else []
    if missing and not argv[1:]:
      sys.exit(help_pages.usage())
    needed = " ".join(f"--{name}=..." for name in missing)
    reason = f"give {needed}; --help explains the options" if missing else _one_line(error)
    section = re.match(r"flag (--config\.(\S+?)=.*): .* as a ConfigDict", reason)
    if config and section:
      given, name = section.groups()
      field = next(x for x in flatten(config.to_dict()) if x.startswith(f"{name}."))
      reason = f"{given}: {name} is a section of fields; give one, such as --config.{field}"
  except (AttributeError, KeyError):  # ml_collections raises them for an unknown config field
    reason = config and _unknown_field(config, lines)
    if not reason:
      raise
  sys.exit(f"error: {reason}")


def _read_config(source: str) -> ConfigDict:
  """Reads FILE[:PRESET]; raises ValueError, which names the file and the line of an error in it."""
  file = source.partition(":")[0]
  if not Path(file).is_file():
    known = help_pages.config_file() or "configs/rl.py"
    raise ValueError(f"--config={source}: no such file; give a file such as {known}")
  logging.set_verbosity(logging.ERROR)  # a missing `return` would be a warning too
  try:
    config = flags.FLAGS["config"].parser.parse(source)
  except Exception as error:  # a config file is a program, which can raise any error
    raise ValueError(_unknown_preset(source) or _error_in_file(file, error)) from error
  if not isinstance(config, ConfigDict):
    found = type(config).__name__
    raise ValueError(f"{file}: get_config returns {found}; expected a ConfigDict; return one")
  return config


def _unknown_preset(source: str) -> str | None:
  """Returns an error for FILE:PRESET if the file's PRESETS lack the preset, else None."""
  file, _, preset = source.partition(":")
  try:
    known = list(filter(None, help_pages.read_comments(Path(file)).presets))
  except (SyntaxError, ValueError, tokenize.TokenError):  # the file has another error
    return None
  if not known or not preset or preset in known:
    return None
  meant = suggest(preset, known)
  hint = f"did you mean {file}:{meant}?" if meant else f"give one of {', '.join(known)}"
  return f"--config={source}: no such preset; {hint}"


def _error_in_file(file: str, error: BaseException) -> str:
  """Describes an error of a config file, with the line of the file if the error is in it."""
  if isinstance(error, AttributeError) and "'get_config'" in str(error):
    return f"{file}: no function get_config; expected one that returns a ConfigDict; define it"
  cause = error
  while cause.__cause__ or cause.__context__:  # ml_collections raises another error
    cause = cause.__cause__ or cause.__context__
  if "null bytes" in str(cause):  # Python gives no line, and before 3.11.4 no SyntaxError
    line = Path(file).read_bytes().partition(b"\0")[0].count(b"\n") + 1
    return f"{file}, line {line}: {cause}"
  if isinstance(cause, SyntaxError):
    return f"{file}, line {cause.lineno or 1}: {cause.msg}"
  is_file = lambda name: os.path.abspath(name) == os.path.abspath(file)
  frames = traceback.extract_tb(cause.__traceback__)
  numbers = [frame.lineno for frame in frames if is_file(frame.filename)]
  place = f"{file}, line {numbers[-1]}" if numbers else f"--config={file}"
  kind = "" if type(cause) is ValueError else f"{type(cause).__name__}: "
  return f"{place}: {kind}{_one_line(cause)}"


def _unknown_field(config: ConfigDict, lines: str) -> str | None:
  """Returns an error for the first unknown `--config.FIELD`, with the field that it may mean.

  Args:
    config: the config without the changes of the command line.
    lines: the command line, an argument a line.
  """
  known = flatten(config.to_dict())
  for name in re.findall(r"^--?(?:no)?config\.([\w.]+)", lines, re.MULTILINE):
    if name not in known:
      meant = suggest(name, known)
      hint = f"did you mean --config.{meant}?" if meant else "--help lists the fields"
      return f"--config.{name}: no such field; {hint}"
  return None


def _unknown_flag(name: str, config: ConfigDict | None) -> str:
  """Returns an error for an unknown flag, with the flag or the field that it may mean."""
  fields = flatten(config.to_dict()) if config else help_pages.field_names()
  known = [*help_pages.own_flags(), *(f"config.{field}" for field in fields)]
  meant = suggest(name, known)
  hint = f"did you mean --{meant}?" if meant else "--help lists the options"
  return f"--{name}: no such option; {hint}"


def _is_bug(error: Exception) -> bool:
  """Returns whether an error is none that a user can cause: of the runtime, but not of memory."""
  return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)


def _describe(error: Exception) -> str:
  """Describes an error that a user can cause in one line."""
  if isinstance(error, OSError) and error.errno in _FULL:
    return f"{error.filename or 'a disk'}: {error.strerror}; make room, or write to another disk"
  if isinstance(error, OSError) and error.errno and error.filename:
    advice = _ADVICE.get(error.errno, "check the path and its disk")
    return f"{error.filename}: {error.strerror}; {advice}"
  if isinstance(error, MemoryError | RuntimeError):
    found = _one_line(error)
    return f"out of memory ({found[:300]}); give a smaller batch, size or number of samples"
  return _one_line(error)


def _one_line(error: BaseException) -> str:
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
  workdir = flags.DEFINE(
    within(Text(empty=False)), "workdir", None, "Folder of the run; the same folder resumes it."
  )
  flags.mark_flags_as_required(["config", "workdir"])

  def with_config() -> None:
    with _disk_errors_name(Path(workdir.value)):
      main(config.value, Path(workdir.value))

  run(with_config, several_processes)


@contextlib.contextmanager
def _disk_errors_name(workdir: Path) -> Iterator[None]:
  """Says in an error of a full disk how to resume, and adds the workdir if it names no file."""
  try:
    yield
  except OSError as error:
    if error.errno not in _FULL or error.filename == _STDOUT:
      raise
    raise OSError(
      f"{error.filename or workdir}: {error.strerror}; make room and run the same command to "
      "resume from the latest checkpoint"
    ) from error
