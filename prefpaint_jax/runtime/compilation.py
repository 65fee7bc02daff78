"""How programs are compiled and run: what happens by itself is not always the fastest."""

import contextlib
import ctypes
import functools
import gc
import glob
import importlib.util
import platform
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from jax.stages import Compiled, Traced

from prefpaint_jax.kernels.dispatch import _tracing_for

_OPTIONS = {
  # YNNPACK for products, and for sums and maxima with what is around them: all of attention is one
  # kernel. Not for convolutions: XLA's own take half to all of the time of its.
  "cpu": {
    "xla_cpu_experimental_ynn_fusion_type": (
      "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    ),
    "xla_cpu_prefer_vector_width": 512,  # by itself half of what AVX-512 has
  },
  # One product for queries, keys and values reads their input once, not three times, but what it
  # gives is then cut into three, which costs twice that; so it is with every pair of products.
  "gpu": {"xla_gpu_dot_merger_threshold_mb": 0},
  # For fewer than 8 pictures XLA cuts each into pieces that overlap, puts them together for the
  # norm and cuts again: by its own estimates a residual block takes up to three times as long.
  "tpu": {
    "xla_tpu_run_space_to_batch": False,
    "xla_tpu_run_space_to_batch_on_new_platforms": False,
  },
}

# Of mallopt(3): how many pieces are asked of the system and from which size on, and what is free
# before it is given back.
_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1
_PIECES = 2**16  # as many as glibc allows by itself
_LARGE = 2**17  # bytes; its own threshold, which otherwise grows with what is freed
_library: ctypes.CDLL | None = None  # of C, where memory is kept


@functools.cache
def fast_jit(mesh: Mesh | None = None) -> Callable:
  """`jax.jit` with what makes programs faster, where the compiler for these devices knows that.

  Without a mesh it is that for this process's devices. What it makes is for them alone.
  """
  devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
  # Tried on a device of this process: not every backend compiles for another's alone.
  device = next((x for x in devices if x.process_index == jax.process_index()), devices[0])
  platform = device.platform

  def jit(function: Callable, **options) -> Callable:
    if platform in ("cpu", "tpu"):  # a "gpu" may be of two kinds
      function = _tracing_for(platform, function)
    return jax.jit(function, **options)

  options = {}
  x = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
  for name, value in _OPTIONS.get(platform, {}).items():
    # One that this version does not know must not cost the others.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      jit(lambda x: x, compiler_options={name: value}).lower(x).compile()
      options[name] = value
  return functools.partial(jit, compiler_options=options)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
  """Without Python looking for garbage: a fifth of the time in which functions are traced."""
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was_enabled:
      gc.enable()


class Program:
  """A jitted function, compiled for the arguments of its first call and kept without its trace.

  JAX keeps what a function was traced to for as long as the function: as much memory as all
  temporary arrays of a small model's update.
  """

  def __init__(self, jitted: Callable):
    self._jitted = jitted
    self._compiled: Compiled | None = None

  def trace(self, *arguments) -> Traced:
    """As `jax.jit`'s; only before it is compiled."""
    return self._jitted.trace(*arguments)

  def compile(self, *arguments) -> Any:
    """Compiles it for arguments, or shapes with their shardings; gives those of its results."""
    with _without_collections():
      traced = self.trace(*arguments)
      self._compiled = traced.lower().compile()
      place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
      results = jax.tree.map(place, traced.out_info, self._compiled.output_shardings)
      del self._jitted, traced
    gc.collect(0)  # what was traced refers to itself, and is young
    return results

  def __call__(self, *arguments):
    if self._compiled is None:
      self.compile(*arguments)
    return self._compiled(*arguments)


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
  global _library
  accelerated = has_tpu() or importlib.util.find_spec("jax_plugins")
  runs_here = jax.config.jax_platforms == "cpu" or not accelerated
  if runs_here and platform.libc_ver()[0] == "glibc":
    _library = ctypes.CDLL(None)
    _library.mallopt(_MMAP_THRESHOLD, _LARGE)
    _library.mallopt(_MMAP_MAX, 0)
    _library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    jax.config.update("jax_cpu_enable_async_dispatch", False)


@contextlib.contextmanager
def apart() -> Iterator[None]:
  """Where memory is kept, large arrays made within are given back to the system when freed.

  For what is loaded and copied before programs run: it would leave holes in what they work in, and
  of two programs each may find its own.
  """
  if _library is not None:
    _library.mallopt(_MMAP_MAX, _PIECES)
  try:
    yield
  finally:
    if _library is not None:
      _library.mallopt(_MMAP_MAX, 0)
