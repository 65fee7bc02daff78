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
from scipy import ndimage

from prefpaint_jax.data.masks import KINDS
from prefpaint_jax.simulation import luma

BEST_OF = (1, 3, 10)
# Every statistic, in the order in which it is shown.
LABELS = {
  "winrate/s1": "WinRate, one against one",
  "winrate/s3": "WinRate, best of 3 against one",
  "baseline/winrate/s3": "baseline's own best of 3 against one",
  "winrate_paired/s3": "WinRate, best of 3 each",
  "winrate/s10": "WinRate, best of 10 against one",
  "baseline/winrate/s10": "baseline's own best of 10 against one",
  "winrate_paired/s10": "WinRate, best of 10 each",
  "reward/gain": "gain in reward",
  "reward/mean": "reward",
  "baseline/reward/mean": "baseline's reward",
  "reward/var": "variance within a prompt",
  "baseline/reward/var": "baseline's variance within a prompt",
}

MEASURES = {
  "brightness": "mean luma of the hole",
  "contrast": "standard deviation of its luma",
  "saturation": "mean distance of its strongest from its weakest channel",
  "sharpness": "mean step of luma between neighbours in it",
  "seam": "log of the mean step across its border over that between visible pixels near it",
  "known_pixels": "largest change of a pixel that was known",
  "diversity": "mean cosine distance between the features of two samples of a prompt",
}
SEEDS, SPREADS = 3.0, 0.2
RULE = (
  f"A change is flagged when it is larger than {SEEDS:g} times the seed variation (how far another "
  f"seed moves the baseline's mean over the prompts) and than {SPREADS:g} times the spread (the "
  "standard deviation between the baseline's pictures)."
)

# "Near" the hole is this share of the picture's shorter side; a smaller step is not seen.
_NEAR, _JUST_SEEN = 0.08, 0.015
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


# ------------------------------------------------------------------------------------------- drift


def measure(images: np.ndarray, masks: np.ndarray, originals: np.ndarray) -> dict[str, np.ndarray]:
  """Each of MEASURES but diversity, [B], of finished pictures.

  images, originals: [B, H, W, 3] in [0, 1], the latter the prompts' own, of which only the known
  pixels count; masks: [B, H, W, 1], 1 = filled in. What a mask leaves no pixels for is 0.
  """
  images, hole = np.asarray(images, np.float32), np.asarray(masks, np.float32)[..., 0]
  grey = luma(images)
  brightness = _mean(grey, hole)
  contrast = np.sqrt(_mean((grey - brightness[:, None, None]) ** 2, hole))
  saturation = _mean(images.max(-1) - images.min(-1), hole)
  changed = np.abs(images - originals) * (1 - masks)
  reach = max(1, round(_NEAR * min(hole.shape[1:])))
  near = ndimage.maximum_filter(hole, size=(1, 2 * reach + 1, 2 * reach + 1))
  in_hole, close = (_over_pairs(region, np.add) for region in (hole, near))  # how many of the two
  step = np.abs(_over_pairs(images, np.subtract)).mean(-1)
  across, beside = _mean(step, in_hole == 1), _mean(step, (in_hole == 0) & (close == 2))
  return {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "sharpness": _mean(np.abs(_over_pairs(grey, np.subtract)), in_hole == 2),
    "seam": np.log((across + _JUST_SEEN) / (beside + _JUST_SEEN)),
    "known_pixels": changed.max((1, 2, 3)),
  }


def diversity(features: np.ndarray) -> np.ndarray:
  """[N] Mean cosine distance between two of the S samples of a prompt, features [N, S, D].

  0 where all point the same way; S is at least 2.
  """
  features = np.asarray(features, np.float64)
  samples = features.shape[1]
  length = np.linalg.norm(features, axis=-1, keepdims=True)
  directions = features / np.maximum(length, 1e-12)
  # |Σ u|² = S + the sum over ordered pairs of their cosine.
  pairs = np.sum(directions.sum(1) ** 2, axis=-1) - np.sum(directions**2, axis=(1, 2))
  return 1 - pairs / (samples * (samples - 1))


def seed_variation(values: np.ndarray) -> float:
  """How far another seed moves the mean over prompts of a measure [N, S]: a standard deviation.

  The larger of that of the S means over prompts, which sees what all prompts of a seed share, and
  of what the variance within prompts makes of it, which is not small by chance when S is. With one
  sample there is only the bootstrap's over prompts (its closed form), which is larger than both.
  """
  number, samples = values.shape
  if samples == 1:
    return float(values.std() / np.sqrt(number))
  within = np.sqrt(values.var(1, ddof=1).mean() / number)
  return float(max(values.mean(0).std(ddof=1), within))


