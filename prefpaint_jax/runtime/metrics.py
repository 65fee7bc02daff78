"""The record of a run: metrics.jsonl, TensorBoard events, a progress bar.

Shapes: H W pixels.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from prefpaint_jax.runtime.files import write_text
from prefpaint_jax.runtime.tensorboard import EventFile


class MetricsWriter:
  """`workdir/metrics.jsonl`, one object per iteration, and `workdir/tensorboard`.

  With `is_writer` false (every process but the first) it takes the same calls and writes nothing.
  What was written survives the process, and a full disk is an error of the call that meets it.
  """

  def __init__(self, workdir: str | os.PathLike[str], is_writer: bool = True):
    self._workdir = Path(workdir)
    self.is_writer = is_writer
    self._lines: TextIO | None = None
    self._events: EventFile | None = None
    self._purge_step: int | None = None

  def truncate(self, iteration: int) -> None:
    """Forgets what was written past `iteration`, the restored one. Call before the first write.

    A run killed after its last checkpoint has written lines it is about to write again, the last
    of them perhaps by half.
    """
    path = self._workdir / "metrics.jsonl"
    # TensorBoard hides the events past this step that earlier files hold.
    self._purge_step = iteration + 1
    if not self.is_writer or not path.exists():
      return
    *complete, _ = path.read_text().split("\n")
    kept = [line for line in complete if json.loads(line)["iteration"] <= iteration]
    write_text(path, "".join(line + "\n" for line in kept))

  def write(self, iteration: int, scalars: Mapping[str, Any]) -> None:
    """One line of scalars (numbers or 0-d arrays); NaN and infinities become null."""
    if not self.is_writer:
      return
    self._open()
    numbers = {name: np.asarray(value).item() for name, value in scalars.items()}
    finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
    line = {"iteration": iteration} | {name: finite.get(name) for name in numbers}
    print(json.dumps(line, allow_nan=False), file=self._lines, flush=True)
    self._events.scalars(iteration, finite)

  def image(self, iteration: int, name: str, image: np.ndarray) -> None:
    """A uint8 picture [H, W, 3] for TensorBoard."""
    if self.is_writer:
      self._open()
      self._events.image(iteration, name, image)

  def close(self) -> None:
    if self._lines is not None:
      self._lines.close()
      self._events.close()
      self._lines = self._events = None

  def _open(self) -> None:
    if self._lines is None:
      self._workdir.mkdir(parents=True, exist_ok=True)
      self._lines = (self._workdir / "metrics.jsonl").open("a")
      self._events = EventFile(self._workdir / "tensorboard", self._purge_step)


class LogLines:
  """The part of tqdm that a run uses, for a log file: a line every `interval` seconds."""

  def __init__(self, total: int, initial: int, interval: float, stream: TextIO):
    self._total, self._interval, self._stream = total, interval, stream
    self._done = self._reported = initial
    self._postfix = ""
    self._last_line = time.monotonic()

  def set_postfix_str(self, text: str, refresh: bool = True) -> None:
    """`refresh` is tqdm's; a line appears only when it is due."""
    del refresh
    self._postfix = text

  def update(self, count: int = 1) -> None:
    self._done += count
    if time.monotonic() - self._last_line >= self._interval:
      self._report()

  def close(self) -> None:
    if self._done != self._reported:
      self._report()

  def _report(self) -> None:
    self._reported, self._last_line = self._done, time.monotonic()
    line = f"iteration {self._done}/{self._total}"
    print(f"{line}, {self._postfix}" if self._postfix else line, file=self._stream, flush=True)


def progress(
  total: int,
  initial: int = 0,
  visible: bool = True,
  interval: float = 30.0,
  stream: TextIO | None = None,
) -> tqdm | LogLines:
  """A bar over `total` iterations, `initial` of them done before: `update()`, `set_postfix_str()`.

  On a terminal it moves; elsewhere it is a line every `interval` seconds and one at the end. Not
  `visible` (every process but the first), it shows nothing.
  """
  stream = sys.stderr if stream is None else stream
  if visible and not stream.isatty():
    return LogLines(total, initial, interval, stream)
  return tqdm(total=total, initial=initial, file=stream, disable=not visible, dynamic_ncols=True)


class IterationLog:
  """Writes a line per iteration without making the device wait for Python.

  The metrics of an iteration are fetched while the next one runs. The clocks assume that: a rollout
  begins when the update before it is done. On one CPU device programs run when they are called;
  the log sees that and writes at once.
  """

  def __init__(self, writer: MetricsWriter, total: int, start: int, images_per_iteration: int):
    self._writer, self._images = writer, images_per_iteration
    self._bar = progress(total, start, visible=writer.is_writer)
    self._pending: tuple[int, dict[str, float], list[Any], float] | None = None
    self.restart_clock()

  def restart_clock(self) -> None:
    """Times the next rollout from now on: what was done meanwhile is not part of it."""
    self._updated_at = time.perf_counter()

  def scored(self, score_metrics: Mapping[str, jax.Array]) -> None:
    """To be called when rollout and score are dispatched; writes the line of the last iteration."""
    self.synchronous = all(x.is_ready() for x in score_metrics.values())
    self._scored_at, self._score_metrics = time.perf_counter(), score_metrics
    self.flush()

  def updated(
    self, iteration: int, update_metrics: list[Mapping[str, jax.Array]]
  ) -> dict[str, float]:
    """To be called when the updates of an iteration are dispatched.

    Returns:
      The score's metrics, for which this waits.
    """
    line = {name: float(value) for name, value in jax.device_get(self._score_metrics).items()}
    scored_at = self._scored_at if self.synchronous else time.perf_counter()
    line["time/rollout_s"] = scored_at - self._updated_at
    self._pending = iteration, line, update_metrics, scored_at
    return line

  def flush(self, more: Callable[[], Mapping[str, float]] = dict) -> dict[str, float]:
    """Writes the pending line, if there is one, and returns it.

    Args:
      more: gives further metrics of the iteration, once its updates are done.
    """
    if self._pending is None:
      return {}
    iteration, line, update_metrics, scored_at = self._pending
    self._pending = None
    updates = jax.device_get(update_metrics)
    self._updated_at = time.perf_counter()
    line |= {name: float(np.mean([one[name] for one in updates])) for name in updates[0]}
    line["time/update_s"] = self._updated_at - scored_at
    line["time/iteration_s"] = line["time/rollout_s"] + line["time/update_s"]
    line["images_per_s"] = self._images / line["time/iteration_s"]
    line |= more()
    self._writer.write(iteration, line)
    self._bar.set_postfix_str(
      f"reward {line['reward/mean']:+.3f}, {line['images_per_s']:.1f} images/s", refresh=False
    )
    self._bar.update()
    return line

  def close(self) -> None:
    """Closes the progress bar."""
    self._bar.close()
