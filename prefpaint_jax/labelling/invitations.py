"""The file of invited annotators: a line `NAME TOKEN` each."""

import os
import re
import secrets
import unicodedata
from pathlib import Path

from prefpaint_jax.data.examples import SIMULATED
from prefpaint_jax.runtime.files import atomic_path

MOST_LETTERS = 40
# A surname is no token, because others can guess it.
TOKEN = re.compile(r"(?=[A-Za-z]*[0-9_-])[A-Za-z0-9_-]{8,200}|[A-Za-z]{16,200}")


def clean_name(name: str) -> str:
  """Returns the name of an annotator in Unicode's form C, without spaces around it.

  Raises:
    ValueError: the name is empty, long, not printable, or that of a simulated annotator.
  """
  name = unicodedata.normalize("NFC", name).strip()
  if not 0 < len(name) <= MOST_LETTERS or not name.isprintable():
    raise ValueError(f"the name is {name!r:.80}; expected 1 to {MOST_LETTERS} printable letters")
  if name.startswith(SIMULATED):
    raise ValueError(f"the name is {name!r}; only simulated annotators begin so; give another")
  return name


def read_invitations(file: Path) -> dict[str, str]:
  """Reads the annotators and their tokens; draws a token for a name without one, and writes it.

  A name is one word. Empty lines, and lines that begin with #, are kept.

  Returns:
    {token: name}.

  Raises:
    ValueError: a line has more than a name and a token, or a name or a token occurs twice.
  """
  lines, invited, drawn = [], {}, False
  try:
    text = file.read_text("utf-8")
  except UnicodeDecodeError:
    raise ValueError(f"{file} is not text in UTF-8; expected a name a line; replace it") from None
  for number, line in enumerate(text.splitlines(), 1):
    words = line.split()
    if words and not words[0].startswith("#"):
      where = f"{file}, line {number}"
      if len(words) > 2:
        raise ValueError(f"{where}: {len(words)} words; expected NAME or NAME TOKEN")
      try:
        name = clean_name(words[0])
      except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
      if len(words) == 1:
        words.append(secrets.token_urlsafe(18))
        line, drawn = " ".join(words), True
      if not TOKEN.fullmatch(words[1]):
        raise ValueError(
          f"{where}: {words[1]!r} is no token of 8 or more of A-Z a-z 0-9 _ - with a digit, _ or "
          "-; remove it, and one is drawn; a name is one word"
        )
      if name in invited.values() or words[1] in invited:
        raise ValueError(f"{where}: {name} or the token is in a line before; remove one")
      invited[words[1]] = name
    lines.append(line)
  if not invited:
    raise ValueError(f"{file} names nobody; write one name a line")
  if drawn:
    with atomic_path(file.resolve()) as temporary:
      os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
      temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")
  return invited
