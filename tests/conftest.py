"""Fixtures of all tests, and their settings of JAX: eight CPU devices in one process.

The environment variables are set before any module imports JAX.
"""

import gc
import os
import signal

import pytest
from jaxtyping import install_import_hook

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # do not use the user's compilation cache
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()


# The functions of these modules check the shapes and types of their arguments in every test.
install_import_hook(
  [
    f"prefpaint_jax.{name}"
    for name in ("align", "diffusion", "kernels", "models.pipeline", "preference.bound")
  ],
  "beartype.beartype",
)

# Tracing makes many objects and little garbage: collect less often than Python's default.
gc.set_threshold(50_000, 20, 20)


LONGEST = ("test_train", "test_processes", "test_faults")


def pytest_collection_modifyitems(items):
  """Runs the longest files first, so that two workers end at about the same time."""
  items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture
def interruptible():
  """Enables SIGINT in this process and its children; shells disable it in background jobs."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def quick_compilation():
  """Disables most of XLA's optimisations, which halves the time of a file that mostly compiles."""
  import jax

  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def inpainter():
  """The tiny pipeline of `prefpaint_jax.testing`."""
  from prefpaint_jax import testing

  return testing.tiny_inpainter()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
  """The folder of the compilation cache; one for all tests, because JAX keeps the first it gets."""
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled_once(compiled):
  """Shares one compilation cache between all runs of a file, in this process and its children."""
  import jax

  before = {
    "jax_disable_most_optimizations": False,
    "jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
  }
  values = True, str(compiled), 0.0, -1
  now = dict(zip(before, values, strict=True))
  for name, value in now.items():
    jax.config.update(name, value)
  # Programs that another file compiled have other options, and results with other last bits.
  jax.clear_caches()
  with pytest.MonkeyPatch.context() as patch:
    for name, value in now.items():
      patch.setenv(name.upper(), str(value).lower() if value is True else str(value))
    yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(
  scope="module",
  params=["cpu", *(pytest.param(x, marks=pytest.mark.slow) for x in ("reference", "cuda", "tpu"))],
)
def kernels(request):
  """Runs the tests of a file once per implementation of the kernels; on the CPU's first."""
  from prefpaint_jax.kernels.dispatch import implementation

  with implementation(request.param):
    yield request.param
