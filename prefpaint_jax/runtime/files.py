"""Files that are written whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
  """Gives a temporary path beside `path`; renames it to `path` at the end, removes it on error.

  Makes the folder of `path` if need be.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    yield temporary
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a text file, whole or not at all."""
  with atomic_path(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any, sort_keys: bool = False) -> None:
  """Writes `content` as indented JSON, whole or not at all."""
  write_text(path, json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")
