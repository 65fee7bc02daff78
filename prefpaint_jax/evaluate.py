"""How a policy compares with another on the same prompts."""
# Shapes: N prompts.

import numpy as np


def wins(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
  """1 where the policy's score [N] beats the baseline's, 0 where it loses, ½ where they tie."""
  return 0.5 * (1.0 + np.sign(np.asarray(scores, np.float64) - np.asarray(baseline, np.float64)))


def bootstrap_interval(
  values: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
  """Percentile bootstrap interval of the mean of `values` [N], resampling prompts."""
  values = np.asarray(values, np.float64)
  rng = np.random.default_rng(seed)
  means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def describe(name: str, scores: np.ndarray, baseline: np.ndarray) -> str:
  """One line: WinRate with its 95 % interval, and both means."""
  won = wins(scores, baseline)
  low, high = bootstrap_interval(won)
  return (
    f"{name:<18} WinRate {won.mean():.3f} [{low:.3f}, {high:.3f}]   "
    f"mean {np.mean(scores):+.3f}, base {np.mean(baseline):+.3f}"
  )
