"""Samples candidate inpaintings for people to score.

  python -m prefpaint_jax.collect --config=configs/collect.py --workdir=runs/candidates \\
    --config.pictures=FOLDER

Draws prompts from images and samples candidates for each with one or several policies. Writes the
files that annotators and `prefpaint_jax.data.preferences` read to the workdir: images/, masks/,
masks_color/, inpaint/ID_<k>.png, prompts.jsonl, candidates.jsonl, train.txt and test.txt. With
`config.rewards` it also scores the candidates and writes scores.jsonl. The same command resumes an
interrupted run. With a larger number of prompts it adds prompts to the workdir.
"""
# Shapes: B prompts in a batch, H W pixels.

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from prefpaint_jax import inpainter
from prefpaint_jax.data import masks as mask_io
from prefpaint_jax.data.captions import check_guidance
from prefpaint_jax.data.drawn_prompts import DrawnPrompts
from prefpaint_jax.data.examples import SPLITS, Prompt, stack
from prefpaint_jax.data.images import save_png, to_bytes
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.preference import simulation
from prefpaint_jax.rewards import load_reward
from prefpaint_jax.rewards.candidates import score_candidates
from prefpaint_jax.runtime import cli, interrupts, sharding
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.files import parse_json, write_text
from prefpaint_jax.runtime.memory import check_memory
from prefpaint_jax.runtime.metrics import progress
from prefpaint_jax.runtime.ranges import Text, check
from prefpaint_jax.runtime.runs import PINNED, pin_steps
from prefpaint_jax.runtime.signals import stop_requests
from prefpaint_jax.runtime.text import print_next
from prefpaint_jax.runtime.waiting import waiting
from prefpaint_jax.runtime.workdir import open_workdir

WRITES = (
  *("images", "masks", "masks_color", "inpaint"),
  *("prompts.jsonl", "candidates.jsonl", "train.txt", "test.txt", "scores.jsonl"),
)


def recover(folder: Path, per_prompt: int) -> set[str]:
  """Removes the lines of unfinished prompts, which a killed run may leave.

  Args:
    folder: the workdir.
    per_prompt: number of candidates of a finished prompt.

  Returns:
    The IDs of the finished prompts.

  Raises:
    ValueError: a complete line is damaged; the message names it, and no file has changed.
  """
  files = {name: folder / f"{name}.jsonl" for name in ("candidates", "prompts")}
  lines = {}
  for name, file in files.items():
    # The text after the last newline is an incomplete line.
    complete = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    ids = []
    for number, line in enumerate(complete, 1):
      place = f"{file}, line {number}"
      ids.append(parse_json(line, place).get("image_id"))
      check(f"{place}: image_id", ids[-1], Text(empty=False))
    lines[name] = list(zip(ids, complete, strict=True))
  counts = Counter(image_id for image_id, _ in lines["candidates"])
  # A killed process may have written the line of one file only: each file has its own buffer.
  finished = {name for name, _ in lines["prompts"] if counts[name] == per_prompt}
  for name, file in files.items():
    kept = [line.decode() + "\n" for image_id, line in lines[name] if image_id in finished]
    write_text(file, "".join(kept))
  return finished


def sample_candidates(
  policies: list[tuple[str, Inpainter]],
  batch: Mapping[str, np.ndarray],
  turn: int,
  key: jax.Array,
  config: ConfigDict,
) -> Iterator[tuple[str, np.ndarray]]:
  """Samples the candidates of a batch of prompts.

  Args:
    policies: (name, policy); the samples take them in turn.
    batch: B prompts (see `examples.stack`).
    turn: offset into the policies; the number of the batch.
    key: PRNG key of the batch.

  Yields:
    (name of the policy, or "perturbed", and candidates [B, H, W, 3] in [0, 1]).
  """
  images, masks = batch["image"], batch["mask"]
  samples = []
  for sample in range(config.samples_per_prompt):
    name, policy = policies[(turn + sample) % len(policies)]
    samples.append(
      policy(
        images,
        masks,
        key=jax.random.fold_in(key, sample),
        num_steps=config.num_steps,
        eta=config.eta,
        text=batch["text"].tolist(),
        guidance_scale=config.guidance_scale,
      )
    )
    yield name, samples[-1]
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  sources = [*samples, images]  # the true image is perturbed as well
  for i in range(config.perturbed):
    yield "perturbed", simulation.perturb(rng, sources[(turn + i) % len(sources)], masks)


def write_prompt(folder: Path, prompt: Prompt, candidates: list[np.ndarray]) -> None:
  """Writes the images of one prompt and of its candidates, [H, W, 3] in [0, 1]."""
  name, mask = prompt["id"], prompt["mask"]
  if prompt["complete"]:
    save_png(folder / "images" / f"{name}.png", to_bytes(prompt["image"]))
  save_png(folder / "masks" / f"{name}_mask.png", to_bytes(mask.repeat(3, axis=-1)))
  masked = to_bytes(prompt["image"] * (1.0 - mask))
  save_png(folder / "masks_color" / f"{name}_mask_color.png", masked)
  for k, candidate in enumerate(candidates):
    save_png(folder / "inpaint" / f"{name}_{k}.png", to_bytes(candidate))


