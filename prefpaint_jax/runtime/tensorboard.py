"""TensorBoard events, without torch."""

import contextlib
import functools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


@contextlib.contextmanager
def _without_torch():
  """tensorboardX imports it where it can, which takes seconds, and has no use for it here."""
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
  """The parts of tensorboardX that are used here."""
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
  """A new file of events in a folder. An event is on the disk when its call returns.

  Not tensorboardX's SummaryWriter: its thread dies of a full disk, and its queue blocks for ever.
  TensorBoard hides what earlier files hold from `purge_step` on.
  """

  def __init__(self, folder: Path, purge_step: int | None = None):
    folder.mkdir(exist_ok=True)
    self._x = _protocol()
    self._writer = self._x.EventsWriter(str(folder / "events"))
    if purge_step is not None:
      start = self._x.SessionLog(status=self._x.SessionLog.START)
      self._add(self._x.Event(step=purge_step, session_log=start))

  def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
    values = [self._x.summary.scalar(name, number).value[0] for name, number in numbers.items()]
    self._add(self._x.Event(step=step, summary=self._x.Summary(value=values)))

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """A uint8 picture [H, W, 3]."""
    drawn = self._x.summary.image(name, image, dataformats="HWC")
    self._add(self._x.Event(step=step, summary=drawn))

  def close(self) -> None:
    self._writer.close()

  def _add(self, event: Any) -> None:
    event.wall_time = time.time()
    self._writer.write_event(event)
    self._writer.flush()
