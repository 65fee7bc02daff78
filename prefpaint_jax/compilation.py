"""How programs are compiled and run: what happens by itself is not always the fastest."""

import ctypes
import functools
import glob
import importlib.util
import platform
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

_OPTIONS = {
  # Of YNNPACK the products only: XLA's own convolutions take half to all of the time of its.
  "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
  # For fewer than 8 pictures XLA cuts each into pieces that overlap, puts them together for the
  # norm and cuts again: by its own estimates a residual block takes up to three times as long.
  "tpu": {
    "xla_tpu_run_space_to_batch": False,
    "xla_tpu_run_space_to_batch_on_new_platforms": False,
  },
}

# Of mallopt(3): how many pieces are asked of the system, and what is free before it is given back.
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1


@functools.cache
def fast_jit(mesh: Mesh | None = None) -> Callable:
  """`jax.jit` with what makes programs faster, where the compiler for these devices knows that.

  Without a mesh it is that for this process's devices.
  """
  devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
  # Tried on a device of this process: not every backend compiles for another's alone.
  device = next((x for x in devices if x.process_index == jax.process_index()), devices[0])
  if device.platform not in _OPTIONS:
    return jax.jit
  jit = functools.partial(jax.jit, compiler_options=_OPTIONS[device.platform])
  x = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
  try:
    jit(lambda x: x).lower(x).compile()
  except jax.errors.JaxRuntimeError:
    return jax.jit
  return jit


def has_tpu() -> bool:
  """Whether JAX will find TPU chips in this machine: not libtpu alone, which plans need as well."""
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips and importlib.util.find_spec("libtpu"))


def keep_memory() -> None:
  """Where programs run on a CPU, has them run in memory that this process has had before.

  Else the system hands it out anew, page by page, each time a program begins: a tenth of an
  update's time. Only the heap of the first thread can hold that much, so programs run in the thread
  that calls them. To be called before JAX is asked for its devices. It is for glibc, and where
  JAX_PLATFORMS is not cpu and JAX may find an accelerator nothing is done.
  """
  accelerated = has_tpu() or importlib.util.find_spec("jax_plugins")
  runs_here = jax.config.jax_platforms == "cpu" or not accelerated
  if runs_here and platform.libc_ver()[0] == "glibc":
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
