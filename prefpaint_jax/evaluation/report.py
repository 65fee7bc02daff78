"""The report of an evaluation: one HTML file with style, drawings and images, without scripts.

The numbers come from `winrate`, `witnesses`, `drift` and `fidelity`; this module computes only the
histograms.
"""
# Shapes: N prompts, S samples of each, H W pixels.

import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from prefpaint_jax.evaluation.drift import MEASURES
from prefpaint_jax.evaluation.gallery import Example, render
from prefpaint_jax.evaluation.histogram import histograms
from prefpaint_jax.evaluation.tables import (
  FIDELITY_COLUMNS,
  LABELS,
  fidelity_rows,
  show_typeset,
)
from prefpaint_jax.evaluation.winrate import VISIBLE_GAIN, Scores, best_of_warning, verdict
from prefpaint_jax.evaluation.witnesses import MEASURES as MEANINGS
from prefpaint_jax.runtime.files import write_text
from prefpaint_jax.web.report_page import render_page, render_table, typeset

_READING = (
  "Brackets are 95 % bootstrap intervals over prompts. WinRate compares samples of different "
  "seeds; an equally good policy has 0.5, and its best of N against one has N / (N + 1). Standard "
  "deviations are the baseline's within a prompt. A side is called preferred if the interval of "
  f"WinRate excludes 0.5 and the gain is at least {VISIBLE_GAIN:g} standard deviations."
)


def write_report(
  path: str | os.PathLike[str],
  title: str,
  about: Mapping[str, Any],
  summary: Mapping[str, Mapping[str, Mapping[str, Any]]],
  scores: Mapping[str, Scores],
  witnesses: Mapping[str, Any] | None = None,
  drift: Mapping[str, Any] | None = None,
  fidelity: Mapping[str, Any] | None = None,
  gallery: Mapping[str, Sequence[Example]] | None = None,
  policies: Sequence[Sequence[str]] = (),
) -> None:
  """Writes the report. The file is complete or does not exist.

  Args:
    path: the HTML file to write.
    title: names of policy and baseline.
    about: facts for the top of the page, in order; "command" is formatted as code.
    summary: result of `winrate.summarise`.
    scores: scores by judge, for the histograms.
    witnesses: result of `witnesses.compare`.
    drift: result of `drift.drift`.
    fidelity: result of `fidelity.compare`.
    gallery: examples by section (see `gallery.make_gallery`); each adds at most 0.4 MB to the file.
    policies: rows of the table of all policies, with a row of titles (see `policy_table`).
  """
  measures = drift["measures"] if drift else {}
  flagged = [name.replace("_", " ") for name, found in measures.items() if found["flagged"]]
  cards = [_card(*judge, flagged) for judge in summary.items()]
  body = [
    _header(title, about),
    f'<section class="cards">{"".join(cards)}</section><p class="note">{_READING}</p>',
    f"<section><h2>All policies</h2>{render_table(policies)}</section>" if policies else "",
    *(_judge(name, groups, scores[name]) for name, groups in summary.items()),
    _witnesses(witnesses) if witnesses else "",
    _drift(drift) if drift else "",
    _fidelity(fidelity) if fidelity else "",
    render(gallery) if gallery else "",
  ]
  write_text(path, render_page(title, body))


def _header(title: str, about: Mapping[str, Any]) -> str:
  """Renders the title and the list of facts."""
  facts = ""
  for name, fact in about.items():
    text = escape(str(fact))
    if name == "command":  # lines break only between words
      text = f"<code>{' '.join(f'<span>{word}</span>' for word in text.split(' '))}</code>"
    facts += f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{text}</dd>"
  return f"<header><h1>{escape(title)}</h1><dl>{facts}</dl></header>"


