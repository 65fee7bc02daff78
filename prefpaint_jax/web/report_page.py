"""The frame of a report: one HTML file with its style, without scripts."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("report.css")


def render_page(title: str, body: Iterable[str]) -> str:
  """Returns the page of a title and of the parts of its body, which are HTML."""
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE.read_text()}</style>
</head>
<body>
<main>
{"".join(body)}
</main>
</body>
</html>
"""


def render_table(rows: Sequence[Sequence[str]]) -> str:
  """Renders rows of text, with a row of titles; an interval in brackets is small."""
  titles, *others = rows
  head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles[1:])
  body = ""
  for name, *cells in others:
    cells = (escape(typeset(cell)) for cell in cells)
    small = (re.sub(r" (\[.*\])$", r"<small>\1</small>", cell) for cell in cells)
    cells = "".join(f"<td>{cell}</td>" for cell in small)
    body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
  return (
    f'<div class="scroll" tabindex="0"><table><thead><tr><td>{escape(titles[0])}</td>{head}</tr>'
    f"</thead><tbody>{body}</tbody></table></div>"
  )


def typeset(number: str) -> str:
  """Replaces hyphens by minus signs."""
  return number.replace("-", "−")
