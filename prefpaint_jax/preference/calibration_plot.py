"""Plot of a calibration: errors against ‖z‖_{V⁻¹}, and the histogram of the trust weight."""
# Shapes: N samples.

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from prefpaint_jax.preference.calibration import (
  ENVELOPE,
  Calibration,
  ErrorStatistics,
  Samples,
  TrustWeight,
  check_samples,
  describe_rank,
  is_constant,
)
from prefpaint_jax.runtime.files import atomic_path

if TYPE_CHECKING:
  from matplotlib.axes import Axes


BLUE, RED, GREY = "#1f5fa8", "#c8402f", "#8a8f98"


def plot(calibration: Calibration, samples: Samples, path: str | os.PathLike[str]) -> None:
  """Draws a PNG of 1800 x 900 pixels.

  On the left is |error| over ‖z‖ with quantiles, envelope and bound; on the right the histogram of
  γ.

  Args:
    calibration: the result of `calibrate` for `samples`.
    path: the file to write. Missing folders are made.
  """
  from matplotlib.figure import Figure

  samples = check_samples(samples)
  statistics, trust = calibration.errors[calibration.against], calibration.trust
  norms, errors = samples.norms, samples.errors[calibration.against]
  figure = Figure(figsize=(9, 4.5), dpi=200, layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
  _plot_errors(left, norms, errors, statistics)
  _plot_trust(right, norms, trust)
  error = {"truth": "|reward − noise-free score|", "targets": "|reward − annotated score|"}
  left.set(title=describe_rank(statistics), xlabel="‖z‖", ylabel=error[calibration.against])
  title = f"γ = {trust.mean:.3g} ± {trust.std:.2g}"
  right.set(title=title, xlabel="trust weight γ = exp(b − k‖z‖)", ylabel="samples")
  for axes in (left, right):
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8, frameon=False)
  with atomic_path(path) as partial:
    figure.savefig(partial, format="png")


def _running_quantiles(
  norms: np.ndarray, errors: np.ndarray, levels: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Computes mean ‖z‖ [bins] and quantiles of |error| [levels, bins] in bins of equal counts."""
  number = int(np.clip(len(norms) // 40, 1, 12))
  bins = np.array_split(np.argsort(norms, kind="stable"), number)
  centres = np.array([norms[part].mean() for part in bins])
  return centres, np.array([np.quantile(errors[part], levels) for part in bins]).T


def _window(values: np.ndarray) -> tuple[float, float]:
  """Returns the ends of an axis, at least a quarter of the mean from it.

  A narrower axis would make nearly constant values look spread.
  """
  mean, (low, high) = values.mean(), np.quantile(values, (0.001, 0.999))
  return min(0.95 * low, 0.75 * mean) if low > high / 2 else 0.0, max(1.02 * high, 1.25 * mean)


def _plot_errors(
  axes: Axes, norms: np.ndarray, errors: np.ndarray, statistics: ErrorStatistics
) -> None:
  """Draws |error| over ‖z‖ with its quantiles, the envelope and the bound."""
  ends = np.array(_window(norms))
  axes.set_xlim(ends)
  axes.set_ylim(0, 1.2 * np.quantile(errors, 0.998) or 1.0)
  axes.scatter(norms, errors, s=5, color=GREY, alpha=0.5, linewidths=0)
  if not is_constant(norms):
    centres, quantiles = _running_quantiles(norms, errors, (0.5, 0.95))
    line = {"color": BLUE, "marker": "o", "markersize": 3}
    axes.plot(centres, quantiles[0], "-", label="median of |error| at this ‖z‖", **line)
    axes.plot(centres, quantiles[1], "--", label="95th percentile of |error| at this ‖z‖", **line)
  label = f"{statistics.envelope:.3g}‖z‖, above {ENVELOPE:.0%} of all"
  axes.plot(ends, statistics.envelope * ends, color=RED, label=label)
  for level in statistics.levels:  # most are steeper than the axes show; the legend has C
    axes.plot(ends, level.constant * ends, ":", color="black", linewidth=1)
  if statistics.levels:
    constants = ", ".join(f"{level.constant:.3g}" for level in statistics.levels)
    deltas = ", ".join(str(level.delta) for level in statistics.levels)
    axes.lines[-1].set_label(f"bound C‖z‖, C = {constants} at δ = {deltas}")


def _plot_trust(axes: Axes, norms: np.ndarray, trust: TrustWeight) -> None:
  """Draws the histogram of γ, and that of the suggested weight if γ is nearly constant."""
  shown = [(trust.k, trust.b, "", {"color": BLUE, "alpha": 0.8})]
  if trust.nearly_constant and trust.suggested_k is not None:
    style = {"color": RED, "histtype": "step"}
    shown.append((trust.suggested_k, trust.suggested_b, " (suggested)", style))
  weights = [np.exp(b - k * norms) for k, b, *_ in shown]
  lows, highs = zip(*map(_window, weights), strict=True)
  edges = np.linspace(min(lows), max(highs), 60)
  axes.set_xlim(edges[0], edges[-1])
  for (k, b, note, style), gamma in zip(shown, weights, strict=True):
    axes.hist(gamma, edges, label=f"k = {k:.3g}, b = {b:.3g}{note}", **style)
