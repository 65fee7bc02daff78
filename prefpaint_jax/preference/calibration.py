"""How far the error bound can be trusted: errors of the reward on held-out data beside ‖z‖.

The bound says that |wᵀz − w*ᵀz| ≤ C‖z‖ for all z at once, with probability 1 − δ over the noise of
the training scores. `calibrate` measures how often that holds, how tight it is, whether a larger
‖z‖ goes with a larger error, and whether the trust weight γ = exp(b − k‖z‖) tells the samples apart
at all; `describe` says it in a few lines, `plot` shows it.
"""
# Shapes: N samples.
# matplotlib and scipy take a second to import, and are imported where they are needed.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from prefpaint_jax.preference.bound import Bound, confidence, effective_rank

DELTAS = (0.1, 0.05, 0.01)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ENVELOPE = 0.95  # share of the samples under the empirical envelope

# A weight that varies less than this cannot change what is learned by more than its own scale.
NEARLY_CONSTANT = 0.05

# Of the suggested weight: wide enough to matter, and still all samples count; its mean is the
# paper's, which is also the constant weight that the paper compares with.
SPREAD, MEAN = 0.25, 1.4

# A rank correlation below this says too little to weight samples by, however small its p value.
WEAK_CORRELATION = 0.1


class Samples(NamedTuple):
  """Scored samples that the reward was not fitted on."""

  norms: np.ndarray  # ‖z‖_{V⁻¹} [N]
  rewards: np.ndarray  # wᵀz [N]
  targets: np.ndarray  # normalised scores [N], with the annotators' noise
  truth: np.ndarray | None = None  # the same without noise [N], where it is known
  kinds: Sequence[str] | None = None  # kind of prompt of each

  @property
  def errors(self) -> dict[str, np.ndarray]:
    """|error| [N] against "truth", which is what the bound speaks of, and against "targets".

    Against targets it has the noise of the annotators in it, which no ‖z‖ can bound.
    """
    against = {"truth": self.truth, "targets": self.targets}
    return {
      name: np.abs(np.asarray(self.rewards, np.float64) - np.asarray(values, np.float64))
      for name, values in against.items()
      if values is not None
    }


@dataclass(frozen=True)
class Spread:
  mean: float
  std: float
  quantiles: dict[str, float]  # by level, "0.05" to "0.95"


@dataclass(frozen=True)
class Level:
  """The bound at one δ."""

  delta: float
  constant: float  # C
  coverage: float  # share of the samples with |error| ≤ C‖z‖; the bound promises all of them
  tightness: float  # median of |error| / (C‖z‖); 1 would be exact, 0.01 a hundred times too wide


@dataclass(frozen=True)
class Agreement:
  """Of |error| with ‖z‖."""

  samples: int
  norm: Spread  # of ‖z‖
  error: Spread  # of |error|
  levels: list[Level]  # by falling δ; empty where the bound knows no C
  envelope: float  # smallest C' with |error| ≤ C'‖z‖ for 95 % of the samples
  rank_correlation: float | None  # Spearman's, of |error| and ‖z‖; None where one is constant
  p_value: float | None  # of no correlation, samples taken to be independent


@dataclass(frozen=True)
class TrustWeight:
  """The weight γ = exp(b − k‖z‖) of the samples."""

  k: float
  b: float
  mean: float
  std: float
  relative_spread: float  # std / mean; no b can change it
  smallest: float
  largest: float
  nearly_constant: bool  # relative spread below 0.05
  suggested_k: float | None  # relative spread 0.25; None where no k gives it
  suggested_b: float | None  # with suggested_k, mean 1.4


@dataclass(frozen=True)
class Calibration:
  """Plain numbers throughout: `dataclasses.asdict` of it goes into JSON as it is."""

  against: str  # "truth" or "targets": what the errors of `kinds`, `describe` and `plot` are from
  width: int  # D
  effective_rank: float  # of Σ zzᵀ
  errors: dict[str, Agreement]  # against "targets", and against "truth" where it is known
  kinds: dict[str, Agreement]  # by kind of prompt
  trust: TrustWeight


def calibrate(samples: Samples, bound: Bound, k: float = 0.05, b: float = 0.7) -> Calibration:
  """Compares the errors with the bound, and γ of the given k and b with a constant."""
  samples = _checked(samples)
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
    errors={name: _agreement(norms, values, constants) for name, values in errors.items()},
    kinds={
      str(kind): _agreement(norms[kinds == kind], error[kinds == kind], constants)
      for kind in np.unique(kinds)
    },
    trust=_trust(norms, k, b),
  )


def suggest_trust(
  norms: np.ndarray, spread: float = SPREAD, mean: float = MEAN
) -> tuple[float, float] | None:
  """k and b with which γ of norms [N] has this mean and this std / mean; None: there are none.

  std / mean rises with k, from 0 towards a limit that the samples of the smallest norm set.
  """
  from scipy import optimize

  norms = np.asarray(norms, np.float64)
  excess = norms - norms.min()  # what all norms have in common is a factor, which is b's affair
  limit = np.sqrt(1 / np.mean(excess == 0) - 1)
  if _is_constant(norms) or limit <= spread:
    return None
  high = 1 / excess.std()
  while _relative_spread(norms, high) < spread:
    high *= 2
  k = optimize.brentq(lambda k: _relative_spread(norms, k) - spread, 0, high, xtol=1e-12 * high)
  return float(k), float(np.log(mean / np.mean(np.exp(-k * excess))) + k * norms.min())


