"""Compiler options, ahead-of-time compilation, its cache, and memory that XLA:CPU reuses."""

import contextlib
import ctypes
import functools
import gc
import glob
import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from jax.stages import Compiled, Traced

from prefpaint_jax.kernels.dispatch import platform_of, traced_for
from prefpaint_jax.runtime.memory import check_memory

# What each option brings; docs/performance.md has the figures.
OPTIONS = {
  # YNNPACK for products and reductions with their neighbours: attention becomes one kernel. Not for
  # convolutions, where XLA's own kernels take half to all of YNNPACK's time.
  "cpu": {
    "xla_cpu_experimental_ynn_fusion_type": (
      "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    ),
    "xla_cpu_prefer_vector_width": 512,  # XLA's default uses half of AVX-512
  },
  # A merged product of queries, keys and values reads its input once, but XLA then cuts the result
  # into three, which costs twice what the merge saves.
  "cuda": {"xla_gpu_dot_merger_threshold_mb": 0},
  # For fewer than 8 images space-to-batch cuts each into overlapping pieces and joins them for each
  # norm: by XLA's own estimates a residual block takes up to three times as long.
  "tpu": {
    "xla_tpu_run_space_to_batch": False,
    "xla_tpu_run_space_to_batch_on_new_platforms": False,
  },
}


# With YNNPACK's kernels and four CPU devices in a process, the first samples of each device are
# wrong from about the eighth step of a chain on, by amounts that vary from run to run as in a race
# (jax 0.10.2). One, two and three devices were right in all sizes tried; the cause in XLA is open.
ONE_DEVICE_ONLY = {"cpu": ("xla_cpu_experimental_ynn_fusion_type",)}


@functools.cache
def fast_jit(mesh: Mesh | None = None) -> Callable:
  """Returns `jax.jit` with the compiler options and the kernels of the mesh's platform.

  Args:
    mesh: the devices to compile for; default: this process's.
  """
  devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
  # Options are tried on a device of this process: not every backend compiles for others alone.
  device = next((x for x in devices if x.process_index == jax.process_index()), devices[0])
  platform = platform_of(device)

  def jit(function: Callable, **options) -> Callable:
    return jax.jit(traced_for(platform, function), **options)

  offered = dict(OPTIONS.get(platform, {}))
  if len(devices) > 1:
    for name in ONE_DEVICE_ONLY.get(platform, ()):
      offered.pop(name, None)
  accepted = {}
  x = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
  for name, value in offered.items():
    # An option that this version of XLA does not know must not cost the others.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      jit(lambda x: x, compiler_options={name: value}).lower(x).compile()
      accepted[name] = value
  return functools.partial(jit, compiler_options=accepted)


class Program:
  """A jitted function, compiled ahead of time; its jaxpr is freed after compilation.

  `jax.jit` keeps the jaxpr for as long as the function: for a small model as much memory as all
  temporary arrays of an update.
  """

  def __init__(self, jitted: Callable):
    self._jitted: Callable | None = jitted
    self._compiled: Compiled | None = None

  def trace(self, *arguments) -> Traced:
    """Traces the function, as `jax.jit`'s `trace` does; only before it is compiled."""
    return self._jitted.trace(*arguments)

  def compile(self, *arguments) -> Any:
    """Compiles the function for arrays, or for shapes with their shardings.

    Returns:
      The shapes of the results with their shardings.

    Raises:
      ValueError: the temporary arrays need more memory than the machine has.
    """
    traced = self.trace(*arguments)
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    if jax.default_backend() == "cpu" and memory is not None:  # other devices refuse by themselves
      check_memory(memory.temp_size_in_bytes, "a step of this batch and size")
    self._compiled = compiled
    with_sharding = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    results = jax.tree.map(with_sharding, traced.out_info, self._compiled.output_shardings)
    self._jitted = None
    del traced
    gc.collect(0)  # a jaxpr refers to itself
    return results

  def __call__(self, *arguments):
    if self._compiled is None:
      self.compile(*arguments)
    return self._compiled(*arguments)


def enable_cache() -> None:
  """Enables JAX's persistent compilation cache, in the user's cache folder.

  It changes nothing where the user or a program has chosen: JAX_COMPILATION_CACHE_DIR names another
  folder, or is empty to disable the cache; `jax.config.jax_compilation_cache_dir` does the same.
  JAX caches programs that take a second or more to compile.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not jax.config.jax_compilation_cache_dir:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "prefpaint_jax"))


def has_tpu() -> bool:
  """Whether JAX will find TPU chips in this machine; libtpu alone is needed for plans too."""
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips and importlib.util.find_spec("libtpu"))


def keep_memory() -> None:
  """Keeps freed memory in the process, so XLA:CPU does not page-fault its buffers on every call.

  It sets glibc's malloc options and has programs run in the calling thread, whose heap is the only
  one that can hold that much. Commands call it before JAX makes its devices. It does nothing
  without glibc, or where JAX may find an accelerator.
  """
  accelerated = has_tpu() or importlib.util.find_spec("jax_plugins")
  if (jax.config.jax_platforms == "cpu" or not accelerated) and platform.libc_ver()[0] == "glibc":
    mmap_max, mmap_threshold, trim_threshold = -4, -3, -1  # of mallopt(3)
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 2**17)  # a fixed threshold; glibc's grows with what is freed
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def replace_damaged_cache_entries() -> None:
  """Deletes the entries of the compilation cache that JAX cannot read, so that it replaces them.

  A process that is killed while it writes an entry, or finds the disk full, leaves a part of the
  entry. JAX never replaces it: every later start compiles that program and prints a warning. This
  function changes the display of warnings in the whole process.
  """
  show, told = warnings.showwarning, []
  error = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.+)"
  )

  def delete_entries(message: Any, *place: Any, **more: Any) -> None:
    found, folder = error.match(str(message)), jax.config.jax_compilation_cache_dir
    if not found or not folder:
      return show(message, *place, **more)
    for entry in Path(folder).glob(f"{glob.escape(found[2])}-*-cache"):
      entry.unlink(missing_ok=True)
    if found[1] == "writing" and not told:
      told.append(found[3])
      print(f"{folder}: {found[3]}; later starts compile again; make room", file=sys.stderr)

  warnings.showwarning = delete_entries
