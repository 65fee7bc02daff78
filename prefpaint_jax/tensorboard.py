"""TensorBoard events, without torch."""

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path

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


with _without_torch():
  from tensorboardX import summary
  from tensorboardX.event_file_writer import EventsWriter
  from tensorboardX.proto.event_pb2 import Event, SessionLog
  from tensorboardX.proto.summary_pb2 import Summary


class EventFile:
  """A new file of events in a folder. An event is on the disk when its call returns.

  Not tensorboardX's SummaryWriter: its thread dies of a full disk, and its queue blocks for ever.
  TensorBoard hides what earlier files hold from `purge_step` on.
  """

  def __init__(self, folder: Path, purge_step: int | None = None):
    folder.mkdir(exist_ok=True)
    self._writer = EventsWriter(str(folder / "events"))
    if purge_step is not None:
      self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

  def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
    values = [summary.scalar(name, number).value[0] for name, number in numbers.items()]
    self._add(Event(step=step, summary=Summary(value=values)))

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """A uint8 picture [H, W, 3]."""
    self._add(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))

  def close(self) -> None:
    self._writer.close()

  def _add(self, event: Event) -> None:
    event.wall_time = time.time()
    self._writer.write_event(event)
    self._writer.flush()
