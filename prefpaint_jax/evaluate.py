"""Compares a policy with a baseline on held-out prompts.

  python -m prefpaint_jax.evaluate --config=configs/eval.py:mini --workdir=runs/eval \\
    --config.policy=runs/mini

Policy, baseline and rivals draw S samples of every prompt from the same seeds, and every judge
scores them. Known pixels, and the hole where its true content is known, are compared with the
prompt's image. Writes report.html, eval.json (docs/evaluation.md explains its keys), table.tex and
examples.png.
The same command resumes an interrupted evaluation.
"""
# Shapes: N prompts, S samples of each.

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from prefpaint_jax import inpainter
from prefpaint_jax.data import examples
from prefpaint_jax.data import masks as mask_io
from prefpaint_jax.data import prompts as prompt_io
from prefpaint_jax.data.captions import check_guidance
from prefpaint_jax.data.images import save_png
from prefpaint_jax.evaluation import batches as batch_files
from prefpaint_jax.evaluation import drift as drift_lib
from prefpaint_jax.evaluation import (
  fidelity,
  gallery,
  policy_table,
  report,
  tables,
  winrate,
  witnesses,
)
from prefpaint_jax.evaluation.examination import examine
from prefpaint_jax.evaluation.winrate import Scores
from prefpaint_jax.models.lpips import load as load_lpips
from prefpaint_jax.rewards.objective import load_rewards, warn_without_texts
from prefpaint_jax.runtime import cli, interrupts, sharding
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.files import atomic_path, read_json, write_json, write_text
from prefpaint_jax.runtime.memory import check_memory
from prefpaint_jax.runtime.metrics import progress
from prefpaint_jax.runtime.runs import PINNED, pin_steps
from prefpaint_jax.runtime.signals import stop_requests
from prefpaint_jax.runtime.waiting import waiting
from prefpaint_jax.runtime.workdir import open_workdir

SIDES = ("policy", "baseline")


def check(config: ConfigDict) -> None:
  """Raises ValueError for a config that cannot work."""
  check_fields(config, "eval")
  for field in ("policy", "baseline", "prompts"):
    if not config[field]:
      raise ValueError(f"config.{field} is empty; give --config.{field}=...")
  images = config.batch_size * config.samples_per_prompt
  what = f"config.batch_size={config.batch_size} with {images} samples of config.size={config.size}"
  check_memory(64 * images * config.size**2, what)
  if twice := [name for i, name in enumerate(config.rivals) if name in config.rivals[:i]]:
    raise ValueError(f"config.rivals has {twice[0]} twice; expected different policies; keep one")
  if not config.judges and not config.simulated_preference:
    raise ValueError("config.judges is empty; give at least one reward")
  sharding.check_batch(config.batch_size, sharding.make_mesh(devices=jax.local_devices()))


def all_policies(config: ConfigDict) -> dict[str, tuple[str, int | str | None]]:
  """Returns name and asked checkpoint of the policies by side: SIDES, "rival0", "rival1", ..."""
  policies = {side: (config[side], config[f"{side}_step"]) for side in SIDES}
  return policies | {f"rival{i}": (name, None) for i, name in enumerate(config.rivals)}


def choose_prompts(config: ConfigDict) -> tuple[Sequence[examples.Prompt], list[int]]:
  """Returns the prompts of the config's split, and the indices of the prompts to evaluate."""
  prompts = prompt_io.open_prompts(config.prompts, config.split, config.size)
  wanted = (
    i
    for i in range(len(prompts))
    if not config.kind or mask_io.KINDS[prompts[i]["kind"]] == config.kind
  )
  check_guidance(config.guidance_scale, prompts.has_texts, config.prompts)
  chosen = list(itertools.islice(wanted, config.num_prompts or None))
  if len(chosen) < config.num_prompts and jax.process_index() == 0:
    print(
      f"num_prompts is {config.num_prompts}; {config.prompts} has {len(chosen)}: compares those"
    )
  if not chosen:
    raise ValueError(
      f"{config.prompts}: none of the {len(prompts)} prompts of {config.split!r} is of kind "
      f"{config.kind}; give another --config.kind"
    )
  return prompts, chosen


