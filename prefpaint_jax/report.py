"""An evaluation as one page: report.html holds its style, drawings and pictures, and no scripts.

The numbers are those of `comparison`: the page shows them, it computes none but the histograms.
"""
# Shapes: N prompts, S samples of each, H W pixels.

import base64
import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

from prefpaint_jax.comparison import LABELS, MEASURES, Scores, show
from prefpaint_jax.data.images import resize_image

SMALL = 96  # pixels of the longer side up to which a picture is enlarged, every pixel a square
LARGEST = 320  # of the longer side of a picture on the page


_READING = (
  "In brackets: 95 % bootstrap intervals over prompts. The best of S wins more often by having "
  "more tries: against one, a policy no better than the baseline gets the baseline's own rate if "
  "it paints the very same pictures, and S / (S + 1) if it paints others."
)


class Example(NamedTuple):
  """One prompt of the gallery, with the sample of each side that its scores belong to.

  The pictures are [H, W, 3], floats in [0, 1] or uint8.
  """

  name: str
  prompt: np.ndarray  # its hole already grey, or whatever tells it from black
  baseline: np.ndarray
  policy: np.ndarray
  scores: Mapping[str, tuple[float, float]]  # by judge: the policy's, the baseline's


def choose(gains: np.ndarray, each: int = 6) -> dict[str, np.ndarray]:
  """Which prompts to show: {section: indices of gains [N]}, each prompt at most once.

  The largest gains, those about the median, and the smallest, largest first; fewer than `each`
  where there are not enough, and none that is not finite.
  """
  gains = np.asarray(gains, np.float64)
  order = np.argsort(-gains, kind="stable")
  order = order[np.isfinite(gains[order])]
  number = len(order)
  each = min(each, max(1, number // 3))
  middle = (number - each) // 2
  sections = {
    "Largest gains": order[:each],
    "About the median": order[middle : middle + each] if number > 2 else order[:0],
    "Smallest gains, or largest losses": order[max(each, number - each) :],
  }
  return {title: indices for title, indices in sections.items() if len(indices)}


def make_gallery(
  names: Sequence[str],
  prompts: Sequence[np.ndarray],
  baseline: Sequence[np.ndarray],
  policy: Sequence[np.ndarray],
  scores: Mapping[str, Scores],
  each: int = 6,
) -> dict[str, list[Example]]:
  """The sections of `choose`, by what the first judge says of the first sample of each prompt.

  names, pictures: N of each, the pictures those of the first samples; scores: as summarised.
  """
  first = {judge: [side[:, 0] for side in sides] for judge, sides in scores.items()}
  ours, theirs = next(iter(first.values()))
  return {
    title: [
      Example(
        names[i],
        prompts[i],
        baseline[i],
        policy[i],
        {judge: tuple(float(side[i]) for side in sides) for judge, sides in first.items()},
      )
      for i in indices
    ]
    for title, indices in choose(ours - theirs, each).items()
  }


def write_report(
  path: str | os.PathLike[str],
  title: str,
  about: Mapping[str, Any],
  summary: Mapping[str, Mapping[str, Mapping[str, Any]]],
  scores: Mapping[str, Scores],
  drift: Mapping[str, Any] | None = None,
  gallery: Mapping[str, Sequence[Example]] | None = None,
) -> None:
  """Writes the page; whole or not at all.

  Args:
    title: what was compared, in a few words.
    about: what else to say at the top, in this order; "command" is set as code.
    summary, drift: of `comparison.summarise` and `comparison.drift`.
    scores: what the summary was made of, for the histograms.
    gallery: examples by section (see `make_gallery`); 0.3 MB each, at most.
  """
  body = [
    _header(title, about),
    f'<section class="cards">{"".join(_card(*judge) for judge in summary.items())}</section>',
    *(_judge(name, groups, scores[name]) for name, groups in summary.items()),
    _drift(drift) if drift else "",
    _gallery(gallery) if gallery else "",
  ]
  page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{"".join(body)}
</main>
</body>
</html>
"""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_text(page, encoding="utf-8")
  os.replace(temporary, path)


# ---------------------------------------------------------------------------------------- sections


def _header(title: str, about: Mapping[str, Any]) -> str:
  facts = ""
  for name, fact in about.items():
    text = escape(str(fact))
    if name == "command":  # broken between its words alone
      text = f"<code>{' '.join(f'<span>{word}</span>' for word in text.split(' '))}</code>"
    facts += f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{text}</dd>"
  return f"<header><h1>{escape(title)}</h1><dl>{facts}</dl></header>"


def _card(judge: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
  """The headline of a judge: its WinRate over all prompts, as a number and on a scale."""
  found, prompts = groups["all"]["winrate/s1"], groups["all"]["prompts"]
  value, low, high = (_number("winrate/s1", found[key]) for key in ("value", "low", "high"))
  if found["low"] > 0.5:
    verdict = "The policy is preferred."
  elif found["high"] < 0.5:
    verdict = "The baseline is preferred."
  else:
    verdict = "No preference is shown."
  left, width = 100 * found["low"], 100 * (found["high"] - found["low"])
  return (
    f'<article class="card"><h2>{escape(judge)}</h2><p class="rate">{value}</p>'
    f'<div class="scale"><i style="left:{left:.2f}%;width:{width:.2f}%"></i>'
    f'<b style="left:{100 * found["value"]:.2f}%"></b></div>'
    f"<p>WinRate over {prompts} prompts, one sample against one; 95 % interval {low} to {high}. "
    f"<strong>{verdict}</strong></p></article>"
  )


def _judge(judge: str, groups: Mapping[str, Mapping[str, Any]], scores: Scores) -> str:
  """The full table of a judge, and how its scores and gains are spread."""
  columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in groups)
  counts = "".join(f"<td>{_count(group)}</td>" for group in groups.values())
  rows = [f'<tr><th scope="row">prompts</th>{counts}</tr>']
  for statistic in (name for name in LABELS if name in groups["all"]):
    cells = "".join(f"<td>{_interval(statistic, group)}</td>" for group in groups.values())
    row = ' class="reference"' if statistic.startswith("baseline/") else ""
    rows.append(f'<tr{row}><th scope="row">{LABELS[statistic]}</th>{cells}</tr>')
  return (
    f"<section><h2>{escape(judge)}</h2>"
    f'<div class="scroll"><table><thead><tr><td></td>{columns}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div>"
    f'<p class="note">{_READING}</p>'
    f'<div class="figures">{_histograms(scores)}</div></section>'
  )


def _count(group: Mapping[str, Any]) -> str:
  left_out = group["left_out"]
  return f"{group['prompts']}<small>{left_out} left out</small>" if left_out else group["prompts"]


def _interval(statistic: str, group: Mapping[str, Any]) -> str:
  if statistic not in group:
    return "–"
  value, low, high = (_number(statistic, group[statistic][key]) for key in ("value", "low", "high"))
  return f"{value}<small>[{low}, {high}]</small>"


def _drift(table: Mapping[str, Any]) -> str:
  """What else has changed, with the flags."""
  measures = table["measures"]
  keys = ["baseline", "policy", "change", "seed_variation", "spread"]
  if any("original" in found for found in measures.values()):
    keys.insert(0, "original")
  columns = "".join(f'<th scope="col">{key.replace("_", " ")}</th>' for key in keys)
  rows = []
  for name, found in measures.items():
    cells = "".join(f"<td>{_measured(key, found.get(key))}</td>" for key in keys)
    flag = ' <b class="flag">flagged</b>' if found["flagged"] else ""
    label = f"{escape(name.replace('_', ' '))}{flag}<small>{escape(MEASURES.get(name, ''))}</small>"
    rows.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
  return (
    '<section><h2>Drift</h2><div class="scroll"><table>'
    f"<thead><tr><td></td>{columns}</tr></thead>"
    f'<tbody>{"".join(rows)}</tbody></table></div><p class="note">{escape(table["rule"])}</p>'
    "</section>"
  )


def _measured(key: str, number: float | None) -> str:
  if number is None:
    return "–"
  return _typeset(f"{number:+.4f}" if key == "change" else f"{number:.4f}")


def _gallery(gallery: Mapping[str, Sequence[Example]]) -> str:
  sections = "".join(
    f'<h3>{escape(title)}</h3><div class="gallery">{"".join(map(_example, examples))}</div>'
    for title, examples in gallery.items()
  )
  return f"<section><h2>Prompt, baseline, policy</h2>{sections}</section>"


def _example(example: Example) -> str:
  """Three pictures side by side, and what each judge gave to two of them."""
  pictures = "".join(
    _picture(getattr(example, what), f"{example.name}: {what}")
    for what in ("prompt", "baseline", "policy")
  )
  rows = ""
  for judge, (policy, baseline) in example.scores.items():
    theirs, ours = (_number("reward", score) for score in (baseline, policy))
    ours = f"<b>{ours}</b>" if policy > baseline else f"<span>{ours}</span>"
    theirs = f"<b>{theirs}</b>" if baseline > policy else f"<span>{theirs}</span>"
    rows += f"<span>{escape(judge)}</span>{theirs}{ours}"
  return f"<figure>{pictures}{rows}<figcaption>{escape(example.name)}</figcaption></figure>"


def _picture(image: np.ndarray, what: str) -> str:
  """An <img> that carries its data: small pictures as PNG, others reduced to LARGEST, as JPEG."""
  height, width, _ = image.shape
  longer = max(height, width)
  image = np.clip(image / 255 if image.dtype == np.uint8 else image, 0, 1)
  if longer > LARGEST:
    image = resize_image(image, tuple(max(1, round(x * LARGEST / longer)) for x in (height, width)))
  pixels = Image.fromarray(np.round(image * 255).astype(np.uint8))
  file_format, style = ("png", ' class="small"') if longer <= SMALL else ("jpeg", "")
  file = io.BytesIO()
  pixels.save(file, format=file_format, quality=88)
  data = base64.b64encode(file.getvalue()).decode()
  return f'<img{style} alt="{escape(what)}" src="data:image/{file_format};base64,{data}">'


def _number(statistic: str, number: float) -> str:
  return _typeset(show(statistic, number))


def _typeset(number: str) -> str:
  return number.replace("-", "−")


# -------------------------------------------------------------------------------------- histograms

_WIDTH, _HEIGHT, _FOOT = 480, 190, 26  # of a drawing, and of the axis below it


def _histograms(scores: Scores) -> str:
  policy, baseline = (np.asarray(side, np.float64) for side in scores)
  finite = np.isfinite(policy).all(1) & np.isfinite(baseline).all(1)
  sides = {"baseline": baseline[finite], "policy": policy[finite]}
  gains = (policy[finite] - baseline[finite]).mean(1)
  legend = ", ".join(
    f'<span><i class="{name}"></i>{name} (mean {_number("reward", values.mean())})</span>'
    for name, values in sides.items()
  )
  share = _number("winrate", np.mean(gains > 0))
  return (
    f"<figure>{_histogram(sides)}<figcaption>Rewards of all samples: {legend}</figcaption></figure>"
    f"<figure>{_histogram({'policy': gains})}<figcaption>Gain of each prompt, mean over its "
    f"samples; above 0 in {share} of them</figcaption></figure>"
  )


def _histogram(series: Mapping[str, np.ndarray]) -> str:
  """An SVG of the shares of each of `series` in common bins; 0 is always between two of them."""
  low, high = min(map(np.min, series.values())), max(map(np.max, series.values()))
  if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
    low, high = low - 0.5, high + 0.5
  # Rice's rule, for the smaller of the series.
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
  ticks = MaxNLocator(6).tick_values(edges[0], edges[-1])
  for tick in (t for t in ticks if 0.02 * _WIDTH <= x(t) <= 0.98 * _WIDTH):
    zero = abs(tick) < 1e-9 * (high - low)
    if zero:
      parts.append(f'<path class="zero" d="M{x(0):.1f} 0V{floor}"/>')
    label = _typeset("0" if zero else f"{tick:.6g}")
    parts.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - 8}">{label}</text>')
  view = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="histogram"'
  return f"<svg {view}>{''.join(parts)}</svg>"


# ------------------------------------------------------------------------------------------- style

_STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fdfdfb; --raised: #f5f5f1; --ink: #1c1f24; --muted: #666c76; --line: #dfe0dc;
  --policy: #1f5fa8; --baseline: #8a8f98; --warning: #b5371f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #141619; --raised: #1d2024; --ink: #e4e6e9; --muted: #989ea8; --line: #2f343a;
    --policy: #7db0ec; --baseline: #858b95; --warning: #f0896f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 70rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0; }
h2 { font-size: 1.25rem; font-weight: 650; margin: 0 0 0.75rem; }
h3 { font-size: 0.95rem; font-weight: 600; color: var(--muted); margin: 1.75rem 0 0.75rem; }
section { margin-top: 3.25rem; }
h1, h2, dd, figcaption { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1.25rem; margin: 1rem 0 0; }
dt, small, .note, figcaption, .reference, thead th { color: var(--muted); }
dd { margin: 0; min-width: 0; }
code span { display: inline-block; max-width: 100%; }
code { font: 0.85em/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.note, figcaption { font-size: 0.85rem; }

.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
.card { background: var(--raised); border-radius: 10px; padding: 1.25rem 1.4rem; }
.card h2 { font-size: 0.95rem; font-weight: 600; color: var(--muted); margin: 0; }
.card p { font-size: 0.9rem; margin: 0.9rem 0 0; }
.card .rate { font-size: 2.9rem; line-height: 1; font-weight: 650; letter-spacing: -0.03em; }
.scale { position: relative; height: 1rem; margin-top: 1rem; }
.scale, .scale::after { background: linear-gradient(var(--line) 0 0) center / 100% 2px no-repeat; }
.scale::after { content: ""; position: absolute; left: 50%; width: 2px; inset-block: 0;
  margin-left: -1px; background: var(--baseline); }
.scale i { position: absolute; top: 5px; height: 6px; border-radius: 3px; opacity: 0.45;
  background: var(--policy); }
.scale b { position: absolute; top: 2px; width: 12px; height: 12px; margin-left: -6px; z-index: 1;
  border-radius: 50%; background: var(--policy); }

.scroll { overflow-x: auto; }
/* Whole pixels, and lines above the rows: else the sticky column hides some of them. */
table { border-collapse: separate; border-spacing: 0; border-bottom: 1px solid var(--line);
  min-width: 100%; font-size: 15px; line-height: 22px; }
th, td { padding: 7px 0 7px 24px; text-align: right; vertical-align: top; white-space: nowrap; }
tbody th, tbody td { border-top: 1px solid var(--line); }
th { font-weight: 500; }
tbody th { text-align: left; padding-left: 0; white-space: normal; min-width: 144px;
  position: sticky; left: 0; background: var(--ground); }
.reference th { font-weight: 400; padding-left: 16px; }
td small { margin-left: 8px; }
small { font-size: 13px; font-weight: 400; }
th small { display: block; line-height: 18px; }
.flag { color: var(--warning); font-weight: 650; }

.figures, .gallery { display: grid; gap: 1.75rem 2rem; }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  margin-top: 1.5rem; }
.gallery { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--muted); text-anchor: middle; }
path { fill: none; stroke-width: 1.5; }
path.baseline { fill: var(--baseline); fill-opacity: 0.35; stroke: none; }
path.policy { fill: var(--policy); fill-opacity: 0.18; stroke: var(--policy); }
path.mean { fill: none; stroke-dasharray: 4 4; }
path.baseline.mean { stroke: var(--baseline); }
path.axis, path.zero { stroke: var(--line); }
.figures span { white-space: nowrap; }
figcaption i { display: inline-block; width: 0.7em; height: 0.7em; margin-right: 0.35em;
  border-radius: 2px; }
i.policy { background: var(--policy); }
i.baseline { background: var(--baseline); }
.gallery figure { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0 0.35rem;
  font-size: 0.85rem; align-content: start; }
.gallery img { display: block; width: 100%; height: auto; border-radius: 4px;
  margin-bottom: 0.3rem; }
.gallery img.small { image-rendering: pixelated; border-radius: 2px; }
.gallery span:nth-of-type(3n + 1) { overflow-wrap: anywhere; }
.gallery span { color: var(--muted); }
.gallery b { font-weight: 650; }
.gallery figcaption { grid-column: 1 / -1; order: -1; margin-bottom: 0.25rem; }
@media (max-width: 40rem) {
  main { padding: 1.75rem 1rem 3rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.4rem; }
  td small { display: block; margin: 0; line-height: 18px; }
  th, td { padding-left: 16px; }
}
"""