def drift(
  policy: Mapping[str, np.ndarray],
  baseline: Mapping[str, np.ndarray],
  originals: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
  """Which measures, [N, S] or [N] on each side, have changed by more than seeds change them.

  originals: the same of the prompts' own pictures, [N], where what was in the hole is known.
  Returns {"rule": RULE, "measures": {name: {"baseline", "policy", "change", "seed_variation",
  "spread", "flagged"}}}, with "original" where given; goes into JSON as it is.
  """
  table = {}
  for name in policy:
    ours, theirs = (
      np.reshape(np.asarray(side[name], np.float64), (len(side[name]), -1))
      for side in (policy, baseline)
    )
    finite = np.isfinite(ours).all(1) & np.isfinite(theirs).all(1)
    if not finite.any():
      raise ValueError(
        f"{name}: none of {len(finite)} prompts has finite measures: look at the pictures"
      )
    ours, theirs = ours[finite], theirs[finite]
    change, variation, spread = ours.mean() - theirs.mean(), seed_variation(theirs), theirs.std()
    table[name] = {
      "baseline": float(theirs.mean()),
      "policy": float(ours.mean()),
      "change": float(change),
      "seed_variation": variation,
      "spread": float(spread),
      "flagged": bool(abs(change) > max(SEEDS * variation, SPREADS * spread)),
    }
    if originals is not None and name in originals:
      table[name]["original"] = float(np.mean(np.asarray(originals[name], np.float64)[finite]))
  return {"rule": RULE, "measures": table}


def _over_pairs(values: np.ndarray, combine: np.ufunc) -> np.ndarray:
  """[B, H, W, ...] -> [B, pairs, ...]: `combine` of all neighbours, in columns and in rows."""
  pairs = (combine(values[:, 1:], values[:, :-1]), combine(values[:, :, 1:], values[:, :, :-1]))
  flat = [part.reshape(len(part), -1, *part.shape[3:]) for part in pairs]
  return np.concatenate(flat, axis=1)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """[B, ...] -> [B]; 0 where there is no weight."""
  axes = tuple(range(1, values.ndim))
  return (values * weights).sum(axes) / np.maximum(weights.sum(axes), 1e-12)


# ---------------------------------------------------------------------------------------- in words


def describe(name: str, scores: np.ndarray, baseline: np.ndarray) -> str:
  """One line: WinRate with its 95 % interval, and both means."""
  won = wins(scores, baseline)
  low, high = bootstrap_interval(won)
  return (
    f"{name:<18} WinRate {won.mean():.3f} [{low:.3f}, {high:.3f}]   "
    f"mean {np.mean(scores):+.3f}, base {np.mean(baseline):+.3f}"
  )


def show(statistic: str, number: float) -> str:
  """A number of this statistic to the digits that matter; a gain always with its sign."""
  if statistic == "reward/gain":
    return f"{number:+.3f}"
  return f"{number:#.3g}" if statistic.endswith("/var") else f"{number:.3f}"


def describe_table(judge: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
  """A judge's part of the summary as lines for a terminal: statistics by kind of prompt."""
  rows = [[judge, *groups], ["prompts", *(str(group["prompts"]) for group in groups.values())]]
  for statistic in (name for name in LABELS if name in groups["all"]):
    cells = [
      "{} [{}, {}]".format(*(show(statistic, group[statistic][key]) for key in _INTERVAL))
      if statistic in group
      else "–"
      for group in groups.values()
    ]
    rows.append([LABELS[statistic], *cells])
  return _aligned(rows)


def describe_drift(table: Mapping[str, Any]) -> str:
  """The table of `drift` as lines for a terminal."""
  rows = [["drift", "baseline", "policy", "change", "seed variation", "spread", ""]]
  for name, found in table["measures"].items():
    numbers = [f"{found[key]:.4f}" for key in ("baseline", "policy")]
    numbers.append(f"{found['change']:+.4f}")
    numbers += [f"{found[key]:.4f}" for key in ("seed_variation", "spread")]
    rows.append([name, *numbers, "flagged" if found["flagged"] else ""])
  return _aligned(rows) + "\n" + table["rule"]


_INTERVAL = ("value", "low", "high")


def _aligned(rows: list[list[str]]) -> str:
  """Columns two spaces apart."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in rows
  )
