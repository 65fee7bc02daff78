"""What a run writes down for people: metrics.jsonl, TensorBoard events, a progress bar, pictures.

Shape letters: N pictures, H W pixels.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

from prefpaint_jax.tensorboard import EventFile


class MetricsWriter:
  """`workdir/metrics.jsonl`, one object per iteration, and `workdir/tensorboard`.

  With `is_writer` false (every process but the first) it takes the same calls and writes nothing.
  What was written survives the process, and a full disk is an error of the call that meets it.
  """

  def __init__(self, workdir: str | os.PathLike[str], is_writer: bool = True):
    self._workdir = Path(workdir)
    self._is_writer = is_writer
    self._lines: TextIO | None = None
    self._events: EventFile | None = None
    self._purge_step: int | None = None

  def truncate(self, iteration: int) -> None:
    """Forgets what was written past `iteration`, the restored one. Call before the first write.

    A run killed after its last checkpoint has written lines it is about to write again, the last
    of them perhaps by half.
    """
    path = self._workdir / "metrics.jsonl"
    # TensorBoard hides the events past this step that earlier files hold.
    self._purge_step = iteration + 1
    if not self._is_writer or not path.exists():
      return
    *complete, _ = path.read_text().split("\n")
    kept = [line for line in complete if json.loads(line)["iteration"] <= iteration]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)

  def write(self, iteration: int, scalars: Mapping[str, Any]) -> None:
    """One line of scalars (numbers or 0-d arrays); NaN and infinities become null."""
    if not self._is_writer:
      return
    self._open()
    numbers = {name: np.asarray(value).item() for name, value in scalars.items()}
    finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
    line = {"iteration": iteration} | {name: finite.get(name) for name in numbers}
    print(json.dumps(line, allow_nan=False), file=self._lines, flush=True)
    self._events.scalars(iteration, finite)

  def image(self, iteration: int, name: str, image: np.ndarray) -> None:
    """A uint8 picture [H, W, 3] for TensorBoard."""
    if self._is_writer:
      self._open()
      self._events.image(iteration, name, image)

  def close(self) -> None:
    if self._lines is not None:
      self._lines.close()
      self._events.close()
      self._lines = self._events = None

  def _open(self) -> None:
    if self._lines is None:
      self._workdir.mkdir(parents=True, exist_ok=True)
      self._lines = (self._workdir / "metrics.jsonl").open("a")
      self._events = EventFile(self._workdir / "tensorboard", self._purge_step)


class LogLines:
  """The part of tqdm that a run uses, for a log file: a line every `interval` seconds."""

  def __init__(self, total: int, initial: int, interval: float, stream: TextIO):
    self._total, self._interval, self._stream = total, interval, stream
    self._done = self._reported = initial
    self._postfix = ""
    self._last_line = time.monotonic()

  def set_postfix_str(self, text: str, refresh: bool = True) -> None:
    """`refresh` is tqdm's; a line appears only when it is due."""
    del refresh
    self._postfix = text

  def update(self, count: int = 1) -> None:
    self._done += count
    if time.monotonic() - self._last_line >= self._interval:
      self._report()

  def close(self) -> None:
    if self._done != self._reported:
      self._report()

  def _report(self) -> None:
    self._reported, self._last_line = self._done, time.monotonic()
    line = f"iteration {self._done}/{self._total}"
    print(f"{line}, {self._postfix}" if self._postfix else line, file=self._stream, flush=True)


def progress(
  total: int,
  initial: int = 0,
  visible: bool = True,
  interval: float = 30.0,
  stream: TextIO | None = None,
) -> tqdm | LogLines:
  """A bar over `total` iterations, `initial` of them done before: `update()`, `set_postfix_str()`.

  On a terminal it moves; elsewhere it is a line every `interval` seconds and one at the end. Not
  `visible` (every process but the first), it shows nothing.
  """
  stream = sys.stderr if stream is None else stream
  if visible and not stream.isatty():
    return LogLines(total, initial, interval, stream)
  return tqdm(total=total, initial=initial, file=stream, disable=not visible, dynamic_ncols=True)


def image_grid(
  images: np.ndarray,
  columns: int,
  scale: int = 1,
  padding: int = 2,
  labels: Sequence[str] | None = None,
) -> np.ndarray:
  """Pictures row by row on white, as uint8 [grid height, grid width, 3].

  Args:
    images: [N, H, W, 3] in [0, 1]; values outside are clipped.
    columns: pictures per row; the last row is filled up with white.
    scale: every pixel becomes scale × scale of them.
    padding: white pixels around every picture.
    labels: N short texts, each written under its picture and cut off at its width.
  """
  count, height, width, _ = images.shape
  if labels is not None and len(labels) != count:
    raise ValueError(f"image_grid: {len(labels)} labels for {count} images: give one for each")
  pixels = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
  pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
  if labels is not None:
    strips = np.stack([_label(text, width * scale) for text in labels])
    pixels = np.concatenate([pixels, strips], axis=1)
  rows = -(-count // columns)
  margins = [(0, rows * columns - count), (padding, padding), (padding, padding), (0, 0)]
  tiles = np.pad(pixels, margins, constant_values=255)
  _, tile_height, tile_width, _ = tiles.shape
  grid = tiles.reshape(rows, columns, tile_height, tile_width, 3).swapaxes(1, 2)
  return grid.reshape(rows * tile_height, columns * tile_width, 3)


def _label(text: str, width: int) -> np.ndarray:
  font = ImageFont.load_default()
  strip = Image.new("RGB", (width, int(font.getbbox("Ág")[3]) + 2), "white")
  ImageDraw.Draw(strip).text((1, 0), text, fill="black", font=font)
  return np.asarray(strip)


def save_png(
  path: str | os.PathLike[str], image: np.ndarray, text: Mapping[str, str] | None = None
) -> None:
  """Writes a uint8 picture [H, W, 3], with `text` as PNG text fields; whole or not at all."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  fields = PngImagePlugin.PngInfo()
  for name, value in (text or {}).items():
    fields.add_text(name, value)
  temporary = path.with_name(f".{path.name}.tmp")
  Image.fromarray(image).save(temporary, format="PNG", pnginfo=fields)
  os.replace(temporary, path)
