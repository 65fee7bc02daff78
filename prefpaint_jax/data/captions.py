"""Texts of prompts and of images: captions.jsonl or captions/ID.txt in their folder.

captions.jsonl has one JSON object {"id", "text"} per line. captions/ID.txt is the text of one ID;
its last newline is not part of the text. Texts are otherwise kept as they are. An ID without a text
has the empty text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from prefpaint_jax.runtime.files import parse_json

LINES, FILES = "captions.jsonl", "captions"


def read_captions(folder: Path, ids: Iterable[str]) -> dict[str, str]:
  """Reads the texts of a folder: {ID: text}, empty if the folder has none.

  Args:
    folder: the folder that has captions.jsonl or captions/.
    ids: the IDs that may have a text.

  Raises:
    ValueError: the folder has both, or a text cannot be read, has an unknown ID, or is the second
      one of its ID. The message names the file and the line.
  """
  lines, files = folder / LINES, sorted((folder / FILES).glob("**/*.txt"))
  files = [file for file in files if not file.name.startswith(".")]
  if files and lines.is_file():
    raise ValueError(f"{lines} and {folder / FILES} both have texts; remove one of them")
  if not files and not lines.is_file():
    return {}
  texts, places, ids = {}, {}, frozenset(ids)
  if lines.is_file():
    for number, line in enumerate(lines.read_bytes().split(b"\n"), 1):
      if line.strip():
        place = f"{lines}, line {number}"
        row = parse_json(line, place)
        id_ = check_text(row.get("id"), f"{place}: id")
        if id_ in texts:
          raise ValueError(f"{place}: {id_!r} is also in line {places[id_]}; keep one of them")
        texts[id_], places[id_] = check_text(row.get("text"), f"{place}: text"), number
        _check_id(id_, ids, place)
  for file in files:
    id_ = file.relative_to(folder / FILES).with_suffix("").as_posix()
    texts[id_] = decode_text(file.read_bytes(), str(file)).removesuffix("\n").removesuffix("\r")
    _check_id(id_, ids, str(file))
  return texts


def check_text(value: Any, place: str) -> str:
  """Returns a text; raises ValueError, which names `place`, if the value is not one."""
  if not isinstance(value, str):
    raise ValueError(f"{place} is {value!r}; expected a string; correct the line")
  try:
    value.encode()
  except UnicodeEncodeError:  # JSON can hold half of a surrogate pair, which is no character
    raise ValueError(f"{place} is {value!r}, which is not valid Unicode; correct it") from None
  return value


def decode_text(content: bytes, place: str) -> str:
  """Decodes a text in UTF-8; raises ValueError, which names `place` and the line."""
  try:
    return content.decode("utf-8-sig")  # editors on Windows write a byte-order mark
  except UnicodeDecodeError as error:
    line = 1 + content.count(b"\n", 0, error.start)
    raise ValueError(f"{place}, line {line}: not text in UTF-8; save the file as UTF-8") from None


def check_guidance(scale: float, has_texts: bool, source: str) -> None:
  """Raises ValueError if config.guidance_scale asks for guidance by texts that `source` lacks."""
  if scale != 1 and not has_texts:
    raise ValueError(
      f"config.guidance_scale is {scale:g}, but {source} has no texts to guide by; add "
      f"{LINES} to it, or give 1"
    )


def _check_id(id_: str, ids: Collection[str], place: str) -> None:
  """Raises ValueError, which names `place`, for an ID that is not one of `ids`."""
  if id_ not in ids:
    known = f"expected an ID such as {min(ids)!r}" if ids else "there is none"
    raise ValueError(f"{place}: unknown id {id_!r}; {known}; correct or remove it")
