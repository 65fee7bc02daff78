"""One table of all policies of an evaluation, also in LaTeX.

The columns are those of BrushNet's table, in its order, as far as they were measured. Other judges
follow the first three.
"""
# Shapes: N prompts, S samples of each.

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prefpaint_jax.evaluation.batches import of_side
from prefpaint_jax.evaluation.fidelity import counted

# Judges that BrushNet's table has, and its names of them, before and after the fidelity.
FIRST = {"image-reward": "Image Reward", "hps-v2.1": "HPS V2.1", "aesthetic-v1": "Aesthetic Score"}
LAST = {"clip-score": "CLIP Similarity"}
FIDELITY = {"psnr": "PSNR", "lpips": "LPIPS", "mse": "MSE"}
_NONE = "–"


def make_table(
  results: Mapping[str, np.ndarray], policies: Mapping[str, str], protocol: str = ""
) -> list[list[str]]:
  """Makes the rows of the table, with a row of titles: means over prompts.

  Prompts with a number that is not finite are left out of its mean.

  Args:
    results: results of an evaluation by name (see `examination.examine`).
    policies: {side: name of its policy}, in the order of the rows.
    protocol: "" or "brushnet", which counts the first sample of each prompt.
  """
  scores = of_side(results, next(iter(policies)), "score")
  measures = of_side(results, next(iter(policies)), "fidelity")
  columns = {f"score/{name}": title for name, title in FIRST.items() if name in scores}
  columns |= {f"score/{name}": name for name in scores if name not in FIRST | LAST}
  columns |= {f"fidelity/{name}": title for name, title in FIDELITY.items() if name in measures}
  columns |= {f"score/{name}": title for name, title in LAST.items() if name in scores}
  rows = [["policy", *columns.values()]]
  for side, name in policies.items():
    rows.append([name, *(_mean(results[f"{side}/{column}"], protocol) for column in columns)])
  return rows


def add_win_rates(
  rows: Sequence[Sequence[str]], summaries: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
  """Adds columns with the WinRates against the baseline, which is the first row.

  Args:
    rows: result of `make_table`, with a row of titles.
    summaries: results of `winrate.summarise`, in the order of the other rows.
  """
  titles, baseline, *others = rows
  table = [[*titles, *(f"WinRate {judge}" for judge in summaries[0])]]
  table.append([*baseline, *[_NONE] * len(summaries[0])])
  for row, judges in zip(others, summaries, strict=True):
    found = (groups["all"]["winrate/s1"] for groups in judges.values())
    table.append([*row, *("{value:.3f} [{low:.3f}, {high:.3f}]".format(**one) for one in found)])
  return table


def to_latex(rows: Sequence[Sequence[str]]) -> str:
  """Formats rows as a LaTeX tabular with the rules of the package booktabs."""
  titles, *others = ([_escape(cell) for cell in row] for row in rows)
  lines = [
    "% needs \\usepackage{booktabs}",
    f"\\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}",
    "\\toprule",
    f"{' & '.join(titles)} \\\\",
    "\\midrule",
    *(f"{' & '.join(row)} \\\\" for row in others),
    "\\bottomrule",
    "\\end{tabular}",
  ]
  return "\n".join(lines) + "\n"


def _mean(values: np.ndarray, protocol: str) -> str:
  """Formats the mean over prompts of the samples that count [N, S]."""
  means = counted(values, protocol).mean(1)
  means = means[np.isfinite(means)]
  return f"{means.mean():.4g}" if len(means) else _NONE


_SPECIAL = {
  "\\": "\\textbackslash{}",
  "~": "\\textasciitilde{}",
  "^": "\\textasciicircum{}",
  _NONE: "--",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def _escape(text: str) -> str:
  """Replaces the characters that LaTeX reads as commands; a negative number gets a minus sign."""
  if re.fullmatch(r"-[\d.e+-]+", text):
    return f"${text}$"
  return "".join(_SPECIAL.get(character, character) for character in text)
