"""The folder of a labelling server: what it shows, and the file that takes the answers.

`Unit` and `Item` are the words of this room: a unit is a prompt with the candidates that one answer
judges, all of them or a pair. An item is a unit shown to an annotator, for the first time or again.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from absl import logging
from PIL import Image

from prefpaint_jax.data.annotation_files import read_candidates, read_prompts
from prefpaint_jax.data.examples import CRITERIA, MAX_SCORE, SIMULATED
from prefpaint_jax.runtime.files import atomic_path, check_is_folder, parse_json
from prefpaint_jax.runtime.ranges import Integer, Number, Text, check

MODES = {"scores": "annotations.jsonl", "pairs": "pairs.jsonl"}  # mode -> file of its answers
SCORE = Integer(0, int(MAX_SCORE))
SECONDS = Number(0, 1e7)
SECRET = ".label_secret"


class Unit(NamedTuple):
  """A prompt and the candidates that one answer judges, sorted."""

  image_id: str
  candidates: tuple[str, ...]


class Item(NamedTuple):
  """A unit, by its index, as an annotator sees it: for the first time, or again."""

  unit: int
  repeat: bool = False


class Answer(NamedTuple):
  """{candidate: {criterion: score}}, or the better candidate of a pair (None: equal)."""

  content: dict[str, dict[str, float]] | str | None
  seconds: float


class Shown(NamedTuple):
  """What a folder has to show."""

  units: list[Unit]  # in the order of prompts.jsonl
  texts: dict[str, str]  # image ID -> text
  files: dict[tuple[str, str], Path]  # ("known", image ID), ("mask", ...), ("candidate", name)


def read_shown(folder: Path, mode: str) -> Shown:
  """Reads the prompts and candidates of a workdir of `prefpaint_jax.collect`.

  In the mode "pairs" each two candidates of a prompt are a unit.

  Raises:
    ValueError: a file is missing or damaged, or the images of a prompt differ in size.
  """
  check_is_folder(folder, "the --workdir of prefpaint_jax.collect")
  errors: list[str] = []
  prompts = read_prompts(folder, errors)
  candidates = read_candidates(folder, prompts, errors)
  if errors:
    raise ValueError(f"{folder}/{errors[0]}; correct the file or collect the candidates again")
  names = defaultdict(list)
  for name, candidate in candidates.items():
    names[candidate.image_id].append(name)
  units, files = [], {}
  for image_id in filter(names.get, prompts):
    whole = folder / "images" / f"{image_id}.png"
    masked = folder / "masks_color" / f"{image_id}_mask_color.png"
    own = {("known", image_id): whole if whole.exists() else masked}
    own["mask", image_id] = folder / "masks" / f"{image_id}_mask.png"
    own |= {("candidate", name): folder / "inpaint" / f"{name}.png" for name in names[image_id]}
    _check_sizes(own.values())
    files |= own
    number = len(names[image_id]) if mode == "scores" else 2
    groups = itertools.combinations(sorted(names[image_id]), number)
    units += [Unit(image_id, group) for group in groups]
  if not units:
    raise ValueError(f"{folder}: no candidates to show; run prefpaint_jax.collect first")
  return Shown(units, {image_id: prompt.text for image_id, prompt in prompts.items()}, files)


def _check_sizes(files: Sequence[Path]) -> None:
  """Raises ValueError if a file is no image, or not of the size of the first."""
  sizes = {}
  for file in files:
    try:
      with Image.open(file) as image:  # reads the header only
        sizes[file] = image.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
      raise ValueError(f"{file}: {error}; collect the candidates again") from None
  first = next(iter(sizes))
  for file, size in sizes.items():
    if size != sizes[first]:
      found, expected = ("x".join(map(str, x)) for x in (size, sizes[first]))
      raise ValueError(f"{file} is {found}, {first} is {expected}; give both one size")


def read_secret(folder: Path) -> bytes:
  """Reads the secret of a folder, from which the server derives its keys; draws it at first.

  Keys that a page holds are valid after a new start of the server.
  """
  path = folder / SECRET
  if not path.exists():
    with atomic_path(path) as temporary:
      os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
      temporary.write_text(secrets.token_hex(32))
  return path.read_bytes()


class AnswerFile:
  """The answers of all annotators, in a file and in memory.

  `answers` has the answers that stand, {(annotator, item): answer}, in the order in which they were
  first complete. One process writes the file; see `runtime.workdir.exclusive`.
  """

  def __init__(self, folder: Path, mode: str, units: Sequence[Unit]):
    """Opens the file and cuts off an answer that a killed process has not finished.

    Raises:
      ValueError: a line is damaged, names something unknown, or is of a simulated annotator.
    """
    self.answers: dict[tuple[str, Item], Answer] = {}
    self._path, self._mode, self._units = folder / MODES[mode], mode, units
    self._index = {unit: index for index, unit in enumerate(units)}
    self._by_id = {unit.image_id: index for index, unit in enumerate(units)}
    self._lines: set[tuple[str, str | tuple[str, ...], bool]] = set()  # see `_line_key`
    self._partial: dict[tuple[str, Item], dict] = defaultdict(dict)
    self._file: int | None = None  # the first answer makes the file
    self._size = 0
    if self._path.exists():
      content = self._path.read_bytes()
      kept = self._read(content)
      self._open()
      if not content.startswith(kept):
        os.write(self._file, kept[len(content) :])
      if len(kept) < len(content):
        logging.warning("%s: cut off an answer that was not finished", self._path)
      os.ftruncate(self._file, len(kept))
      os.fsync(self._file)
      self._size = len(kept)

  def _open(self) -> None:
    self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    parent = os.open(self._path.parent, os.O_RDONLY)
    os.fsync(parent)  # a new file is lost with its folder's entry
    os.close(parent)

  def close(self) -> None:
    if self._file is not None:
      os.close(self._file)

  def append(self, rows: Sequence[Mapping]) -> None:
    """Writes the lines of an answer; returns when they are on disk.

    Raises:
      OSError: the disk takes no more; the file is as before.
      ValueError: another program has changed the file; nothing is written.
    """
    content = memoryview("".join(json.dumps(row) + "\n" for row in rows).encode())
    if self._file is None:
      self._open()
    opened = os.fstat(self._file)
    found = self._path.stat() if self._path.exists() else None
    if not found or not os.path.samestat(found, opened) or opened.st_size != self._size:
      raise ValueError(
        f"{self._path.name} was changed by another program; the answer is not saved; start "
        "prefpaint_jax.label again"
      )
    try:
      written = 0
      while written < len(content):
        written += os.write(self._file, content[written:])
      os.fsync(self._file)
    except OSError:
      os.ftruncate(self._file, self._size)
      raise
    self._size += len(content)

  def take(self, rows: Sequence[Mapping]) -> None:
    """Adds the lines of an answer to `answers`."""
    for row in rows:
      self._take(row, self._path.name)

  def rows(self, annotator: str, item: Item, answer: Answer) -> Iterator[dict]:
    """Yields the lines of an answer."""
    unit = self._units[item.unit]
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    about = {"annotator": annotator, "seconds": answer.seconds, "time": time}
    if self._mode == "scores":
      parts = [{"candidate": name} | answer.content[name] for name in unit.candidates]
    else:
      parts = [{"candidates": list(unit.candidates), "better": answer.content}]
    for part in parts:
      row = {"image_id": unit.image_id} | part | about
      if (annotator, _judged(row), item.repeat) in self._lines:
        row["corrects"] = True
      if item.repeat:
        row["repeat"] = True
      yield row

  def _read(self, content: bytes) -> bytes:
    """Reads the lines of the file; returns the bytes that are kept."""
    *lines, torn = content.split(b"\n")
    rows: list[tuple[str, dict | None, bytes]] = []
    for number, line in enumerate(lines, 1):
      where = f"{self._path}, line {number}"
      rows.append((where, parse_json(line, where), line) if line.strip() else (where, None, line))
    if torn and _is_by_hand(torn):  # a person's editor may write no newline at the end
      rows.append((f"{self._path}, line {len(rows) + 1}", json.loads(torn), torn))
    elif self._mode == "scores":
      rows = rows[: len(rows) - self._unfinished([row for _, row, _ in rows])]
    for where, row, _ in rows:
      if row is not None:
        self._take(row, where)
    return b"".join(line + b"\n" for *_, line in rows)

  def _unfinished(self, rows: Sequence[dict | None]) -> int:
    """Returns the number of lines at the end which are part of one answer, without the rest."""
    key = lambda row: row and tuple(row.get(x) for x in ("image_id", "annotator", "time"))
    if not rows or not rows[-1] or "time" not in rows[-1]:
      return 0
    group = list(itertools.takewhile(lambda row: key(row) == key(rows[-1]), reversed(rows)))
    index = self._by_id.get(str(rows[-1].get("image_id")))
    return len(group) if index is not None and len(group) < self._number(index) else 0

  def _number(self, unit: int) -> int:
    return len(self._units[unit].candidates)

  def _take(self, row: Mapping, where: str) -> None:
    """Adds a line to `answers`."""
    for name in ("image_id", "annotator"):
      if type(row.get(name)) is not int:
        check(f"{where}: {name}", row.get(name), Text(empty=False))
    annotator, image_id = str(row["annotator"]), str(row["image_id"])
    if annotator.startswith(SIMULATED):
      raise ValueError(f"{where}: {annotator} is simulated; move the file to another place first")
    repeat, judged = bool(row.get("repeat")), _judged(row)
    seconds = row.get("seconds") if SECONDS.contains(row.get("seconds")) else 0.0
    if self._mode == "pairs":
      index = self._index.get(Unit(image_id, judged))
      if index is None or row.get("better") not in (None, *judged):
        raise ValueError(f"{where}: unknown pair or better candidate; correct the line")
      key, content = (annotator, Item(index, repeat)), row["better"]
    else:
      index = self._by_id.get(image_id)
      if index is None or judged not in self._units[index].candidates:
        raise ValueError(f"{where}: unknown candidate {judged!r}; correct the line")
      for name in CRITERIA:
        check(f"{where}: {name}", row.get(name), Number(0, MAX_SCORE))
      key = annotator, Item(index, repeat)
      content = self._partial[key]
      content[judged] = {name: row[name] for name in CRITERIA}
    self._lines.add((annotator, judged, repeat))
    if self._mode == "pairs" or len(content) == self._number(index):
      self.answers[key] = Answer(content, seconds)


def _judged(row: Mapping) -> str | tuple[str, ...]:
  """Returns the candidate of a line of scores, or the pair of a line of pairs."""
  if "candidates" in row:
    return tuple(sorted(map(str, row["candidates"])))
  return str(row.get("candidate")).removesuffix(".png")


def _is_by_hand(line: bytes) -> bool:
  """Returns whether a line without a newline is whole, and not of this server."""
  try:
    row = json.loads(line)
  except ValueError:
    return False
  return isinstance(row, dict) and "time" not in row