def run_batches(config: ConfigDict, workdir: Path) -> tuple[dict[str, np.ndarray], int] | None:
  """Samples and scores all batches that the workdir does not have yet.

  Each process computes its share of the batches, and returns the results of all processes.

  Returns:
    The results [N, ...] by name (see `examine`), and N; None if the command was asked to stop.
  """
  process, processes = jax.process_index(), jax.process_count()
  folder, key = workdir / "batches", jax.random.key(config.seed)
  mesh = sharding.make_mesh(devices=jax.local_devices())
  prompts, chosen = choose_prompts(config)
  lpips = load_lpips(config.lpips, config.size) if config.lpips else None
  judges = load_rewards(config.judges, config.dtype)
  warn_without_texts(judges.values(), prompts.has_texts, config.prompts)
  asked = all_policies(config)
  if process == 0 and not any(folder.glob("*.npz")):
    (workdir / PINNED).unlink(missing_ok=True)
  steps = pin_steps(workdir / PINNED, asked)
  with waiting(f"loading {' and '.join(name for name, _ in asked.values())}"):
    policies = {
      side: inpainter.open_policy(name, config.dtype, steps[side]).place(mesh)
      for side, (name, _) in asked.items()
    }

  folder.mkdir(parents=True, exist_ok=True)
  work = list(batch_files.batches(chosen, config.batch_size))
  file_of = lambda number: folder / f"{number:05d}.npz"
  damaged = [
    n for n, _, _ in work if file_of(n).is_file() and batch_files.read_batch(file_of(n)) is None
  ]
  if damaged and process == 0:
    print(f"{folder}: computes {len(damaged)} damaged batches again, the first is {damaged[0]}")
  missing = [x for x in work[process::processes] if x[0] in damaged or not file_of(x[0]).is_file()]
  done = len(work) - processes * len(missing)
  bar = progress(len(work), done, visible=process == 0, unit="batch")
  with stop_requests() as received:
    for number, indices, new in missing:
      if received:
        break
      batch = examples.stack([prompts[i] for i in indices])
      what, size = "compiling, and sampling the first batch", batch["mask"].shape
      with waiting(what, size, number == missing[0][0]):
        results = examine(policies, judges, batch, jax.random.fold_in(key, number), config, lpips)
      with atomic_path(file_of(number)) as partial, partial.open("wb") as output:
        np.savez_compressed(output, **{name: values[:new] for name, values in results.items()})
      bar.update()
    bar.close()
    stopped = np.any(multihost_utils.process_allgather(np.array(bool(received))))
  if stopped:
    interrupts.end_early()
    return None
  return examples.concatenate(
    [batch_files.read_batch(file_of(number)) for number, _, _ in work]
  ), len(chosen)


def evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """Evaluates as `config` says; resumes the evaluation in `workdir` if there is one.

  Returns:
    "judges": the summary of `winrate.summarise`; "witnesses": the result of `witnesses.compare`;
    "drift": the result of `drift.drift`; "fidelity": the result of `fidelity.compare`; "rivals", if
    there are any: the same four by name. Empty if the command was asked to stop.
  """
  check(config)
  if not config.split:
    config = config.copy_and_resolve_references()
    config.split = prompt_io.final_split(config.prompts)
  with open_workdir(
    config,
    workdir,
    "evaluate",
    writes=("batches", "eval.json", "report.html", "table.tex", "examples.png"),
    free=("gallery",),
    progress="batches/*.npz",
    is_writer=jax.process_index() == 0,
  ):
    return _evaluate(config, workdir)


def _evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """Evaluates in a workdir that this process holds; see `evaluate`."""
  done = run_batches(config, workdir)
  if done is None:
    if jax.process_index() == 0:
      print("stopped; finished batches are saved, and the same command goes on")
    return {}
  results, number = done
  evaluation = compare(results, "policy", config.protocol)
  if config.rivals:
    evaluation["rivals"] = {
      name: compare(results, f"rival{i}", config.protocol) for i, name in enumerate(config.rivals)
    }
  if jax.process_index() == 0:
    write_results(config, workdir, results, number, evaluation)
  return evaluation


