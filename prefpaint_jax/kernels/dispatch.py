"""Chooses the implementation of an op for the platform that a program is traced for.

An op is a table of functions with the same arguments: "reference", its definition, and those for
"cpu", "cuda", "rocm" or "tpu". A platform without an entry gets the reference.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

Op = Mapping[str, Callable]

_platform = contextvars.ContextVar[str | None]("platform of the traced program", default=None)
_implementation = contextvars.ContextVar[str | None]("implementation of all ops", default=None)


def platform_of(device: jax.Device) -> str:
  """Returns "cpu", "tpu", "cuda" or "rocm"."""
  if device.platform != "gpu":
    return device.platform
  return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def dispatch(op: Op, *arrays: Any) -> Any:
  """Calls the implementation of `op` for the platform that the program is traced for.

  `fast_jit` says which platform that is; elsewhere it is the default device's.
  """
  name = _implementation.get() or _platform.get()
  if name is None:
    default = jax.config.jax_default_device or jax.local_devices()[0]
    name = default if isinstance(default, str) else platform_of(default)
  return op.get(name, op["reference"])(*arrays)


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
  """Uses the implementations of this name for every op that is traced inside: for tests."""
  jax.clear_caches()
  token = _implementation.set(name)
  try:
    yield
  finally:
    _implementation.reset(token)
    jax.clear_caches()


def traced_for(platform: str, function: Callable) -> Callable:
  """Returns `function`, traced with the ops of `platform`."""

  @functools.wraps(function)
  def traced(*arguments, **options):
    token = _platform.set(platform)
    try:
      return function(*arguments, **options)
    finally:
      _platform.reset(token)

  named = function
  while isinstance(named, functools.partial):
    named = named.func
  traced.__name__ = named.__name__  # XLA names the program after it
  return traced
