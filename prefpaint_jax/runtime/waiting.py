"""A line before long work: what a command waits for, and how long it took the last time."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import jax
from tqdm import tqdm

from prefpaint_jax.runtime.files import write_json

FILE = "seconds.json"  # in the folder of the compilation cache
DELAY = 3.0  # seconds until the line appears; most refusals end before it
LONG = 2.0  # seconds; shorter work is not remembered

_speaks = False
_hits = 0  # programs that came from the compilation cache


def speak() -> None:
  """Makes `waiting` print lines in this process; without it, library functions are silent."""
  global _speaks
  _speaks = True
  jax.monitoring.register_event_listener(_count)


def _count(event: str, **_) -> None:
  global _hits
  _hits += event == "/jax/compilation_cache/cache_hits"


@contextlib.contextmanager
def waiting(what: str, size: object = "", is_first: bool = True) -> Iterator[None]:
  """Prints `what` to standard error, with the seconds that it took in an earlier process.

  It prints nothing for work that ends within a second, or fails: an error stays one line.

  Args:
    what: the work, "compiling the update" for example.
    size: times of work of other sizes are different entries.
    is_first: false for work that has been done in this process; it prints nothing.
  """
  if not (_speaks and is_first):
    yield
    return
  file = Path(jax.config.jax_compilation_cache_dir or "", FILE)
  key, known = f"{what} {size}".strip(), _read(file)
  last = f" ({known[key]:.0f} s the last time)" if key in known else ""
  line = Timer(DELAY, tqdm.write, (f"{what}{last} ...", sys.stderr))
  line.daemon = True
  line.start()
  hits, began = _hits, time.monotonic()
  try:
    yield
  finally:
    line.cancel()
  seconds = time.monotonic() - began
  if seconds >= LONG and _hits == hits and jax.config.jax_compilation_cache_dir:
    with contextlib.suppress(OSError):  # a folder that takes no files costs only the memory
      write_json(file, _read(file) | {key: round(seconds, 1)})


def _read(file: Path) -> dict[str, float]:
  """Reads the seconds by work; nothing from a file that is missing or damaged."""
  with contextlib.suppress(OSError, ValueError):
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict):
      return {key: x for key, x in content.items() if isinstance(x, int | float)}
  return {}
