"""scores.jsonl: the scores that rewards gave to the candidates of a folder.

A line has the scores of one candidate, null where a score is not finite:

  {"image_id": "train_00000_cat", "candidate": "train_00000_cat_0", "scores": {"seam": -0.31}}
"""
# Shapes: N candidates, R rewards.

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefpaint_jax.runtime.files import parse_json
from prefpaint_jax.runtime.ranges import Number, Optional, Text, check, shorten
from prefpaint_jax.runtime.weighted_names import split_names

FILE = "scores.jsonl"
SCORE = Optional(Number(-3.4e38, 3.4e38))  # float32


def write_scores(output: Any, image_id: str, candidate: str, scores: Mapping[str, float]) -> None:
  """Writes the line of one candidate."""
  finite = {name: float(x) if math.isfinite(x) else None for name, x in scores.items()}
  print(json.dumps({"image_id": image_id, "candidate": candidate, "scores": finite}), file=output)


def read_scores(folder: Path, rewards: str, errors: list[str]) -> Iterator[tuple]:
  """Combines the scores of the rewards; candidates with a score that is not finite are left out.

  Each reward's scores are standardised over the candidates of the folder, weighted and summed.

  Args:
    rewards: names and weights, "NAME*WEIGHT,NAME".
    errors: gets a line, FILE:LINE and the error, for each error.

  Yields:
    (FILE:LINE, image ID, candidate, `rewards`, (combined score,)).

  Raises:
    ValueError: there is no such file, or all scores of a reward are equal.
  """
  file, names = folder / FILE, dict(split_names(rewards))
  if not file.is_file():
    raise ValueError(
      f"{file}: no such file; write it by collect with --config.rewards, or leave it empty here"
    )
  about, rows = [], []
  for number, line in enumerate(file.read_bytes().splitlines(), 1):
    where = f"{FILE}:{number}"
    try:
      row = parse_json(line, where)
      _check(row, where)
    except ValueError as error:
      errors.append(str(error))
      continue
    found = row["scores"]
    if unknown := [name for name in names if name not in found]:
      raise ValueError(
        f"{folder}/{where}: no score of {', '.join(unknown)}; name some of {', '.join(found)}"
      )
    about.append((where, row["image_id"], row["candidate"].removesuffix(".png")))
    rows.append([math.nan if found[name] is None else found[name] for name in names])
  scores = np.array(rows, np.float64).reshape(-1, len(names))
  known = np.isfinite(scores).all(axis=1)
  scores = scores[known]
  for name, values in zip(names, scores.T, strict=True):
    if len(values) and np.ptp(values) < 1e-9:
      raise ValueError(
        f"{file}: all {len(values)} scores of {name} are {values[0]:g}, so they express no "
        "preference; leave it out"
      )
  if len(scores):
    scores = (scores - scores.mean(0)) / scores.std(0) @ np.array(list(names.values()))
  named = (row for row, finite in zip(about, known, strict=True) if finite)
  for (where, image_id, name), score in zip(named, scores.tolist(), strict=True):
    yield where, image_id, name, rewards, (score,)


def _check(row: Mapping[str, Any], where: str) -> None:
  """Raises ValueError if a field of a line is missing or of another type."""
  for name in ("image_id", "candidate"):
    check(f"{where}: {name}", row.get(name), Text(empty=False))
  scores = row.get("scores")
  if not isinstance(scores, dict):
    raise ValueError(f"{where}: scores is {shorten(scores)}; expected an object of numbers")
  for name, score in scores.items():
    check(f"{where}: score of {name}", score, SCORE)