def _draw_prompts(config: ConfigDict) -> dict[str, DrawnPrompts]:
  """Returns {split: its prompts}, without empty splits."""
  numbers = dict(zip(SPLITS, (config.num_prompts, config.num_test_prompts), strict=True))
  return {
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


def collect(config: ConfigDict, workdir: Path) -> None:
  """Samples the candidates of all prompts that the workdir does not have yet."""
  check_fields(config, "collect")
  for field in ("pictures", "policies"):
    if not config[field]:
      raise ValueError(f"config.{field} is empty; give --config.{field}=NAME")
  if not config.num_prompts + config.num_test_prompts:
    raise ValueError("config.num_prompts and config.num_test_prompts are 0; give one above 0")
  what = f"config.batch_size={config.batch_size} of config.size={config.size}"
  check_memory(64 * config.batch_size * config.size**2, what)
  sharding.check_batch(config.batch_size, sharding.make_mesh(devices=jax.local_devices()))
  rewards = {name: load_reward(name, config.dtype) for name in config.rewards}
  drawn = _draw_prompts(config)
  has_texts = any(prompts.has_texts for prompts in drawn.values())
  check_guidance(config.guidance_scale, has_texts, config.pictures)
  free = "num_prompts", "num_test_prompts", "rewards"
  progress_file = "candidates.jsonl"
  with open_workdir(config, workdir, "collect", WRITES, free, progress_file) as write_config:
    is_complete = _collect(config, workdir, drawn, write_config)
    if is_complete and config.rewards:
      is_complete = score_candidates(workdir, rewards, config.batch_size)
  if not is_complete:
    print("stopped; finished prompts are saved, and the same command goes on")
    return
  scored = f"; scores.jsonl has the scores of {', '.join(config.rewards)}" if config.rewards else ""
  print(
    f"{workdir}: {sum(map(len, drawn.values()))} prompts with "
    f"{config.samples_per_prompt + config.perturbed} candidates each{scored}"
  )
  if not config.rewards:
    print_next(("label", f"--candidates={workdir}"))


def _collect(
  config: ConfigDict,
  workdir: Path,
  drawn: Mapping[str, DrawnPrompts],
  write_config: Callable[[], None],
) -> bool:
  """Samples in a workdir that this process holds; returns False if it was asked to stop."""
  finished = recover(workdir, config.samples_per_prompt + config.perturbed)
  if not finished:
    (workdir / PINNED).unlink(missing_ok=True)
  mesh = sharding.make_mesh(devices=jax.local_devices())
  steps = pin_steps(workdir / PINNED, {name: (name, None) for name in config.policies})
  with waiting(f"loading {', '.join(config.policies)}"):
    policies = [
      (name, inpainter.open_policy(name, config.dtype, steps[name]).place(mesh))
      for name in config.policies
    ]
  write_config()

  B, key = config.batch_size, jax.random.key(config.seed)
  bar = progress(sum(len(prompts) for prompts in drawn.values()), len(finished))
  with (
    stop_requests() as received,
    ThreadPoolExecutor(4) as pool,
    (workdir / "prompts.jsonl").open("a") as prompt_lines,
    (workdir / "candidates.jsonl").open("a") as candidate_lines,
  ):
    for split, prompts in drawn.items():
      split_key = jax.random.fold_in(key, SPLITS.index(split))
      for first in range(0, len(prompts), B):
        # Repeats the last prompt to fill the last batch, because XLA compiles for one batch size.
        batch = [prompts[min(i, len(prompts) - 1)] for i in range(first, first + B)]
        missing = [i for i in range(min(B, len(prompts) - first)) if batch[i]["id"] not in finished]
        if not missing:
          continue
        if received:
          interrupts.end_early()
          bar.close()
          return False
        batch_key = jax.random.fold_in(split_key, first)
        sampled = sample_candidates(policies, stack(batch), first // B, batch_key, config)
        candidates = list(sampled)
        # Images are written before the lines that list them, so that a listed prompt is complete.
        samples_by_prompt = [[samples[i] for _, samples in candidates] for i in missing]
        write = functools.partial(write_prompt, workdir)
        list(pool.map(write, [batch[i] for i in missing], samples_by_prompt))
        for i in missing:
          name, kind = batch[i]["id"], mask_io.KINDS[batch[i]["kind"]]
          about = {"source": batch[i]["source"], "picture": batch[i]["picture"]}
          if text := batch[i].get("text"):
            about["text"] = text
          print(json.dumps({"image_id": name, "kind": kind} | about), file=prompt_lines)
        for i in missing:
          name = batch[i]["id"]
          for k, (policy, _) in enumerate(candidates):
            line = {"image_id": name, "candidate": f"{name}_{k}", "policy": policy}
            print(json.dumps(line), file=candidate_lines)
        prompt_lines.flush()
        candidate_lines.flush()
        bar.update(len(missing))
  for split, prompts in drawn.items():
    ids = [prompts.id(i) for i in range(len(prompts))]
    write_text(workdir / f"{split}.txt", "".join(f"{name}\n" for name in ids))
  bar.close()
  return True


if __name__ == "__main__":
  cli.run_with_config(collect)
