"""Runs of several processes: start, agreement on a flag, and exit on the error of one process.

Under Slurm's `srun`, under Open MPI's `mpirun` and on TPU pods, JAX finds the processes of a run.
Elsewhere the environment of each process must name them: JAX_COORDINATOR_ADDRESS (HOST:PORT of
process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without any of these, the run has one process.
"""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prefpaint_jax.runtime import compilation, interrupts, sharding

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
  """Connects the processes of the run; in a run of one process it does nothing.

  Call it before any computation.

  Raises:
    ValueError: some of the environment's variables are missing or invalid.
  """
  arguments = read_environment(os.environ)
  if arguments is None and not known_launcher(os.environ):
    return
  # JAX's preemption service would replace the handler of SIGTERM; see `signals`.
  jax.config.update("jax_enable_preemption_service", False)
  if arguments is None:
    jax.distributed.initialize()
  else:
    jax.distributed.initialize(*arguments, cluster_detection_method="deactivate")
  if jax.process_count() > 1 and jax.local_devices()[0].platform == "cpu":
    # Only process 0 would write the compilation cache. After a restart it would run programs while
    # the others still compile, and Gloo, the CPU collectives, times out after 30 seconds.
    jax.config.update("jax_enable_compilation_cache", False)


def silence_gloo() -> None:
  """Silences the lines that Gloo prints, if this process is one of several.

  Gloo, the CPU collectives, prints its connections to file descriptor 1. Python's standard output
  moves to a new descriptor, and descriptor 1 then leads to the null device.
  """
  several = any(os.environ.get(name) for name in VARIABLES) or known_launcher(os.environ)
  if several and sys.stdout:
    sys.stdout.flush()
    stream = sys.stdout
    sys.stdout = io.TextIOWrapper(
      os.fdopen(os.dup(stream.fileno()), "wb"),
      encoding=stream.encoding,
      errors=stream.errors,
      line_buffering=stream.line_buffering,
    )
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def read_environment(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
  """Reads (address of process 0, number of processes, index of this process).

  Returns:
    None if the variables are unset, or if some are unset and JAX knows the launcher.

  Raises:
    ValueError: some of the variables are missing or invalid.
  """
  given = {name: environment[name] for name in VARIABLES if environment.get(name)}
  if not given or (len(given) < len(VARIABLES) and known_launcher(environment)):
    return None
  if missing := [name for name in VARIABLES if name not in given]:
    raise ValueError(
      f"{', '.join(given)} set, but not {' and '.join(missing)}; set all of them or none"
    )
  address, *numbers = given.values()
  if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
    raise ValueError(
      f"JAX_NUM_PROCESSES={numbers[0]}, JAX_PROCESS_ID={numbers[1]}; expected a number N of "
      "processes and an id from 0 to N - 1: set a different id in each process"
    )
  return address, int(numbers[0]), int(numbers[1])


def known_launcher(environment: Mapping[str, str]) -> bool:
  """Returns whether a launcher that JAX knows has started several processes."""
  # The number of tasks of the srun step, not of the allocation: a command that a batch script
  # starts without srun is a run of one process.
  for tasks in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
    if tasks in environment:
      return int(environment[tasks]) > 1
  if int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
    return True
  if hosts := environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES"):
    return "," in hosts
  # On a TPU virtual machine JAX asks the metadata server for the other machines of the pod.
  return "TPU_SKIP_MDS_QUERY" not in environment and compilation.has_tpu()


def any_process(flag: bool, mesh: Mesh) -> jax.Array:
  """Computes whether `flag` is set on any process; all processes get the same boolean array.

  All processes must call it at the same point of their sequence of programs. The call returns
  before the result is computed; the program waits only when it reads the result.
  """
  flags = jax.make_array_from_callback(
    (mesh.size,), sharding.batch_sharding(mesh), lambda _: np.full(1, flag)
  )
  return jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))(flags)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
  """Prints an error and exits immediately, without cleanup, if the run has several processes.

  JAX's cleanup at exit would wait for the other processes, while they wait for this one. If this
  process exits immediately, the others detect it and exit too.
  """
  try:
    yield
  except BaseException as error:
    status = error.code if isinstance(error, SystemExit) else 1
    # All processes of a run that was asked to stop end together.
    if not status or status == interrupts.status or jax.process_count() == 1:
      raise
    if isinstance(status, str):
      print(status, file=sys.stderr)
    elif lost := _lost_process(error):
      print(lost, file=sys.stderr)
    elif not isinstance(error, SystemExit):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def _lost_process(error: BaseException) -> str | None:
  """Returns one line for an error of communication; None for other errors."""
  first = str(error).split("\n")[0]
  signs = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
  if not isinstance(error, jax.errors.JaxRuntimeError) or not any(sign in first for sign in signs):
    return None
  return (
    f"error: process {jax.process_index()} of {jax.process_count()} has lost another process "
    f"({first}); read its log, and run the same command to resume from the latest checkpoint"
  )
