"""Reads the prompts, candidates and lists of a folder of scores, and collects every error.

`data.annotations` describes the files. Each reader appends to a list `errors`: one line of text
for each error, which begins with FILE:LINE.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefpaint_jax.data import masks
from prefpaint_jax.data.captions import check_text, read_captions
from prefpaint_jax.data.examples import CRITERIA, SPLITS, VALIDATION

_NUMBERS = ("kind", *CRITERIA)  # fields that may hold numbers; all others hold text
PROMPTS, CANDIDATES = "prompts.jsonl", "candidates.jsonl"


class PromptEntry(NamedTuple):
  """One prompt, before its images and scores are read."""

  where: str  # FILE:LINE; "" if only a mask file names the prompt
  source: str
  kind: int | None  # index into masks.KINDS; None: unknown
  picture: str  # ID of the image that the prompt was drawn from
  text: str = ""


class CandidateEntry(NamedTuple):
  """One candidate, before its image and scores are read."""

  where: str  # FILE:LINE; "" if only an image file names the candidate
  image_id: str
  policy: str


def read_prompts(folder: Path, errors: list[str]) -> dict[str, PromptEntry]:
  """Reads prompts.jsonl, or lists the masks if that file is missing, and the captions.

  A line with an error still counts as a prompt if its ID is known. Otherwise every score of that
  prompt would add an error about an unknown ID.

  Returns:
    {image ID: entry}.
  """
  prompts, texts = {}, {}
  if (folder / PROMPTS).exists():
    rows = read_rows(folder / PROMPTS, ("image_id", "source", "kind"), errors)
  else:
    ids = sorted(f.name.removesuffix("_mask.png") for f in folder.glob("masks/*_mask.png"))
    prompts = {image_id: PromptEntry("", "unknown", None, image_id) for image_id in ids}
    rows = ()
  for where, row in rows:
    image_id, kind = row["image_id"], row["kind"]
    if kind in masks.KINDS:
      kind = masks.KINDS.index(kind)
    elif type(kind) is not int or not 0 <= kind < len(masks.KINDS):
      errors.append(f"{where}: kind is {kind!r}; expected one of {', '.join(masks.KINDS)}")
    if image_id in prompts:
      errors.append(f"{where}: image id {image_id!r} is also in {prompts[image_id].where}")
    image = str(row.get("picture") or image_id)
    prompts[image_id] = PromptEntry(where, row["source"], kind, image)
    if "text" in row:
      texts[image_id] = _read(folder, errors, check_text, row["text"], f"{where}: text") or ""
  captions = _read(folder, errors, read_captions, folder, prompts) or {}
  if captions and texts:
    errors.append(f"captions and {PROMPTS} both have texts; keep only one")
  for image_id, text in (texts | captions).items():
    prompts[image_id] = prompts[image_id]._replace(text=text)
  return prompts


def read_candidates(
  folder: Path, prompts: Mapping[str, PromptEntry], errors: list[str]
) -> dict[str, CandidateEntry]:
  """Reads candidates.jsonl, or lists the images in inpaint/ if that file is missing.

  Returns:
    {candidate: entry}.
  """
  if not (folder / CANDIDATES).exists():
    names = (file.stem.rpartition("_") for file in folder.glob("inpaint/*.png"))
    by_number = sorted(names, key=lambda name: (name[0], len(name[2]), name[2]))
    return {
      f"{image_id}_{number}": CandidateEntry("", image_id, "unknown")
      for image_id, _, number in by_number
      if image_id in prompts
    }
  candidates = {}
  for where, row in read_rows(folder / CANDIDATES, ("image_id", "candidate", "policy"), errors):
    name, image_id = row["candidate"].removesuffix(".png"), row["image_id"]
    if is_candidate_of(where, name, image_id, prompts, errors):
      if name in candidates:
        errors.append(f"{where}: candidate {name!r} is also in {candidates[name].where}")
      candidates[name] = CandidateEntry(where, image_id, row["policy"])
  return candidates


def read_lists(
  folder: Path, prompts: Mapping[str, PromptEntry], errors: list[str]
) -> dict[str, frozenset[str]]:
  """Reads train.txt, test.txt and validation.txt if they exist.

  Returns:
    {split: the image IDs in its list}, without the splits that have no list.
  """
  lists, places = {}, {}
  for split in (*SPLITS, VALIDATION):
    file = folder / f"{split}.txt"
    if not file.exists():
      continue
    ids = set()
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), 1):
      image_id, where = line.strip(), f"{file.name}:{number}"
      if not image_id:
        continue
      if image_id not in prompts:
        errors.append(f"{where}: unknown image id {image_id!r}")
      elif image_id in places and image_id not in ids:
        errors.append(f"{where}: {image_id!r} is also in {places[image_id]}; keep it in one split")
      places.setdefault(image_id, where)
      ids.add(image_id)
    lists[split] = frozenset(ids)
  return lists


def _read(folder: Path, errors: list[str], function: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a function; if it raises ValueError, appends the error and returns None."""
  try:
    return function(*arguments)
  except ValueError as error:
    errors.append(str(error).replace(f"{folder}/", ""))
    return None


def read_rows(file: Path, fields: Sequence[str], errors: list[str]) -> Iterator[tuple[str, dict]]:
  """Yields ("FILE:LINE", object) of each line that holds a JSON object with all `fields`.

  Fields outside `_NUMBERS` are converted to strings.
  """
  for number, line in enumerate(file.read_bytes().splitlines(), 1):
    if not line.strip():
      continue
    where = f"{file.name}:{number}"
    try:
      row = json.loads(line)
    except ValueError as error:
      errors.append(f"{where}: not JSON: {getattr(error, 'msg', 'not UTF-8')}")
      continue
    if not isinstance(row, dict):
      errors.append(f"{where}: not a JSON object")
      continue
    missing = [name for name in fields if name not in row]
    texts = {name: row[name] for name in fields if name in row and name not in _NUMBERS}
    wrong = [name for name, text in texts.items() if type(text) not in (str, int) or text == ""]
    if missing:
      errors.append(f"{where}: missing {', '.join(missing)}")
    if wrong:
      errors.append(f"{where}: {', '.join(wrong)}: expected a non-empty string")
    if not missing and not wrong:
      yield where, row | {name: str(text) for name, text in texts.items()}


def is_candidate_of(
  where: str,
  name: str,
  image_id: str,
  prompts: Mapping[str, PromptEntry],
  errors: list[str],
) -> bool:
  """Returns whether the image ID is known and the candidate is named ID_<k>.

  If not, it appends an error.
  """
  if image_id not in prompts:
    errors.append(f"{where}: unknown image id {image_id!r}")
  elif name.rpartition("_")[0] != image_id:
    errors.append(f"{where}: candidate {name!r} does not belong to image id {image_id!r}")
  else:
    return True
  return False


def is_collected(
  folder: Path,
  where: str,
  name: str,
  candidates: Mapping[str, CandidateEntry],
  errors: list[str],
) -> bool:
  """Returns whether the folder has a candidate of this name; if not, it appends an error."""
  if name not in candidates:
    expected = CANDIDATES if (folder / CANDIDATES).exists() else "inpaint/"
    errors.append(f"{where}: unknown candidate {name!r}; expected one of {expected}")
  return name in candidates
