"""Scores collected candidates with simulated annotators, to test the pipeline without people.

  python -m prefpaint_jax.annotate --candidates=runs/candidates

Writes annotations.jsonl to the folder, in the format of human scores.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags

from prefpaint_jax.data import images as image_io
from prefpaint_jax.preference import simulation
from prefpaint_jax.runtime import cli
from prefpaint_jax.runtime.cli import within
from prefpaint_jax.runtime.config_fields import SEED
from prefpaint_jax.runtime.files import atomic_path
from prefpaint_jax.runtime.ranges import Integer, Number, Text
from prefpaint_jax.runtime.workdir import exclusive

_CHUNK = 512  # candidates scored at a time


def annotate(folder: Path, annotators: int, noise: float, seed: int) -> int:
  """Writes annotations.jsonl, the simulated scores of all candidates in a folder.

  Args:
    folder: the workdir of `prefpaint_jax.collect`.
    annotators: number of scores for each candidate.
    noise: standard deviation of an annotator's error, for scores from 0 to 7.
    seed: of the errors.

  Returns:
    The number of candidates.
  """
  file = folder / "candidates.jsonl"
  if not file.is_file():
    raise ValueError(f"{file}: no such file; give the --workdir of prefpaint_jax.collect")
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  with (
    exclusive(folder),
    atomic_path(folder / "annotations.jsonl") as partial,
    partial.open("w") as output,
  ):
    for first in range(0, len(lines), _CHUNK):
      chunk = lines[first : first + _CHUNK]
      images = [image_io.load_image(folder / "inpaint" / f"{x['candidate']}.png") for x in chunk]
      masks = [image_io.load_mask(folder / "masks" / f"{x['image_id']}_mask.png") for x in chunk]
      truth = simulation.true_preference(np.stack(images), np.stack(masks))
      rng = np.random.default_rng([seed, first])
      scores = simulation.annotate(rng, truth, annotators, noise)
      for i, line in enumerate(chunk):
        names = {"image_id": line["image_id"], "candidate": line["candidate"]}
        for a in range(annotators):
          ratings = {name: int(values[i, a]) for name, values in scores.items()}
          print(json.dumps(names | {"annotator": f"simulated_{a}"} | ratings), file=output)
  return len(lines)


if __name__ == "__main__":
  _CANDIDATES = flags.DEFINE(
    within(Text(empty=False)), "candidates", None, "Workdir of prefpaint_jax.collect."
  )
  _ANNOTATORS = flags.DEFINE(within(Integer(1, 1000)), "annotators", 3, "Scores per candidate.")
  _NOISE = flags.DEFINE(within(Number(0, 100)), "noise", 0.7, "Standard deviation of a score.")
  _SEED = flags.DEFINE(within(SEED), "seed", 0, "Seed of the noise.")
  flags.mark_flag_as_required("candidates")

  def main() -> None:
    folder = Path(_CANDIDATES.value)
    number = annotate(folder, _ANNOTATORS.value, _NOISE.value, _SEED.value)
    print(f"{folder / 'annotations.jsonl'}: {number} candidates, {_ANNOTATORS.value} scores each")

  cli.run(main)
