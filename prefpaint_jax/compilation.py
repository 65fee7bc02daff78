"""How programs are compiled: what a compiler does by itself is not always the fastest."""

import functools
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
