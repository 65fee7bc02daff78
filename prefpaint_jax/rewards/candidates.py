"""Scores the candidates of a folder with rewards, and writes scores.jsonl."""
# Shapes: b prompts of a batch, C candidates of each.

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from prefpaint_jax.data.annotation_files import read_candidates, read_prompts
from prefpaint_jax.data.images import load_image, load_mask
from prefpaint_jax.data.reward_scores import FILE, write_scores
from prefpaint_jax.rewards.objective import warn_without_texts
from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.runtime import interrupts
from prefpaint_jax.runtime.files import parse_json, write_text
from prefpaint_jax.runtime.metrics import progress
from prefpaint_jax.runtime.signals import stop_requests


def score_candidates(folder: Path, rewards: Mapping[str, Reward], batch_size: int) -> bool:
  """Scores the candidates of all prompts that scores.jsonl does not have yet.

  A prompt is finished if all its candidates have scores of exactly these rewards.

  Args:
    folder: the workdir of `prefpaint_jax.collect`, with equal numbers of candidates.
    rewards: by name.
    batch_size: b.

  Returns:
    False if the command was asked to stop.

  Raises:
    ValueError: a file is damaged, or a reward fails.
  """
  errors: list[str] = []
  prompts = read_prompts(folder, errors)
  candidates = defaultdict(list)
  for name, candidate in read_candidates(folder, prompts, errors).items():
    candidates[candidate.image_id].append(name)
  if errors:
    raise ValueError(f"{folder}/{errors[0]}; correct the file or collect the candidates again")
  ids, finished = list(candidates), _recover(folder / FILE, rewards, candidates)
  warn_without_texts(rewards.values(), any(one.text for one in prompts.values()), str(folder))
  bar = progress(len(candidates), len(finished), unit="scored prompt")
  with stop_requests() as received, (folder / FILE).open("a") as output:
    for first in range(0, len(ids), batch_size):
      # Repeats the last prompt to fill the last batch, because XLA compiles for one batch size.
      batch = [ids[min(i, len(ids) - 1)] for i in range(first, first + batch_size)]
      missing = [
        i for i, name in enumerate(ids[first : first + batch_size]) if name not in finished
      ]
      if not missing:
        continue
      if received:
        interrupts.end_early()
        bar.close()
        return False
      texts = [prompts[name].text for name in batch]
      scores = _score(folder, rewards, batch, [candidates[name] for name in batch], texts)
      for i in missing:
        for k, name in enumerate(candidates[batch[i]]):
          row = {reward: values[i, k] for reward, values in scores.items()}
          write_scores(output, batch[i], name, row)
      output.flush()
      bar.update(len(missing))
  bar.close()
  return True


def _score(
  folder: Path,
  rewards: Mapping[str, Reward],
  ids: Sequence[str],
  candidates: Sequence[Sequence[str]],
  texts: Sequence[str],
) -> dict[str, np.ndarray]:
  """Reads the images of b prompts and returns the scores [b, C] of each reward."""
  read = lambda kind, name: load_image(folder / kind / f"{name}.png")
  samples = np.stack([read("inpaint", name) for names in candidates for name in names])
  masks = np.stack([load_mask(folder / "masks" / f"{image_id}_mask.png") for image_id in ids])
  known = np.stack([read("masks_color", f"{image_id}_mask_color") for image_id in ids])
  return {
    name: reward(samples, known, masks, texts).reshape(len(ids), -1)
    for name, reward in rewards.items()
  }


def _recover(
  file: Path, rewards: Collection[str], candidates: Mapping[str, Sequence[str]]
) -> set[str]:
  """Removes the lines of unfinished prompts and of other rewards; returns the finished prompts."""
  # The text after the last newline is an incomplete line.
  lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
  kept = defaultdict(dict)
  for number, line in enumerate(lines, 1):
    row = parse_json(line, f"{file}, line {number}")
    if set(row.get("scores") or ()) == set(rewards):
      kept[str(row.get("image_id"))][str(row.get("candidate"))] = line.decode() + "\n"
  finished = {name for name, expected in candidates.items() if set(expected) == set(kept[name])}
  write_text(
    file, "".join(line for name in kept if name in finished for line in kept[name].values())
  )
  return finished
