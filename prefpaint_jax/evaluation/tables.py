"""The numbers of an evaluation as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefpaint_jax.evaluation.winrate import best_of_warning, verdict
from prefpaint_jax.runtime.text import align_columns
from prefpaint_jax.web.report_page import typeset

SIMULATED = "true preference"  # the label of the simulated annotators as a judge

# Every statistic and its label, in the order of the tables.
LABELS = {
  "winrate/s1": "WinRate, one sample each",
  "winrate/s3": "WinRate, best of 3 against one",
  "winrate_each/s3": "WinRate, best of 3 each",
  "winrate/s10": "WinRate, best of 10 against one",
  "winrate_each/s10": "WinRate, best of 10 each",
  "winrate_paired/s1": "share of seeds with a higher reward",
  "gain": "gain in reward",
  "gain_in_sd": "gain in standard deviations",
  "gain_best/s3": "gain in reward, best of 3 each",
  "gain_best/s10": "gain in reward, best of 10 each",
  "reward/mean": "reward",
  "baseline/reward/mean": "baseline's reward",
  "reward/var": "variance within a prompt",
  "baseline/reward/var": "baseline's variance within a prompt",
}


def judge_title(label: str) -> str:
  """Returns the name of a judge for readers, which differs from the names of policies."""
  return SIMULATED if label == SIMULATED else f"reward {label}"


def full_name(name: str, iteration: int | None) -> str:
  """Returns the name of a policy for readers."""
  if iteration is not None:
    return f"{name} (iteration {iteration})"
  return "mini (embedded)" if name == "mini" else name


def describe(name: str, group: Mapping[str, Any]) -> str:
  """Returns one line with WinRate, gain and means of a group (see `winrate.estimate`)."""
  if not group["prompts"]:
    return f"{name:<18} WinRate –: none of {group['left_out']} prompts has finite scores"
  value = lambda statistic: show(statistic, group[statistic]["value"])
  low, high = (show("winrate/s1", group["winrate/s1"][key]) for key in ("low", "high"))
  in_sd = f" ({value('gain_in_sd')} SD)" if "gain_in_sd" in group else ""
  left_out = f"   {group['left_out']} left out" if group["left_out"] else ""
  return (
    f"{name:<18} WinRate {value('winrate/s1')} [{low}, {high}]   gain {value('gain')}{in_sd}   "
    f"mean {group['reward/mean']['value']:+.3f}, base {group['baseline/reward/mean']['value']:+.3f}"
    f"{left_out}"
  )


def show(statistic: str, number: float) -> str:
  """Formats a number of a statistic; a gain always has its sign."""
  if statistic == "gain_in_sd":
    return f"{number:+.2f}"
  if statistic.startswith("gain"):
    return f"{number:+.3f}"
  return f"{number:#.3g}" if statistic.endswith("/var") else f"{number:.3f}"


def describe_table(judge: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
  """Formats one judge's part of a summary as lines: statistics by kind of prompt.

  Args:
    judge: the title of the table.
    groups: `winrate.summarise(...)[judge]`.
  """
  rows = [[judge, *groups], ["prompts", *(str(group["prompts"]) for group in groups.values())]]
  for statistic in (name for name in LABELS if name in groups["all"]):
    cells = [
      "{} [{}, {}]".format(*(show(statistic, group[statistic][key]) for key in _INTERVAL))
      if statistic in group
      else "–"
      for group in groups.values()
    ]
    rows.append([LABELS[statistic], *cells])
  return "\n".join(align_columns(rows))


def describe_evaluation(
  judges: Mapping[str, Mapping[str, Mapping[str, Any]]],
  witnesses: Mapping[str, Any],
  drift: Mapping[str, Any],
  fidelity: Mapping[str, Any],
  policies: Sequence[Sequence[str]] = (),
) -> str:
  """Formats all tables of an evaluation, with the verdict and the warning of each judge.

  Args:
    judges: result of `winrate.summarise`.
    witnesses: result of `witnesses.compare`.
    drift: result of `drift.drift`.
    fidelity: result of `fidelity.compare`.
    policies: rows of the table of all policies (see `policy_table`); none: no table.
  """
  parts = []
  for judge, groups in judges.items():
    lines = [describe_table(judge, groups), f"{judge}: {verdict(groups['all'])}"]
    if warning := best_of_warning(groups):
      lines.append(f"warning: {warning}")
    parts.append("\n".join(lines))
  parts += [describe_witnesses(witnesses), describe_drift(drift), describe_fidelity(fidelity)]
  parts += ["\n".join(align_columns(policies))] if policies else []
  return "\n\n".join(parts)


def describe_drift(table: Mapping[str, Any]) -> str:
  """Formats the result of `drift.drift` as lines."""
  rows = [["drift", "baseline", "policy", "change", "seed variation", "spread", ""]]
  for name, found in table["measures"].items():
    numbers = [f"{found[key]:.4f}" for key in ("baseline", "policy")]
    numbers.append(f"{found['change']:+.4f}")
    numbers += [f"{found[key]:.4f}" for key in ("seed_variation", "spread")]
    rows.append([name, *numbers, "flagged" if found["flagged"] else ""])
  return "\n".join(align_columns(rows)) + "\n" + table["rule"]


def describe_witnesses(table: Mapping[str, Any]) -> str:
  """Formats the result of `witnesses.compare` as lines."""
  rows = [["witness", "baseline", "policy", "change"]]
  for name, found in table["measures"].items():
    value, low, high = (f"{found['change'][key]:+.4f}" for key in _INTERVAL)
    sides = [f"{found[side]:.4f}" for side in ("baseline", "policy")]
    rows.append([name, *sides, f"{value} [{low}, {high}]"])
  return "\n".join(align_columns(rows)) + "\n" + table["rule"]


def describe_fidelity(table: Mapping[str, Any]) -> str:
  """Formats the result of `fidelity.compare` as lines."""
  rows = [["known pixels", *FIDELITY_COLUMNS, "left out"], *fidelity_rows(table)]
  return "\n".join(align_columns(rows)) + "\n" + table["rule"]


FIDELITY_COLUMNS = ("baseline", "policy", "change")


def fidelity_rows(table: Mapping[str, Any]) -> list[list[str]]:
  """Formats the measures of `fidelity.compare`: name, three intervals, prompts that are left out.

  The intervals are dashes if no prompt has a finite measure.
  """
  rows = []
  for name, found in table["measures"].items():
    cells = []
    for column in FIDELITY_COLUMNS:
      numbers = [f"{found[column][key]:.4g}" for key in _INTERVAL] if column in found else []
      cells.append("{} [{}, {}]".format(*numbers) if numbers else "–")
    rows.append([name.upper(), *cells, str(found["left_out"] or "")])
  return rows


_INTERVAL = ("value", "low", "high")


def show_typeset(statistic: str, number: float) -> str:
  """Formats a number like `show`, with a typographic minus sign."""
  return typeset(show(statistic, number))
