"""Files that are written whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
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


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], replaces: Collection[str] = ()) -> Iterator[Path]:
  """Gives a temporary folder beside `path`; renames it to `path` at the end, removes it on error.

  A process that is killed between the two renames of a replacement leaves the earlier folder under
  its name with ".before"; the next call puts it back first.

  Args:
    path: the folder; if it has files, they are replaced.
    replaces: names of the files and folders that may be replaced.

  Raises:
    ValueError: the folder has other files.
  """
  path = Path(path).resolve()
  temporary, before = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "before"))
  path.parent.mkdir(parents=True, exist_ok=True)
  if before.exists():
    if path.exists():
      shutil.rmtree(before)
    else:
      before.rename(path)
  if path.exists() and not path.is_dir():
    raise ValueError(f"{path} is a file; expected a folder; name a new one")
  if other := sorted(set(os.listdir(path) if path.exists() else ()) - set(replaces)):
    raise ValueError(f"{path} is not empty, it has {other[0]}; name a new folder")
  shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
  try:
    temporary.mkdir()
    yield temporary
    for file in temporary.rglob("*"):
      if file.is_file():
        with file.open("rb") as opened:
          os.fsync(opened.fileno())
    if path.exists():
      path.rename(before)
    try:
      temporary.rename(path)
    except BaseException:
      if before.exists():
        before.rename(path)
      raise
    shutil.rmtree(before, ignore_errors=True)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a text file, whole or not at all."""
  with atomic_path(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any, sort_keys: bool = False) -> None:
  """Writes `content` as indented JSON, whole or not at all."""
  write_text(path, json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")
