"""Who gets which item: numbers of annotators, shares, repeated items, and what is left."""

import itertools
import random
from collections import Counter, defaultdict

import pytest

from prefpaint_jax.labelling.assignment import OPEN_SECONDS, REPEAT_AFTER, Assignment
from prefpaint_jax.labelling.store import Item


def work(assignment, names, leaving=(), seed=0, after=3):
  """Has annotators answer in a random order until nobody gets an item.

  Args:
    leaving: annotators who open an item after `after` answers and are not seen again.

  Returns:
    (annotator, item) of every answer, in order.
  """
  rng, now, answers = random.Random(seed), 0.0, []
  present = list(names)
  while present:
    now += rng.random()
    name = rng.choice(present)
    item = assignment.current(name, now)
    if name in leaving and sum(who == name for who, _ in answers) >= after:
      present.remove(name)
      continue
    if item is None:
      if all(assignment.current(other, now + OPEN_SECONDS) is None for other in present):
        break
      now += OPEN_SECONDS / 10
      continue
    if rng.random() < 0.5:  # looks at it for some time
      continue
    assignment.record(name, item, seconds=2.0)
    answers.append((name, item))
  return answers


@pytest.mark.parametrize(("people", "per_prompt"), [(3, 3), (5, 2), (7, 1), (4, 3)])
@pytest.mark.parametrize("leaving", [0, 1])
@pytest.mark.parametrize("known", [False, True])
def test_every_unit_gets_its_number_of_different_annotators(people, per_prompt, leaving, known):
  names = [f"ann{i}" for i in range(people + leaving)]
  assignment = Assignment(30, per_prompt, 0.1, seed=1, names=names if known else ())
  answers = work(assignment, names, leaving=names[people:])
  assert len(set(answers)) == len(answers)
  counts = Counter(item.unit for _, item in answers if not item.repeat)
  assert counts == dict.fromkeys(range(30), per_prompt)
  for name in names[:people]:
    assert assignment.done(name) == assignment.total(name)


def test_no_more_look_at_a_unit_than_answers_are_missing():
  assignment = Assignment(2, per_prompt=2, repeats=0, seed=0)
  names = [f"ann{i}" for i in range(6)]
  given = [assignment.current(name, now=0.0) for name in names]
  assert Counter(given) == {Item(0): 2, Item(1): 2, None: 2}
  assert [assignment.current(name, now=1.0) for name in names] == given  # stable over reloads
  later = assignment.current("ann5", now=OPEN_SECONDS + 2)
  assert later in (Item(0), Item(1))  # of somebody who has gone


def test_known_annotators_have_even_shares_that_mix():
  names = [f"ann{i}" for i in range(6)]
  assignment = Assignment(100, per_prompt=3, repeats=0, seed=0, names=names)
  together = Counter()
  for unit in range(100):
    of_unit = [name for name in names if unit in assignment._share(name)]
    assert len(of_unit) == 3
    together.update(itertools.combinations(of_unit, 2))
  assert {len(assignment._share(name)) for name in names} == {50}
  assert len(together) == 15 and min(together.values()) > 5  # every two share units
  assert {assignment.total(name) for name in names} == {50}


def test_order_of_units_is_the_order_of_an_annotator():
  assignment = Assignment(20, per_prompt=1, repeats=0, seed=0)
  answers = work(assignment, ["ann"])
  assert [item.unit for _, item in answers] == list(range(20))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_repeated_items_are_a_share_and_come_later(share):
  number = 200
  assignment = Assignment(number, per_prompt=1, repeats=share, seed=3)
  items = [item for _, item in work(assignment, ["ann"])]
  repeated = [item for item in items if item.repeat]
  assert abs(len(repeated) - share * number) < 1
  assert len(set(items)) == len(items) == assignment.total("ann")
  last = max(place for place, item in enumerate(items) if not item.repeat)
  for place, item in enumerate(items):
    if item.repeat:
      between = place - items.index(Item(item.unit)) - 1
      assert between >= REPEAT_AFTER or place > last


def test_assignment_depends_on_nothing_but_the_answers():
  names = ["ann", "bob", "eve"]
  first = Assignment(40, per_prompt=2, repeats=0.2, seed=5)
  answers = work(first, names)
  for cut in (0, 1, 17, 60, len(answers)):
    again = [Assignment(40, per_prompt=2, repeats=0.2, seed=5) for _ in range(2)]
    for assignment in again:
      for name, item in answers[:cut]:
        assignment.record(name, item, 1.0)
        assignment.record(name, item, 1.0)  # a correction
    one, two = ([x.current(name, 0.0) for name in names] for x in again)
    assert one == two
    assert [again[0].total(x) for x in names] == [again[1].total(x) for x in names]


def test_time_left_is_the_median_of_the_answers_for_each_item_left():
  assignment = Assignment(10, per_prompt=1, repeats=0, seed=0)
  assert assignment.seconds_left("ann") is None
  for unit, seconds in enumerate((1.0, 2.0, 600.0)):
    assignment.record("ann", Item(unit), seconds)
  assert assignment.seconds_left("ann") == 2.0 * 7
  assert assignment.previous("ann", None) == Item(2)
  assert assignment.previous("ann", Item(2)) == Item(1)
  assert assignment.previous("ann", Item(0)) is None


def test_annotators_who_come_late_share_what_is_left():
  assignment = Assignment(60, per_prompt=1, repeats=0, seed=0)
  done = defaultdict(int)
  for _ in range(30):
    assignment.record("ann", assignment.current("ann", 0.0), 1.0)
  assert assignment.total("ann") == 60
  assignment.current("bob", 0.0)
  assert (assignment.total("ann"), assignment.total("bob")) == (45, 15)
  assignment.current("ann", OPEN_SECONDS + 1)  # bob has gone without an answer
  assert assignment.total("ann") == 60
  assignment.current("bob", OPEN_SECONDS + 1)
  for name, _ in work(assignment, ["ann", "bob"]):
    done[name] += 1
  assert sum(done.values()) == 30
