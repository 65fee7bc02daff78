"""The log of a run: metrics.jsonl, TensorBoard events and a progress bar."""
# Shapes: H W pixels.

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

from prefpaint_jax.runtime.config_fields import ALGORITHMS, COUNT_OR_NONE
from prefpaint_jax.runtime.files import parse_json, write_text
from prefpaint_jax.runtime.finite import check_metrics
from prefpaint_jax.runtime.ranges import check
from prefpaint_jax.runtime.tensorboard import EventFile
from prefpaint_jax.runtime.workdir import CONFIG, flatten, read_workdir

# Metrics of an update that are finite as long as the run is.
FINITE = tuple(
  f"{algorithm}/{name}"
  for algorithm in ALGORITHMS
  for name in ("policy_loss", "kl_to_base", "grad_norm")
)
# Metrics that TensorBoard shows beside the hyperparameters, for those runs that write them.
RESULTS = (
  "reward/mean",
  "held_out/reward",
  "held_out/reward_winrate",
  "held_out/reward_gain_in_sd",
  "validation/pair_accuracy",
  "validation/implicit_accuracy",
)


class MetricsWriter:
  """Writes `workdir/metrics.jsonl`, one object per iteration, and `workdir/tensorboard`.

  The events begin with the fields of `workdir/config.json`, if there is one, as hyperparameters.

  Each method passes its data to the operating system before it returns, so a killed process loses
  none. On a full disk the method raises OSError.
  """

  def __init__(self, workdir: str | os.PathLike[str], is_writer: bool = True):
    """Opens no file; the first write does.

    Args:
      workdir: folder of the run.
      is_writer: if false (every process but the first), methods do nothing.
    """
    self._workdir = Path(workdir)
    self.is_writer = is_writer
    self._lines: TextIO | None = None
    self._events: EventFile | None = None
    self._purge_step: int | None = None

  def truncate(self, iteration: int) -> list[dict[str, Any]]:
    """Deletes the lines after `iteration`, the one of the restored checkpoint; returns the others.

    Call it before the first write. A run that was killed after its latest checkpoint has written
    lines that the resumed run will write again; the last one may be incomplete.
    """
    path = self._workdir / "metrics.jsonl"
    # TensorBoard hides events of earlier files from this step on.
    self._purge_step = iteration + 1
    if not self.is_writer or not path.exists():
      return []
    *complete, _ = path.read_bytes().split(b"\n")
    kept, lines = [], []
    for number, line in enumerate(complete, 1):
      scalars = parse_json(line, f"{path}, line {number}")
      done = scalars.get("iteration")
      check(f"{path}, line {number}: iteration", done, COUNT_OR_NONE)
      if done <= iteration:
        kept.append(line)
        lines.append(scalars)
    write_text(path, "".join(line.decode() + "\n" for line in kept))
    return lines

  def write(self, iteration: int, scalars: Mapping[str, Any]) -> None:
    """Writes a line of scalars (numbers or 0-d arrays); NaN and infinities become null."""
    if not self.is_writer:
      return
    self._open()
    numbers = {name: np.asarray(value).item() for name, value in scalars.items()}
    finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
    line = {"iteration": iteration} | {name: finite.get(name) for name in numbers}
    print(json.dumps(line, allow_nan=False), file=self._lines, flush=True)
    self._events.scalars(iteration, finite)

  def image(self, iteration: int, name: str, image: np.ndarray) -> None:
    """Writes a uint8 image [H, W, 3] for TensorBoard."""
    if self.is_writer:
      self._open()
      self._events.image(iteration, name, image)

  def histogram(self, iteration: int, name: str, values: np.ndarray) -> None:
    """Writes the histogram of finite values for TensorBoard; nothing if there is no value."""
    if self.is_writer and len(values):
      self._open()
      self._events.histogram(iteration, name, values)

  def close(self) -> None:
    """Closes the files."""
    if self._lines is not None:
      self._lines.close()
      self._events.close()
      self._lines = self._events = None

  def _open(self) -> None:
    if self._lines is None:
      self._workdir.mkdir(parents=True, exist_ok=True)
      self._lines = (self._workdir / "metrics.jsonl").open("a")
      self._events = EventFile(self._workdir / "tensorboard", self._purge_step)
      if (self._workdir / CONFIG).is_file():
        self._events.hyperparameters(flatten(read_workdir(self._workdir).to_dict()), RESULTS)


