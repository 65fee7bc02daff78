"""Chooses an implementation by the platform that a program is traced for."""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax

_traced_for = contextvars.ContextVar[str | None](
  "platform of the program being traced", default=None
)


def by_platform(*arrays: Any, default: Callable, **functions: Callable) -> Any:
  """`jax.lax.platform_dependent`; within a function of `fast_jit` one alone is traced.

  All of them, for every layer, take a fifth longer to trace and lower.
  """
  if (platform := _traced_for.get()) is None:
    return jax.lax.platform_dependent(*arrays, default=default, **functions)
  return functions.get(platform, default)(*arrays)


def _tracing_for(platform: str, function: Callable) -> Callable:
  """The function, traced with `by_platform` knowing the platform."""

  @functools.wraps(function)
  def traced(*arguments, **options):
    token = _traced_for.set(platform)
    try:
      return function(*arguments, **options)
    finally:
      _traced_for.reset(token)

  named = function
  while isinstance(named, functools.partial):
    named = named.func
  traced.__name__ = named.__name__  # the program's
  return traced
