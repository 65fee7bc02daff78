"""Ranges of settings: the values that a config field, a flag or an argument may have.

A range is data. It says which values it contains, describes itself for an error, and parses the
text of a flag. No range of numbers contains NaN or an infinity.
"""

import dataclasses
import math
import numbers
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Number:
  """The finite numbers from `low` to `high`; without a bound that is in `excluded`, and `also`."""

  low: float = -math.inf
  high: float = math.inf
  excluded: tuple[float, ...] = ()
  also: tuple[float, ...] = ()

  name = "a number"
  kind = numbers.Real
  number = float

  def contains(self, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, self.kind):
      return False
    # Also False for NaN. `math.isfinite` overflows for long integers.
    if not -math.inf < value < math.inf:
      return False
    inside = self.low <= value <= self.high and value not in self.excluded
    return inside or value in self.also

  def parse(self, text: str) -> float:
    return self.number(text)

  def __str__(self) -> str:
    low, high = (f"{x:.10g}" for x in (self.low, self.high))
    first = f"above {low}" if self.low in self.excluded else f"from {low}"
    last = f"below {high}" if self.high in self.excluded else f"at most {high}"
    if math.isinf(self.low) or math.isinf(self.high):
      bounds = first.replace("from", "not below") if math.isinf(self.high) else last
      bounds = "that is finite" if math.isinf(self.low) and math.isinf(self.high) else bounds
    else:
      bounds = f"{first}, {last}" if self.excluded else f"{first} to {high}"
    return " or ".join([*(f"{value:g}" for value in self.also), f"{self.name} {bounds}"])


class Integer(Number):
  """The integers from `low` to `high`, and `also`."""

  name = "an integer"
  kind = numbers.Integral
  number = int


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of some texts."""

  choices: tuple[str, ...]

  def contains(self, value: Any) -> bool:
    return isinstance(value, str) and value in self.choices

  def parse(self, text: str) -> str:
    return text

  def __str__(self) -> str:
    return f"one of {', '.join(choice or repr(choice) for choice in self.choices)}"


@dataclasses.dataclass(frozen=True)
class Boolean:
  """True or False."""

  def contains(self, value: Any) -> bool:
    return isinstance(value, bool)

  def __str__(self) -> str:
    return "True or False"


@dataclasses.dataclass(frozen=True)
class Text:
  """A text. An empty one only if `empty`; a regular expression if `pattern`."""

  empty: bool = True
  pattern: bool = False

  def contains(self, value: Any) -> bool:
    if not isinstance(value, str) or "\0" in value or not (self.empty or value.strip()):
      return False
    try:
      return not self.pattern or bool(re.compile(value))
    except (re.error, RecursionError, OverflowError):
      return False

  def parse(self, text: str) -> str:
    return text

  def __str__(self) -> str:
    return "a regular expression" if self.pattern else "a text" if self.empty else "a name or path"


@dataclasses.dataclass(frozen=True)
class Several:
  """A tuple of values in one range: `count` of them, or any number; `rising`: none falls."""

  item: Any
  count: int | None = None
  rising: bool = False

  def contains(self, value: Any) -> bool:
    return (
      isinstance(value, list | tuple)
      and self.count in (None, len(value))
      and all(map(self.item.contains, value))
      and (not self.rising or list(value) == sorted(value))
    )

  def __str__(self) -> str:
    order = ", none below the one before" if self.rising else ""
    return f"a tuple of {self.count or 'values'}, each {self.item}{order}"


@dataclasses.dataclass(frozen=True)
class Optional:
  """None, or a value in a range."""

  item: Any

  def contains(self, value: Any) -> bool:
    return value is None or self.item.contains(value)

  def __str__(self) -> str:
    return f"None or {self.item}"


@dataclasses.dataclass(frozen=True)
class Step:
  """A checkpoint of a run: an iteration, as a number or a text, or best."""

  def contains(self, value: Any) -> bool:
    if isinstance(value, str):
      return value == "best" or (value.isdecimal() and int(value) > 0)
    return Integer(1).contains(value)

  def parse(self, text: str) -> str:
    return text

  def __str__(self) -> str:
    return "an iteration, 1 or more, or best"


Range = Number | Choice | Boolean | Text | Several | Optional | Step


def check(name: str, value: Any, allowed: Range) -> None:
  """Raises ValueError, which names the setting and what it may be, for a value out of its range.

  Args:
    name: of the setting, for example "config.clip_range".
    value: its value.
    allowed: its range.
  """
  if not allowed.contains(value):
    raise ValueError(f"{name} is {shorten(value)}; expected {allowed}")


def shorten(value: Any) -> str:
  """Returns the representation of a value, cut to 80 characters."""
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
