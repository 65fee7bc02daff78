"""Typed reading of JSON objects: each field is read, refused by name, or known to be harmless."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple


class Table(NamedTuple):
  """The fields of a stock config that are not read; a dataclass has those that are.

  A field in neither place is unknown to the stock class too, which ignores it.
  """

  what: str  # the component, with which an error begins
  fixed: Mapping[str, tuple] = {}  # field -> its only values that are implemented
  # Fields that do not change the result: of training, of the file, or of other samplers.
  harmless: frozenset[str] = frozenset()


def read(cls: type, config: Mapping[str, Any], table: Table) -> Any:
  """Makes a dataclass from a JSON object.

  Args:
    cls: the dataclass. A missing field gets its default.
    config: the JSON object.
    table: the fields that are not read.

  Raises:
    ValueError: a field has a value of another type, or one that is not implemented.
  """
  for name, values in table.fixed.items():
    if name in config and not any(_same(config[name], value) for value in values):
      raise ValueError(
        f"{table.what} config: {name} is {config[name]!r}, which is not supported; expected "
        f"{' or '.join(map(repr, values))}; use a checkpoint that has it"
      )
  hints = typing.get_type_hints(cls)
  values = {}
  for field in dataclasses.fields(cls):
    if field.name in config:
      value = _frozen(config[field.name])
      if not _fits(value, hints[field.name]):
        raise ValueError(
          f"{table.what} config: {field.name} is {config[field.name]!r}; expected "
          f"{_describe(hints[field.name])}; correct it, or download the file again"
        )
      is_float = hints[field.name] is float
      values[field.name] = float(value) if is_float else value
  return cls(**values)


def _frozen(value: Any) -> Any:
  """Makes tuples of lists, so that a config is hashable and can be a static argument of jax.jit."""
  return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _same(value: Any, expected: Any) -> bool:
  """Compares JSON values; true is not 1."""
  return _frozen(value) == expected and isinstance(value, bool) == isinstance(expected, bool)


def _fits(value: Any, hint: Any) -> bool:
  """Returns whether a JSON value has the type of an annotation; numbers must be finite."""
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    return any(_fits(value, option) for option in typing.get_args(hint))
  if typing.get_origin(hint) is tuple:
    return isinstance(value, tuple) and all(_fits(v, typing.get_args(hint)[0]) for v in value)
  if dataclasses.is_dataclass(hint):
    return isinstance(value, hint)
  if hint is float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)
  return isinstance(value, hint) and isinstance(value, bool) == (hint is bool)


_NOUNS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}


def _describe(hint: Any) -> str:
  """Names the type of an annotation as JSON does."""
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    return " or ".join(map(_describe, typing.get_args(hint)))
  if typing.get_origin(hint) is tuple:
    return f"a list, each {_describe(typing.get_args(hint)[0])}"
  return _NOUNS.get(hint, "null" if hint is type(None) else "an object")