def describe(calibration: Calibration) -> str:
  """A few lines for a terminal."""
  found, trust = calibration.errors[calibration.against], calibration.trust
  scores = {"truth": "the noise-free scores", "targets": "annotated scores"}[calibration.against]
  lines = [
    f"bound: |error| {_pair(found.error)} against {scores} of {found.samples} samples; "
    f"‖z‖ {_pair(found.norm)}, effective rank {calibration.effective_rank:.1f} of "
    f"{calibration.width}"
  ]
  for level in found.levels:
    lines.append(
      f"  δ = {level.delta}: |error| ≤ {level.constant:.3g}‖z‖ holds for "
      f"{round(level.coverage * found.samples)} of {found.samples}; the median error is "
      f"{level.tightness:.2g} of it"
    )
  if not found.levels:
    lines.append("  no C is known: the bound has no noise_scale or no norm_bound")
  elif calibration.against == "targets":
    lines.append("  the bound leaves out the annotators' own noise, which these errors contain")
  elif found.levels[-1].coverage < 1:
    lines.append("  the bound promises all: the scores are not linear in z, or R or S is too small")
  lines.append(f"  {ENVELOPE:.0%} of the errors are below {found.envelope:.3g}‖z‖")
  for kind, part in calibration.kinds.items():
    lines.append(f"  {kind}: {part.samples} samples, |error| {_pair(part.error)}, {_rank(part)}")
  lines.append(f"  {_rank(found)}: {_verdict(found)}")
  lines.append(
    f"trust weight: γ {trust.mean:.3g} ± {trust.std:.2g}, {trust.smallest:.3g} to "
    f"{trust.largest:.3g}, with k = {trust.k:.4g} and b = {trust.b:.4g}"
  )
  if trust.nearly_constant:
    remedy = "no k spreads it, ‖z‖ is the same for nearly all samples"
    if trust.suggested_k is not None:
      remedy = f"k = {trust.suggested_k:.4g} and b = {trust.suggested_b:.4g} would spread it by "
      remedy += f"{SPREAD:.0%} about a mean of {MEAN}"
    spread = f"{trust.relative_spread:.1%} of its mean"
    lines.append(f"  nearly constant, it spreads by {spread}: {remedy}")
  return "\n".join(lines)


def _checked(samples: Samples) -> Samples:
  """Arrays in float64, or an error that names the field."""
  arrays = {
    name: np.asarray(values, np.float64)
    for name, values in samples._asdict().items()
    if name != "kinds" and values is not None
  }
  shape = arrays["norms"].shape
  for name, values in arrays.items():
    if values.ndim != 1 or values.shape != shape or len(values) < 2:
      raise ValueError(f"{name} have shape {values.shape}, norms {shape}: give [N], N at least 2")
    if not np.isfinite(values).all():
      bad = int((~np.isfinite(values)).sum())
      raise ValueError(f"{bad} of {len(values)} {name} are not finite: leave those samples out")
  if samples.kinds is not None and len(samples.kinds) != shape[0]:
    raise ValueError(f"{len(samples.kinds)} kinds for {shape[0]} samples: give one to each")
  return samples._replace(**arrays)


def _spread(values: np.ndarray) -> Spread:
  quantiles = dict(zip(map(str, QUANTILES), np.quantile(values, QUANTILES).tolist(), strict=True))
  return Spread(float(values.mean()), float(values.std()), quantiles)


def _agreement(norms: np.ndarray, errors: np.ndarray, constants: dict[float, float]) -> Agreement:
  from scipy import stats

  ratio = errors / np.maximum(norms, 1e-30)  # ‖z‖ = 0 promises that there is no error
  envelope = float(np.quantile(ratio, ENVELOPE, method="inverted_cdf"))
  varied = len(errors) > 2 and not _is_constant(norms) and np.ptp(errors) > 0
  rank, p_value = map(float, stats.spearmanr(errors, norms)) if varied else (None, None)
  levels = [
    Level(delta, C, float(np.mean(ratio <= C)), float(np.median(ratio)) / C)
    for delta, C in constants.items()
  ]
  return Agreement(
    samples=len(errors),
    norm=_spread(norms),
    error=_spread(errors),
    levels=levels,
    envelope=envelope,
    rank_correlation=rank,
    p_value=p_value,
  )


def _trust(norms: np.ndarray, k: float, b: float) -> TrustWeight:
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


def _is_constant(norms: np.ndarray) -> bool:
  """To rounding: norms come in float32, out of a triangular solve."""
  return bool(norms.std() <= 1e-4 * norms.mean())


def _relative_spread(norms: np.ndarray, k: float) -> float:
  """std / mean of exp(−k‖z‖)."""
  exponent = -k * norms
  weight = np.exp(exponent - exponent.max())  # no b, and no overflow
  return float(weight.std() / weight.mean())


def _pair(spread: Spread) -> str:
  return f"{spread.mean:.3g} ± {spread.std:.2g}"


def _rank(found: Agreement) -> str:
  if found.rank_correlation is None:
    return "no rank correlation of |error| and ‖z‖"
  p_value = "p < 0.001" if found.p_value < 1e-3 else f"p = {found.p_value:.2g}"
  return f"rank correlation of |error| and ‖z‖ {found.rank_correlation:+.2f}, {p_value}"


def _verdict(found: Agreement) -> str:
  if found.rank_correlation is None:
    return "one of them is the same for all samples"
  if abs(found.rank_correlation) < WEAK_CORRELATION or not found.p_value < 0.05:
    return "‖z‖ says next to nothing about the error on these samples"
  if found.rank_correlation < 0:
    return "the error falls where ‖z‖ rises, so γ trusts the wrong samples"
  return "the error rises with ‖z‖, as the bound has it"
