"""A policy beside a baseline that painted the same prompts from the same seeds: how often it wins,
what it gains, and what else it changes.

`summarise` gives what stands in `eval.json`, for each judge, for all prompts and for each kind of
them that is present:

  {judge: {"all" | kind: {"prompts": 64, "left_out": 0, STATISTIC: {"value", "low", "high"}, ...}}}

Every STATISTIC is the mean over prompts of a number per prompt (`per_prompt`), with its 95 %
bootstrap interval over prompts. A prompt with a score that is not finite is left out, and counted.

  winrate/sS           the best of S samples against one of the baseline, S in 1, 3, 10
  baseline/winrate/sS  the same of the baseline itself: what a policy gets that changed nothing
                       (one that is as good but paints other pictures gets S / (S + 1))
  winrate_paired/sS    the best of S against the baseline's best of S
  reward/gain          the policy's reward above the baseline's
  reward/mean          the policy's reward, as the judge gives it; baseline/reward/mean
  reward/var           variance over the samples of a prompt (unbiased); baseline/reward/var

At S = 1 only `winrate/s1` is given: the others would be the same, and ½. Ties count half. What
needs more samples than there are is absent.

Drift is what the scores do not say. `measure` looks at single pictures, `diversity` at all of a
prompt, and `drift` tells a change of policy from one of seeds.
"""
# Shapes: N prompts, S samples of each, K statistics, B pictures, H W pixels, D features.

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from prefpaint_jax.data.masks import KINDS

BEST_OF = (1, 3, 10)
_DRAWS = 2**20  # of the bootstrap, held at a time


class Scores(NamedTuple):
  """Of one judge; sample s of a prompt has the same seed on both sides."""

  policy: np.ndarray  # [N, S]
  baseline: np.ndarray  # [N, S]


# -------------------------------------------------------------------------------------- statistics
def wins(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
  """1 where the policy's score beats the baseline's, 0 where it loses, ½ where they tie."""
  return 0.5 * (1.0 + np.sign(np.asarray(scores, np.float64) - np.asarray(baseline, np.float64)))


def best_of_wins(
  scores: np.ndarray, baseline: np.ndarray, best_of: int, paired: bool = False
) -> np.ndarray:
  """[N] How often the best of `best_of` samples of a prompt beats one of the baseline.

  scores, baseline: [N, S], S at least `best_of`. The samples of a prompt fall into S // best_of
  groups of consecutive ones; a rest is not used. In each group the best score stands against the
  first of the baseline's, or against its best (`paired`); the result is the mean over groups. As
  no sample is in two groups, every one of them is a fair best-of draw, and all weigh the same.

  A policy that is no better gets ½ with one sample, or paired. Otherwise it gets S / (S + 1), with
  S = best_of, if its samples are independent of the baseline's, and against itself, where a sample
  stands against the best of a group that contains it, 1 − 1/(2S) (both where nothing ties).
  """
  groups = scores.shape[1] // best_of
  ours, theirs = (
    side[:, : groups * best_of].reshape(len(side), groups, best_of) for side in (scores, baseline)
  )
  return wins(ours.max(-1), theirs.max(-1) if paired else theirs[..., 0]).mean(1)


def per_prompt(scores: Scores) -> dict[str, np.ndarray]:
  """Each statistic [N] of the single prompts, whose mean over prompts is reported."""
  policy, baseline = (np.asarray(side, np.float64) for side in scores)
  samples = policy.shape[1]
  values = {}
  for best_of in (number for number in BEST_OF if number <= samples):
    values[f"winrate/s{best_of}"] = best_of_wins(policy, baseline, best_of)
    if best_of > 1:
      values[f"baseline/winrate/s{best_of}"] = best_of_wins(baseline, baseline, best_of)
      values[f"winrate_paired/s{best_of}"] = best_of_wins(policy, baseline, best_of, paired=True)
  values["reward/gain"] = (policy - baseline).mean(1)
  for prefix, side in (("", policy), ("baseline/", baseline)):
    values[f"{prefix}reward/mean"] = side.mean(1)
    if samples > 1:
      values[f"{prefix}reward/var"] = side.var(1, ddof=1)
  return values


def bootstrap_means(values: np.ndarray, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
  """Means of values [N] or [N, K] over N prompts drawn with replacement: [resamples, ...].

  All K see the same draws. They are counted rather than looked up: one product for all K.
  """
  values = np.asarray(values, np.float64)
  number = len(values)
  rng = np.random.default_rng(seed)
  means = np.empty((resamples, *values.shape[1:]))
  at_once = max(1, _DRAWS // number)
  for first in range(0, resamples, at_once):
    rows = min(at_once, resamples - first)
    drawn = rng.integers(number, size=(rows, number)) + number * np.arange(rows)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=rows * number).reshape(rows, number)
    means[first : first + rows] = counts.astype(np.float64) @ values / number
  return means


def bootstrap_interval(
  values: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
  """Percentile bootstrap interval of the mean of `values` [N], resampling prompts."""
  means = bootstrap_means(values, resamples, seed)
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def summarise(
  scores: Mapping[str, Scores], kinds: np.ndarray
) -> dict[str, dict[str, dict[str, Any]]]:
  """{judge: {"all" or kind: {statistic: ...}}} of the module's docstring; goes into JSON as it is.

  kinds: int [N], indices of masks.KINDS.
  """
  kinds = np.asarray(kinds)
  members = {"all": np.ones(len(kinds), bool)}
  members |= {name: kinds == kind for kind, name in enumerate(KINDS) if np.any(kinds == kind)}
  summary = {}
  for judge, sides in scores.items():
    policy, baseline = (np.asarray(side, np.float64) for side in sides)
    if policy.ndim != 2 or policy.shape != baseline.shape or len(policy) != len(kinds):
      raise ValueError(
        f"{judge}: scores {policy.shape} of the policy and {baseline.shape} of the baseline for "
        f"{len(kinds)} prompts: give [N, S] on both sides"
      )
    finite = np.isfinite(policy).all(1) & np.isfinite(baseline).all(1)
    if not finite.any():
      raise ValueError(
        f"{judge}: none of {len(kinds)} prompts has finite scores: look at the pictures"
      )
    summary[judge] = {}
    for name, member in members.items():
      chosen = member & finite
      counts = {"prompts": int(chosen.sum()), "left_out": int((member & ~finite).sum())}
      values = per_prompt(Scores(policy[chosen], baseline[chosen])) if chosen.any() else {}
      summary[judge][name] = counts | _with_intervals(values)
  return summary


def _with_intervals(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
  """The mean and the interval of each statistic [N]."""
  if not values:
    return {}
  columns = np.stack(list(values.values()), axis=1)
  lows, highs = np.quantile(bootstrap_means(columns), [0.025, 0.975], axis=0)
  return {
    name: {"value": float(column.mean()), "low": float(low), "high": float(high)}
    for name, column, low, high in zip(values, columns.T, lows, highs, strict=True)
  }
