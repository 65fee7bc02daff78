"""Histograms of an evaluation as SVG."""
# Shapes: N prompts, S samples of each.

from collections.abc import Mapping

import numpy as np
from matplotlib.ticker import MaxNLocator

from prefpaint_jax.evaluation.tables import show_typeset
from prefpaint_jax.evaluation.winrate import Scores
from prefpaint_jax.web.report_page import typeset

# Pixels: width and height of a drawing, and the height of the axis labels in it.
_WIDTH, _HEIGHT, _FOOT = 480, 190, 26


def histograms(scores: Scores) -> str:
  """Draws two <figure> elements: rewards of all samples, and gains of all prompts.

  Prompts with scores that are not finite are left out.
  """
  policy, baseline = (np.asarray(side, np.float64) for side in scores)
  finite = np.isfinite(policy).all(1) & np.isfinite(baseline).all(1)
  sides = {"baseline": baseline[finite], "policy": policy[finite]}
  gains = (policy[finite] - baseline[finite]).mean(1)
  legend = ", ".join(
    f'<span><i class="{name}"></i>{name} (mean {show_typeset("reward", values.mean())})</span>'
    for name, values in sides.items()
  )
  share = show_typeset("winrate", np.mean(gains > 0))
  return (
    f"<figure>{_histogram(sides)}<figcaption>Rewards of all samples: {legend}</figcaption></figure>"
    f"<figure>{_histogram({'policy': gains})}<figcaption>Gain of each prompt, mean over its "
    f"samples; above 0 for {share} of them</figcaption></figure>"
  )


def _histogram(series: Mapping[str, np.ndarray]) -> str:
  """Draws an SVG of the share of each series in common bins; 0 is always an edge between bins."""
  low, high = min(map(np.min, series.values())), max(map(np.max, series.values()))
  if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
    low, high = low - 0.5, high + 0.5
  # Rice's rule gives the number of bins for the smallest series.
  number = np.clip(2 * np.cbrt(min(map(np.size, series.values()))), 6, 40)
  bin_width = (high - low) / int(number)
  first, last = int(np.floor(low / bin_width)), int(np.floor(high / bin_width)) + 1
  edges = bin_width * np.arange(first, last + 1)
  shares = {name: np.histogram(v, edges)[0] / v.size for name, v in series.items()}
  floor, peak = _HEIGHT - _FOOT, max(map(np.max, shares.values()))
  x = lambda value: (value - edges[0]) / (edges[-1] - edges[0]) * _WIDTH
  y = lambda share: floor - share / peak * (floor - 8)
  parts = [
    f'<path class="{name}" d="M0 {floor}'
    + "".join(
      f"V{y(share):.1f}H{x(edge):.1f}" for share, edge in zip(heights, edges[1:], strict=True)
    )
    + f'V{floor}Z"/>'
    for name, heights in shares.items()
  ]
  for name, values in series.items():
    middle = f"{x(values.mean()):.1f}"
    parts.append(f'<path class="{name} mean" d="M{middle} 0V{floor}"/>')
  parts.append(f'<path class="axis" d="M0 {floor}H{_WIDTH}"/>')
  for share in (t for t in MaxNLocator(3).tick_values(0, peak) if 0 < t <= peak):
    parts.append(f'<path class="axis" d="M0 {y(share):.1f}H6"/>')
    parts.append(f'<text class="share" x="9" y="{y(share) + 4:.1f}">{100 * share:.6g} %</text>')
  ticks = MaxNLocator(6).tick_values(edges[0], edges[-1])
  for tick in (t for t in ticks if 0.02 * _WIDTH <= x(t) <= 0.98 * _WIDTH):
    zero = abs(tick) < 1e-9 * (high - low)
    if zero:
      parts.append(f'<path class="zero" d="M{x(0):.1f} 0V{floor}"/>')
    label = typeset("0" if zero else f"{tick:.6g}")
    parts.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - 8}">{label}</text>')
  view = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="histogram"'
  return f"<svg {view}>{''.join(parts)}</svg>"
