"""The batches of an evaluation, and the file of results that each has."""
# Shapes: b prompts of a batch, S samples of each.

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np


def batches(chosen: list[int], size: int) -> Iterator[tuple[int, list[int], int]]:
  """Yields (number, indices, new) for each batch of `size` prompts.

  The last batch repeats its last prompt up to `size`; `new` is the number of different prompts.
  """
  for number, first in enumerate(range(0, len(chosen), size)):
    part = chosen[first : first + size]
    yield number, part + [part[-1]] * (size - len(part)), len(part)


def read_batch(file: Path) -> dict[str, np.ndarray] | None:
  """Reads the results of one batch; None if the file is missing, damaged or incomplete."""
  try:
    with np.load(file) as arrays:
      # Earlier versions did not write "original", "text" and the fidelity.
      is_whole = {"text", "policy/fidelity/mse"} <= set(arrays.files)
      return {name: arrays[name] for name in arrays.files} if is_whole else None
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
    return None


def of_side(results: Mapping[str, np.ndarray], side: str, part: str) -> dict[str, np.ndarray]:
  """Returns the results named SIDE/PART/NAME, by NAME."""
  prefix = f"{side}/{part}/"
  return {n.removeprefix(prefix): x for n, x in results.items() if n.startswith(prefix)}
