"""Compares a policy with a baseline on held-out prompts.

  python -m prefpaint_jax.evaluate --config=configs/eval.py:mini --workdir=runs/eval \
    --config.policy=runs/mini

Both paint S samples of every prompt from the same seeds; every judge scores them. The workdir
receives eval.json (`comparison` says what its keys are) and report.html; the same command goes on
where an interrupted one stopped.
"""
# Shapes: N prompts, b of them in a batch, S samples of each, H W pixels, D features.

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from prefpaint_jax.data.images import resize_image, to_bytes
from prefpaint_jax.evaluation import drift as drift_lib
from prefpaint_jax.evaluation import report, tables, winrate
from prefpaint_jax.evaluation.drift import diversity, measure
from prefpaint_jax.evaluation.winrate import Scores
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.preference import simulation
from prefpaint_jax.reward import RewardModel
from prefpaint_jax.runtime import cli, sharding
from prefpaint_jax.runtime.files import atomic_path, write_json
from prefpaint_jax.runtime.metrics import progress
from prefpaint_jax.runtime.workdir import open_workdir

SIDES = ("policy", "baseline")
SIMULATED = "true preference"
THUMBNAIL = 256  # pixels along the longer side of what the report shows


def open_judges(names: tuple[str, ...], dtype: str) -> dict[str, RewardModel]:
  """{label: reward model}; the label is the end of the name that tells it from the others."""
  judges = {}
  for name in names:
    label = Path(name).name
    if label == "reward":  # of a workdir of train_reward
      label = "/".join(Path(name).parts[-2:])
    judges[label if label not in judges else name] = RewardModel.from_pretrained(name, dtype=dtype)
  return judges


def choose_prompts(config: ConfigDict) -> tuple[Sequence[examples.Prompt], list[int]]:
  """The prompts of a split, and the indices of those that are asked for."""
  prompts = prompt_io.open_prompts(config.prompts, config.split, config.size)
  if config.kind and config.kind not in mask_io.KINDS:
    raise ValueError(f"config.kind is {config.kind!r}; give one of {', '.join(mask_io.KINDS)}")
  wanted = (
    i
    for i in range(len(prompts))
    if not config.kind or mask_io.KINDS[prompts[i]["kind"]] == config.kind
  )
  chosen = list(itertools.islice(wanted, config.num_prompts or None))
  if not chosen:
    raise ValueError(
      f"{config.prompts}: none of the {len(prompts)} prompts of {config.split!r} is of kind "
      f"{config.kind}; give another --config.kind"
    )
  return prompts, chosen


def thumbnail(image: np.ndarray) -> np.ndarray:
  """[H, W, 3] in [0, 1] -> uint8, no side longer than THUMBNAIL."""
  scale = min(1.0, THUMBNAIL / max(image.shape[:2]))
  size = tuple(max(1, round(scale * side)) for side in image.shape[:2])
  return to_bytes(resize_image(image, size))


def examine(
  policies: Mapping[str, Inpainter],
  judges: Mapping[str, RewardModel],
  batch: Mapping[str, np.ndarray],
  key: jax.Array,
  config: ConfigDict,
) -> dict[str, np.ndarray]:
  """Everything that is kept of a batch of prompts, by "side/..." names.

  side/score/JUDGE [b, S], side/measure/NAME [b, S], side/measure/diversity [b],
  side/picture [b, h, w, 3] (the first samples, small), and id, kind, prompt [b, h, w, 3].
  """
  S = config.samples_per_prompt
  images, masks = batch["image"], batch["mask"]
  repeated_images, repeated_masks = (np.repeat(x, S, axis=0) for x in (images, masks))
  shown = np.where(masks > 0, 0.5, images)  # the hole grey, apart from black
  kept = {
    "id": batch["id"],
    "kind": batch["kind"],
    "prompt": np.stack([thumbnail(image) for image in shown]),
  }
  by_prompt = lambda x: np.asarray(x).reshape(-1, S, *np.shape(x)[1:])
  for side, policy in policies.items():
    painted = policy(
      images, masks, key=key, num_steps=config.num_steps, eta=config.eta, num_samples=S
    )
    features = None
    for label, judge in judges.items():
      rewards, z = judge.score(painted, images * (1.0 - masks))
      features = by_prompt(z) if features is None else features
      kept[f"{side}/score/{label}"] = by_prompt(rewards)
    if config.simulated_preference:
      truth = simulation.true_preference(painted, repeated_masks)["combined"]
      kept[f"{side}/score/{SIMULATED}"] = by_prompt(truth)
    measures = measure(painted, repeated_masks, repeated_images)
    kept |= {f"{side}/measure/{name}": by_prompt(values) for name, values in measures.items()}
    if S > 1 and features is not None:
      kept[f"{side}/measure/diversity"] = diversity(features)
    kept[f"{side}/picture"] = np.stack([thumbnail(image) for image in painted[::S]])
  return kept


