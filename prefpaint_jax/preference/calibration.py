"""Calibration of the error bound: compares the reward's errors on held-out data with ‖z‖_{V⁻¹}.

The bound states |wᵀz − w*ᵀz| ≤ C‖z‖ for all z together, with probability 1 − δ over the noise of
the training scores. `calibrate` measures how often the inequality holds, how tight it is, whether
the error grows with ‖z‖, and how much the trust weight γ = exp(b − k‖z‖) varies over the samples.
`describe` returns the results as text; `calibration_plot.plot` draws them.
"""
# Shapes: N samples.
# Functions import scipy where they need it, because the import takes a second.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from prefpaint_jax.preference.bound import Bound, confidence, effective_rank

DELTAS = (0.1, 0.05, 0.01)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ENVELOPE = 0.95  # share of the samples below the empirical envelope

# Below this std / mean the trust weight is nearly constant: it only scales the loss.
NEARLY_CONSTANT = 0.05

# std / mean and mean of the suggested weight. The weight then matters and no sample's weight is
# near 0. The mean is the constant weight of the paper's ablation.
SPREAD, MEAN = 0.25, 1.4

# A rank correlation below this is too weak to weight samples by, for any p-value.
WEAK_CORRELATION = 0.1


class Samples(NamedTuple):
  """Scored samples that the reward was not fitted to."""

  norms: np.ndarray  # ‖z‖_{V⁻¹} [N]
  rewards: np.ndarray  # wᵀz [N]
  targets: np.ndarray  # normalised scores [N], with the annotators' noise
  truth: np.ndarray | None = None  # normalised scores without noise [N]; None: unknown
  kinds: Sequence[str] | None = None  # kind of each sample's prompt

  @property
  def errors(self) -> dict[str, np.ndarray]:
    """|error| [N] against "truth", if it is known, and against "targets".

    The bound is about errors against the truth. Errors against targets include the annotators'
    noise, which ‖z‖ does not bound.
    """
    against = {"truth": self.truth, "targets": self.targets}
    return {
      name: np.abs(np.asarray(self.rewards, np.float64) - np.asarray(values, np.float64))
      for name, values in against.items()
      if values is not None
    }


@dataclass(frozen=True)
class Spread:
  """Mean, standard deviation and quantiles of a quantity."""

  mean: float
  std: float
  quantiles: dict[str, float]  # by level, "0.05" to "0.95"


@dataclass(frozen=True)
class Level:
  """The bound at one δ."""

  delta: float
  constant: float  # C
  coverage: float  # share of the samples with |error| ≤ C‖z‖; 1 if the bound holds
  tightness: float  # median of |error| / (C‖z‖); at 0.01 the bound is 100 times the median error


@dataclass(frozen=True)
class ErrorStatistics:
  """Statistics of |error| and ‖z‖, and of their relation."""

  samples: int  # N
  norm: Spread  # of ‖z‖
  error: Spread  # of |error|
  levels: list[Level]  # by falling δ; empty if the bound has no noise_scale or no norm_bound
  envelope: float  # smallest C' with |error| ≤ C'‖z‖ for 95 % of the samples
  rank_correlation: float | None  # Spearman's, of |error| and ‖z‖; None if one is constant
  p_value: float | None  # for the hypothesis of no correlation between independent samples


@dataclass(frozen=True)
class TrustWeight:
  """Statistics of the trust weight γ = exp(b − k‖z‖) over the samples."""

  k: float
  b: float
  mean: float
  std: float
  relative_spread: float  # std / mean, which does not depend on b
  smallest: float
  largest: float
  nearly_constant: bool  # relative spread below 0.05
  suggested_k: float | None  # gives relative spread 0.25; None if no k does
  suggested_b: float | None  # gives mean 1.4 together with suggested_k


@dataclass(frozen=True)
class Calibration:
  """The result of `calibrate`. All fields are plain numbers; `dataclasses.asdict` gives JSON."""

  against: str  # "truth" or "targets", the scores for the errors of `kinds`, `describe` and `plot`
  width: int  # D
  effective_rank: float  # of Σ zzᵀ
  errors: dict[str, ErrorStatistics]  # against "targets", and against "truth" if it is known
  kinds: dict[str, ErrorStatistics]  # by kind of prompt
  trust: TrustWeight


