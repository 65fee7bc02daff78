"""The plot of a calibration: errors against the feature norm, and the trust weight's histogram."""
# Shapes: N samples.

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prefpaint_jax.preference.calibration import (
  ENVELOPE,
  Agreement,
  Calibration,
  Samples,
  TrustWeight,
  _checked,
  _is_constant,
  _rank,
)

if TYPE_CHECKING:
  from matplotlib.axes import Axes


BLUE, RED, GREY = "#1f5fa8", "#c8402f", "#8a8f98"


def plot(calibration: Calibration, samples: Samples, path: str | os.PathLike[str]) -> None:
  """A PNG: |error| over ‖z‖ with its quantiles and envelope, and the histogram of γ."""
  from matplotlib.figure import Figure

  samples = _checked(samples)
  found, trust = calibration.errors[calibration.against], calibration.trust
  norms, errors = samples.norms, samples.errors[calibration.against]
  figure = Figure(figsize=(9, 4.5), dpi=200, layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
  _plot_errors(left, norms, errors, found)
  _plot_trust(right, norms, trust)
  error = {"truth": "|reward − noise-free score|", "targets": "|reward − annotated score|"}
  left.set(title=_rank(found), xlabel="‖z‖", ylabel=error[calibration.against])
  title = f"γ = {trust.mean:.3g} ± {trust.std:.2g}"
  right.set(title=title, xlabel="trust weight γ = exp(b − k‖z‖)", ylabel="samples")
  for axes in (left, right):
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8, frameon=False)
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, format="png")


def _running_quantiles(
  norms: np.ndarray, errors: np.ndarray, levels: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Mean ‖z‖ [bins] and the quantiles of |error| [levels, bins] of bins of equally many samples."""
  number = int(np.clip(len(norms) // 40, 1, 12))
  bins = np.array_split(np.argsort(norms, kind="stable"), number)
  centres = np.array([norms[part].mean() for part in bins])
  return centres, np.array([np.quantile(errors[part], levels) for part in bins]).T


def _window(values: np.ndarray) -> tuple[float, float]:
  """Ends of an axis, a quarter of the mean away from it: magnified enough, a constant is spread."""
  mean, (low, high) = values.mean(), np.quantile(values, (0.001, 0.999))
  return min(0.95 * low, 0.75 * mean) if low > high / 2 else 0.0, max(1.02 * high, 1.25 * mean)


def _plot_errors(axes: Axes, norms: np.ndarray, errors: np.ndarray, found: Agreement) -> None:
  ends = np.array(_window(norms))
  axes.set_xlim(ends)
  axes.set_ylim(0, 1.2 * np.quantile(errors, 0.998) or 1.0)
  axes.scatter(norms, errors, s=5, color=GREY, alpha=0.5, linewidths=0)
  if not _is_constant(norms):
    centres, quantiles = _running_quantiles(norms, errors, (0.5, 0.95))
    line = {"color": BLUE, "marker": "o", "markersize": 3}
    axes.plot(centres, quantiles[0], "-", label="median of |error| at this ‖z‖", **line)
    axes.plot(centres, quantiles[1], "--", label="95th percentile of |error| at this ‖z‖", **line)
  label = f"{found.envelope:.3g}‖z‖, above {ENVELOPE:.0%} of all"
  axes.plot(ends, found.envelope * ends, color=RED, label=label)
  for level in found.levels:  # often steeper than the picture can show: the legend says how steep
    axes.plot(ends, level.constant * ends, ":", color="black", linewidth=1)
  if found.levels:
    constants = ", ".join(f"{level.constant:.3g}" for level in found.levels)
    deltas = ", ".join(str(level.delta) for level in found.levels)
    axes.lines[-1].set_label(f"bound C‖z‖, C = {constants} at δ = {deltas}")


def _plot_trust(axes: Axes, norms: np.ndarray, trust: TrustWeight) -> None:
  shown = [(trust.k, trust.b, "", {"color": BLUE, "alpha": 0.8})]
  if trust.nearly_constant and trust.suggested_k is not None:
    style = {"color": RED, "histtype": "step"}
    shown.append((trust.suggested_k, trust.suggested_b, " would spread it", style))
  weights = [np.exp(b - k * norms) for k, b, *_ in shown]
  lows, highs = zip(*map(_window, weights), strict=True)
  edges = np.linspace(min(lows), max(highs), 60)
  axes.set_xlim(edges[0], edges[-1])
  for (k, b, note, style), gamma in zip(shown, weights, strict=True):
    axes.hist(gamma, edges, label=f"k = {k:.3g}, b = {b:.3g}{note}", **style)
