"""Stop requests: SIGTERM and SIGINT, collected so that a run can save before it ends."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from prefpaint_jax.runtime import distributed, interrupts


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
  """Gives the list of SIGTERM and SIGINT received so far; a second one has its usual effect.

  A command that ends early for them calls `interrupts.end_early`. `train` does not, because
  launch/slurm.sbatch relies on its exit status 0.
  """
  received: list[int] = []
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

  def note(number: int, _) -> None:
    received.append(number)
    interrupts.last_signal = number
    signal.signal(number, before[number])

  for number in before:
    signal.signal(number, note)
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def agreed_stop_requests(mesh: Mesh) -> Iterator[Callable[[], bool | jax.Array]]:
  """Gives a function that says whether any process of the run was asked to stop.

  All processes call it at the same points of the run and get the same answer, so that they stop
  after the same iteration.
  """
  with stop_requests() as received:
    if jax.process_count() == 1:
      yield lambda: bool(received)
    else:
      yield lambda: distributed.any_process(bool(received), mesh)
