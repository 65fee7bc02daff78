"""The folder of a labelling server: what it shows, and the file that takes the answers.

`Unit` and `Item` are the words of this room: a unit is a prompt with the candidates that one answer
judges, all of them or a pair. An item is a unit shown to an annotator, for the first time or again.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from PIL import Image

from prefpaint_jax.data.annotation_files import (
  CandidateEntry,
  PromptEntry,
  read_candidates,
  read_prompts,
)
from prefpaint_jax.data.answers import ANNOTATIONS, PAIRS, read_answers
from prefpaint_jax.data.examples import CRITERIA, MAX_SCORE, SIMULATED
from prefpaint_jax.runtime.files import atomic_path, check_is_folder
from prefpaint_jax.runtime.ranges import Integer, Number

MODES = {"scores": ANNOTATIONS, "pairs": PAIRS}  # mode -> file of its answers
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

  prompts: dict[str, PromptEntry]
  candidates: dict[str, CandidateEntry]
  units: list[Unit]  # in the order of the prompts
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
  return Shown(prompts, candidates, units, files)


def _check_sizes(files: Iterable[Path]) -> None:
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
  given. One process writes the file; see `runtime.workdir.exclusive`.
  """

  def __init__(self, folder: Path, mode: str, shown: Shown):
    """Reads the file and cuts off a line that a killed process has not finished.

    Raises:
      ValueError: a line is damaged or of a simulated annotator, or the folder has answers of the
        other mode.
    """
    self.answers: dict[tuple[str, Item], Answer] = {}
    self._path, self._mode, self._units = folder / MODES[mode], mode, shown.units
    self._lines: set[tuple[str, bool, tuple[str, ...]]] = set()
    self._file: int | None = None  # the first answer makes the file
    self._size = 0
    for other in MODES.values():
      if other != self._path.name and (folder / other).exists():
        raise ValueError(
          f"{folder} has {other}, and --mode={mode} writes {self._path.name}; expected one of "
          "them; move the other to another folder"
        )
    if self._path.exists():
      self._cut()
      os.fsync(self._file)  # a killed server may have written an answer that is acknowledged now
      self._read(folder, shown)

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
      OSError: the disk takes no more, or another program has changed the file. Nothing is written.
    """
    content = memoryview("".join(json.dumps(row) + "\n" for row in rows).encode())
    if self._file is None:
      self._open()
    opened = os.fstat(self._file)
    found = self._path.stat() if self._path.exists() else None
    if not found or not os.path.samestat(found, opened) or opened.st_size != self._size:
      raise OSError(
        errno.ESTALE,
        f"{self._path.name} was changed by another program; start prefpaint_jax.label again",
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

  def take(self, annotator: str, item: Item, answer: Answer) -> None:
    """Adds an answer, whose lines are written, to `answers`."""
    self.answers[annotator, item] = answer
    for judged in self._judged(item):
      self._lines.add((annotator, item.repeat, judged))

  def rows(self, annotator: str, item: Item, answer: Answer, left: str) -> Iterator[dict]:
    """Yields the lines of an answer.

    Args:
      left: the candidate that was shown first.
    """
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    for judged in self._judged(item):
      row: dict[str, Any] = {"image_id": self._units[item.unit].image_id}
      if self._mode == "scores":
        row |= {"candidate": judged[0]} | answer.content[judged[0]]
      else:
        row |= {"candidates": list(judged), "better": answer.content, "left": left}
      row |= {"annotator": annotator, "seconds": answer.seconds, "time": time}
      if (annotator, item.repeat, judged) in self._lines:
        row["corrects"] = True
      if item.repeat:
        row["repeat"] = True
      yield row

  def _judged(self, item: Item) -> list[tuple[str, ...]]:
    """Returns the candidates of each line of an answer."""
    candidates = self._units[item.unit].candidates
    return [(name,) for name in candidates] if self._mode == "scores" else [candidates]

  def _cut(self) -> None:
    """Opens the file and cuts off a line without an end.

    The other lines of that answer stay: each is a rating, and the page sends the answer again.
    """
    content = self._path.read_bytes()
    self._open()
    self._size = content.rfind(b"\n") + 1
    torn = content[self._size :]
    if torn and _is_object(torn):
      os.write(self._file, b"\n")  # a person's editor has left it out
      self._size = len(content) + 1
    elif torn:
      logging.warning("%s: cut off a line that was not finished", self._path)
      os.ftruncate(self._file, self._size)

  def _read(self, folder: Path, shown: Shown) -> None:
    """Reads the answers of the file."""
    errors: list[str] = []
    index = {unit: place for place, unit in enumerate(shown.units)}
    whole = {unit.image_id: unit for unit in shown.units}
    scores: dict[tuple[str, Item], dict] = defaultdict(dict)
    for line in read_answers(folder, shown.prompts, shown.candidates, errors):
      if line.annotator.startswith(SIMULATED):
        raise ValueError(f"{folder}/{line.where}: {line.annotator} is simulated; move the file")
      self._lines.add((line.annotator, line.repeat, line.candidates))
      in_pairs = self._mode == "pairs"
      unit = Unit(line.image_id, line.candidates) if in_pairs else whole[line.image_id]
      key = line.annotator, Item(index[unit], line.repeat)
      if in_pairs:
        better = {1: line.candidates[0], -1: line.candidates[1], 0: None}[line.values[0]]
        self.answers[key] = Answer(better, line.seconds or 0.0)
        continue
      scores[key][line.candidates[0]] = dict(zip(CRITERIA, line.values, strict=True))
      if len(scores[key]) == len(unit.candidates):
        self.answers[key] = Answer(scores[key], line.seconds or 0.0)
    if errors:
      raise ValueError(f"{folder}/{errors[0]}; correct the file")


def _is_object(line: bytes) -> bool:
  """Returns whether a line is a whole JSON object."""
  try:
    return isinstance(json.loads(line), dict)
  except (ValueError, RecursionError):
    return False
