"""Scores collected candidates with simulated annotators, a test without people.

  python -m prefpaint_jax.annotate --candidates=runs/candidates

Writes annotations.jsonl to the folder, in the format of human scores. It replaces simulated scores
there, and refuses to replace scores of people.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

from prefpaint_jax.data import images as image_io
from prefpaint_jax.data.annotation_files import read_candidates, read_prompts
from prefpaint_jax.data.examples import SIMULATED
from prefpaint_jax.preference import simulation
from prefpaint_jax.runtime import cli
from prefpaint_jax.runtime.cli import within
from prefpaint_jax.runtime.config_fields import SEED
from prefpaint_jax.runtime.files import atomic_path, check_is_folder
from prefpaint_jax.runtime.ranges import Integer, Number, Text
from prefpaint_jax.runtime.text import print_next
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

  Raises:
    ValueError: annotations.jsonl has scores of people, or the noise is not finite.
  """
  check_is_folder(folder, "the --workdir of prefpaint_jax.collect")
  file = folder / "candidates.jsonl"
  if not file.is_file():
    raise ValueError(f"{file}: no such file; give the --workdir of prefpaint_jax.collect")
  errors: list[str] = []
  prompts = read_prompts(folder, errors)
  candidates = read_candidates(folder, prompts, errors)
  if errors:
    raise ValueError(f"{folder}/{errors[0]}; correct the file or collect the candidates again")
  lines = list(candidates.items())
  with (
    exclusive(folder),
    _replaced_scores(folder / "annotations.jsonl") as partial,
    partial.open("w") as output,
  ):
    for first in range(0, len(lines), _CHUNK):
      chunk = lines[first : first + _CHUNK]
      images = [image_io.load_image(folder / "inpaint" / f"{name}.png") for name, _ in chunk]
      masks = [image_io.load_mask(folder / "masks" / f"{x.image_id}_mask.png") for _, x in chunk]
      texts = [prompts[x.image_id].text for _, x in chunk]
      truth = simulation.true_preference(np.stack(images), np.stack(masks), texts)
      rng = np.random.default_rng([seed, first])
      scores = simulation.annotate(rng, truth, annotators, noise)
      for i, (name, candidate) in enumerate(chunk):
        names = {"image_id": candidate.image_id, "candidate": name}
        for a in range(annotators):
          ratings = {criterion: int(values[i, a]) for criterion, values in scores.items()}
          print(json.dumps(names | {"annotator": f"{SIMULATED}{a}"} | ratings), file=output)
  return len(lines)


@contextlib.contextmanager
def _replaced_scores(file: Path) -> Iterator[Path]:
  """Gives a path that replaces `file`, which may be missing; see `atomic_path`.

  Raises:
    ValueError: a line of `file` is not of a simulated annotator.
  """
  for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else (), 1):
    try:
      is_simulated = json.loads(line)["annotator"].startswith(SIMULATED)
    except (ValueError, KeyError, TypeError, AttributeError):
      is_simulated = not line.strip()
    if not is_simulated:
      raise ValueError(
        f"{file}: line {number} is not of a simulated annotator, and people's scores are not "
        "replaced; move the file to another place first"
      )
  with atomic_path(file) as partial:
    yield partial


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
    print_next(
      (
        "data.preferences",
        "--config=configs/preferences.py",
        f"--workdir={folder}_preferences",
        f"--config.source={folder}",
      )
    )

  cli.run(main)