def scores_of(results: Mapping[str, np.ndarray], side: str) -> dict[str, Scores]:
  """Returns the scores of a side and of the baseline, by judge."""
  policy, baseline = (batch_files.of_side(results, one, "score") for one in (side, "baseline"))
  return {label: Scores(policy[label], baseline[label]) for label in policy}


def compare(results: Mapping[str, np.ndarray], side: str, protocol: str) -> dict[str, Any]:
  """Compares a side with the baseline: "judges", "witnesses", "drift" and "fidelity"."""
  both = lambda part: (batch_files.of_side(results, one, part) for one in (side, "baseline"))
  found = witnesses.compare(*both("witness"), results["truth"], results["complete"])
  return {
    "judges": winrate.summarise(scores_of(results, side), results["kind"]),
    "witnesses": found,
    "drift": drift_lib.drift(*both("measure")),
    "fidelity": fidelity.compare(*both("fidelity"), protocol),
  }


def write_results(
  config: ConfigDict,
  workdir: Path,
  results: Mapping[str, np.ndarray],
  number: int,
  evaluation: Mapping[str, Any],
) -> None:
  """Writes eval.json, report.html, table.tex and examples.png, and prints the tables.

  Args:
    results: results of `run_batches`.
    number: N.
    evaluation: result of `evaluate`.
  """
  steps = read_json(workdir / PINNED)
  policies, scores = all_policies(config), scores_of(results, "policy")
  names = {side: tables.full_name(name, steps[side]) for side, (name, _) in policies.items()}
  titles = {label: tables.judge_title(label) for label in scores}
  about = {}
  for side in SIDES:
    about[side] = config[side]
    if steps[side] is not None:
      about[f"{side}_iteration"] = steps[side]
  if config.rivals:
    about["rivals"] = ", ".join(name for side, name in names.items() if side not in SIDES)
  about |= {
    "judges": ", ".join(titles.values()),
    "prompts": f"{number} of {config.prompts}, {config.split}",
    "samples_per_prompt": config.samples_per_prompt,
    "sampler": f"DDIM, {config.num_steps} steps, eta {config.eta:g}, "
    f"guidance scale {config.guidance_scale:g}",
    **({"protocol": config.protocol} if config.protocol else {}),
    **({"blended": "across the border of the hole"} if config.blended else {}),
    "seed": config.seed,
    "command": " ".join(["python -m prefpaint_jax.evaluate", *sys.argv[1:]]),
  }
  write_json(workdir / "eval.json", {"about": about, **evaluation})
  named = lambda by_label: {titles[label]: value for label, value in by_label.items()}
  pairs = zip(results["original"], results["complete"], strict=True)
  shown = gallery.make_examples(
    results["id"].tolist(),
    results["prompt"],
    results["baseline/picture"],
    results["policy/picture"],
    named(scores),
    [image if known else None for image, known in pairs],
    results["text"].tolist(),
  )
  sides = {side: names[side] for side in SIDES}
  save_png(workdir / "examples.png", gallery.draw_examples(shown, **sides))
  ordered = {side: names[side] for side in ("baseline", *names)}  # the baseline is the first row
  rows = policy_table.make_table(results, ordered, config.protocol)
  write_text(workdir / "table.tex", policy_table.to_latex(rows))
  compared = [evaluation, *evaluation.get("rivals", {}).values()]
  summaries = [one["judges"] for one in compared]
  rows = policy_table.add_win_rates(rows, summaries) if config.rivals else []
  summary, *others = (evaluation[part] for part in ("judges", "witnesses", "drift", "fidelity"))
  report.write_report(
    workdir / "report.html",
    f"Policy {names['policy']} against baseline {names['baseline']}",
    about,
    named(summary),
    named(scores),
    *others,
    gallery.make_gallery(shown, each=config.gallery // 3),
    rows,
  )
  print(tables.describe_evaluation(named(summary), *others, rows), end="\n\n")
  print(f"wrote {workdir / 'report.html'}, examples.png, table.tex, and eval.json with all numbers")


if __name__ == "__main__":
  cli.run_with_config(evaluate, several_processes=True)
