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
from PIL import Image

from prefpaint_jax.data.images import resize_image, to_bytes
from prefpaint_jax.evaluation.drift import MEASURES
from prefpaint_jax.evaluation.histogram import histograms
from prefpaint_jax.evaluation.tables import LABELS, show_typeset, typeset
from prefpaint_jax.evaluation.winrate import Scores
from prefpaint_jax.runtime.files import write_text

SMALL = 96  # pixels of the longer side up to which a picture is enlarged, every pixel a square
LARGEST = 320  # of the longer side of a picture on the page
_READING = (
  "In brackets: 95 % bootstrap intervals over prompts. The best of S wins more often by having "
  "more tries: against one, a policy no better than the baseline gets the baseline's own rate if "
  "it paints the very same pictures, and S / (S + 1) if it paints others."
)

_STYLE = Path(__file__).with_name("report.css")


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
<style>
{_STYLE.read_text()}</style>
</head>
<body>
<main>
{"".join(body)}
</main>
</body>
</html>
"""
  write_text(path, page)


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
  value, low, high = (show_typeset("winrate/s1", found[key]) for key in ("value", "low", "high"))
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
    f'<div class="figures">{histograms(scores)}</div></section>'
  )


def _count(group: Mapping[str, Any]) -> str:
  left_out = group["left_out"]
  return f"{group['prompts']}<small>{left_out} left out</small>" if left_out else group["prompts"]


def _interval(statistic: str, group: Mapping[str, Any]) -> str:
  if statistic not in group:
    return "–"
  value, low, high = (
    show_typeset(statistic, group[statistic][key]) for key in ("value", "low", "high")
  )
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
  return typeset(f"{number:+.4f}" if key == "change" else f"{number:.4f}")


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
    theirs, ours = (show_typeset("reward", score) for score in (baseline, policy))
    ours = f"<b>{ours}</b>" if policy > baseline else f"<span>{ours}</span>"
    theirs = f"<b>{theirs}</b>" if baseline > policy else f"<span>{theirs}</span>"
    rows += f"<span>{escape(judge)}</span>{theirs}{ours}"
  return f"<figure>{pictures}{rows}<figcaption>{escape(example.name)}</figcaption></figure>"


def _picture(image: np.ndarray, what: str) -> str:
  """An <img> that carries its data: small pictures as PNG, others reduced to LARGEST, as JPEG."""
  height, width, _ = image.shape
  longer = max(height, width)
  image = image / 255 if image.dtype == np.uint8 else image
  if longer > LARGEST:
    image = resize_image(image, tuple(max(1, round(x * LARGEST / longer)) for x in (height, width)))
  pixels = Image.fromarray(to_bytes(image))
  file_format, style = ("png", ' class="small"') if longer <= SMALL else ("jpeg", "")
  file = io.BytesIO()
  pixels.save(file, format=file_format, quality=88)
  data = base64.b64encode(file.getvalue()).decode()
  return f'<img{style} alt="{escape(what)}" src="data:image/{file_format};base64,{data}">'
