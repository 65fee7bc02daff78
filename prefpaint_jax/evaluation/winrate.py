"""WinRate and rewards of a policy against a baseline.

Both inpaint the same prompts from the same seeds. `summarise` computes, for each judge, for all
prompts and for each kind of prompts:

  {judge: {"all" | kind: {"prompts": 64, "left_out": 0, STATISTIC: {"value", "low", "high"}, ...}}}

A STATISTIC is the mean over prompts of a number per prompt (`per_prompt`), with its 95 % bootstrap
interval over prompts. Prompts with a score that is not finite are left out and counted.

  winrate/sS           the policy's best of S samples against one sample of the baseline;
                       S in 1, 3, 10
  baseline/winrate/sS  the baseline's best of S samples against the first of them: the rate of a
                       policy that makes the baseline's images. An equally good policy with
                       independent samples has the rate S / (S + 1).
  winrate_paired/sS    the policy's best of S against the baseline's best of S
  reward/gain          the policy's reward minus the baseline's
  reward/mean          the policy's reward; baseline/reward/mean: the baseline's
  reward/var           the policy's variance over the samples of a prompt, unbiased;
                       baseline/reward/var: the baseline's

For S = 1 there is only `winrate/s1`, because `winrate_paired/s1` would be equal to it and
`baseline/winrate/s1` would be ½. Ties count half. Statistics that need more samples than there are
are left out.
"""
# Shapes: N prompts, S samples of each, K statistics.

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from prefpaint_jax.data.masks import KINDS

BEST_OF = (1, 3, 10)
_DRAWS = 2**20  # draws of the bootstrap that are in memory at a time


class Scores(NamedTuple):
  """Scores by one judge. Sample s of a prompt has the same seed on both sides."""

  policy: np.ndarray  # [N, S]
  baseline: np.ndarray  # [N, S]


def wins(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
  """Compares scores of equal shapes: 1 where `scores` is higher, 0 where lower, ½ for ties."""
  return 0.5 * (1.0 + np.sign(np.asarray(scores, np.float64) - np.asarray(baseline, np.float64)))


def best_of_wins(
  scores: np.ndarray, baseline: np.ndarray, best_of: int, paired: bool = False
) -> np.ndarray:
  """Computes the rate [N] at which the best of several samples beats the baseline, per prompt.

  The samples of a prompt are split into S // best_of groups of consecutive samples; the remainder
  is not used. The result is the mean over groups. The groups share no sample, so the estimate is
  unbiased.

  A policy that is as good as the baseline gets ½ for `best_of` = 1 or `paired`. Otherwise it gets
  n / (n + 1) for n = `best_of`, if its samples are independent of the baseline's, and
  1 − 1 / (2n) if they are the baseline's own samples (both without ties).

  Args:
    scores: the policy's scores [N, S], S ≥ `best_of`.
    baseline: the baseline's scores [N, S].
    best_of: samples in a group.
    paired: compare with the baseline's best score of the group instead of its first.
  """
  groups = scores.shape[1] // best_of
  policy_groups, baseline_groups = (
    side[:, : groups * best_of].reshape(len(side), groups, best_of) for side in (scores, baseline)
  )
  rivals = baseline_groups.max(-1) if paired else baseline_groups[..., 0]
  return wins(policy_groups.max(-1), rivals).mean(1)


def per_prompt(scores: Scores) -> dict[str, np.ndarray]:
  """Computes every statistic [N] for each prompt."""
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
  """Computes means of values [N] or [N, K] over N prompts drawn with replacement.

  All K columns have the same draws. Each resample is a vector of counts, so that one matrix product
  computes the means of all columns.

  Returns:
    [resamples] or [resamples, K].
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
  """Computes the percentile bootstrap interval (low, high) of the mean of values [N]."""
  means = bootstrap_means(values, resamples, seed)
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def summarise(
  scores: Mapping[str, Scores], kinds: np.ndarray
) -> dict[str, dict[str, dict[str, Any]]]:
  """Computes the summary that the module's docstring describes; it can be written as JSON.

  Args:
    scores: by judge.
    kinds: kinds of the prompts, int [N], indices of masks.KINDS.

  Raises:
    ValueError: if shapes do not match or no prompt has finite scores. The message names the judge.
  """
  kinds = np.asarray(kinds)
  members = {"all": np.ones(len(kinds), bool)}
  members |= {name: kinds == kind for kind, name in enumerate(KINDS) if np.any(kinds == kind)}
  summary = {}
  for judge, sides in scores.items():
    policy, baseline = (np.asarray(side, np.float64) for side in sides)
    if policy.ndim != 2 or policy.shape != baseline.shape or len(policy) != len(kinds):
      raise ValueError(
        f"{judge}: the policy's scores are {policy.shape} and the baseline's {baseline.shape} for "
        f"{len(kinds)} prompts; give [N, S] for both"
      )
    finite = np.isfinite(policy).all(1) & np.isfinite(baseline).all(1)
    if not finite.any():
      raise ValueError(
        f"{judge}: none of {len(kinds)} prompts has finite scores; check the samples"
      )
    summary[judge] = {}
    for name, member in members.items():
      chosen = member & finite
      counts = {"prompts": int(chosen.sum()), "left_out": int((member & ~finite).sum())}
      values = per_prompt(Scores(policy[chosen], baseline[chosen])) if chosen.any() else {}
      summary[judge][name] = counts | _with_intervals(values)
  return summary


def _with_intervals(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
  """Computes the mean and the 95 % interval of each statistic [N]."""
  if not values:
    return {}
  columns = np.stack(list(values.values()), axis=1)
  lows, highs = np.quantile(bootstrap_means(columns), [0.025, 0.975], axis=0)
  return {
    name: {"value": float(column.mean()), "low": float(low), "high": float(high)}
    for name, column, low, high in zip(values, columns.T, lows, highs, strict=True)
  }
