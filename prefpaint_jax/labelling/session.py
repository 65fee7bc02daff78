"""A labelling in progress: the answers of a folder, and the keys that stand for names."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

from prefpaint_jax.data.examples import CRITERIA, MAX_SCORE
from prefpaint_jax.data.images import load_image, load_mask, to_bytes
from prefpaint_jax.labelling.assignment import Assignment
from prefpaint_jax.labelling.invitations import clean_name
from prefpaint_jax.labelling.store import (
  SCORE,
  SECONDS,
  Answer,
  AnswerFile,
  Item,
  Unit,
  read_secret,
  read_shown,
)
from prefpaint_jax.runtime.ranges import check, shorten


class Labelling:
  """The answers of a folder, the items of its annotators, and the keys of both."""

  def __init__(
    self,
    folder: Path,
    mode: str = "scores",
    per_prompt: int = 3,
    repeats: float = 0.05,
    seed: int = 0,
    invited: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
  ):
    """Reads a folder.

    Args:
      folder: the workdir of `prefpaint_jax.collect`, which this process holds.
      mode: "scores" or "pairs".
      per_prompt: number of annotators of each prompt, or of each pair.
      repeats: share of an annotator's items that are shown again.
      seed: of every order and choice.
      invited: {token: name}; None: everybody who gives a name.
      order: IDs of the prompts, the first wanted first; None: at random.

    Raises:
      ValueError: a file of the folder is damaged.
    """
    self.mode, self._seed, self._invited = mode, seed, invited
    shown = read_shown(folder, mode)
    units, files, self._prompts = shown.units, shown.files, shown.prompts
    if order is None:
      random.Random(seed).shuffle(units)
    else:
      rank = {image_id: place for place, image_id in enumerate(order)}
      units.sort(key=lambda unit: rank.get(unit.image_id, len(rank)))
    self._units: list[Unit] = units
    self._secret = read_secret(folder)
    self._files = {self._key(*about): (about[0], path) for about, path in files.items()}
    self._masks = {image_id: path for (kind, image_id), path in files.items() if kind == "mask"}
    self._known = {self._key("known", image_id): image_id for image_id in self._masks}
    self._unit_of = {self._unit_key(unit): index for index, unit in enumerate(units)}
    self.file = AnswerFile(folder, mode, shown)
    names = (invited or {}).values()
    self.assignment = Assignment(len(units), per_prompt, repeats, seed, names)
    for (name, item), answer in self.file.answers.items():
      self.assignment.record(name, item, answer.seconds)
    self._writing = asyncio.Lock()

  @property
  def is_open(self) -> bool:
    return self._invited is None

  def annotator(self, headers: Mapping[str, str]) -> str:
    """Returns the name of the annotator who sends a request.

    Raises:
      ValueError: the request has no valid token, or no valid name.
    """
    if self._invited is None:
      return clean_name(unquote(headers.get("x-annotator", ""), errors="strict"))
    scheme, _, token = headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(token.strip().encode("latin1", "replace")).digest()
    for known, name in self._invited.items():
      same = hmac.compare_digest(hashlib.sha256(known.encode()).digest(), digest)
      if same and scheme.lower() == "bearer":
        return name
    raise ValueError("unknown or missing invitation; open the link that you were sent")

  def state(self, name: str) -> dict[str, Any]:
    """Returns the progress of an annotator."""
    self.assignment.join(name)
    return {
      "mode": self.mode,
      "annotator": name,
      "open": self.is_open,
      "done": self.assignment.done(name),
      "total": self.assignment.total(name),
      "seconds_left": self.assignment.seconds_left(name),
      "criteria": list(CRITERIA),
      "most": int(MAX_SCORE),
    }

  def item(self, name: str, key: str | None = None) -> dict[str, Any]:
    """Returns an item of an annotator, by default the first without an answer.

    Raises:
      ValueError: the annotator has no item of this key.
    """
    now = time.monotonic()
    if key is None:
      item = self.assignment.current(name, now)
    else:
      item = self._find(name, key)
      self.assignment.claim(name, item, now)
    previous = self.assignment.previous(name, item)
    before = previous and self._item_key(name, previous)
    if item is None:
      return {"item": None, "previous": before}
    unit = self._units[item.unit]
    ahead = self.assignment.following(name, item)
    return {
      "item": self._item_key(name, item),
      "number": self.assignment.position(name, item) + 1,
      "text": self._prompts[unit.image_id].text,
      "known": self._address("known", unit),
      "mask": self._address("mask", unit),
      "candidates": [{"id": x, "image": f"/image/{x}"} for x in self._shown(name, item)],
      "answer": self._told(name, item),
      "previous": before,
      "ahead": self._images(name, ahead) if ahead else [],
    }

  async def answer(self, name: str, message: Mapping[str, Any]) -> None:
    """Saves an answer; returns when it is on disk.

    Raises:
      ValueError: the item or a candidate is not of this annotator, or a score is out of range.
      OSError: the answer is not saved; see `AnswerFile.append`.
    """
    item = self._find(name, message.get("item"))
    check("seconds", message.get("seconds"), SECONDS)
    parse = self._parse_scores if self.mode == "scores" else self._parse_better
    answer = Answer(parse(name, item, message), round(message["seconds"], 2))
    async with self._writing:
      before = self.file.answers.get((name, item))
      if before is None or before.content != answer.content:
        # In a thread, so that others are answered while the disk writes.
        left = next(iter(self._shown(name, item).values()))
        rows = list(self.file.rows(name, item, answer, left))
        await asyncio.to_thread(self.file.append, rows)
        self.file.take(name, item, answer)
        self.assignment.record(name, item, answer.seconds)

  def image(self, key: str) -> bytes | None:
    """Returns an image as PNG, with the pixels that a training reads and nothing else of the file.

    The missing pixels of the known image are transparent.
    """
    kind, path = self._files.get(key, (None, None))
    if kind is None:
      return None
    pixels = to_bytes(load_mask(path)[..., 0] if kind == "mask" else load_image(path))
    if kind == "known":
      known = 1 - load_mask(self._masks[self._known[key]]).astype(np.uint8)
      pixels = np.concatenate([pixels * known, 255 * known], axis=-1)
    output = io.BytesIO()
    Image.fromarray(pixels).save(output, format="PNG", compress_level=1)
    return output.getvalue()

  def _parse_scores(self, name: str, item: Item, message: Mapping) -> dict[str, dict[str, float]]:
    scores, shown = message.get("scores"), self._shown(name, item)
    if not isinstance(scores, dict) or set(scores) != set(shown):
      raise ValueError("scores are not of the candidates of this item; reload the page")
    for given in scores.values():
      if not isinstance(given, dict) or set(given) != set(CRITERIA):
        raise ValueError(f"scores are {shorten(given)}; expected {', '.join(CRITERIA)}")
      for criterion in CRITERIA:
        check(criterion, given[criterion], SCORE)
    return {shown[key]: {x: given[x] for x in CRITERIA} for key, given in scores.items()}

  def _parse_better(self, name: str, item: Item, message: Mapping) -> str | None:
    better, shown = message.get("better", ""), self._shown(name, item)
    if better is not None and (not isinstance(better, str) or better not in shown):
      raise ValueError("better is not a candidate of this item, nor null; reload the page")
    return None if better is None else shown[better]

  def _told(self, name: str, item: Item) -> dict[str, Any] | None:
    """Returns the answer to an item as the page sent it."""
    answer = self.file.answers.get((name, item))
    if answer is None:
      return None
    key_of = {candidate: key for key, candidate in self._shown(name, item).items()}
    if self.mode == "pairs":
      return {"better": None if answer.content is None else key_of[answer.content]}
    return {"scores": {key_of[candidate]: given for candidate, given in answer.content.items()}}

  def _shown(self, name: str, item: Item) -> dict[str, str]:
    """Returns {key: candidate} of an item, in the order in which the annotator sees them."""
    unit = self._units[item.unit]
    draw = random.Random(f"{self._seed} {name} {self._unit_key(unit)}")
    names = draw.sample(unit.candidates, len(unit.candidates))
    if item.repeat:  # each one has another place
      turn = draw.randrange(1, max(2, len(names)))
      names = names[turn:] + names[:turn]
    return {self._key("candidate", candidate): candidate for candidate in names}

  def _address(self, kind: str, unit: Unit) -> str:
    return f"/image/{self._key(kind, unit.image_id)}"

  def _images(self, name: str, item: Item) -> list[str]:
    """Returns the addresses of an item's images, which the page loads while it shows another."""
    unit = self._units[item.unit]
    candidates = [f"/image/{x}" for x in self._shown(name, item)]
    return [self._address("known", unit), self._address("mask", unit), *candidates]

  def _find(self, name: str, key: Any) -> Item:
    """Returns the item of a key, which only its annotator was told."""
    unit = self._unit_of.get(key[:12]) if isinstance(key, str) and key.isascii() else None
    for item in (Item(unit, repeat) for repeat in (False, True) if unit is not None):
      if hmac.compare_digest(self._item_key(name, item), key):
        return item
    raise ValueError(f"item is {shorten(key)}; expected one of {name}; reload the page")

  def _item_key(self, name: str, item: Item) -> str:
    unit = self._unit_key(self._units[item.unit])
    return unit + self._key("item", name, unit, str(item.repeat))

  def _unit_key(self, unit: Unit) -> str:
    return self._key("unit", self.mode, *unit.candidates)[:12]

  def _key(self, *parts: str) -> str:
    """Returns 32 digits that nobody without the folder's secret can compute."""
    text = "\0".join(parts).encode(errors="surrogatepass")
    return hmac.new(self._secret, text, "sha256").hexdigest()[:32]
