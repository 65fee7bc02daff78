"""The report on annotators: label_report.json, and label_report.html in the style of evaluations.

`statistics` computes the numbers.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from prefpaint_jax.data.annotation_files import read_candidates, read_prompts
from prefpaint_jax.data.answers import ANNOTATIONS, PAIRS, has_pairs, read_answers
from prefpaint_jax.data.examples import CRITERIA
from prefpaint_jax.labelling.statistics import ENOUGH, summarise
from prefpaint_jax.runtime.files import check_is_folder, write_json, write_text
from prefpaint_jax.web.report_page import render_page, render_table, typeset

JSON, HTML = "label_report.json", "label_report.html"
_READING = {
  "scores": (
    "Krippendorff's alpha is 1 if all annotators give a candidate the same score, and 0 if they "
    "agree no more than by chance. Each candidate that two or more have scored counts. The "
    "combined score weights the criteria by "
    + ", ".join(f"{name} {weight:g}" for name, weight in CRITERIA.items())
    + "."
  ),
  "pairs": (
    "Krippendorff's alpha (nominal) is the share of equal choices above chance: 1 if all "
    "annotators choose the same in each pair, and 0 if they agree no more than by chance. Each "
    "pair that two or more have answered counts, in both orders."
  ),
}
_COLUMNS = (
  "Correlations with the others compare with the mean of all other annotators of the same "
  "candidate or pair. Repeats compare the second answer to an item with the first: the mean "
  "difference, in brackets the difference between two answers at random, and the correlation."
)
_WIDTH, _HEIGHT, _FOOT = 480, 190, 26  # of a histogram and its labels, in pixels


def write(folder: Path) -> dict[str, Any]:
  """Writes label_report.json and label_report.html to a folder of answers.

  Returns:
    The content of label_report.json, see `statistics.summarise`.

  Raises:
    ValueError: the folder has no answers, or an error. The message has the first error.
  """
  folder = Path(folder)
  check_is_folder(folder, "the --workdir of prefpaint_jax.collect")
  pairs = has_pairs(folder)
  file = folder / (PAIRS if pairs else ANNOTATIONS)
  if not file.is_file():
    raise ValueError(f"{file}: no such file; score the candidates with prefpaint_jax.label")
  errors: list[str] = []
  prompts = read_prompts(folder, errors)
  candidates = read_candidates(folder, prompts, errors)
  answers = read_answers(folder, prompts, candidates, errors)
  if errors:
    more = f" (and {len(errors) - 1} more errors)" if len(errors) > 1 else ""
    raise ValueError(f"{folder}/{errors[0]}; correct the file{more}")
  if not answers:
    raise ValueError(f"{file} has no answers; score the candidates with prefpaint_jax.label")
  names: dict[str, list[str]] = defaultdict(list)
  for name, candidate in candidates.items():
    names[candidate.image_id].append(name)
  found = summarise(answers, names, pairs)
  write_json(folder / JSON, found)
  write_text(folder / HTML, render(found, str(folder)))
  return found


def render(found: Mapping[str, Any], folder: str) -> str:
  """Renders the page of a result of `statistics.summarise`."""
  flagged = {name: one["flags"] for name, one in found["annotators"].items() if one["flags"]}
  return render_page(
    "Annotators",
    [
      _header(found, folder),
      f'<section class="cards">{_agreement_card(found)}{_flags_card(found, flagged)}</section>'
      f'<p class="note">{escape(_READING[found["mode"]])}</p>',
      _annotators(found),
      _choices(found) if found["mode"] == "pairs" else _scores(found),
      _coverage(found),
    ],
  )


def _header(found: Mapping[str, Any], folder: str) -> str:
  """Renders the title and the numbers of answers."""
  facts = {
    "folder": folder,
    "answers": f"{found['answers']}, and {found['repeats']} repeats"
    + (" (comparisons of two)" if found["mode"] == "pairs" else ""),
    "annotators": len(found["annotators"]),
  }
  rows = "".join(f"<dt>{name}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items())
  return f"<header><h1>Annotators</h1><dl>{rows}</dl></header>"


def _agreement_card(found: Mapping[str, Any]) -> str:
  """Renders alpha as the headline, and alpha without the flagged annotators."""
  pairs = found["mode"] == "pairs"
  agreement, unflagged = found["agreement"], found["agreement_unflagged"]
  key = "pairs" if pairs else "combined"
  if agreement[key] is None:
    about = "unknown: no candidate or pair has two annotators, or all answers are the same"
  elif pairs:
    equal, chance = (_share(agreement[name]) for name in ("equal", "by_chance"))
    about = f"of the choices. {equal} of them are equal; by chance, {chance} would be."
  else:
    about = "of the combined score; " + ", ".join(f"{x} {_number(agreement[x])}" for x in CRITERIA)
  return (
    f'<article class="card"><h2>Agreement</h2><p class="rate">{_number(agreement[key])}</p>'
    f"<p>Krippendorff's alpha {about}</p><p>Without annotators who have a flag: "
    f"{_number(unflagged[key])}</p></article>"
  )


def _flags_card(found: Mapping[str, Any], flagged: Mapping[str, Sequence[str]]) -> str:
  """Renders the number of annotators with a flag, and their names."""
  lines = "".join(
    f'<p class="warning">{escape(name)}: {escape(", ".join(flags))}</p>'
    for name, flags in flagged.items()
  )
  lines = lines or "<p>No annotator has a flag.</p>"
  return (
    f'<article class="card"><h2>Flags</h2><p class="rate">{len(flagged)} of '
    f"{len(found['annotators'])}</p>{lines}</article>"
  )


def _annotators(found: Mapping[str, Any]) -> str:
  """Renders time, agreement and consistency of each annotator, and the rules of the flags."""
  rows = [["", "flags", "answers", "seconds", "others: correlation"]]
  rows[0] += ["repeats: difference", "repeats: correlation"]
  for name, one in found["annotators"].items():
    others, own = one["others"], one["consistency"]
    row = [name, ", ".join(one["flags"]) or _unjudged(one), str(one["answers"])]
    row.append(f"{_number(one['seconds'], 1)} [{_number(one['seconds_per_candidate'], 1)} each]")
    row.append(f"{_number(others['correlation'])} [of {others['values']}]")
    row.append(f"{_number(own['difference'])} [{_number(own['by_chance'])} by chance]")
    row.append(f"{_number(own['correlation'])} [of {own['values']}]")
    rows.append(row)
  rules = "".join(
    f"<dt>{escape(name)}</dt><dd>{escape(rule)}</dd>" for name, rule in found["rules"].items()
  )
  return (
    f"<section><h2>Annotators</h2>{render_table(rows)}"
    f'<p class="note">{_COLUMNS}</p><h3>Flags</h3><dl class="note">{rules}</dl>'
    '<p class="note">A flag is a reason to look at the answers. It leaves out none of them.</p>'
    "</section>"
  )


def _unjudged(one: Mapping[str, Any]) -> str:
  """Returns a note if the annotator has too few answers to be found random."""
  most = max(one["others"]["values"], one["consistency"]["values"])
  return "–" if most >= ENOUGH else "too few to say"


def _choices(found: Mapping[str, Any]) -> str:
  """Renders the choices of each annotator in pairs."""
  rows = [["", "equal", "left side", "cycles"]]
  for name, one in found["annotators"].items():
    left = f"{_share(one['left'])} [of {one['sided']}]"
    rows.append([name, _share(one["equal"]), left, f"{one['cycles']} [of {one['triples']}]"])
  return (
    f'<section><h2>Choices</h2>{render_table(rows)}<p class="note">The share of the left side is '
    "over decided pairs whose line says which candidate was on the left. Cycles are counted over "
    "three candidates with three decided pairs: the first is better than the second, the second "
    "than the third, and the third than the first. Of choices at random, a quarter are cycles."
    "</p></section>"
  )


def _scores(found: Mapping[str, Any]) -> str:
  """Renders the scores of each annotator, and draws them by criterion and by annotator."""
  rows = [["", *(f"{name}: mean" for name in CRITERIA), "combined: standard deviation"]]
  for name, one in found["annotators"].items():
    means, spreads = one.get("mean", {}), one.get("spreads", {})
    cells = [f"{_number(means.get(x))} [± {_number(spreads.get(x))}]" for x in CRITERIA]
    rows.append([name, *cells, _number(one["spread"])])
  draw = lambda name, counts: (
    f"<figure>{_bars(counts)}<figcaption>{escape(name)}: {sum(counts)} scores</figcaption></figure>"
  )
  criteria = "".join(draw(name, counts) for name, counts in found["histograms"].items())
  people = "".join(
    draw(name, one["histogram"]) for name, one in found["annotators"].items() if "histogram" in one
  )
  return (
    f"<section><h2>Scores</h2>{render_table(rows)}"
    f'<h3>Scores of all annotators</h3><div class="figures">{criteria}</div>'
    f'<h3>Overall scores of each annotator</h3><div class="figures">{people}</div></section>'
  )


def _coverage(found: Mapping[str, Any]) -> str:
  """Renders how many prompts, and pairs, have how many annotators."""
  kinds = found["annotators_of"]
  numbers = sorted({int(number) for counts in kinds.values() for number in counts})
  rows = [["", *(f"{number} annotator{'s' * (number != 1)}" for number in numbers)]]
  for kind, counts in kinds.items():
    rows.append([kind, *(str(counts.get(str(number), 0)) for number in numbers)])
  note = "pairs" if found["mode"] == "pairs" else "candidates"
  return (
    f"<section><h2>Annotators of each prompt</h2>{render_table(rows)}"
    f'<p class="note">The number of a prompt is the smallest of its {note}. Repeats do not count.'
    "</p></section>"
  )


def _bars(counts: Sequence[int]) -> str:
  """Draws the share of each score, 0 to 7, as SVG."""
  floor, width, total = _HEIGHT - _FOOT, _WIDTH / len(counts), max(1, sum(counts))
  peak = max(1, *counts)
  parts = []
  for score, count in enumerate(counts):
    left, height = score * width, count / peak * (floor - 22)
    middle = left + width / 2
    parts.append(
      f'<path class="policy" d="M{left + 4:.1f} {floor}V{floor - height:.1f}'
      f'H{left + width - 4:.1f}V{floor}Z"/><text x="{middle:.1f}" y="{_HEIGHT - 8}">{score}</text>'
    )
    if count:
      share = f"{100 * count / total:.0f} %"
      parts.append(f'<text x="{middle:.1f}" y="{floor - height - 6:.1f}">{share}</text>')
  parts.append(f'<path class="axis" d="M0 {floor}H{_WIDTH}"/>')
  view = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="histogram of scores"'
  return f"<svg {view}>{''.join(parts)}</svg>"


def _number(number: float | None, digits: int = 2) -> str:
  """Formats a number; a dash for None."""
  return "–" if number is None else typeset(f"{number:.{digits}f}")


def _share(share: float | None) -> str:
  return "–" if share is None else f"{100 * share:.0f} %"
