"""TensorBoard event files, written without torch."""
# Shapes: H W pixels.

import contextlib
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


@contextlib.contextmanager
def _without_torch():
  """Keeps tensorboardX from importing torch, which takes seconds and is not needed here."""
  is_new = "torch" not in sys.modules
  if is_new:
    sys.modules["torch"] = None
  try:
    yield
  finally:
    if is_new:
      del sys.modules["torch"]


@functools.cache
def _protocol() -> Any:
  """Imports the parts of tensorboardX that this module uses."""
  with _without_torch():
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, summary_pb2

  return SimpleNamespace(
    summary=summary,
    EventsWriter=EventsWriter,
    Event=event_pb2.Event,
    SessionLog=event_pb2.SessionLog,
    Summary=summary_pb2.Summary,
  )


class EventFile:
  """Writes a new file of events; each method returns when its event is in the file.

  It replaces tensorboardX's SummaryWriter, whose writer thread ends on a full disk; calls then
  block for ever on its full queue.
  """

  def __init__(self, folder: Path, purge_step: int | None = None):
    """Creates the file.

    Args:
      folder: folder for the file; created if missing.
      purge_step: TensorBoard hides events of earlier files from this step on. None: it hides none.
    """
    folder.mkdir(exist_ok=True)
    self._protocol = _protocol()
    self._writer = self._protocol.EventsWriter(str(folder / "events"))
    if purge_step is not None:
      start = self._protocol.SessionLog(status=self._protocol.SessionLog.START)
      self._add(self._protocol.Event(step=purge_step, session_log=start))

  def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
    """Writes numbers by name."""
    values = [
      self._protocol.summary.scalar(name, number).value[0] for name, number in numbers.items()
    ]
    self._add(self._protocol.Event(step=step, summary=self._protocol.Summary(value=values)))

  def hyperparameters(self, fields: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Writes the fields of a config by dotted name; TensorBoard shows them beside `metrics`."""
    shown = {
      name: value if isinstance(value, str | bool | int | float) else json.dumps(value)
      for name, value in fields.items()
    }
    for summary in self._protocol.summary.hparams(shown, dict.fromkeys(metrics)):
      self._add(self._protocol.Event(summary=summary))

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes a uint8 image [H, W, 3]."""
    summary = self._protocol.summary.image(name, image, dataformats="HWC")
    self._add(self._protocol.Event(step=step, summary=summary))

  def histogram(self, step: int, name: str, values: np.ndarray) -> None:
    """Writes the histogram of finite values, at least one."""
    summary = self._protocol.summary.histogram(name, values, "auto")
    self._add(self._protocol.Event(step=step, summary=summary))

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()

  def _add(self, event: Any) -> None:
    event.wall_time = time.time()
    self._writer.write_event(event)
    self._writer.flush()