def calibrate(samples: Samples, bound: Bound, k: float = 0.05, b: float = 0.7) -> Calibration:
  """Compares the errors of N ≥ 2 samples with the bound, and measures how γ of k and b varies.

  Raises:
    ValueError: if a field of the samples has the wrong shape or is not finite.
  """
  samples = check_samples(samples)
  levels = () if None in (bound.noise_scale, bound.norm_bound) else DELTAS
  constants = {delta: confidence(bound, delta) for delta in levels}
  errors = samples.errors
  against = next(iter(errors))
  kinds = np.asarray([] if samples.kinds is None else samples.kinds)
  norms, error = samples.norms, errors[against]
  return Calibration(
    against=against,
    width=bound.width,
    effective_rank=effective_rank(bound),
    errors={name: _error_statistics(norms, values, constants) for name, values in errors.items()},
    kinds={
      str(kind): _error_statistics(norms[kinds == kind], error[kinds == kind], constants)
      for kind in np.unique(kinds)
    },
    trust=_trust(norms, k, b),
  )


def suggest_trust(
  norms: np.ndarray, spread: float = SPREAD, mean: float = MEAN
) -> tuple[float, float] | None:
  """Computes the k and b for which γ has the given mean and the given std / mean.

  With rising k, std / mean rises from 0 to a limit, which depends on the share of samples that have
  the smallest norm.

  Args:
    norms: ‖z‖ [N].
    spread: std / mean of γ.
    mean: mean of γ.

  Returns:
    (k, b), or None if the norms are constant or the limit is at most `spread`.
  """
  from scipy import optimize

  norms = np.asarray(norms, np.float64)
  excess = norms - norms.min()  # a constant added to all norms changes b only
  limit = np.sqrt(1 / np.mean(excess == 0) - 1)
  if is_constant(norms) or limit <= spread:
    return None
  high = 1 / excess.std()
  while _relative_spread(norms, high) < spread:
    high *= 2
  k = optimize.brentq(lambda k: _relative_spread(norms, k) - spread, 0, high, xtol=1e-12 * high)
  return float(k), float(np.log(mean / np.mean(np.exp(-k * excess))) + k * norms.min())


def describe(calibration: Calibration) -> str:
  """Returns the results as a few lines of text."""
  statistics, trust = calibration.errors[calibration.against], calibration.trust
  scores = {"truth": "the noise-free scores", "targets": "annotated scores"}[calibration.against]
  lines = [
    f"bound: |error| {_pair(statistics.error)} against {scores} of {statistics.samples} samples; "
    f"‖z‖ {_pair(statistics.norm)}, effective rank {calibration.effective_rank:.1f} of "
    f"{calibration.width}"
  ]
  for level in statistics.levels:
    lines.append(
      f"  δ = {level.delta}: |error| ≤ {level.constant:.3g}‖z‖ holds for "
      f"{round(level.coverage * statistics.samples)} of {statistics.samples} samples; the median "
      f"error is {level.tightness:.2g} of the bound"
    )
  if not statistics.levels:
    lines.append("  C is unknown, because the bound has no noise_scale or no norm_bound")
  elif calibration.against == "targets":
    lines.append("  these errors include the annotators' noise, which the bound leaves out")
  elif statistics.levels[-1].coverage < 1:
    lines.append("  the bound fails for some: R or S is too small, or scores are not linear in z")
  lines.append(f"  {ENVELOPE:.0%} of the errors are below {statistics.envelope:.3g}‖z‖")
  for kind, part in calibration.kinds.items():
    lines.append(
      f"  {kind}: {part.samples} samples, |error| {_pair(part.error)}, {describe_rank(part)}"
    )
  lines.append(f"  {describe_rank(statistics)}: {_verdict(statistics)}")
  lines.append(
    f"trust weight: γ {trust.mean:.3g} ± {trust.std:.2g}, {trust.smallest:.3g} to "
    f"{trust.largest:.3g}, with k = {trust.k:.4g} and b = {trust.b:.4g}"
  )
  if trust.nearly_constant:
    remedy = "no k changes that, because ‖z‖ is equal for nearly all samples"
    if trust.suggested_k is not None:
      remedy = f"use k = {trust.suggested_k:.4g} and b = {trust.suggested_b:.4g} for a standard "
      remedy += f"deviation of {SPREAD:.0%} and a mean of {MEAN}"
    spread = f"{trust.relative_spread:.1%} of its mean"
    lines.append(f"  γ is nearly constant, its standard deviation is {spread}; {remedy}")
  return "\n".join(lines)


