"""Ctrl-C while a command starts, and the exit status of a command that a signal stopped.

The package imports this module before a command imports JAX, so it imports nothing slow.
"""

import os
import signal
from typing import Any

status = 0  # exit status of the process, unless an error ends it
last_signal: int = signal.SIGTERM  # received by this process, or by another one of its run


def exit_at_once() -> None:
  """Makes Ctrl-C end the process with one line, while modules are imported.

  KeyboardInterrupt would print a traceback of import statements, and some libraries catch it. Where
  Ctrl-C is disabled, as in a shell's background jobs, it stays disabled.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, exit_now)


def raise_again() -> None:
  """Makes Ctrl-C raise KeyboardInterrupt, if `exit_at_once` has changed that."""
  if signal.getsignal(signal.SIGINT) is exit_now:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_now(number: int = signal.SIGINT, _: Any = None) -> None:
  """Ends the process with one line and the exit status of a shell; it is a signal handler too."""
  os.write(2, b"Interrupted.\n")  # `print` may be interrupted in itself
  # Threads of XLA and of the data loader may still run; Python's normal exit would crash.
  os._exit(128 + number)


def end_early() -> None:
  """Makes the exit status of the command that of a process which `last_signal` ended."""
  global status
  status = 128 + last_signal
