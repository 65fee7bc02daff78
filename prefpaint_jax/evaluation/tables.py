"""The numbers of an evaluation as text."""
# Shapes: N prompts.

from collections.abc import Mapping
from typing import Any

import numpy as np

from prefpaint_jax.evaluation.winrate import bootstrap_interval, wins
from prefpaint_jax.runtime.text import align_columns

# Every statistic and its label, in the order of the tables.
LABELS = {
  "winrate/s1": "WinRate, one sample each",
  "winrate/s3": "WinRate, best of 3 against one",
  "baseline/winrate/s3": "baseline, best of 3 against one",
  "winrate_paired/s3": "WinRate, best of 3 each",
  "winrate/s10": "WinRate, best of 10 against one",
  "baseline/winrate/s10": "baseline, best of 10 against one",
  "winrate_paired/s10": "WinRate, best of 10 each",
  "reward/gain": "gain in reward",
  "reward/mean": "reward",
  "baseline/reward/mean": "baseline's reward",
  "reward/var": "variance within a prompt",
  "baseline/reward/var": "baseline's variance within a prompt",
}


def describe(name: str, scores: np.ndarray, baseline: np.ndarray) -> str:
  """Returns one line: WinRate with its 95 % interval, and the means of scores [N] and baseline."""
  won = wins(scores, baseline)
  low, high = bootstrap_interval(won)
  return (
    f"{name:<18} WinRate {won.mean():.3f} [{low:.3f}, {high:.3f}]   "
    f"mean {np.mean(scores):+.3f}, base {np.mean(baseline):+.3f}"
  )


def show(statistic: str, number: float) -> str:
  """Formats a number of a statistic; a gain always has its sign."""
  if statistic == "reward/gain":
    return f"{number:+.3f}"
  return f"{number:#.3g}" if statistic.endswith("/var") else f"{number:.3f}"


def describe_table(judge: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
  """Formats one judge's part of a summary as lines: statistics by kind of prompt.

  Args:
    judge: the title of the table.
    groups: `winrate.summarise(...)[judge]`.
  """
  rows = [[judge, *groups], ["prompts", *(str(group["prompts"]) for group in groups.values())]]
  for statistic in (name for name in LABELS if name in groups["all"]):
    cells = [
      "{} [{}, {}]".format(*(show(statistic, group[statistic][key]) for key in _INTERVAL))
      if statistic in group
      else "–"
      for group in groups.values()
    ]
    rows.append([LABELS[statistic], *cells])
  return "\n".join(align_columns(rows))


def describe_drift(table: Mapping[str, Any]) -> str:
  """Formats the result of `drift.drift` as lines."""
  rows = [["drift", "baseline", "policy", "change", "seed variation", "spread", ""]]
  for name, found in table["measures"].items():
    numbers = [f"{found[key]:.4f}" for key in ("baseline", "policy")]
    numbers.append(f"{found['change']:+.4f}")
    numbers += [f"{found[key]:.4f}" for key in ("seed_variation", "spread")]
    rows.append([name, *numbers, "flagged" if found["flagged"] else ""])
  return "\n".join(align_columns(rows)) + "\n" + table["rule"]


_INTERVAL = ("value", "low", "high")


def show_typeset(statistic: str, number: float) -> str:
  """Formats a number like `show`, with a typographic minus sign."""
  return typeset(show(statistic, number))


def typeset(number: str) -> str:
  """Replaces hyphens by minus signs."""
  return number.replace("-", "−")