def check_samples(samples: Samples) -> Samples:
  """Converts the arrays to float64; raises ValueError if a shape or a value is wrong."""
  arrays = {
    name: np.asarray(values, np.float64)
    for name, values in samples._asdict().items()
    if name != "kinds" and values is not None
  }
  shape = arrays["norms"].shape
  for name, values in arrays.items():
    if values.ndim != 1 or values.shape != shape or len(values) < 2:
      raise ValueError(f"{name} have shape {values.shape}, norms {shape}; give [N], N at least 2")
    if not np.isfinite(values).all():
      bad = int((~np.isfinite(values)).sum())
      raise ValueError(f"{bad} of {len(values)} {name} are not finite; leave those samples out")
  if samples.kinds is not None and len(samples.kinds) != shape[0]:
    raise ValueError(f"{len(samples.kinds)} kinds for {shape[0]} samples; give one per sample")
  return samples._replace(**arrays)


def _spread(values: np.ndarray) -> Spread:
  """Computes mean, standard deviation and quantiles of values [N]."""
  quantiles = dict(zip(map(str, QUANTILES), np.quantile(values, QUANTILES).tolist(), strict=True))
  return Spread(float(values.mean()), float(values.std()), quantiles)


def _error_statistics(
  norms: np.ndarray, errors: np.ndarray, constants: dict[float, float]
) -> ErrorStatistics:
  """Computes the statistics of norms [N] and errors [N]; `constants` maps each δ to its C."""
  from scipy import stats

  ratio = errors / np.maximum(norms, 1e-30)  # at ‖z‖ = 0 the bound allows no error
  envelope = float(np.quantile(ratio, ENVELOPE, method="inverted_cdf"))
  varied = len(errors) > 2 and not is_constant(norms) and np.ptp(errors) > 0
  rank, p_value = map(float, stats.spearmanr(errors, norms)) if varied else (None, None)
  levels = [
    Level(delta, C, float(np.mean(ratio <= C)), float(np.median(ratio)) / C)
    for delta, C in constants.items()
  ]
  return ErrorStatistics(
    samples=len(errors),
    norm=_spread(norms),
    error=_spread(errors),
    levels=levels,
    envelope=envelope,
    rank_correlation=rank,
    p_value=p_value,
  )


def _trust(norms: np.ndarray, k: float, b: float) -> TrustWeight:
  """Computes the statistics of γ for norms [N]."""
  gamma = np.exp(b - k * norms)
  relative_spread = _relative_spread(norms, k)
  suggested_k, suggested_b = suggest_trust(norms) or (None, None)
  return TrustWeight(
    k=float(k),
    b=float(b),
    mean=float(gamma.mean()),
    std=float(gamma.std()),
    relative_spread=relative_spread,
    smallest=float(gamma.min()),
    largest=float(gamma.max()),
    nearly_constant=relative_spread < NEARLY_CONSTANT,
    suggested_k=suggested_k,
    suggested_b=suggested_b,
  )


def is_constant(norms: np.ndarray) -> bool:
  """Returns whether all norms are equal up to the rounding error of float32."""
  return bool(norms.std() <= 1e-4 * norms.mean())


def _relative_spread(norms: np.ndarray, k: float) -> float:
  """Computes std / mean of exp(−k‖z‖)."""
  exponent = -k * norms
  weight = np.exp(exponent - exponent.max())  # subtracting the maximum prevents an overflow
  return float(weight.std() / weight.mean())


def _pair(spread: Spread) -> str:
  """Returns "mean ± std"."""
  return f"{spread.mean:.3g} ± {spread.std:.2g}"


def describe_rank(statistics: ErrorStatistics) -> str:
  """Returns the rank correlation and its p-value as text."""
  if statistics.rank_correlation is None:
    return "no rank correlation of |error| and ‖z‖"
  p_value = "p < 0.001" if statistics.p_value < 1e-3 else f"p = {statistics.p_value:.2g}"
  return f"rank correlation of |error| and ‖z‖ {statistics.rank_correlation:+.2f}, {p_value}"


def _verdict(statistics: ErrorStatistics) -> str:
  """Returns the meaning of the rank correlation as text."""
  if statistics.rank_correlation is None:
    return "one of them is equal for all samples"
  if abs(statistics.rank_correlation) < WEAK_CORRELATION or not statistics.p_value < 0.05:
    return "‖z‖ does not predict the error on these samples"
  if statistics.rank_correlation < 0:
    return "the error falls where ‖z‖ rises, so γ trusts the wrong samples"
  return "the error rises with ‖z‖, as the bound assumes"
