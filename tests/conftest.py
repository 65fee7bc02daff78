"""Eight CPU devices in one process for every test. Set before anything imports JAX."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()


@pytest.fixture(scope="module")
def quick_compilation():
  """Halves the time of a file that mostly compiles."""
  import jax

  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def inpainter():
  """The tiny pipeline."""
  from prefpaint_jax import testing

  return testing.tiny_inpainter()
