"""Novelty of features, disagreement of rewards, and runs whose trust weight is of them."""

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax import testing
from prefpaint_jax.align import novelty
from prefpaint_jax.align.score import disagreement
from prefpaint_jax.preference.bound import load_bound, mahalanobis_norm
from prefpaint_jax.train import train

CONFIG = Path(__file__).parents[2] / "configs" / "rl.py"


def test_novelty_is_the_norm_by_half_of_the_samples_with_mean_one_on_the_others():
  z = np.random.default_rng(0).normal(1.0, [0.1, 1.0, 3.0], (101, 3)).astype(np.float32)
  fitted, others = z[::2].astype(np.float64), z[1::2].astype(np.float64)
  gram = fitted.T @ fitted
  inverse = np.linalg.inv(gram + 0.01 * np.trace(gram) / 3 * np.eye(3))
  norm = lambda z: np.sqrt(np.einsum("bi,ij,bj->b", z, inverse, z))
  found = mahalanobis_norm(novelty.fit(z).whitening, z)
  np.testing.assert_allclose(found, norm(z) / norm(others).mean(), rtol=1e-5)
  assert found[1::2].mean() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("z", [np.zeros((8, 3)), np.ones((1, 3))], ids=["zeros", "one"])
def test_features_that_give_no_novelty_are_refused_in_one_line(z):
  with pytest.raises(ValueError, match=r"\Anovelty: \d samples of the base policy[^\n]*\Z"):
    novelty.fit(z)


def test_disagreement_is_the_deviation_between_standardised_rewards():
  rng = np.random.default_rng(0)
  scores = [rng.normal(3.0, 5.0, 9), rng.normal(size=9), rng.uniform(size=9)]
  valid = np.arange(9) != 4
  standard = [(x - x[valid].mean()) / x[valid].std(ddof=1) for x in scores]
  in_jax = lambda *scores: [jnp.asarray(x, jnp.float32) for x in scores]
  found = disagreement(in_jax(*scores), jnp.asarray(valid))
  np.testing.assert_allclose(found[valid], np.std(standard, 0, ddof=1)[valid], rtol=1e-5)
  same = disagreement(in_jax(scores[0], 7 * scores[0]), jnp.asarray(valid))
  np.testing.assert_allclose(same[valid], 0.0, atol=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
  return testing.write_tiny_world(tmp_path_factory.mktemp("world"))


def run(world: dict[str, str], workdir: Path, **changes):
  """Trains a tiny run; returns its parameters and its metrics, without times."""
  config = runpy.run_path(str(CONFIG))["get_config"]()
  fields = {
    "num_iterations": 2,
    "checkpoint_every": 1,
    "eval_every": 1,
    "eval_prompts": 8,
    "num_samples": 8,
    "sample_every": 0,
    "trust.k": 0.5,
  }
  config.update_from_flattened_dict(testing.tiny_training(world) | fields | changes)
  params = jax.device_get(train(config.lock(), workdir).params)
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  timed = ("time/", "images_per_s")
  return params, [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_a_run_weighed_by_novelty_resumes_exactly(world, tmp_path):
  fields = {"trust.norm": "novelty", "trust.reference": 20}
  whole, lines = run(world, tmp_path / "whole", **fields)
  run(world, tmp_path / "parts", num_iterations=1, **fields)
  parts, again = run(world, tmp_path / "parts", **fields)
  jax.tree.map(np.testing.assert_array_equal, parts, whole)
  assert again == lines
  assert load_bound(tmp_path / "whole" / novelty.FILE_NAME).count == 12  # half of 24 in chunks of 8
  assert 0.3 < lines[-1]["trust/norm"] < 3.0
  assert "held_out/drift/novelty" in lines[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_a_run_weighed_by_the_disagreement_of_its_rewards(world, tmp_path):
  fields = {"trust.norm": "ensemble", "reward": f"{world['reward']},seam"}
  _, lines = run(world, tmp_path / "run", **fields)
  line = lines[-1]
  assert line["trust/norm"] > 0
  assert line["trust/min"] < line["trust/mean"] < np.exp(0.7)
  with pytest.raises(ValueError, match="'ensemble' with one reward"):
    run(world, tmp_path / "one", **{"trust.norm": "ensemble"})
  with pytest.raises(ValueError, match="'novelty' needs a reward with features, seam has none"):
    run(world, tmp_path / "none", **{"trust.norm": "novelty", "reward": "seam"})
