"""The table of all policies: columns, means, WinRates and LaTeX."""

import numpy as np

from prefpaint_jax.evaluation import policy_table, tables

SCORES = ("clip-score", "my_judge", "aesthetic-v1", "hps-v2.1", "image-reward")


def results(*sides, lpips=True):
  rng = np.random.default_rng(0)
  names = [f"score/{name}" for name in SCORES] + ["fidelity/mse", "fidelity/psnr"]
  names += ["fidelity/lpips"] if lpips else []
  return {f"{side}/{name}": rng.standard_normal((6, 3)) for side in sides for name in names}


def test_columns_are_in_the_order_of_brushnet_and_cells_are_means():
  found = results("baseline", "policy", "rival0")
  names = {"baseline": "base", "policy": "a_1", "rival0": "b&c"}
  titles, *rows = policy_table.make_table(found, names)
  assert titles[1:4] == ["Image Reward", "HPS V2.1", "Aesthetic Score"]
  assert titles[4:] == ["my_judge", "PSNR", "LPIPS", "MSE", "CLIP Similarity"]
  assert [row[0] for row in rows] == list(names.values())
  assert rows[1][1] == f"{found['policy/score/image-reward'].mean():.4g}"
  assert rows[2][7] == f"{found['rival0/fidelity/mse'].mean():.4g}"
  first = policy_table.make_table(found, names, "brushnet")[3][8]
  assert first == f"{found['rival0/score/clip-score'][:, 0].mean():.4g}"
  assert "LPIPS" not in policy_table.make_table(results("policy", lpips=False), {"policy": ""})[0]


def test_numbers_that_are_not_finite_are_left_out():
  found = results("policy")
  found["policy/fidelity/psnr"][:] = np.inf
  found["policy/score/hps-v2.1"][2, 1] = np.nan
  row = policy_table.make_table(found, {"policy": "p"})[1]
  assert row[5] == "–"
  assert row[2] == f"{np.delete(found['policy/score/hps-v2.1'], 2, 0).mean():.4g}"


def test_latex_escapes_names_and_has_a_row_for_each_policy():
  rows = [["policy", "a_b"], ["50% \\~ {x}", "-1.5"], ["b&c", "–"]]
  assert policy_table.to_latex(rows).splitlines() == [
    r"% needs \usepackage{booktabs}",
    r"\begin{tabular}{lr}",
    r"\toprule",
    r"policy & a\_b \\",
    r"\midrule",
    r"50\% \textbackslash{}\textasciitilde{} \{x\} & $-1.5$ \\",
    r"b\&c & -- \\",
    r"\bottomrule",
    r"\end{tabular}",
  ]


def test_win_rates_follow_the_means_and_the_baseline_has_none():
  rows = [["policy", "PSNR"], ["base", "1"], ["a", "2"], ["b", "3"]]
  of = lambda value: {"j": {"all": {"winrate/s1": {"value": value, "low": 0.25, "high": 0.75}}}}
  assert policy_table.add_win_rates(rows, [of(0.5), of(0.625)]) == [
    ["policy", "PSNR", "WinRate j"],
    ["base", "1", "–"],
    ["a", "2", "0.500 [0.250, 0.750]"],
    ["b", "3", "0.625 [0.250, 0.750]"],
  ]


def test_a_measure_of_no_finite_prompt_is_shown_as_dashes():
  table = {"rule": "rule", "measures": {"psnr": {"prompts": 0, "left_out": 3}}}
  assert tables.describe_fidelity(table).splitlines()[1].split() == ["PSNR", "–", "–", "–", "3"]
