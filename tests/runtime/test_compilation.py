"""What is kept of programs, and how they run on a CPU."""

import json
import os
import platform
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import pytest

from prefpaint_jax.kernels.dispatch import by_platform
from prefpaint_jax.runtime import compilation
from prefpaint_jax.runtime.compilation import Program, fast_jit

needs_glibc = pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="memory is kept by glibc's allocator"
)
PROGRAM = """
import resource
import jax, jax.numpy as jnp, numpy as np
from prefpaint_jax.runtime import compilation, sharding

compilation.keep_memory()
program = jax.jit(lambda x: jnp.sort(x, axis=0)[::-1] @ x)  # what is sorted is 16 MB
mesh = sharding.make_mesh(devices=jax.devices()[:1])
x = np.ones((2048, 2048), np.float32)
faults = []
for _ in range(12):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  program(sharding.to_global(mesh, x)).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults))
"""
LOADED = """
import numpy as np
from prefpaint_jax.runtime import compilation

def pages() -> int:
  return int(open("/proc/self/statm").read().split()[1])

compilation.keep_memory()
for make in compilation.apart()(np.ones), np.ones:
  before = pages()
  array, above = make(2**22), np.ones(2**22)
  del array
  print(pages() - before)
"""


def test_program_is_compiled_for_shapes_and_forgets_what_it_was_traced_to():
  def double(x):
    return {"doubled": 2 * x}

  traced = weakref.ref(double)
  program = Program(jax.jit(double))
  del double
  x = jnp.arange(3.0)
  results = program.compile(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding))
  assert traced() is None
  assert results == {"doubled": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=x.sharding)}
  assert program(x)["doubled"].tolist() == [0.0, 2.0, 4.0]
  with pytest.raises(TypeError, match="compiled"):
    program(jnp.arange(4.0))


def test_one_function_of_several_is_traced_where_the_platform_is_known():
  seen = []

  def named(name: str, factor: float):
    def function(x):
      seen.append(name)
      return factor * x

    return function

  functions = {"cpu": named("cpu", 2.0), "tpu": named("tpu", 3.0)}
  choose = lambda x: by_platform(x, **functions, default=named("default", 4.0))
  for jit, traced in ((fast_jit(), {"cpu"}), (jax.jit, {"cpu", "tpu", "default"})):
    seen.clear()
    assert jit(lambda x: choose(x))(1.0) == 2.0
    assert set(seen) == traced
    assert jit(jax.grad(lambda x: choose(x)))(1.0) == 2.0


def test_option_that_a_compiler_lacks_does_not_cost_the_others(monkeypatch):
  known, unknown = {"xla_cpu_prefer_vector_width": 512}, {"xla_cpu_of_another_version": True}
  monkeypatch.setattr(compilation, "_OPTIONS", {"cpu": unknown | known})
  jit = fast_jit.__wrapped__()
  assert jit.keywords["compiler_options"] == known
  assert jit(lambda x: 2 * x)(1.0) == 2.0


def printed_by(program: str, **environment: str) -> str:
  ended = subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  return ended.stdout


@pytest.mark.slow
@needs_glibc
def test_memory_of_programs_is_kept_where_they_run_on_a_cpu(tmp_path):
  def page_faults(**environment: str) -> list[int]:
    return json.loads(printed_by(PROGRAM, **environment))

  (tmp_path / "jax_plugins").mkdir()
  pages = 16 * 2**20 // 4096
  # Some runs need more than those before, on a busy machine half. A third do not; else most do.
  assert page_faults(JAX_PLATFORMS="cpu")[3] < 0.1 * pages
  assert page_faults(JAX_PLATFORMS="", PYTHONPATH=str(tmp_path))[5] > 0.9 * pages


@needs_glibc
def test_what_is_loaded_leaves_no_hole_in_memory_that_is_kept():
  pages = 32 * 2**20 // 4096
  given_back, kept = map(int, printed_by(LOADED).split())
  assert given_back == pytest.approx(pages, rel=0.1)
  assert kept == pytest.approx(2 * pages, rel=0.1)
