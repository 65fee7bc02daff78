"""Short texts for terminals: one line of an error, aligned columns."""

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
