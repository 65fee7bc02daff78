"""Compiler options, ahead-of-time compilation, and the settings that keep memory."""

import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import pytest

from prefpaint_jax.runtime import compilation
from prefpaint_jax.runtime.compilation import Program, fast_jit

KEEP_MEMORY = """
import jax
from prefpaint_jax.runtime import compilation

compilation.keep_memory()
print(jax.config.values["jax_cpu_enable_async_dispatch"])
"""


def test_a_program_is_compiled_for_shapes_and_its_jaxpr_is_freed():
  def double(x):
    return {"doubled": 2 * x}

  function = weakref.ref(double)
  program = Program(jax.jit(double))
  del double
  x = jnp.arange(3.0)
  results = program.compile(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding))
  assert function() is None
  assert results == {"doubled": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=x.sharding)}
  assert program(x)["doubled"].tolist() == [0.0, 2.0, 4.0]
  with pytest.raises(TypeError, match="compiled"):
    program(jnp.arange(4.0))


def test_an_unknown_option_does_not_cost_the_others(monkeypatch):
  known, unknown = {"xla_cpu_prefer_vector_width": 512}, {"xla_cpu_of_another_version": True}
  monkeypatch.setattr(compilation, "OPTIONS", {"cpu": unknown | known})
  jit = fast_jit.__wrapped__()
  assert jit.keywords["compiler_options"] == known
  assert jit(lambda x: 2 * x)(1.0) == 2.0


@pytest.mark.parametrize("platforms, accelerated", [("cpu", True), ("", False), ("", True)])
def test_memory_is_kept_unless_jax_may_find_an_accelerator(platforms, accelerated, tmp_path):
  if accelerated:
    (tmp_path / "jax_plugins").mkdir()
  environment = os.environ | {"JAX_PLATFORMS": platforms, "PYTHONPATH": str(tmp_path)}
  ended = subprocess.run(
    [sys.executable, "-c", KEEP_MEMORY], env=environment, capture_output=True, text=True, check=True
  )
  keeps = platforms == "cpu" or not accelerated
  assert ended.stdout.strip() == str(not keeps)


CACHED = """
import pathlib, resource, sys
import jax, jax.numpy as jnp
from prefpaint_jax.runtime import compilation

compilation.replace_damaged_cache_entries()
folder = pathlib.Path(sys.argv[1])
jax.config.update("jax_compilation_cache_dir", str(folder))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
x = jnp.arange(3.0)
entries = lambda: sorted(folder.glob("jit_double-*-cache"))

def double(x):
  return 2 * x

def start():
  jax.clear_caches()
  assert jax.jit(double)(x).tolist() == [0.0, 2.0, 4.0]

start()
(entry,) = entries()
damaged = entry.read_bytes()[: entry.stat().st_size // 2]  # of a process killed while it writes
entry.write_bytes(damaged)
start()
assert entry.stat().st_size > len(damaged)
entry.unlink()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(damaged),) * 2)  # as a full disk
start()
assert not entries()
"""


def test_damaged_entries_of_the_compilation_cache_are_replaced(tmp_path):
  run = [sys.executable, "-c", CACHED, str(tmp_path)]
  environment = os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
  ended = subprocess.run(run, capture_output=True, text=True, env=environment)
  assert ended.returncode == 0, ended.stderr
  assert ended.stderr == (
    f"{tmp_path}: OSError: [Errno 27] File too large; later starts compile again; make room\n"
  )
