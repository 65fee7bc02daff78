"""The referee of a run: warns when the objective rises while the samples become worse.

It compares the held-out measurements of a run: the objective, judges (rewards that are never
optimised), drift measures, and the distance between two samples of a prompt. The intervals are
those of `evaluation.winrate` over prompts.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

JUDGE = "judge/"  # before a judge's name in the names of held-out scores
SAME_PROMPT = "distance"  # measure: distance between the samples of a prompt
COLLAPSE = 0.5  # share of the base policy's distance below which diversity has collapsed


def is_score(name: str) -> bool:
  """Returns whether a name is that of a score, and not of a measure."""
  return name in ("reward", "true_preference") or name.startswith(JUDGE)


class Referee:
  """Holds the measurements of a run so far; `look` judges a new one.

  `last_good` is the iteration at which the judge that falls was best; None: no judge falls.

  The verdict has three parts, each 0 or 1 in the metrics `referee/*`:

  - hacking: the objective's gain is above that of an earlier measurement (its interval excludes
    it), while a judge's gain is below that judge's best so far (the intervals do not meet).
  - drift: the mean of a measure has left the base policy's own spread, one standard deviation.
  - diversity: two samples of a prompt differ by less than half as much as the base policy's.
  """

  def __init__(self, lines: Iterable[Mapping[str, Any]] = ()):
    """Starts with the lines of metrics.jsonl, so that a resumed run gets the same verdicts."""
    self.last_good: int | None = None
    number = lambda value: np.nan if value is None else value
    self._lines = [
      {name: number(value) for name, value in line.items()}
      for line in lines
      if "held_out/reward_gain" in line
    ]

  def look(
    self,
    iteration: int,
    line: dict[str, float],
    policy: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
  ) -> tuple[dict[str, float], list[str]]:
    """Judges a measurement.

    Args:
      line: its metrics `held_out/*`.
      policy: scores and measures [N, S] of the policy, from `HeldOut.compare`.
      base: those of the base policy.

    Returns:
      The metrics `referee/*`, and a line of text for each warning.
    """
    found = {
      "hacking": list(self._hacked(line)),
      "drift": list(_drifted(policy, base)),
      "diversity": list(_collapsed(policy, base)),
    }
    self._lines.append(line | {"iteration": iteration})
    metrics = {f"referee/{name}": float(bool(warnings)) for name, warnings in found.items()}
    return metrics, [warning for warnings in found.values() for warning in warnings]

  def _hacked(self, line: Mapping[str, float]) -> Iterable[str]:
    gain = "held_out/reward_gain"
    for name in line:
      judge = name.removeprefix(f"held_out/{JUDGE}").removesuffix("_gain")
      if name != f"held_out/{JUDGE}{judge}_gain":
        continue
      known = [x for x in self._lines if np.isfinite([x.get(f"{name}/low", np.nan), x[gain]]).all()]
      if not known:
        continue
      best = max(known, key=lambda earlier, name=name: earlier[f"{name}/low"])
      falls = line[f"{name}/high"] < best[f"{name}/low"]
      rises = line[f"{gain}/low"] > best[gain]
      if falls and rises:
        self.last_good = int(best["iteration"])
        yield (
          f"the reward's gain rises from {best[gain]:+.3g} to {line[gain]:+.3g} while the judge "
          f"{judge} falls from {best[name]:+.3g} to {line[name]:+.3g}: the policy may exploit the "
          "reward; look at its samples, and lower learning_rate or raise kl_weight"
        )


def _drifted(policy: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> Iterable[str]:
  for name, values in policy.items():
    if is_score(name) or name in (SAME_PROMPT, "known_pixels"):
      continue
    change, spread = np.mean(values) - np.mean(base[name]), np.std(base[name])
    if abs(change) > spread:
      yield (
        f"{name} of the samples changes by {change:+.3g}, more than the spread {spread:.3g} of the "
        "base policy's; look at the samples"
      )


def _collapsed(policy: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> Iterable[str]:
  now, before = np.mean(policy[SAME_PROMPT]), np.mean(base[SAME_PROMPT])
  if now < COLLAPSE * before:
    yield (
      f"two samples of a prompt differ by {now:.3g}, the base policy's by {before:.3g}: diversity "
      "collapses; lower learning_rate or raise kl_weight"
    )
