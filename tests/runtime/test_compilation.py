"""Compiler options, ahead-of-time compilation, and the settings that keep memory."""

import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

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


def test_several_cpu_devices_do_without_the_kernels_that_fail_on_four():
  options = lambda count: fast_jit(Mesh(jax.local_devices()[:count], "some")).keywords[
    "compiler_options"
  ]
  assert options(1).keys() - options(2).keys() <= set(compilation.ONE_DEVICE_ONLY["cpu"])
  assert not options(2).keys() & set(compilation.ONE_DEVICE_ONLY["cpu"])
  assert not fast_jit().keywords["compiler_options"].keys() - options(2).keys()


CHAINS = """
import jax, numpy as np
from prefpaint_jax.align.rollout import in_chunks
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.compilation import fast_jit

inpainter = Inpainter.from_pretrained("mini")
modules, B = inpainter.modules, 256
steps = ddim.ddim_steps(modules.schedule, 10, 1.0)
noise = jax.random.normal(jax.random.key(0), modules.latent_shape(B, 32, 32))
images, masks = np.full((B, 32, 32, 3), 0.5, np.float32), np.ones((B, 32, 32, 1), np.float32)
context = inpainter.encode_text(["warm light", "cold light"] * (B // 2))
encoded = modules.encode_prompts(inpainter.params["vae"], images, masks, context)

def run(devices):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  prompts = jax.device_put(encoded, sharding.batch_sharding(mesh))
  params = jax.device_put(inpainter.params["unet"], sharding.replicated(mesh))

  def chain(params, prompts, noise):
    def predict(latents, timestep):
      some = lambda shared, own, latents: modules.predict(shared[0], own, latents, shared[1])
      return in_chunks(some, 0, mesh, (params, timestep), prompts, latents)
    return ddim.sample(predict, modules.schedule, steps, noise, jax.random.key(1))

  first = jax.device_put(noise, sharding.batch_sharding(mesh))
  return np.asarray(fast_jit(mesh)(chain)(params, prompts, first))

print(np.abs(run(1) - run(4)).max())
"""


@pytest.mark.slow
def test_a_chain_on_four_devices_equals_that_on_one():
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  ended = subprocess.run(
    [sys.executable, "-c", CHAINS],
    env=os.environ | flags,
    capture_output=True,
    text=True,
    check=True,
  )
  assert float(ended.stdout) < 1e-4


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
