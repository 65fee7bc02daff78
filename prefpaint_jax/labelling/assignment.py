"""Which item an annotator gets: a function of the units, the seed, the names and the answers.

Each annotator has a share of the units: `per_prompt` annotators of each unit, as even as can be,
drawn by the seed. An annotator who has finished the share takes over units of others, so that the
work is also finished if somebody leaves.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from statistics import median

from prefpaint_jax.labelling.store import Item

OPEN_SECONDS = 600  # an item that an annotator has opened is kept for this annotator
REPEAT_AFTER = 10  # items between an item and its repetition


class Assignment:
  """Assigns N units, 0 to N - 1 in the order in which they are wanted."""

  def __init__(
    self, number: int, per_prompt: int, repeats: float, seed: int, names: Iterable[str] = ()
  ):
    """Starts without answers.

    Args:
      number: of units.
      per_prompt: number of annotators of each unit.
      repeats: share of an annotator's items that are shown again.
      seed: of the shares and of the choice of repetitions.
      names: annotators that are known to come; others join with their first question.
    """
    self._number, self._per_prompt, self._repeats, self._seed = number, per_prompt, repeats, seed
    self._known = set(names)
    self._names = set(names)
    self._shares: dict[str, set[int]] = {}
    self._missing = dict.fromkeys(range(number), per_prompt)  # answers that each unit lacks
    self._missing_answers = number * per_prompt
    self._answered: dict[str, dict[Item, int]] = defaultdict(dict)  # item -> position
    self._items: dict[str, list[Item]] = defaultdict(list)
    self._seconds: dict[str, list[float]] = defaultdict(list)
    self._new: Counter[str] = Counter()  # answers to first showings
    self._due: dict[str, deque[int]] = defaultdict(deque)  # units that are to be shown again
    self._open: dict[str, tuple[Item, float]] = {}

  def join(self, name: str) -> None:
    """Adds an annotator."""
    if name not in self._names:
      self._names.add(name)
      self._shares = {}

  def record(self, name: str, item: Item, seconds: float) -> None:
    """Adds an answer; a corrected one changes nothing."""
    self.join(name)
    if item in self._answered[name]:
      return
    self._answered[name][item] = len(self._items[name])
    self._items[name].append(item)
    self._seconds[name].append(seconds)
    if name in self._open and self._open[name][0] == item:
      del self._open[name]
    if item.repeat:
      if item.unit in self._due[name]:
        self._due[name].remove(item.unit)
      return
    before = self._planned_repeats(name, self._new[name])
    self._new[name] += 1
    is_planned = self._planned_repeats(name, self._new[name]) > before
    if is_planned and item._replace(repeat=True) not in self._answered[name]:
      self._due[name].append(item.unit)
    if item.unit in self._missing:
      self._missing_answers -= 1
      self._missing[item.unit] -= 1
      if not self._missing[item.unit]:
        del self._missing[item.unit]

  def current(self, name: str, now: float) -> Item | None:
    """Returns the item that the annotator is to answer, and keeps it open; None if there is none.

    Args:
      now: time in seconds.
    """
    self.join(name)
    self._open = {k: v for k, v in self._open.items() if now - v[1] < OPEN_SECONDS}
    item, _ = self._open.get(name, (None, now))
    if item is None or not (item.repeat or self._is_free(name, item.unit, self._held(name))):
      item = self._next(name)
    self.claim(name, item, now)
    return item

  def claim(self, name: str, item: Item | None, now: float) -> None:
    """Notes that the annotator looks at an item."""
    if item is None:
      self._open.pop(name, None)
    elif item not in self._answered[name]:
      self._open[name] = item, now

  def position(self, name: str, item: Item | None) -> int:
    """Returns the position of an item among the annotator's; one without an answer is the next."""
    return self._answered[name].get(item, len(self._items[name]))

  def previous(self, name: str, item: Item | None) -> Item | None:
    """Returns the item that the annotator answered before this one."""
    position = self.position(name, item)
    return self._items[name][position - 1] if position else None

  def following(self, name: str, item: Item) -> Item | None:
    """Returns the item that comes after this one, unless another annotator takes it."""
    item_after = self._next(name, item)
    return None if item_after == item else item_after

  def done(self, name: str) -> int:
    return len(self._items[name])

  def total(self, name: str) -> int:
    """Returns the number of items of an annotator: those done, and a fair share of the others."""
    new = self._new[name]
    own = sum(not item.repeat and item.unit in self._missing for item in self._items[name])
    # A name without an answer may be a slip of the pen.
    people = sum(self._new[x] > 0 or x in self._open or x in self._known for x in self._names)
    left = min(len(self._missing) - own, math.ceil(self._missing_answers / max(1, people)))
    later = self._planned_repeats(name, new + left) - self._planned_repeats(name, new)
    return self.done(name) + left + later + len(self._due[name])

  def seconds_left(self, name: str) -> float | None:
    """Returns the time that the annotator needs for the rest, by the median of the answers."""
    if not self._seconds[name]:
      return None
    return median(self._seconds[name]) * (self.total(name) - self.done(name))

  def _planned_repeats(self, name: str, number: int) -> int:
    """Returns how many of an annotator's first `number` units are shown again."""
    return math.floor(number * self._repeats + random.Random(f"{self._seed} {name}").random())

  def _held(self, name: str) -> Counter[int]:
    """Counts the other annotators who look at each unit."""
    items = (item for other, (item, _) in self._open.items() if other != name)
    return Counter(item.unit for item in items if not item.repeat)

  def _is_free(self, name: str, unit: int, held: Counter[int]) -> bool:
    """Returns whether a unit lacks an answer that nobody else is about to give."""
    return self._missing.get(unit, 0) > held[unit] and Item(unit) not in self._answered[name]

  def _next(self, name: str, answered: Item | None = None) -> Item | None:
    """Chooses an item: a repetition that is due, else one of the share, else one of another's.

    `answered` counts as an item with an answer.
    """
    due, held = self._due[name], self._held(name)
    if due and self.done(name) - self._answered[name][Item(due[0])] > REPEAT_AFTER:
      return Item(due[0], repeat=True)
    share, others = self._share(name), None
    for unit in self._missing:
      if self._is_free(name, unit, held) and Item(unit) != answered:
        if unit in share:
          return Item(unit)
        others = unit if others is None else others
    if others is not None:
      return Item(others)
    return Item(due[0], repeat=True) if due else None

  def _share(self, name: str) -> set[int]:
    """Returns the units of an annotator."""
    if not self._shares:
      self._shares = {name: set() for name in sorted(self._names)}
      draws = {name: random.Random(f"{self._seed} share {name}") for name in self._shares}
      for unit in range(self._number):
        order = {name: (len(self._shares[name]), draw.random()) for name, draw in draws.items()}
        for chosen in heapq.nsmallest(self._per_prompt, order, key=order.__getitem__):
          self._shares[chosen].add(unit)
    return self._shares[name]
