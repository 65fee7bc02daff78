"""`python -m prefpaint_jax.benchmark`, and the comparison with PyTorch in tests/benchmarks."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from prefpaint_jax import benchmark, testing
from prefpaint_jax.runtime import compilation, sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parents[1]
get_config = runpy.run_path(str(ROOT / "configs" / "rl.py"))["get_config"]


@pytest.fixture(scope="module")
def scripts():
  """Returns `run` and `worlds` of tests/benchmarks, which are scripts and no package."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "tests" / "benchmarks")
    import run
    import worlds

    yield run, worlds


# ------------------------------------------------------------------------------------ the command
@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ConfigDict:
  config = get_config()
  world = testing.write_tiny_world(tmp_path_factory.mktemp("world"), 1, 1)
  config.update_from_flattened_dict(testing.tiny_training(world))
  return config


@pytest.fixture(scope="module")
def report(config) -> dict:
  return benchmark.benchmark(config, sharding.make_mesh(devices=jax.devices()[:1]), repeats=3)


@pytest.mark.slow
def test_flops_of_the_stages_add_up_to_the_iteration(report):
  stages = report["stages"]
  parts = [stages[name] for name in ("rollout", "score", "update")]
  assert stages["update"]["times"] == 2
  assert stages["iteration"]["flops"] == sum(part["times"] * part["flops"] for part in parts)
  of_rollout = stages["encode"]["flops"] + stages["decode"]["flops"]
  assert 0 < of_rollout < stages["rollout"]["flops"]
  for stage in stages.values():
    seconds = stage["seconds"]
    assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"]
  assert json.loads(json.dumps(report)) == report


@pytest.mark.slow
def test_share_of_the_peak_is_per_device(report):
  stage = report["stages"]["rollout"]
  half = 2 * stage["flops"] / stage["seconds"]["median"]
  line = next(x for x in benchmark.describe(report, half).splitlines() if x.startswith("rollout"))
  assert "50.0%" in line
  assert "%" not in benchmark.describe(report)
  twice = report | {"devices": 2}
  assert "25.0%" in benchmark.describe(twice, half)


@pytest.mark.slow
def test_memory_of_the_update_holds_parameters_and_moments(report):
  memory = report["stages"]["update"]["memory"]
  held = 3 * 4 * report["parameters"]["unet"]  # parameters and two moments, float32
  assert held < memory["arguments"] < 2 * held
  assert memory["temporaries"] > 0


def test_missing_policy_is_an_error_of_one_line(tmp_path):
  command = [sys.executable, "-m", "prefpaint_jax.benchmark", f"--config={ROOT}/configs/rl.py"]
  found = subprocess.run([*command, "--config.policy=no/such"], capture_output=True, text=True)
  assert found.returncode == 1
  assert found.stderr.strip().splitlines()[-1].startswith("error: config.policy no/such")


# ------------------------------------------------------------------------------ tests/benchmarks
@pytest.mark.slow
def test_opponents_compute_the_same_iteration(scripts, tmp_path):
  pytest.importorskip("torch", reason="the opponents need torch: pip install torch")
  run, worlds = scripts
  from ours import Ours
  from theirs import Theirs

  worlds.write("tiny", "float32", tmp_path)
  world = worlds.read(tmp_path)
  ours = Ours(world)
  ours.prepare("iteration")
  result = ours.read(ours.work("iteration"))
  for opponent in ("reference", "tuned"):
    theirs = Theirs(world, opponent)
    theirs.prepare("iteration")
    errors = run.disagreements(result, theirs.read(theirs.work("iteration")), ours.before)
    assert errors.keys() == result.keys()
    run.check(errors, "float32", opponent)
    theirs.checks = False
    again = theirs.read(theirs.work("iteration"))  # a timed iteration, which draws its noise
    assert all(np.isfinite(value).all() for value in again.values())


def test_difference_in_any_output_is_an_error(scripts):
  run, _ = scripts
  before, theirs = np.zeros(4), {"images": np.ones(4), "params": np.full(4, 1e-4)}
  same = run.disagreements(theirs, theirs, before)
  run.check(same, "float32", "tuned")
  for name, change in (("images", 2e-3), ("params", 2e-5)):
    ours = theirs | {name: theirs[name] + change}
    with pytest.raises(AssertionError, match=f"{name} differs by"):
      run.check(run.disagreements(ours, theirs, before), "float32", "tuned")
  with pytest.raises(AssertionError, match="images differs by nan"):
    nan = theirs | {"images": np.full(4, np.nan)}
    run.check(run.disagreements(nan, theirs, before), "float32", "tuned")


def test_result_replaces_an_older_result_of_the_same_measurement(scripts, tmp_path):
  run, _ = scripts
  one = {"size": "mini", "stage": "score", "opponent": "tuned", "dtype": "float32"}
  one |= {"machine": {"device": "cpu"}}
  run.save(tmp_path / "results.json", [one | {"ratio": 1.0}])
  run.save(tmp_path / "results.json", [one | {"ratio": 2.0}, one | {"size": "medium"}])
  kept = json.loads((tmp_path / "results.json").read_text())
  assert [x.get("ratio") for x in kept] == [2.0, None]


def test_tables_of_the_document_hold_the_measurements(scripts):
  import tables

  seconds = lambda median: {"q1": median, "median": median, "q3": median}
  used = {"loaded": 0, "compiled": 2 * 2**20, "peak_running": 3 * 2**20}
  side = lambda median: {"seconds": seconds(median), "compile_s": 1.0, "memory": used}
  one = {"size": "medium", "stage": "rollout", "opponent": "tuned"}
  one |= {"ours": side(2.0), "theirs": side(3.0), "ratio": seconds(1.5)}
  one |= {"machine": {"device": "cpu", "processor": "P", "cores": 2, "versions": {"jax": "1"}}}
  document = tables.DOCUMENT.read_text()
  filled = tables.fill(document, tables.all_tables([one], None))
  assert "| rollout, seconds | 2 | 3 (**1.50**, 1.50 to 1.50) |" in filled
  assert "| rollout, MiB at the peak | 3 (2) | 3 |" in filled
  assert tables.fill(filled, tables.all_tables([one], None)) == filled
  around = lambda text: re.sub(r"(<!--[^>]*-->\n).*?(<!-- end)", r"\1\2", text, flags=re.DOTALL)
  assert around(filled) == around(document)


# ------------------------------------------------------------------------------ compilation cache
@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({"XDG_CACHE_HOME": "/of/mine"}, "/of/mine/prefpaint_jax"),
    ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/prefpaint_jax"),
    ({"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, None),
    ({"JAX_COMPILATION_CACHE_DIR": ""}, None),
  ],
)
def test_compilation_cache_follows_the_environment(environment, expected, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    compilation.enable_cache()
    assert jax.config.jax_compilation_cache_dir == expected
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
