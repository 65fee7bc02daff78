"""WinRate and rewards of a policy against a baseline.

Both inpaint the same prompts from the same S seeds. `summarise` computes, for each judge, for all
prompts and for each kind of prompts:

  {judge: {"all" | kind: {"prompts": 64, "left_out": 0, STATISTIC: {"value", "low", "high"}, ...}}}

A STATISTIC is the mean over prompts of a number per prompt (`per_prompt`), with its 95 % bootstrap
interval over prompts. Prompts with a score that is not finite are left out and counted.

  winrate/s1         probability that a sample of the policy scores above an independent sample of
                     the baseline: the share of pairs (i, j) of the policy's sample i and the
                     baseline's sample j ≠ i, because samples of one seed are not independent
  winrate/sN         the best of N samples of the policy against one of the baseline, over all
                     choices of different seeds; N in 3, 10. An equally good policy has N / (N + 1).
  winrate_each/sN    the best of N samples of the policy against the best of N of the baseline, over
                     all choices of different seeds
  winrate_paired/s1  share of seeds for which the policy's sample scores above the baseline's. It is
                     no measure of quality: a policy that improves every sample by next to nothing
                     has 1.
  gain               the policy's reward minus the baseline's
  gain_best/sN       the expected reward of the policy's best of N samples minus that of the
                     baseline's best of N; it falls with the policy's diversity
  gain_in_sd         the gain divided by the baseline's standard deviation within a prompt, the root
                     of the mean of baseline/reward/var over the prompts; left out if that is 0
  reward/mean        the policy's reward; baseline/reward/mean: the baseline's
  reward/var         the policy's variance over the samples of a prompt, unbiased;
                     baseline/reward/var: the baseline's

Ties count half. Statistics that need more samples than there are are left out.

The paper reports WinRate for S = 1, 3 and 10 and does not say how S samples are compared. The best
of S against one sample and against the best of S are two readings; which of them the paper means is
not known.
"""
# Shapes: N prompts, S samples of each, K statistics.

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.special import comb

from prefpaint_jax.data.masks import KINDS

BEST_OF = (1, 3, 10)
# The smallest gain, in standard deviations, that `verdict` calls visible. Cohen (A power primer,
# 1992) sets his medium effect at it: "visible to the naked eye of a careful observer".
VISIBLE_GAIN = 0.5
_DRAWS = 2**20  # draws of the bootstrap that are in memory at a time


class Scores(NamedTuple):
  """Scores by one judge. Sample s of a prompt has the same seed on both sides."""

  policy: np.ndarray  # [N, S]
  baseline: np.ndarray  # [N, S]


