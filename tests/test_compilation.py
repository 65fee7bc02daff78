"""How programs run on a CPU."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import jax, jax.numpy as jnp
from prefpaint_jax import compilation

compilation.keep_memory()
program = jax.jit(lambda x: jnp.sort(x, axis=0)[::-1] @ x)  # what is sorted is 16 MB
x = jnp.ones((2048, 2048))
faults = []
for _ in range(9):  # now and then one needs a little more than before
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  program(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[4])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_memory is for glibc")
def test_memory_of_programs_is_kept_where_they_run_on_a_cpu(tmp_path):
  (tmp_path / "jax_plugins").mkdir()

  def page_faults(**environment: str) -> int:
    ended = subprocess.run(
      [sys.executable, "-c", PROGRAM],
      env=os.environ | environment,
      capture_output=True,
      text=True,
      check=True,
    )
    return int(ended.stdout)

  pages = 16 * 2**20 // 4096
  assert page_faults(JAX_PLATFORMS="cpu") < 0.1 * pages
  assert page_faults(JAX_PLATFORMS="", PYTHONPATH=str(tmp_path)) > 0.9 * pages
