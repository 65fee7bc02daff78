"""Tests that the drawn curves and tables equal the metrics in the files."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from prefpaint_jax import plot
from prefpaint_jax.evaluation.curves import (
  curve,
  group_runs,
  load_run,
  reached_at,
  single_runs,
  table,
)
from prefpaint_jax.evaluation.panels import draw
from prefpaint_jax.runtime.metrics import MetricsWriter

ITERATIONS = 12


def numbers(seed, iterations=ITERATIONS):
  """Returns the metrics of each iteration, with held-out metrics in every fourth."""
  rng = np.random.default_rng(seed)
  lines = []
  for iteration in range(1, iterations + 1):
    lines.append(
      {
        "reward/mean": rng.standard_normal(),
        "reward/std": 0.5 + rng.random(),
        "reward/max": 3.0,
        "ppo/approx_kl": 1e-6 * (1 + rng.random()),
        "ppo/clip_fraction": rng.random(),
        "time/images_per_s": 50 * rng.random(),
      }
    )
    if iteration % 4 == 0:
      lines[-1] |= {"held_out/winrate": rng.random(), "held_out/box/reward": rng.random()}
  return lines


def write_run(folder, lines=None, seed=0, norm="none", **fields):
  """Writes the workdir of a run, and returns its lines of metrics."""
  lines = numbers(seed) if lines is None else lines
  folder.mkdir(parents=True)
  config = {"seed": seed, "trust": {"norm": norm, "k": 0.05}, "sample_every": 10} | fields
  (folder / "config.json").write_text(json.dumps(config))
  writer = MetricsWriter(folder)
  for iteration, line in enumerate(lines, start=1):
    writer.write(iteration, line)
  writer.close()
  return lines


def column(lines, key):
  return np.array([line.get(key, math.nan) for line in lines])


def panels(figure):
  return {axes.get_title(loc="left"): axes for axes in figure.axes}


def curves(axes):
  """Returns {label: (iterations, values)} of a panel."""
  return {
    line.get_label(): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
    for line in axes.get_lines()
    if not line.get_label().startswith("_")
  }


def draw_single(*folders, smooth=1):
  return draw(single_runs([load_run(folder) for folder in folders]), smooth)


def test_curves_equal_the_numbers_in_the_file(tmp_path):
  lines = write_run(tmp_path / "run")
  drawn = panels(draw_single(tmp_path / "run"))
  every = np.arange(1, ITERATIONS + 1)
  for title, key, iterations in (
    ("reward", "reward/mean", every),
    ("approximate KL of the updates", "ppo/approx_kl", every),
    ("clip fraction", "ppo/clip_fraction", every),
    ("images per second", "time/images_per_s", every),
    ("held-out WinRate", "held_out/winrate", [4, 8, 12]),
    ("held-out box reward", "held_out/box/reward", [4, 8, 12]),
  ):
    (found,) = curves(drawn.pop(title)).values()
    np.testing.assert_array_equal(found[0], iterations)
    np.testing.assert_array_equal(found[1], column(lines, key)[np.array(iterations) - 1])
  assert not drawn  # no panel for trust weight and loss, which are not in the file


def test_only_metrics_that_match_the_expression_are_drawn(tmp_path):
  write_run(tmp_path / "run")
  groups = single_runs([load_run(tmp_path / "run")])
  assert set(panels(draw(groups, only="^reward|/box/"))) == {"reward", "held-out box reward"}
  with pytest.raises(ValueError, match="nothing to draw"):
    draw(groups, only="nonsense")


def test_shade_of_a_run_is_its_standard_deviation(tmp_path):
  lines = write_run(tmp_path / "run")
  figure = draw_single(tmp_path / "run")
  (shade,) = panels(figure)["reward"].collections
  mean, std = column(lines, "reward/mean"), column(lines, "reward/std")
  corners = {tuple(corner) for corner in shade.get_paths()[0].vertices}
  assert corners == {
    (i, y)
    for i in range(1, ITERATIONS + 1)
    for y in (mean[i - 1] - std[i - 1], (mean + std)[i - 1])
  }
  assert not panels(figure)["clip fraction"].collections
  assert [text.get_text() for text in figure.legends[0].get_texts()] == [
    "run",
    "base policy",
    "± standard deviation",
  ]


def test_shade_of_a_held_out_metric_is_its_interval(tmp_path):
  rates = {4: (0.5, 0.4, 0.7), 8: (0.6, 0.5, 0.65)}
  lines = [{"reward/mean": float(i), "reward/std": 1.0} for i in range(8)]
  for iteration, values in rates.items():
    names = (f"held_out/reward_winrate{part}" for part in ("", "/low", "/high"))
    lines[iteration - 1] |= dict(zip(names, values, strict=True))
  write_run(tmp_path / "run", lines)
  figure = draw_single(tmp_path / "run")
  assert list(panels(figure)) == ["reward", "held-out reward WinRate"]
  (shade,) = panels(figure)["held-out reward WinRate"].collections
  corners = {tuple(corner) for corner in shade.get_paths()[0].vertices}
  assert corners == {(i, end) for i, (_, *ends) in rates.items() for end in ends}
  assert [text.get_text() for text in figure.legends[0].get_texts()] == [
    "run",
    "base policy",
    "± standard deviation, 95 % interval (held-out)",
  ]


def test_panels_have_the_level_of_the_base(tmp_path):
  changes = {"held_out/reward_gain": 0.5, "held_out/drift/seam": 1.0, "held_out/box/winrate": 0.7}
  begin = {"iteration": 0} | dict.fromkeys(changes, 0.0)
  written = [{"held_out/reward": 2.0, "held_out/reward/base": 1.25} | changes]
  write_run(tmp_path / "new", written)
  write_run(tmp_path / "old", [{"held_out/reward": 2.0} | changes])
  with (tmp_path / "old" / "metrics.jsonl").open("a") as file:
    file.write(json.dumps(begin | {"held_out/reward": 1.5}) + "\n")
  for name, level in (("new", 1.25), ("old", 1.5)):
    drawn = panels(draw_single(tmp_path / name))
    assert set(drawn) == {
      "held-out reward", "held-out reward gain", "held-out change of seam", "held-out box WinRate",
    }  # fmt: skip
    levels = {
      title: [line.get_ydata()[0] for line in axes.get_lines() if line.get_label()[0] == "_"]
      for title, axes in drawn.items()
    }
    assert levels == {
      "held-out reward": [level],
      "held-out reward gain": [0.0],
      "held-out change of seam": [0.0],
      "held-out box WinRate": [0.5],
    }


def test_a_constant_metric_has_a_panel_only_if_every_metric_is_constant(tmp_path):
  lines = [{"reward/mean": float(i), "trust/mean": 1.0, "train/loss": 2.0} for i in range(3)]
  write_run(tmp_path / "run", lines)
  run = [load_run(tmp_path / "run")]
  assert list(panels(draw(single_runs(run)))) == ["reward"]
  assert list(panels(draw(single_runs(run), only="trust"))) == ["trust weight γ"]
  write_run(tmp_path / "other", [line | {"trust/mean": 1.5} for line in lines], norm="constant")
  groups = single_runs([*run, load_run(tmp_path / "other")])
  assert list(panels(draw(groups))) == ["reward", "trust weight γ"]


def test_nulls_leave_gaps_and_isolated_numbers_have_markers(tmp_path):
  lines = numbers(0)
  for missing in (4, 6):
    lines[missing]["reward/mean"] = math.nan
  write_run(tmp_path / "run", lines)
  (line,) = panels(draw_single(tmp_path / "run"))["reward"].get_lines()
  values = line.get_ydata()
  assert np.flatnonzero(np.isnan(values)).tolist() == [4, 6]
  np.testing.assert_array_equal(values, column(lines, "reward/mean"))
  assert line.get_marker() == "o" and np.flatnonzero(line.get_markevery()).tolist() == [5]


def test_a_run_has_one_colour_in_all_panels_and_the_figure_one_legend(tmp_path):
  names = [f"{i}" for i in range(9)]
  for i, name in enumerate(names):
    write_run(tmp_path / name, seed=i)
  figure = draw_single(*(tmp_path / name for name in names))
  looks = [
    {
      line.get_label(): (to_hex(line.get_color()), line.get_linestyle())
      for line in axes.get_lines()
      if not line.get_label().startswith("_")
    }
    for axes in figure.axes
  ]
  assert all(look == looks[0] for look in looks)
  assert list(looks[0]) == [f"seed={i}" for i in range(9)]
  assert len(set(looks[0].values())) == 9
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == [*looks[0], "base policy"]
  assert all(axes.get_legend() is None for axes in figure.axes)


def test_runs_are_labelled_by_the_fields_in_which_they_differ(tmp_path):
  write_run(tmp_path / "a", norm="none", bound="")
  write_run(tmp_path / "b", norm="mahalanobis", seed=1, bound="file", sample_every=0)
  write_run(tmp_path / "c", norm="none", skip_steps=[0, 2])
  write_run(tmp_path / "new" / "a", norm="none", bound="")
  run = {name: load_run(tmp_path / name) for name in ("a", "b", "c", "new/a")}
  labels = lambda *names: [group.label for group in single_runs([run[n] for n in names])]
  assert labels("a") == ["a"]
  assert labels("a", "b") == [
    'bound="", trust.norm=none, seed=0',
    "bound=file, trust.norm=mahalanobis, seed=1",
  ]
  assert labels("a", "c") == ['bound="", no skip_steps', "no bound, skip_steps=[0, 2]"]
  same = [str(tmp_path / "a"), str(tmp_path / "new" / "a")]
  assert labels("a", "new/a") == same
  first, _, second = labels("a", "b", "new/a")
  assert [first, second] == [f'bound="", trust.norm=none, seed=0 ({name})' for name in same]


def test_runs_that_differ_in_seed_only_are_one_group(tmp_path):
  for norm in ("none", "mahalanobis"):
    for seed in range(3):
      write_run(tmp_path / f"{norm}{seed}", seed=seed, norm=norm, sample_every=seed)
  write_run(tmp_path / "lonely", norm="constant")
  runs = [load_run(folder) for folder in sorted(tmp_path.iterdir())]
  lonely, mahalanobis, none = group_runs(runs)
  assert lonely.label == "trust.norm=constant"
  assert mahalanobis.label == "trust.norm=mahalanobis (3 seeds)"
  assert none.label == "trust.norm=none (3 seeds)"
  assert [run.workdir.name for run in none.runs] == ["none0", "none1", "none2"]
  (alone,) = group_runs(none.runs)
  assert alone.label == "mean (3 seeds)"


def test_mean_over_seeds_is_nan_where_one_of_them_has_no_number(tmp_path):
  lines = [write_run(tmp_path / "0", seed=0), numbers(1), numbers(2, ITERATIONS - 2)]
  lines[1][4]["reward/mean"] = math.nan
  for seed in (1, 2):
    write_run(tmp_path / str(seed), lines[seed], seed=seed)
  groups = group_runs([load_run(tmp_path / str(seed)) for seed in range(3)])
  drawn = panels(draw(groups))
  common = ITERATIONS - 2
  stacked = np.stack([column(one[:common], "reward/mean") for one in lines])
  ((iterations, values),) = curves(drawn["reward"]).values()
  np.testing.assert_array_equal(iterations, np.arange(1, common + 1))
  np.testing.assert_allclose(values, stacked.mean(axis=0), rtol=1e-12)
  assert np.isnan(values[4]) and np.isfinite(np.delete(values, 4)).all()
  shade = curve(groups[0], "reward/mean")
  np.testing.assert_array_equal(shade.low, stacked.min(axis=0))
  np.testing.assert_array_equal(shade.high, stacked.max(axis=0))
  assert drawn["clip fraction"].collections  # metrics without a std have shades too
  ((iterations, values),) = curves(drawn["held-out WinRate"]).values()
  np.testing.assert_array_equal(iterations, [4, 8])
  expected = np.mean([[one[3]["held_out/winrate"], one[7]["held_out/winrate"]] for one in lines], 0)
  np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_moving_average_is_centred_and_named_on_the_axis(tmp_path):
  lines = numbers(0)
  lines[5]["reward/mean"] = math.nan
  write_run(tmp_path / "run", lines)
  drawn = panels(draw_single(tmp_path / "run", smooth=5))
  for title, key in (("reward", "reward/mean"), ("clip fraction", "ppo/clip_fraction")):
    values = column(lines, key)
    expected = [np.nanmean(values[max(0, i - 2) : i + 3]) for i in range(ITERATIONS)]
    expected = np.where(np.isnan(values), math.nan, expected)  # smoothing does not fill gaps
    ((_, found),) = curves(drawn[title]).values()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert drawn[title].get_ylabel() == "average of 5 iterations"
  ((_, found),) = curves(drawn["held-out WinRate"]).values()
  np.testing.assert_array_equal(found, column(lines, "held_out/winrate")[[3, 7, 11]])
  assert not drawn["held-out WinRate"].get_ylabel()


def test_moving_average_counts_iterations_not_lines(tmp_path):
  write_run(tmp_path / "run", [])
  written = {10: 1.0, 20: 3.0, 30: 8.0, 31: 2.0}
  text = "".join(f'{{"iteration": {i}, "train/loss": {x}}}\n' for i, x in written.items())
  (tmp_path / "run" / "metrics.jsonl").write_text(text)
  (group,) = single_runs([load_run(tmp_path / "run")])
  np.testing.assert_array_equal(curve(group, "train/loss", 5).values, [1, 3, 5, 5])
  np.testing.assert_allclose(curve(group, "train/loss", 21).values, [2, 4, 13 / 3, 5])


def test_incomplete_last_line_is_ignored_and_lines_of_one_iteration_are_joined(tmp_path):
  lines = write_run(tmp_path / "run")
  file = tmp_path / "run" / "metrics.jsonl"
  with file.open("a") as stream:
    stream.write(f'{{"iteration": {ITERATIONS}, "held_out/late": 0.5}}\n')
    stream.write(f'{{"iteration": {ITERATIONS + 1}, "reward/me')
  run = load_run(tmp_path / "run")
  assert run.iterations.tolist() == list(range(1, ITERATIONS + 1))
  np.testing.assert_array_equal(run.columns["reward/mean"], column(lines, "reward/mean"))
  assert (
    run.columns["held_out/late"][-1] == 0.5 and np.isnan(run.columns["held_out/late"][:-1]).all()
  )
  assert run.config["trust.norm"] == "none"


def test_metrics_with_the_name_of_an_earlier_version_are_drawn(tmp_path):
  write_run(tmp_path / "run", [{"images_per_s": 2.0}, {"time/images_per_s": 3.0}])
  ((_, values),) = curves(panels(draw_single(tmp_path / "run"))["images per second"]).values()
  np.testing.assert_array_equal(values, [2.0, 3.0])


def test_iteration_0_is_drawn_where_it_has_values_beside_the_level_of_the_base(tmp_path):
  write_run(tmp_path / "run", [{"reward/mean": 1.0, "held_out/reward_gain": 0.5}])
  with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
    stream.write('{"iteration": 0, "held_out/reward_gain": 0.0}\n')
  figure = draw(single_runs([load_run(tmp_path / "run")]))
  panels = {axes.get_title(loc="left"): axes.lines for axes in figure.axes}
  drawn, level = sorted(panels["held-out reward gain"], key=lambda line: line.get_label()[0] == "_")
  np.testing.assert_array_equal(drawn.get_xydata(), [[0, 0], [1, 0.5]])
  np.testing.assert_array_equal(level.get_ydata(), [0, 0])
  (reward,) = panels["reward"]
  assert np.nanmax(reward.get_ydata()) == 1.0 and np.isnan(reward.get_ydata()[0])


def test_axis_of_kl_is_logarithmic_unless_a_value_is_zero(tmp_path):
  lines = write_run(tmp_path / "positive")
  lines[3]["ppo/approx_kl"] = 0.0
  write_run(tmp_path / "zero", lines)
  title = "approximate KL of the updates"
  assert panels(draw_single(tmp_path / "positive"))[title].get_yscale() == "log"
  assert panels(draw_single(tmp_path / "zero"))[title].get_yscale() == "linear"


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda run: None, "nowhere: no such folder; give the --workdir of a run"),
    (lambda run: run.mkdir(), "no config.json; give the --workdir of a run"),
    (
      lambda run: write_run(run, []),
      "no metrics.jsonl; wait until the run has finished an iteration",
    ),
    (lambda run: (write_run(run), (run / "metrics.jsonl").write_text("")), "no complete line"),
    (
      lambda run: (write_run(run), (run / "metrics.jsonl").write_text('{"iter')),
      "no complete line",
    ),
    (
      lambda run: (write_run(run), (run / "metrics.jsonl").write_text('{"iteration": 1}\n[2]\n')),
      r"metrics.jsonl, line 2: '\[2\]' is not a line of metrics",
    ),
    (
      lambda run: write_run(run, [{"other": 1.0}]),
      "nowhere: nothing to draw; expected values of reward",
    ),
  ],
)
def test_errors_name_folders_without_a_run(tmp_path, damage, message):
  damage(tmp_path / "nowhere")
  with pytest.raises(ValueError, match=message) as caught:
    draw_single(tmp_path / "nowhere")
  assert "\n" not in str(caught.value)


def test_a_group_with_two_equal_seeds_is_an_error(tmp_path):
  write_run(tmp_path / "a")
  write_run(tmp_path / "b")
  with pytest.raises(ValueError, match="have the same config and seed 0; leave one of them out"):
    group_runs([load_run(tmp_path / "a"), load_run(tmp_path / "b")])


@pytest.mark.parametrize("smooth", [0, 4])
def test_moving_average_of_an_even_number_is_an_error(tmp_path, smooth):
  write_run(tmp_path / "run")
  with pytest.raises(ValueError, match=f"smooth is {smooth}; give an odd number"):
    draw_single(tmp_path / "run", smooth=smooth)


def test_folders_can_be_separated_by_commas(tmp_path, capsys):
  names = ["a", "k=1,seed=0", "b"]
  for i, name in enumerate(names):
    write_run(tmp_path / name, seed=i)
  given = [str(tmp_path / "k=1,seed=0"), f"{tmp_path / 'a'},{tmp_path / 'b'}"]
  output = tmp_path / "new" / "curves.png"
  plot.main(given, output, mean=True, smooth=3)
  assert capsys.readouterr().out == f"{output}\n"
  with Image.open(output) as image:
    assert image.format == "PNG" and image.width == 1800
    assert np.ptp(np.asarray(image.convert("L"))) == 255
  with pytest.raises(ValueError, match=r"give a name that ends in \.png"):
    plot.main(given, tmp_path / "curves.pdf", mean=False, smooth=1)


def test_table_has_iterations_to_a_level_and_last_values(tmp_path):
  rises = [0.0, 0.1, 0.3, 0.2, 0.9]  # crosses 0.2 midway between iterations 2 and 3
  for seed, values in enumerate((rises, [0.2, *rises[1:]])):
    lines = [{"held_out/reward": value} for value in values]
    write_run(tmp_path / str(seed), lines, seed, batch_size=4, samples_per_prompt=2)
  runs = [load_run(tmp_path / name) for name in "01"]
  assert [reached_at(run, "held_out/reward", 0.2) for run in runs] == [2.5, 1.0]
  assert reached_at(runs[0], "held_out/reward", 1.0) == math.inf

  reach = [("held_out/reward", 0.2), ("held_out/reward", 1.0)]
  *_, row = table(group_runs(runs), reach, ["held_out/reward"])
  cells = [cell.strip() for cell in row.strip("| ").split("|")]
  # (2.5 + 1) / 2 iterations of 8 images
  assert cells[1:] == ["1.8 [1.0, 2.5]; 14 images", "0 of 2 reached it", "0.900 [0.900, 0.900]"]

  with pytest.raises(ValueError, match=r"0: has no values of held_out/winrate"):
    table(group_runs(runs), [("held_out/winrate", 0.5)], [])


def test_command_writes_a_png_or_a_one_line_error(tmp_path):
  write_run(tmp_path / "a")
  write_run(tmp_path / "b", seed=1)
  command = [sys.executable, "-m", "prefpaint_jax.plot", f"--output={tmp_path / 'curves.png'}"]
  run = lambda *flags: subprocess.run([*command, *flags], capture_output=True, text=True)
  done = run(f"--workdir={tmp_path / 'a'}", f"--workdir={tmp_path / 'b'}", "--mean")
  assert done.returncode == 0 and (tmp_path / "curves.png").is_file(), done.stderr
  failed = run(f"--workdir={tmp_path / 'c'}")
  assert failed.returncode == 1
  assert failed.stderr == f"error: {tmp_path / 'c'}: no such folder; give the --workdir of a run\n"


def test_a_run_with_judges_ends_with_gains_over_iterations_and_over_the_kl_divergence(tmp_path):
  lines = [
    {
      "held_out/reward_gain_in_sd": float(i),
      "held_out/judge/other_gain_in_sd": -2.0 * i,
      "held_out/kl_to_base": i**2 + 0.5,
    }
    for i in range(1, 4)
  ]
  write_run(tmp_path / "a", lines)
  *_, by_iteration, by_kl = draw_single(tmp_path / "a").axes
  for axes, x in ((by_iteration, [1, 2, 3]), (by_kl, [1.5, 4.5, 9.5])):
    drawn = [line.get_xydata().tolist() for line in axes.get_lines() if len(line.get_xdata()) == 3]
    assert drawn == [[[a, b] for a, b in zip(x, y, strict=True)] for y in ([1, 2, 3], [-2, -4, -6])]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["reward", "judge other"]
  assert by_kl.get_xlabel() == "KL to the base policy, nats"


def test_curves_can_be_drawn_against_images_and_unet_passes(tmp_path):
  cheap, dear = (
    [line | {"count/images": 8 * i, "count/unet_passes": 8 * i * passes} for i, line in lines]
    for passes, lines in ((34, enumerate(numbers(0), 1)), (42, enumerate(numbers(1), 1)))
  )
  write_run(tmp_path / "a", cheap)
  write_run(tmp_path / "b", dear, seed=1)
  groups = single_runs([load_run(tmp_path / name) for name in "ab"])
  for unit, ends in {"images": (96, 96), "unet_passes": (96 * 34, 96 * 42)}.items():
    drawn = list(curves(panels(draw(groups, unit=unit))["reward"]).values())
    assert [x[-1] for x, _ in drawn] == list(ends)
    np.testing.assert_array_equal(drawn[1][1], column(dear, "reward/mean"))
    # Averages are over iterations, whatever the axis.
    smooth, expected = (
      list(curves(panels(draw(groups, 3, unit=one))["reward"]).values())
      for one in (unit, "iteration")
    )
    np.testing.assert_array_equal(smooth[1][1], expected[1][1])
  write_run(tmp_path / "old", seed=2)
  with pytest.raises(ValueError, match="no values of count/images; give --x=iteration"):
    draw(single_runs([load_run(tmp_path / "old")]), unit="images")
