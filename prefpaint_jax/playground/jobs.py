"""A queue of jobs: one runs at a time, the others wait; and a store of the files that they made."""

import dataclasses
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable
from typing import Any

from prefpaint_jax.runtime.text import first_line

MOST_WAITING = 16
MOST_KEPT = 64  # finished jobs whose state can be asked; their files are in a `Shelf`
OVER = ("done", "failed", "cancelled")


class Cancelled(Exception):
  """Ends the work of a job that was cancelled."""


class Busy(Exception):
  """Too many jobs wait."""


@dataclasses.dataclass(eq=False)
class Job:
  """A job and its state.

  Attributes:
    work: computes the result; calls `report` now and then, and lets `Cancelled` pass.
    kind: jobs of one kind take about the same time.
    state: "waiting", "running", or one of OVER.
    stage: what the work does now, for a person.
    done, total: steps.
    compiles: it includes a compilation, so its time says nothing about the next job's.
    error: one line, if it failed.
  """

  work: Callable[["Job"], Any]
  kind: Hashable
  id: str = dataclasses.field(default_factory=lambda: secrets.token_urlsafe(16))
  state: str = "waiting"
  stage: str = ""
  done: int = 0
  total: int = 0
  compiles: bool = False
  error: str = ""
  result: Any = None
  began: float = 0.0
  seconds: float = 0.0
  is_cancelled: bool = False

  def report(self, stage: str, done: int = 0) -> None:
    """Says what the work does now, and adds `done` steps; raises Cancelled."""
    if self.is_cancelled:
      raise Cancelled
    self.stage, self.done = stage, self.done + done


class Queue:
  """Runs jobs in their order, in one thread."""

  def __init__(self):
    self._jobs: dict[str, Job] = {}  # oldest first
    self._seconds: dict[Hashable, float] = {}
    self._changed = threading.Condition()
    threading.Thread(target=self._run, name="jobs", daemon=True).start()

  def add(self, work: Callable[[Job], Any], kind: Hashable = None) -> Job:
    """Adds a job; raises Busy if MOST_WAITING jobs wait."""
    with self._changed:
      if sum(job.state == "waiting" for job in self._jobs.values()) >= MOST_WAITING:
        raise Busy(f"{MOST_WAITING} jobs wait already; try again in a minute")
      over = [name for name, job in self._jobs.items() if job.state in OVER]
      for name in over[: len(over) - MOST_KEPT + 1]:
        del self._jobs[name]
      job = Job(work, kind)
      self._jobs[job.id] = job
      self._changed.notify_all()
      return job

  def cancel(self, name: str) -> None:
    """Cancels a job that waits at once, and one that runs at its next report."""
    with self._changed:
      job = self._jobs[name]
      job.is_cancelled = True
      if job.state == "waiting":
        job.state = "cancelled"

  def describe(self, name: str) -> dict[str, Any]:
    """Returns the state of a job as JSON; raises KeyError if there is no such job."""
    with self._changed:
      job = self._jobs[name]
      before = list(self._jobs.values())[: list(self._jobs).index(name)]
      running = job.state == "running"
      return {
        "job": job.id,
        "state": job.state,
        "ahead": sum(other.state not in OVER for other in before) if job.state == "waiting" else 0,
        "stage": "cancelling" if running and job.is_cancelled else job.stage,
        "done": job.done,
        "total": job.total,
        "seconds": round(time.monotonic() - job.began if running else job.seconds, 2),
        "expected": self._seconds.get(job.kind),
        "compiles": job.compiles,
        "error": job.error,
        "result": job.result,
      }

  def _run(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._next() is not None)
        job = self._next()
        job.state, job.began = "running", time.monotonic()
      state, result = "done", None
      try:
        result = job.work(job)
      except Cancelled:
        state = "cancelled"
      except Exception as error:  # one job must not stop the next
        state, job.error = "failed", first_line(error)
        if not isinstance(error, ValueError):  # an error that no user can cause
          traceback.print_exception(error, file=sys.stderr)
      with self._changed:
        job.state, job.result, job.seconds = state, result, time.monotonic() - job.began
        job.work = lambda _: None  # it holds an image
        if state == "done" and not job.compiles:
          self._seconds[job.kind] = round(job.seconds, 2)

  def _next(self) -> Job | None:
    return next((job for job in self._jobs.values() if job.state == "waiting"), None)


class Shelf:
  """Keeps groups of objects by unguessable keys, the newest groups of at most `most_bytes`."""

  def __init__(self, most_bytes: int):
    self._most = most_bytes
    self._groups: list[dict[str, Any]] = []
    self._sizes: list[int] = []
    self._lock = threading.Lock()

  def add(self, objects: list[Any], size: int) -> list[str]:
    """Adds a group of objects of `size` bytes; returns their keys. The newest group stays."""
    group = {secrets.token_urlsafe(16): one for one in objects}
    with self._lock:
      self._groups.append(group)
      self._sizes.append(size)
      while len(self._groups) > 1 and sum(self._sizes) > self._most:
        del self._groups[0], self._sizes[0]
    return list(group)

  def get(self, key: str) -> Any | None:
    """Returns an object; None: there is none, or it is no longer kept."""
    with self._lock:
      return next((group[key] for group in self._groups if key in group), None)