def wins(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
  """Compares scores of equal shapes: 1 where `scores` is higher, 0 where lower, ½ for ties."""
  return 0.5 * (1.0 + np.sign(np.asarray(scores, np.float64) - np.asarray(baseline, np.float64)))


def win_rate(
  policy: np.ndarray, baseline: np.ndarray, best_of: int = 1, rivals: int = 1
) -> np.ndarray:
  """Computes how often the best of `best_of` samples beats the best of `rivals` of the baseline.

  The result [N] is the mean over all choices of `best_of` seeds for the policy and of `rivals`
  other seeds for the baseline, so it is unbiased for samples that are independent given the prompt.

  Args:
    policy: the policy's scores [N, S], S ≥ `best_of` + `rivals`.
    baseline: the baseline's scores [N, S].
    best_of: samples of the policy in a comparison.
    rivals: samples of the baseline in a comparison.
  """
  samples = policy.shape[1]
  # Let k be the seed of the best rival, the last one in the baseline's order. The other rivals
  # precede it. Of the seeds that precede it, `low` have a policy's sample below rival k, and `high`
  # have not; `under` seeds other than k have one below. With a of the other rivals among `low`,
  # comb(under - a, best_of) choices of the policy's seeds have a best sample below rival k.
  order = np.argsort(np.argsort(baseline, axis=1, kind="stable"), axis=1)
  precedes = order[:, None, :] < order[:, :, None]  # [N, k, j]
  not_won = np.zeros(policy.shape)
  for is_below in (np.less_equal, np.less):  # a tie counts as half of a loss
    below = is_below(policy[:, None, :], baseline[:, :, None])  # [N, k, i]
    under = (below & ~np.eye(samples, dtype=bool)).sum(-1)
    low, high = (below & precedes).sum(-1), (~below & precedes).sum(-1)
    for a in range(rivals):
      ways = comb(low, a) * comb(high, rivals - 1 - a)
      not_won += 0.5 * ways * comb(under - a, best_of)
  return 1 - not_won.sum(1) / (comb(samples, rivals) * comb(samples - rivals, best_of))


def best_reward(scores: np.ndarray, best_of: int) -> np.ndarray:
  """Computes the mean [N] of the best score over all choices of `best_of` of S samples [N, S]."""
  samples = scores.shape[1]
  # The k-th smallest score, counted from 0, is the best of comb(k, best_of - 1) choices.
  ways = comb(np.arange(samples), best_of - 1)
  return np.sort(scores, axis=1) @ (ways / comb(samples, best_of))


def per_prompt(scores: Scores) -> dict[str, np.ndarray]:
  """Computes every statistic [N] for each prompt, except gain_in_sd."""
  policy, baseline = (np.asarray(side, np.float64) for side in scores)
  samples = policy.shape[1]
  values = {}
  for best_of in BEST_OF:
    if best_of + 1 <= samples:
      values[f"winrate/s{best_of}"] = win_rate(policy, baseline, best_of)
    if 1 < best_of <= samples - best_of:
      values[f"winrate_each/s{best_of}"] = win_rate(policy, baseline, best_of, best_of)
  values["winrate_paired/s1"] = wins(policy, baseline).mean(1)
  values["gain"] = (policy - baseline).mean(1)
  for best_of in BEST_OF:
    if 1 < best_of <= samples:
      best = (best_reward(side, best_of) for side in (policy, baseline))
      values[f"gain_best/s{best_of}"] = np.subtract(*best)
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


def estimate(scores: Scores) -> dict[str, Any]:
  """Computes the group of a summary for scores [N, S]: counts, and statistics with intervals.

  It has no statistics if no prompt has finite scores.
  """
  policy, baseline = (np.asarray(side, np.float64) for side in scores)
  finite = np.isfinite(policy).all(1) & np.isfinite(baseline).all(1)
  group: dict[str, Any] = {"prompts": int(finite.sum()), "left_out": int((~finite).sum())}
  if not finite.any():
    return group
  values = per_prompt(Scores(policy[finite], baseline[finite]))
  columns = np.stack(list(values.values()), axis=1)
  means = dict(zip(values, bootstrap_means(columns).T, strict=True))
  found = {name: float(column.mean()) for name, column in values.items()}
  if found.get("baseline/reward/var"):
    with np.errstate(divide="ignore", invalid="ignore"):
      resampled = means["gain"] / np.sqrt(means["baseline/reward/var"])
    found["gain_in_sd"] = found["gain"] / found["baseline/reward/var"] ** 0.5
    means["gain_in_sd"] = resampled[np.isfinite(resampled)]
  for name, value in found.items():
    low, high = np.quantile(means[name], [0.025, 0.975])
    group[name] = {"value": value, "low": float(low), "high": float(high)}
  return group


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
    is_matrix = policy.ndim == 2 and policy.shape == baseline.shape and len(policy) == len(kinds)
    if not is_matrix or policy.shape[1] < 2:
      raise ValueError(
        f"{judge}: the policy's scores are {policy.shape} and the baseline's {baseline.shape} for "
        f"{len(kinds)} prompts; give [N, S] for both, S ≥ 2"
      )
    groups = {name: estimate(Scores(policy[own], baseline[own])) for name, own in members.items()}
    if not groups["all"]["prompts"]:
      raise ValueError(
        f"{judge}: none of {len(kinds)} prompts has finite scores; check the samples"
      )
    summary[judge] = groups
  return summary


def verdict(group: Mapping[str, Any]) -> str:
  """Returns a sentence: which side is preferred, by the statistics of a group (see `estimate`).

  A side is preferred if the interval of winrate/s1 excludes ½ and the gain is at least
  VISIBLE_GAIN standard deviations of the baseline within a prompt.
  """
  found, gain = group["winrate/s1"], group["gain"]["value"]
  if found["low"] <= 0.5 <= found["high"]:
    return "No preference is significant."
  side = "policy" if found["low"] > 0.5 else "baseline"
  visible = VISIBLE_GAIN * group["baseline/reward/var"]["value"] ** 0.5
  if (gain if side == "policy" else -gain) >= visible:
    return f"The {side} is preferred."
  return f"The {side} wins more often, but its gain is too small to be seen."


def best_of_warning(groups: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns a sentence if the policy's best of N is worse than the baseline's, else "".

  N is the largest of BEST_OF that there are samples for. Worse means that the interval of
  gain_best/sN is below 0, for all prompts or for a kind.

  Args:
    groups: `summarise(...)[judge]`.
  """
  numbers = [n for n in BEST_OF if f"gain_best/s{n}" in groups["all"]]
  if not numbers:
    return ""
  statistic = f"gain_best/s{numbers[-1]}"
  worse = [
    f"{name}: {group[statistic]['value']:+.3f}"
    for name, group in groups.items()
    if group.get(statistic, {"high": 0.0})["high"] < 0
  ]
  if not worse:
    return ""
  return (
    f"The policy's best of {numbers[-1]} samples scores below the baseline's best of {numbers[-1]} "
    f"({', '.join(worse)}): the baseline is better where the best of several samples is kept."
  )
