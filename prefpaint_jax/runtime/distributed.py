"""One run in several processes: how they find each other, agree to stop, and end together.

Under Slurm's `srun`, Open MPI's `mpirun` and on TPU pods JAX knows who takes part. Anywhere else
each process is told by its environment: JAX_COORDINATOR_ADDRESS (HOST:PORT, of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without any of this, a process is alone.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prefpaint_jax.runtime import compilation, sharding

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
  """Joins the other processes of the run. Call before any computation; alone, it does nothing.

  Raises:
    ValueError: the environment says only half, or what cannot be.
  """
  arguments = told(os.environ)
  if arguments is None and not found_by_jax(os.environ):
    return
  # JAX would take SIGTERM for itself, and hear nothing else; see `any_process`.
  jax.config.update("jax_enable_preemption_service", False)
  if arguments is None:
    jax.distributed.initialize()
  else:
    jax.distributed.initialize(*arguments, cluster_detection_method="deactivate")
  if jax.process_count() > 1 and jax.local_devices()[0].platform == "cpu":
    # JAX would keep the programs of process 0 alone, which would run them while the others still
    # compile; Gloo, by which CPUs talk to each other, waits for half a minute.
    jax.config.update("jax_enable_compilation_cache", False)


def told(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
  """(address of process 0, number of processes, which one this is); None: JAX or nobody knows."""
  given = {name: environment[name] for name in VARIABLES if environment.get(name)}
  if not given or (len(given) < len(VARIABLES) and found_by_jax(environment)):
    return None
  if missing := [name for name in VARIABLES if name not in given]:
    raise ValueError(f"{', '.join(given)} set, but not {' and '.join(missing)}: set all or none")
  address, *numbers = given.values()
  if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
    raise ValueError(
      f"JAX_NUM_PROCESSES={numbers[0]}, JAX_PROCESS_ID={numbers[1]}: give a number of processes, "
      "and for each its own id, from 0"
    )
  return address, int(numbers[0]), int(numbers[1])


def found_by_jax(environment: Mapping[str, str]) -> bool:
  """Whether a launcher that JAX knows has started several processes."""
  # Of a step of srun, not of the allocation: what a batch script starts without srun is alone.
  for tasks in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
    if tasks in environment:
      return int(environment[tasks]) > 1
  if int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
    return True
  if hosts := environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES"):
    return "," in hosts
  # A TPU virtual machine: which others are in its pod, JAX asks the machine's metadata server.
  return "TPU_SKIP_MDS_QUERY" not in environment and compilation.has_tpu()


def any_process(flag: bool, mesh: Mesh) -> jax.Array:
  """Whether `flag` is set on any process, as a boolean on its way: all get the same.

  It takes its place among the programs that all processes run in one order, so it is exact, and
  nothing waits for it before it is read.
  """
  flags = jax.make_array_from_callback(
    (mesh.size,), sharding.batch_sharding(mesh), lambda _: np.full(1, flag)
  )
  return jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))(flags)


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
  """One of several processes that fails ends on the spot, as if killed, once it has said why.

  An orderly end would wait for the others, which wait for this one; so they learn of it.
  """
  try:
    yield
  except BaseException as error:
    status = error.code if isinstance(error, SystemExit) else 1
    if not status or jax.process_count() == 1:
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
  """One line for an error of communication."""
  first = str(error).split("\n")[0]
  signs = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
  if not isinstance(error, jax.errors.JaxRuntimeError) or not any(sign in first for sign in signs):
    return None
  return (
    f"error: process {jax.process_index()} of {jax.process_count()} has lost another, whose log "
    f"may say why ({first}); the same command goes on from the last checkpoint"
  )
