"""Short texts for terminals: one line of an error, aligned columns, a name with its explanation."""

import shlex
import sys
import textwrap
from collections.abc import Sequence


def first_line(error: BaseException) -> str:
  """Returns the first line of an exception's message, or its type where it has none."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def align_columns(rows: Sequence[Sequence[str]], right: bool = False, gap: int = 2) -> list[str]:
  """Pads the cells of each column to one width.

  Args:
    rows: cells of text, as many in each row.
    right: align every column but the first to the right.
    gap: spaces between columns.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for first, *others in rows:
    pad = str.rjust if right else str.ljust
    cells = [first.ljust(widths[0]), *map(pad, others, widths[1:])]
    lines.append((" " * gap).join(cells).rstrip())
  return lines


def explain(name: str, text: str, column: int = 40, indent: int = 2, width: int = 100) -> list[str]:
  """Sets a name and its explanation side by side, or below each other if the name is long.

  Args:
    name: it begins after `indent` spaces.
    text: it is wrapped, from `column` on.
    width: characters of a line.
  """
  first = " " * indent + name
  lines = textwrap.wrap(" ".join(text.split()), width - column) or [""]
  if len(first) < column - 1:
    first, lines = f"{first:<{column}}{lines[0]}".rstrip(), lines[1:]
  return [first, *(" " * column + line for line in lines if line)]


def print_next(*commands: Sequence[object]) -> None:
  """Prints what a user may run next, to standard error: results are on standard output.

  Args:
    commands: the name of a command of this package, and its arguments.
  """
  print("next:", file=sys.stderr)
  for name, *arguments in commands:
    print(" ", f"python -m prefpaint_jax.{name}", shlex.join(map(str, arguments)), file=sys.stderr)
