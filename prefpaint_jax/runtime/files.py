"""Files: written whole or not at all, and JSON whose errors name the file and the line."""

import contextlib
import json
import os
import shutil
import tempfile
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def check_folder(folder: str | os.PathLike[str]) -> None:
  """Checks that files can be made in a folder, which may not exist yet; leaves nothing there.

  Raises:
    ValueError: they cannot; the message says why.
  """
  existing = Path(folder)
  while not os.path.lexists(existing):
    existing = existing.parent
  if not existing.is_dir():
    raise ValueError(f"{folder}: {existing} is not a folder; give another path")
  try:
    with tempfile.TemporaryFile(dir=existing):  # the rights alone do not tell, in /proc for example
      pass
  except OSError as error:
    raise ValueError(
      f"{folder}: {existing} takes no files ({error.strerror}); give another path, or make it "
      "writable"
    ) from error


def check_is_folder(path: str | os.PathLike[str], wanted: str) -> None:
  """Raises ValueError, which says to give `wanted`, for a file, or a path where nothing is."""
  if not os.path.isdir(path):
    found = " is a file; expected a folder" if os.path.exists(path) else ": no such folder"
    raise ValueError(f"{path}{found}; give {wanted}")


def check_output(
  path: str | os.PathLike[str],
  inputs: Mapping[str, str | os.PathLike[str] | None] = types.MappingProxyType({}),
) -> None:
  """Checks that a command can write a file, before the work whose result the file takes.

  Args:
    path: the file; an earlier one will be replaced.
    inputs: values of the flags that may name a file to read, by flag. Others are ignored.

  Raises:
    ValueError: the path is a folder or a device, its folder takes no files, or it is an input.
  """
  path = Path(path)
  if path.exists() and not path.is_file():
    kind = "a folder" if path.is_dir() else "not a regular file"
    raise ValueError(f"{path} is {kind}; expected a file to write; give another name")
  for flag, name in inputs.items():
    if name and path.exists() and os.path.exists(name) and os.path.samefile(path, name):
      raise ValueError(f"{path} is the file that {flag} names; inputs are kept: give another name")
  check_folder(path.parent)


def check_output_folder(path: str | os.PathLike[str], replaces: Collection[str] = ()) -> None:
  """Checks that a command can write a folder, before the work whose result the folder takes.

  Args:
    path: the folder.
    replaces: names of the files and folders that may be replaced.

  Raises:
    ValueError: the path is a file, the folder has other files, or its parent takes none.
  """
  path = Path(path)
  if path.exists() and not path.is_dir():
    raise ValueError(f"{path} is a file; expected a folder; name a new one")
  if other := sorted(set(os.listdir(path) if path.exists() else ()) - set(replaces)):
    raise ValueError(f"{path} is not empty, it has {other[0]}; name a new folder")
  check_folder(path.parent)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
  """Gives a temporary path beside `path`; renames it to `path` at the end, removes it on error.

  Makes the folder of `path` if need be.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with _errors_name(path):
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
  check_output_folder(path, replaces)
  shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
  try:
    temporary.mkdir()
    with _errors_name(path):
      yield temporary
      for file in temporary.rglob("*"):
        if file.is_file():
          with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if path.exists() and any(path.iterdir()):  # the rename below replaces an empty folder
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


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
  """Adds `path` to an OSError without a file, such as that of `write` on a full disk."""
  try:
    yield
  except OSError as error:
    if error.errno is not None and error.filename is None:
      error.filename = str(path)
    raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a text file, whole or not at all."""
  with atomic_path(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any, sort_keys: bool = False) -> None:
  """Writes `content` as indented JSON, whole or not at all."""
  write_text(path, json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")


_JSON_NAMES = {dict: "an object {...}", list: "an array [...]"}


def read_json(path: str | os.PathLike[str], expected: type = dict) -> Any:
  """Reads a JSON file.

  Args:
    path: the file.
    expected: type of the content, dict or list.

  Raises:
    ValueError: the file is not JSON of this type; the message names the file and the line.
  """
  return parse_json(Path(path).read_bytes(), str(path), expected)


def read_json_lines(path: str | os.PathLike[str], fields: Iterable[str] = ()) -> list[dict]:
  """Reads a file of one JSON object a line; skips empty lines.

  Args:
    path: the file.
    fields: names that each object must have.

  Raises:
    ValueError: a line is not an object with these fields; the message names the file and the line.
  """
  rows = []
  for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
    if not line.strip():
      continue
    row = parse_json(line, f"{path}, line {number}")
    for name in fields:
      if name not in row:
        raise ValueError(f"{path}, line {number}: no field {name!r}; write the file again")
    rows.append(row)
  return rows


def parse_json(text: str | bytes, place: str, expected: type = dict) -> Any:
  """Parses JSON of one type.

  Args:
    text: the JSON, UTF-8.
    place: name of the source for the error, for example a file.
    expected: type of the content, dict or list.

  Raises:
    ValueError: the text is not JSON of this type.
  """
  name = _JSON_NAMES[expected]
  try:
    content = json.loads(text)
  except json.JSONDecodeError as error:
    where = f"line {error.lineno}, column {error.colno}: {error.msg}" if text.strip() else "empty"
    raise ValueError(f"{place} is not JSON ({where}); expected {name}; replace it") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{place} is not text in UTF-8; expected JSON, {name}; replace it") from error
  except RecursionError as error:
    raise ValueError(f"{place} is nested too deeply; expected {name}; replace it") from error
  if not isinstance(content, expected):
    raise ValueError(
      f"{place} holds a JSON value of type {type(content).__name__}; expected {name}; replace it"
    )
  return content
