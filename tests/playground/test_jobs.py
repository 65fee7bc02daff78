"""The queue: order, cancellation, failures; and the store of files."""

import threading
import time

import pytest

from prefpaint_jax.playground import jobs
from prefpaint_jax.playground.jobs import Busy, Queue, Shelf


def ended(queue, job, seconds=20):
  """Waits until a job is over; returns its state."""
  deadline = time.monotonic() + seconds
  while (state := queue.describe(job.id))["state"] not in jobs.OVER:
    assert time.monotonic() < deadline, state
    time.sleep(0.005)
  return state


def held(queue):
  """Adds a job that runs until the event that is returned is set, and waits until it runs."""
  begun, released = threading.Event(), threading.Event()

  def work(job):
    begun.set()
    while not released.wait(0.005):
      job.report("waiting for the test")

  job = queue.add(work)
  assert begun.wait(20)
  return job, released


def test_ten_jobs_run_one_at_a_time_in_order_and_get_their_own_results():
  queue, running, most, order = Queue(), [], [], []

  def work(number):
    def run(job):
      running.append(number)
      most.append(len(running))
      order.append(number)
      time.sleep(0.002)
      running.remove(number)
      return number * number

    return run

  first, released = held(queue)
  added = [queue.add(work(number)) for number in range(10)]
  assert [queue.describe(job.id)["ahead"] for job in added] == list(range(1, 11))
  released.set()
  assert [ended(queue, job)["result"] for job in added] == [n * n for n in range(10)]
  assert order == list(range(10)) and set(most) == {1}
  assert queue.describe(first.id)["state"] == "done"


def test_cancelled_jobs_end_and_the_next_runs():
  queue = Queue()
  first, _ = held(queue)
  second, third = queue.add(lambda job: "never"), queue.add(lambda job: "third")
  queue.cancel(second.id)
  assert queue.describe(second.id)["state"] == "cancelled"
  assert queue.describe(third.id)["ahead"] == 1  # a cancelled job is not waited for
  queue.cancel(first.id)
  assert ended(queue, first)["state"] == "cancelled"
  assert ended(queue, third)["result"] == "third"
  assert queue.describe(second.id)["result"] is None
  queue.cancel(third.id)  # too late: the result stays
  assert queue.describe(third.id)["state"] == "done"


def test_failed_job_says_one_line_and_the_next_runs(capsys):
  def fail(job):
    raise error

  queue = Queue()
  for error in (ValueError("mask: empty\nmore"), RuntimeError("out of memory\nstack")):
    state = ended(queue, queue.add(fail))
    assert (state["state"], state["error"]) == ("failed", str(error).splitlines()[0])
    assert ended(queue, queue.add(lambda job: "next"))["result"] == "next"
  printed = capsys.readouterr().err
  assert "out of memory" in printed and "mask: empty" not in printed


def test_queue_has_an_end_and_forgets_old_jobs(monkeypatch):
  monkeypatch.setattr(jobs, "MOST_WAITING", 2)
  monkeypatch.setattr(jobs, "MOST_KEPT", 3)
  queue = Queue()
  _, released = held(queue)
  waiting = [queue.add(lambda job: None) for _ in range(2)]
  with pytest.raises(Busy, match=r"\A2 jobs wait already; try again"):
    queue.add(lambda job: None)
  released.set()
  ended(queue, waiting[-1])
  for _ in range(4):
    ended(queue, queue.add(lambda job: None))
  with pytest.raises(KeyError):
    queue.describe(waiting[0].id)
  with pytest.raises(KeyError):
    queue.cancel("foreign")


def test_expected_time_is_that_of_the_last_job_of_a_kind_without_its_compilation():
  def work(compiles):
    def run(job):
      job.compiles = compiles
      time.sleep(0.02)

    return run

  queue = Queue()
  assert ended(queue, queue.add(work(True), "small"))["expected"] is None
  assert ended(queue, queue.add(work(False), "small"))["expected"] >= 0.02
  assert ended(queue, queue.add(work(True), "large"))["expected"] is None


def test_shelf_keeps_the_newest_groups_by_keys_that_nobody_guesses():
  shelf = Shelf(most_bytes=10)
  keys = [shelf.add([number, -number], 4) for number in range(1, 4)]
  assert [shelf.get(first) for first, _ in keys] == [None, 2, 3]
  assert shelf.get(shelf.add(["large"], 100)[0]) == "large"
  assert [shelf.get(second) for _, second in keys] == [None] * 3
  assert len({key for group in keys for key in group}) == 6
  assert all(len(key) >= 20 for group in keys for key in group)
