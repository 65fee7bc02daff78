"""On an NVIDIA GPU: kernels, a run beside the CPU's, and exact resume; skipped without one."""
# Each test starts processes that see the GPU, because this process sees CPU devices only.

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from prefpaint_jax.kernels.attention import has_cudnn
from prefpaint_jax.runtime.checkpoint import Checkpoints

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not shutil.which("nvidia-smi") or not has_cudnn(),
    reason="needs an NVIDIA GPU and JAX's plugin: pip install -e '.[cuda]'",
  ),
]
ROOT = Path(__file__).parents[1]


def start(*arguments: str, **variables: str) -> str:
  """Runs Python with these arguments and environment variables; returns what it prints."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cuda",
    "XLA_FLAGS": "",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    **variables,
  }
  command = [sys.executable, *arguments]
  ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
  assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
  return ended.stdout


ATTENTION = """
import sys
import jax
import jax.numpy as jnp
from prefpaint_jax.kernels import attention as module

B, b, L, M, H, D = map(int, sys.argv[2:])
keys = jax.random.split(jax.random.key(0), 4)
shapes = (B, L, H, D), (b, M, H, D), (b, M, H, D), (B, L, H, D)
*xs, weight = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))

@jax.jit
def value_and_gradients(*xs):
  y, back = jax.vjp(chosen, *xs)
  return y, *back(weight.astype(y.dtype))

chosen = module.reference
with jax.default_matmul_precision("highest"):
  exact = value_and_gradients(*xs)
halves = [x.astype(sys.argv[1]) for x in xs]
for chosen in (module.reference, module.cuda):
  jax.clear_caches()
  found = value_and_gradients(*halves)
  difference = lambda a, b: float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
  print(*map(difference, found, exact))
"""


@pytest.mark.parametrize(
  "dtype, sizes",
  [
    ("bfloat16", (2, 2, 4096, 4096, 8, 40)),
    ("bfloat16", (2, 2, 1024, 1024, 8, 80)),
    ("bfloat16", (2, 1, 1024, 77, 8, 80)),
    ("bfloat16", (2, 2, 1024, 77, 10, 64)),
    ("bfloat16", (2, 2, 256, 256, 8, 160)),
    ("float32", (2, 2, 4096, 4096, 1, 512)),
  ],
)
def test_attention_and_its_gradients_are_as_exact_as_the_formula(dtype, sizes):
  """Relative to float32 with exact products; B, b, L, M, H, D."""
  printed = start("-c", ATTENTION, dtype, *map(str, sizes)).splitlines()
  reference, ours = ([float(x) for x in line.split()] for line in printed[-2:])
  assert all(a < 1.3 * b + 1e-6 for a, b in zip(ours, reference, strict=True)), (ours, reference)


def train(workdir: Path, iterations: int, **variables: str) -> list[dict]:
  """Trains the embedded model; returns the metrics without times."""
  fields = {"num_iterations": iterations, "checkpoint_every": 1, "keep_checkpoints": 9}
  fields |= dict.fromkeys(("eval_every", "sample_every", "final_prompts"), 0)
  changes = [f"--config.{name}={value}" for name, value in fields.items()]
  command = ["-m", "prefpaint_jax.train", "--config=configs/rl.py:mini", f"--workdir={workdir}"]
  variables["JAX_COMPILATION_CACHE_DIR"] = str(workdir.parent / "compiled")
  start(*command, *changes, **variables)
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  timed = ("time/", "images_per_s", "memory/")
  return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def test_first_iteration_equals_the_cpus(tmp_path):
  exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
  ours, expected = (
    train(tmp_path / platform, 1, JAX_PLATFORMS=platform, **exact)[0]
    for platform in ("cuda", "cpu")
  )
  names = {name for name in expected if name.startswith(("reward/", "trust/", "ppo/"))}
  names -= {"ppo/approx_kl", "ppo/clip_fraction"}  # near zero
  assert len(names) > 8
  pick = lambda line: {name: line[name] for name in names}
  assert pick(ours) == pytest.approx(pick(expected), rel=5e-3, abs=1e-4)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
  flags = {"XLA_FLAGS": "--xla_gpu_exclude_nondeterministic_ops=true"}
  whole = train(tmp_path / "whole", 3, **flags)
  train(tmp_path / "parts", 1, **flags)
  assert train(tmp_path / "parts", 3, **flags) == whole
  for name in ("params", "opt_state"):
    folders = (tmp_path / run / "checkpoints" for run in ("parts", "whole"))
    jax.tree.map(np.testing.assert_array_equal, *(Checkpoints(x).load(name) for x in folders))