def _card(judge: str, groups: Mapping[str, Mapping[str, Any]], flagged: Sequence[str]) -> str:
  """Renders the headline of a judge: WinRate over all prompts, as a number and on a scale.

  Args:
    flagged: names of the drift measures with a flag, which a preference does not show.
  """
  group = groups["all"]
  found = group["winrate/s1"]
  value, low, high = (show_typeset("winrate/s1", found[key]) for key in ("value", "low", "high"))
  gain = show_typeset("gain", group["gain"]["value"])
  if "gain_in_sd" in group:
    in_sd = show_typeset("gain_in_sd", group["gain_in_sd"]["value"])
    gain += f", {in_sd} standard deviations within a prompt"
  warning = best_of_warning(groups)
  warning = f'<p class="warning">{escape(typeset(warning))}</p>' if warning else ""
  if flagged:
    warning += f'<p class="warning">Drift is flagged: {escape(", ".join(flagged))}</p>'
  left, width = 100 * found["low"], 100 * (found["high"] - found["low"])
  return (
    f'<article class="card"><h2>Judge: {escape(judge)}</h2><p class="rate">{value}</p>'
    f'<div class="scale"><i style="left:{left:.2f}%;width:{width:.2f}%"></i>'
    f'<b style="left:{100 * found["value"]:.2f}%"></b></div>'
    '<p class="ticks"><span>0<small>baseline always wins</small></span><span>½</span>'
    "<span>1<small>policy always wins</small></span></p>"
    f"<p>WinRate over {group['prompts']} prompts, one sample each, of different seeds; 95 % "
    f"interval {low} to {high}. Gain {gain}. <strong>{verdict(group)}</strong></p>{warning}"
    "</article>"
  )


def _judge(judge: str, groups: Mapping[str, Mapping[str, Any]], scores: Scores) -> str:
  """Renders the table of a judge, and the histograms of scores and gains."""
  columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in groups)
  counts = "".join(f"<td>{_count(group)}</td>" for group in groups.values())
  rows = [f'<tr><th scope="row">prompts</th>{counts}</tr>']
  for statistic in (name for name in LABELS if name in groups["all"]):
    cells = "".join(f"<td>{_interval(statistic, group)}</td>" for group in groups.values())
    row = ' class="reference"' if statistic.startswith("baseline/") else ""
    rows.append(f'<tr{row}><th scope="row">{LABELS[statistic]}</th>{cells}</tr>')
  return (
    f"<section><h2>Judge: {escape(judge)}</h2>"
    f'<div class="scroll" tabindex="0"><table><thead><tr><td></td>{columns}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div>"
    f'<div class="figures">{histograms(scores)}</div></section>'
  )


def _count(group: Mapping[str, Any]) -> str:
  """Renders the number of prompts, and the number of prompts that were left out."""
  left_out = group["left_out"]
  return f"{group['prompts']}<small>{left_out} left out</small>" if left_out else group["prompts"]


def _interval(statistic: str, group: Mapping[str, Any]) -> str:
  """Renders a statistic with its interval; a dash if the group does not have it."""
  if statistic not in group:
    return "–"
  value, low, high = (
    show_typeset(statistic, group[statistic][key]) for key in ("value", "low", "high")
  )
  return f"{value}<small>[{low}, {high}]</small>"


def _witnesses(table: Mapping[str, Any]) -> str:
  """Renders the distances from the true content, or why there are none."""
  rows = ""
  for name, found in table["measures"].items():
    value, low, high = (typeset(f"{found['change'][key]:+.4f}") for key in ("value", "low", "high"))
    label = f"{escape(name.replace('_', ' '))}<small>{escape(MEANINGS[name])}</small>"
    sides = "".join(f"<td>{found[side]:.4f}</td>" for side in ("baseline", "policy"))
    rows += (
      f'<tr><th scope="row">{label}</th>{sides}<td>{value}<small>[{low}, {high}]</small></td></tr>'
    )
  columns = "".join(f'<th scope="col">{name}</th>' for name in ("baseline", "policy", "change"))
  drawn = (
    f'<div class="scroll" tabindex="0"><table><thead><tr><td></td>{columns}</tr></thead>'
    f"<tbody>{rows}</tbody></table></div>"
    if rows
    else ""
  )
  return f'<section><h2>Witnesses</h2>{drawn}<p class="note">{escape(table["rule"])}</p></section>'


def _drift(table: Mapping[str, Any]) -> str:
  """Renders the table of drift measures with their flags."""
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
    '<section><h2>Drift</h2><div class="scroll" tabindex="0"><table>'
    f"<thead><tr><td></td>{columns}</tr></thead>"
    f'<tbody>{"".join(rows)}</tbody></table></div><p class="note">{escape(table["rule"])}</p>'
    "</section>"
  )


def _fidelity(table: Mapping[str, Any]) -> str:
  """Renders the table of the known pixels."""
  rows = [["", *FIDELITY_COLUMNS, "left out"], *fidelity_rows(table)]
  return (
    f"<section><h2>Known pixels</h2>{render_table(rows)}"
    f'<p class="note">{escape(table["rule"])}</p></section>'
  )


def _measured(key: str, number: float | None) -> str:
  """Renders a number of the drift table; a dash for None."""
  if number is None:
    return "–"
  return typeset(f"{number:+.4f}" if key == "change" else f"{number:.4f}")
