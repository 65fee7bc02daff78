"""Ctrl-C and exit statuses: one line, and the status that a shell expects."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
  """Runs Python code that may use `cli`; `end` raises a signal in its process."""
  head = "import os, signal; from prefpaint_jax.runtime import cli, interrupts\n"
  command = [sys.executable, "-c", head + textwrap.dedent(code), *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


# A module that takes the place of JAX, and is interrupted while a command imports it.
INTERRUPTED = """
import os, signal, time
try:
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(60)
except BaseException as error:
  raise ImportError from error
"""


@pytest.mark.parametrize("name", ["train", "evaluate", "data.preferences", "plot"])
def test_interrupt_during_the_imports_of_a_command_is_one_line(interruptible, tmp_path, name):
  for module in ("jax", "numpy"):
    (tmp_path / f"{module}.py").write_text(INTERRUPTED)
  path = os.pathsep.join([str(tmp_path), str(ROOT)])
  done = subprocess.run(
    [sys.executable, "-m", f"prefpaint_jax.{name}"],
    env=os.environ | {"PYTHONPATH": path},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stderr, done.stdout) == (130, "Interrupted.\n", "")


def test_import_of_the_package_by_another_program_leaves_ctrl_c_alone(interruptible):
  done = run("print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)")
  assert done.stdout == "True\n"


def test_interrupt_of_the_work_is_one_line_after_its_output(interruptible):
  done = run("""
    def main():
      print("a result")
      signal.raise_signal(signal.SIGINT)
    interrupts.exit_at_once()
    cli.run(main)
  """)
  assert (done.returncode, done.stderr, done.stdout) == (130, "Interrupted.\n", "a result\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_that_ends_early_for_a_signal_has_its_exit_status(number):
  done = run(f"""
    from prefpaint_jax.runtime.signals import stop_requests
    def main():
      with stop_requests() as received:
        signal.raise_signal({int(number)})
      assert received
      interrupts.end_early()
      print("stopped")
    cli.run(main, several_processes=True)
  """)
  assert (done.returncode, done.stderr, done.stdout) == (128 + number, "", "stopped\n")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_closed_pipe_ends_a_command_without_an_error(arguments):
  reader, writer = os.pipe()
  os.close(reader)
  code = "from prefpaint_jax.runtime import cli; cli.run(lambda: print('x' * 99999))"
  done = subprocess.run(
    [sys.executable, "-c", code, *arguments],
    cwd=ROOT,
    stdout=writer,
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  os.close(writer)
  assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
  ("error", "line"),
  [
    ("FileNotFoundError(2, 'No such file', 'a.png')", "a.png: No such file; check the path"),
    ("OSError(40, 'Too many levels', 'a')", "a: Too many levels; remove the loop of links"),
    ("OSError(5, 'Input/output error', 'a')", "a: Input/output error; check the path and its disk"),
  ],
)
def test_error_of_the_system_names_the_file_and_the_way_out(error, line):
  done = run(f"""
    def main():
      raise {error}
    cli.run(main)
  """)
  assert (done.returncode, done.stderr) == (1, f"error: {line}\n")
