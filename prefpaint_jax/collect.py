"""Paints candidates for people to score.

  python -m prefpaint_jax.collect --config=configs/collect.py --workdir=runs/candidates \
    --config.pictures=FOLDER

Draws prompts from pictures and lets one or several policies paint candidates for each. Writes what
annotators and `prefpaint_jax.data.preferences` need to the workdir: images/, masks/, masks_color/,
inpaint/ID_<k>.png, prompts.jsonl, candidates.jsonl, train.txt and test.txt. The same command goes
on where an interrupted one stopped; with more prompts it adds to what is there.
"""
# Shapes: B prompts of a batch, H W pixels.

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from prefpaint_jax import inpainter
from prefpaint_jax.data import masks as mask_io
from prefpaint_jax.data.drawn_prompts import DrawnPrompts
from prefpaint_jax.data.examples import SPLITS, Prompt, stack
from prefpaint_jax.data.images import save_png, to_bytes
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.preference import simulation
from prefpaint_jax.runtime import cli, sharding
from prefpaint_jax.runtime.files import write_text
from prefpaint_jax.runtime.metrics import progress
from prefpaint_jax.runtime.workdir import open_workdir


def recover(folder: Path, per_prompt: int) -> set[str]:
  """The prompts that are finished; lines of others, which a killed run may leave, are removed."""
  files = {name: folder / f"{name}.jsonl" for name in ("candidates", "prompts")}
  lines = {}
  for name, file in files.items():
    # What follows the last newline is half a line.
    complete = file.read_text().split("\n")[:-1] if file.is_file() else []
    lines[name] = [(json.loads(line)["image_id"], line) for line in complete]
  counts = Counter(image_id for image_id, _ in lines["candidates"])
  finished = {image_id for image_id, count in counts.items() if count == per_prompt}
  for name, file in files.items():
    kept = "".join(f"{line}\n" for image_id, line in lines[name] if image_id in finished)
    write_text(file, kept)
  return finished


def paint(
  policies: list[tuple[str, Inpainter]],
  images: np.ndarray,
  masks: np.ndarray,
  turn: int,
  key: jax.Array,
  config: ConfigDict,
) -> Iterator[tuple[str, np.ndarray]]:
  """(who, candidates [B, H, W, 3]) for every candidate of the prompts [B, H, W, 3]."""
  painted = []
  for sample in range(config.samples_per_prompt):
    name, policy = policies[(turn + sample) % len(policies)]
    painted.append(
      policy(
        images,
        masks,
        key=jax.random.fold_in(key, sample),
        num_steps=config.num_steps,
        eta=config.eta,
      )
    )
    yield name, painted[-1]
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  sources = [*painted, images]  # the picture itself is a candidate to spoil, too
  for i in range(config.perturbed):
    yield "perturbed", simulation.perturb(rng, sources[(turn + i) % len(sources)], masks)


def write_prompt(folder: Path, prompt: Prompt, candidates: list[np.ndarray]) -> None:
  """The pictures of one prompt; candidates are [H, W, 3] in [0, 1]."""
  name, mask = prompt["id"], prompt["mask"]
  if prompt["complete"]:
    save_png(folder / "images" / f"{name}.png", to_bytes(prompt["image"]))
  save_png(folder / "masks" / f"{name}_mask.png", to_bytes(mask.repeat(3, axis=-1)))
  masked = to_bytes(prompt["image"] * (1.0 - mask))
  save_png(folder / "masks_color" / f"{name}_mask_color.png", masked)
  for k, candidate in enumerate(candidates):
    save_png(folder / "inpaint" / f"{name}_{k}.png", to_bytes(candidate))


def collect(config: ConfigDict, workdir: Path) -> None:
  if not config.pictures:
    raise ValueError("config.pictures is empty: give --config.pictures=FOLDER")
  if not config.policies or config.samples_per_prompt < 1:
    raise ValueError("config.policies or config.samples_per_prompt is empty: give one or more")
  mesh = sharding.make_mesh(devices=jax.local_devices())
  sharding.check_batch(config.batch_size, mesh)
  numbers = dict(zip(SPLITS, (config.num_prompts, config.num_test_prompts), strict=True))
  drawn = {
    split: DrawnPrompts(
      config.pictures,
      split,
      number,
      config.size,
      seed=config.seed,
      fit=config.fit,
      crop=config.crop,
      test_share=config.test_share,
      kinds=config.kinds.to_dict(),
    )
    for split, number in numbers.items()
    if number
  }
  open_workdir(
    config, workdir, free=("num_prompts", "num_test_prompts"), progress="candidates.jsonl"
  )
  per_prompt = config.samples_per_prompt + config.perturbed
  finished = recover(workdir, per_prompt)
  policies = [
    (name, inpainter.open_policy(name, config.dtype).place(mesh)) for name in config.policies
  ]

  B, key = config.batch_size, jax.random.key(config.seed)
  bar = progress(sum(len(prompts) for prompts in drawn.values()), len(finished))
  with (
    ThreadPoolExecutor(4) as pool,
    (workdir / "prompts.jsonl").open("a") as prompt_lines,
    (workdir / "candidates.jsonl").open("a") as candidate_lines,
  ):
    for split, prompts in drawn.items():
      split_key = jax.random.fold_in(key, SPLITS.index(split))
      for first in range(0, len(prompts), B):
        # A last batch that is not full is filled up, so that nothing is compiled for it.
        batch = [prompts[min(i, len(prompts) - 1)] for i in range(first, first + B)]
        missing = [i for i in range(min(B, len(prompts) - first)) if batch[i]["id"] not in finished]
        if not missing:
          continue
        stacked = stack(batch)
        images, masks = stacked["image"], stacked["mask"]
        batch_key = jax.random.fold_in(split_key, first)
        painted = list(paint(policies, images, masks, first // B, batch_key, config))
        # Pictures first, then the lines that say they are there, then the split that names them.
        write = lambda i: write_prompt(workdir, batch[i], [filling[i] for _, filling in painted])  # noqa: B023
        list(pool.map(write, missing))
        for i in missing:
          name, kind = batch[i]["id"], mask_io.KINDS[batch[i]["kind"]]
          about = {"source": batch[i]["source"], "picture": batch[i]["picture"]}
          print(json.dumps({"image_id": name, "kind": kind} | about), file=prompt_lines)
        for i in missing:
          for k, (who, _) in enumerate(painted):
            line = {"image_id": batch[i]["id"], "candidate": f"{batch[i]['id']}_{k}", "policy": who}
            print(json.dumps(line), file=candidate_lines)
        prompt_lines.flush()
        candidate_lines.flush()
        bar.update(len(missing))
  for split, prompts in drawn.items():
    ids = [prompts.id(i) for i in range(len(prompts))]
    (workdir / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
  bar.close()
  print(
    f"{workdir}: {sum(map(len, drawn.values()))} prompts with "
    f"{per_prompt} candidates each; write the scores to annotations.jsonl there"
  )


if __name__ == "__main__":
  cli.run_with_config(collect)
