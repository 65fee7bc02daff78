"""From the page of labelling to the dataset, by the example that clicks as simulated annotators."""

import asyncio
import importlib.util

import numpy as np
import pytest
from labelling_world import ROOT, label_server, read_lines, write_candidates

from prefpaint_jax.data.images import load_image, to_bytes
from prefpaint_jax.data.preference_records import build_preferences
from prefpaint_jax.data.preferences import open_preferences, read_metadata

pytest.importorskip("starlette", reason="needs the extra label: pip install starlette")
pytest.importorskip("uvicorn", reason="needs the extra label: pip install uvicorn")
pytest.importorskip("playwright", reason="needs playwright: pip install playwright")
pytestmark = pytest.mark.slow
PROMPTS, NAMES = 6, ["ann", "ben", "eve"]


@pytest.fixture(scope="module")
def example():
  file = ROOT / "docs" / "examples" / "click_by_preference.py"
  spec = importlib.util.spec_from_file_location("click_by_preference", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if module.CHROMIUM is None:
    pytest.skip("needs chromium or google-chrome")
  return module


def clicked(example, folder, *flags):
  """Returns {annotator: the answers that were clicked}, each {candidate: its scores}."""
  with label_server(folder, "--port=0", *flags) as (_, (root,)):
    return asyncio.run(example.click(folder, root, NAMES))


def dataset_scores(folder, source):
  """Returns {candidate: its score in the dataset}; the pixels tell which candidate it is."""
  names = {to_bytes(load_image(x)).tobytes(): x.stem for x in (source / "inpaint").iterdir()}
  preferences = [
    preference
    for split in read_metadata(folder)["counts"]
    for preference in open_preferences(folder, split)
  ]
  return {
    names[candidate.tobytes()]: score
    for preference in preferences
    for candidate, score in zip(preference["candidates"], preference["raw_scores"], strict=True)
  }


def test_scores_in_the_dataset_are_the_clicked_ones(example, tmp_path):
  """By mouse and by keys. The answers to repeated items are left out."""
  source = write_candidates(tmp_path / "candidates", PROMPTS)
  answers = clicked(example, source, "--repeats=0.5")
  assert {name: len(given) > PROMPTS for name, given in answers.items()} == dict.fromkeys(
    NAMES, True
  )
  weights = {"structure": 0.3, "texture": 0.3, "overall": 0.4}
  expected = {}
  for given in answers.values():
    first = {}
    for answer in given:
      for candidate, scores in answer.items():
        first.setdefault(candidate, sum(weights[x] * scores[x] for x in weights))
    for candidate, score in first.items():
      expected.setdefault(candidate, []).append(score)
  assert {len(scores) for scores in expected.values()} == {len(NAMES)}
  scores = dataset_scores(build_preferences(source, tmp_path / "preferences"), source)
  assert len(scores) == len(expected) == 3 * PROMPTS
  for candidate, score in scores.items():
    np.testing.assert_allclose(score, np.mean(expected[candidate]), rtol=1e-5)


def test_pairs_on_disk_are_the_clicked_ones(example, tmp_path):
  """By mouse and by keys, with the noise of each annotator, and the equal ones."""
  source = write_candidates(tmp_path / "candidates", PROMPTS)
  answers = clicked(example, source, "--mode=pairs", "--repeats=0")
  lines = {(x["annotator"], *x["candidates"]): x for x in read_lines(source / "pairs.jsonl")}
  assert len(lines) == 3 * PROMPTS * len(NAMES)
  for name, given in answers.items():
    for answer in given:
      tenths = {
        x: 3 * y["structure"] + 3 * y["texture"] + 4 * y["overall"] for x, y in answer.items()
      }
      worse, better = sorted(tenths, key=tenths.get)
      is_equal = tenths[worse] == tenths[better]
      assert lines[name, *sorted(answer)]["better"] == (None if is_equal else better)