def batches(chosen: list[int], size: int) -> Iterator[tuple[int, list[int], int]]:
  """(number, indices, how many of them are new): the last batch is filled up to `size`."""
  for number, first in enumerate(range(0, len(chosen), size)):
    part = chosen[first : first + size]
    yield number, part + [part[-1]] * (size - len(part)), len(part)


def collect_results(folder: Path, count: int) -> dict[str, np.ndarray]:
  """All batches together."""
  parts = []
  for number in range(count):
    with np.load(folder / f"{number:05d}.npz") as file:
      parts.append({name: file[name] for name in file.files})
  return examples.concatenate(parts)


def of_side(results: Mapping[str, np.ndarray], side: str, what: str) -> dict[str, np.ndarray]:
  prefix = f"{side}/{what}/"
  return {n.removeprefix(prefix): x for n, x in results.items() if n.startswith(prefix)}


def evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  ### Settings: refuse what cannot work before anything is painted.
  for field in ("policy", "baseline", "prompts"):
    if not config[field]:
      raise ValueError(f"config.{field} is empty: give --config.{field}=...")
  if not config.judges and not config.simulated_preference:
    raise ValueError("config.judges is empty: name one reward model or more")
  if config.samples_per_prompt < 1:
    raise ValueError(f"samples_per_prompt is {config.samples_per_prompt}: give 1 or more")
  process, processes = jax.process_index(), jax.process_count()
  mesh = sharding.make_mesh(devices=jax.local_devices())
  sharding.check_batch(config.batch_size, mesh)
  prompts, chosen = choose_prompts(config)
  judges = open_judges(tuple(config.judges), config.dtype)
  policies = {
    side: inpainter.open_policy(config[side], config.dtype, config[f"{side}_step"]).place(mesh)
    for side in SIDES
  }
  open_workdir(config, workdir, free=("gallery",), progress="batches/*.npz", is_writer=process == 0)

  ### Paint and score, batch by batch; what is on disk is done.
  folder, key = workdir / "batches", jax.random.key(config.seed)
  folder.mkdir(parents=True, exist_ok=True)
  work = list(batches(chosen, config.batch_size))
  done = sum((folder / f"{number:05d}.npz").is_file() for number, _, _ in work)
  bar = progress(len(work), done, visible=process == 0)
  for number, indices, new in work[process::processes]:
    file = folder / f"{number:05d}.npz"
    if file.is_file():
      continue
    batch = examples.stack([prompts[i] for i in indices])
    kept = examine(policies, judges, batch, jax.random.fold_in(key, number), config)
    with atomic_path(file) as partial, partial.open("wb") as output:
      np.savez_compressed(output, **{name: values[:new] for name, values in kept.items()})
    bar.update()
  bar.close()
  multihost_utils.sync_global_devices("evaluated")

  ### What it says.
  results = collect_results(folder, len(work))
  sides = {side: of_side(results, side, "score") for side in SIDES}
  scores = {
    label: Scores(sides["policy"][label], sides["baseline"][label]) for label in sides["policy"]
  }
  summary = winrate.summarise(scores, results["kind"])
  drift = drift_lib.drift(*(of_side(results, side, "measure") for side in SIDES))
  if process == 0:
    about = {
      "policy": config.policy,
      "baseline": config.baseline,
      "prompts": f"{len(chosen)} of {config.prompts}, {config.split}",
      "samples_per_prompt": config.samples_per_prompt,
      "sampler": f"DDIM, {config.num_steps} steps, eta {config.eta:g}",
      "seed": config.seed,
      "command": " ".join(["python -m prefpaint_jax.evaluate", *sys.argv[1:]]),
    }
    content = {"about": about, "judges": summary, "drift": drift}
    write_json(workdir / "eval.json", content)
    gallery = report.make_gallery(
      results["id"].tolist(),
      results["prompt"],
      results["baseline/picture"],
      results["policy/picture"],
      scores,
      each=config.gallery // 3,
    )
    title = f"{config.policy} beside {config.baseline}"
    report.write_report(workdir / "report.html", title, about, summary, scores, drift, gallery)
    for label, groups in summary.items():
      print(tables.describe_table(label, groups), end="\n\n")
    print(tables.describe_drift(drift), end="\n\n")
    print(f"{workdir / 'report.html'}: the same with pictures; numbers in eval.json")
  return {"judges": summary, "drift": drift}


if __name__ == "__main__":
  cli.run_with_config(evaluate, several_processes=True)
