"""How programs run on a CPU."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from prefpaint_jax import compilation

if sys.argv[1] == "kept":
  compilation.keep_memory()
program = jax.jit(lambda x: jnp.sort(x, axis=0)[::-1] @ x)  # what is sorted is 16 MB
x = jnp.ones((2048, 2048))
for _ in range(3):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  program(x).block_until_ready()
  faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_of_programs_is_kept():
  def faults(how: str) -> int:
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

  pages = 16 * 2**20 // 4096
  assert faults("kept") < 0.1 * pages
  assert faults("as ever") > 0.9 * pages
