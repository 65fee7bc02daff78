"""LoRA: initial adapters, merging, and runs that train only adapters."""

import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from prefpaint_jax import inpainter, testing
from prefpaint_jax.models import lora
from prefpaint_jax.runtime.checkpoint import Checkpoints
from prefpaint_jax.train import train

BASE = {
  "attn1": {"to_q": {"kernel": np.ones((6, 4))}, "norm": {"scale": np.ones(4)}},
  "conv": {"kernel": np.ones((3, 3, 2, 5)), "bias": np.ones(5)},
}


def test_initial_adapters_change_nothing_and_have_the_paths_of_the_chosen_kernels():
  adapters = lora.init(jax.random.key(0), BASE, 2, r"to_q/|conv/")
  shapes = jax.tree.map(np.shape, adapters)
  assert shapes == {
    "attn1": {"to_q": {"kernel": {"down": (6, 2), "up": (2, 4)}}},
    "conv": {"kernel": {"down": (18, 2), "up": (2, 5)}},
  }
  jax.tree.map(np.testing.assert_array_equal, lora.merge(BASE, adapters), BASE)


def test_merged_kernel_equals_the_base_plus_a_sum_over_ranks():
  adapters = lora.init(jax.random.key(0), BASE, 2, "conv")
  pair = adapters["conv"]["kernel"]
  pair["up"] = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
  merged = lora.merge(BASE, adapters)
  expected = np.ones((3, 3, 2, 5))
  for a, b, c, o in np.ndindex(3, 3, 2, 5):
    row = (a * 3 + b) * 2 + c
    expected[a, b, c, o] += sum(float(pair["down"][row, r]) * pair["up"][r, o] for r in range(2))
  np.testing.assert_allclose(merged["conv"]["kernel"], expected, rtol=1e-5)
  assert merged["attn1"] is BASE["attn1"] and merged["conv"]["bias"] is BASE["conv"]["bias"]


@pytest.mark.parametrize(
  ("rank", "targets", "match"),
  [(0, "conv", "rank is 0; give 1 or more"), (1, "to_x", "'to_x', which matches no kernel")],
)
def test_rank_zero_and_targets_without_a_kernel_raise_an_error(rank, targets, match):
  with pytest.raises(ValueError, match=match):
    lora.init(jax.random.key(0), BASE, rank, targets)


@pytest.mark.slow
def test_run_trains_only_adapters_resumes_exactly_and_opens_merged(compiled_once, tmp_path):
  """Also turns on every option that saves memory: bfloat16 moments, FSDP, rematerialisation."""
  world = testing.write_tiny_world(tmp_path / "world")
  path = Path(__file__).parents[2] / "configs" / "rl.py"
  config = runpy.run_path(str(path))["get_config"]()
  changes = {
    "lora.rank": 2,
    "kl_weight": 0.1,
    "moments_dtype": "bfloat16",
    "behaviour_refresh": 2,
    "mesh.fsdp": 4,
    "mesh.split_frozen": True,
    "remat": True,
    "num_iterations": 2,
    "checkpoint_every": 1,
    "sample_every": 0,
  }
  config.update_from_flattened_dict(testing.tiny_training(world) | changes)
  whole = train(config.lock(), tmp_path / "whole")
  shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
  shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "2")
  resumed = train(config, tmp_path / "resumed")
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))

  base = testing.tiny_inpainter().params["unet"]
  opened = inpainter.open_policy(str(tmp_path / "whole")).params["unet"]
  assert jax.tree.structure(opened) == jax.tree.structure(base)
  adapters = Checkpoints(tmp_path / "whole" / "checkpoints").load("params")
  assert lora.merge(base, adapters)
  changed = {
    jax.tree_util.keystr(key, simple=True, separator="/")
    for (key, ours), theirs in zip(
      jax.tree_util.tree_leaves_with_path(opened), jax.tree.leaves(base), strict=True
    )
    if not np.array_equal(ours, theirs)
  }
  assert changed and all("attn" in name and name.endswith("kernel") for name in changed)