class LogLines:
  """Prints a line of progress every `interval` seconds, with the methods of tqdm that a run uses.

  For output to a file, where a progress bar cannot redraw itself.
  """

  def __init__(self, total: int, initial: int, interval: float, stream: TextIO, unit: str):
    self._total, self._interval, self._stream, self._unit = total, interval, stream, unit
    self._done = self._reported = self._initial = initial
    self._postfix = ""
    self._began = self._last_line = time.monotonic()

  def set_postfix_str(self, text: str, refresh: bool = True) -> None:
    """Sets the text that follows the count; `refresh` exists because tqdm has it."""
    del refresh
    self._postfix = text

  def update(self, count: int = 1) -> None:
    """Counts iterations; prints a line if `interval` seconds have passed since the last one."""
    self._done += count
    if time.monotonic() - self._last_line >= self._interval:
      self._report()

  def close(self) -> None:
    """Prints the final count if no line has shown it."""
    if self._done != self._reported:
      self._report()

  def _report(self) -> None:
    self._reported, self._last_line = self._done, time.monotonic()
    elapsed = self._last_line - self._began
    left = elapsed * (self._total - self._done) / max(1, self._done - self._initial)
    times = [f"elapsed {tqdm.format_interval(elapsed)}", f"remaining {tqdm.format_interval(left)}"]
    count = f"{self._unit} {self._done}/{self._total}"
    print(*filter(None, [count, *times, self._postfix]), sep=", ", file=self._stream, flush=True)


def progress(
  total: int,
  initial: int = 0,
  visible: bool = True,
  interval: float = 30.0,
  stream: TextIO | None = None,
  unit: str = "iteration",
) -> tqdm | LogLines:
  """Makes a progress bar on a terminal, or lines of progress in a log file.

  Args:
    total: number of iterations of the run.
    initial: number of iterations done before a resume.
    visible: whether this process shows progress; False on all processes but one.
    interval: seconds between lines in a log file.
    stream: where to print; default: standard error.
    unit: what is counted.
  """
  stream = sys.stderr if stream is None else stream
  if visible and not stream.isatty():
    return LogLines(total, initial, interval, stream, unit)
  return tqdm(
    total=total,
    initial=initial,
    file=stream,
    disable=not visible,
    dynamic_ncols=True,
    unit=f" {unit}",
  )


class IterationLog:
  """Writes a line per iteration while the device runs the next iteration.

  The metrics of an iteration stay pending, not yet fetched, until the next rollout is dispatched.
  The times assume that a rollout begins when the previous update ends. On a single CPU device, JAX
  runs programs synchronously; `synchronous` is then true, and the caller may flush at once.
  """

  def __init__(
    self,
    writer: MetricsWriter,
    total: int,
    start: int,
    images_per_iteration: int,
    more: Callable[[int], Mapping[str, float]],
  ):
    """Starts the clock and the progress bar.

    Args:
      writer: takes the lines.
      total: number of iterations of the run.
      start: number of iterations that an earlier start has done.
      images_per_iteration: number of samples per iteration, for `time/images_per_s`.
      more: computes metrics that follow from the number of the iteration alone.
    """
    self._writer, self._images, self._more = writer, images_per_iteration, more
    self._bar = progress(total, start, visible=writer.is_writer)
    self._pending: tuple[int, dict[str, float], list[Any], float] | None = None
    self.restart_clock()

  def restart_clock(self) -> None:
    """Starts the time of the next rollout now, to exclude work since the last update."""
    self._updated_at = time.perf_counter()

  def scored(self, score_metrics: Mapping[str, jax.Array]) -> None:
    """Writes the pending line; call it when rollout and score are dispatched."""
    self.synchronous = all(x.is_ready() for x in score_metrics.values())
    self._scored_at, self._score_metrics = time.perf_counter(), score_metrics
    self.flush()

  def updated(
    self, iteration: int, update_metrics: list[Mapping[str, jax.Array]]
  ) -> dict[str, float]:
    """Makes the iteration's line pending; call it when its updates are dispatched.

    Args:
      iteration: number of iterations done.
      update_metrics: metrics of each update, on the device.

    Returns:
      The metrics of the score as numbers; this method waits for them.
    """
    line = {name: float(value) for name, value in jax.device_get(self._score_metrics).items()}
    scored_at = self._scored_at if self.synchronous else time.perf_counter()
    line["time/rollout_s"] = scored_at - self._updated_at
    self._pending = iteration, line, update_metrics, scored_at
    return line

  def flush(self, more: Callable[[], Mapping[str, float]] = dict) -> dict[str, float]:
    """Writes the pending line, if any, and returns it.

    Args:
      more: computes further metrics of the iteration; called when its updates are done.

    Raises:
      ValueError: the loss or the gradient norm is not finite. The line is written, without `more`.
    """
    if self._pending is None:
      return {}
    iteration, line, update_metrics, scored_at = self._pending
    self._pending = None
    updates = jax.device_get(update_metrics)
    self._updated_at = time.perf_counter()
    line |= {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
    line |= self._more(iteration)
    line["time/update_s"] = self._updated_at - scored_at
    line["time/iteration_s"] = line["time/rollout_s"] + line["time/update_s"]
    line["time/images_per_s"] = self._images / line["time/iteration_s"]
    line["images_per_s"] = line["time/images_per_s"]  # the name of earlier versions
    if all(math.isfinite(line.get(name, 0.0)) for name in FINITE):
      line |= more()
    self._writer.write(iteration, line)
    check_metrics(iteration, line, FINITE)
    self._bar.set_postfix_str(
      f"reward {line['reward/mean']:+.3f}, {line['time/images_per_s']:.1f} images/s", refresh=False
    )
    self._bar.update()
    return line

  def close(self) -> None:
    """Closes the progress bar."""
    self._bar.close()
