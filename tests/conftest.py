"""Eight CPU devices in one process for every test. Set before anything imports JAX."""

import gc
import os
import signal

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # the user's is not touched
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()


gc.set_threshold(50_000, 20, 20)  # tracing makes many objects, few of them garbage


LONGEST = ("test_train", "test_processes", "test_faults")


def pytest_collection_modifyitems(items):
  """The longest files first, so that two workers end at about the same time."""
  items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture
def interruptible():
  """SIGINT as in a shell's foreground, here and in new processes: scripts' & has it ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


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


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
  """The one folder for compiled programs: JAX keeps to the first that it is given."""
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled_once(compiled):
  """All runs of a file, in this process and others, share their compiled programs."""
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
  jax.clear_caches()  # another file's programs were compiled with other options: other last bits
  with pytest.MonkeyPatch.context() as patch:
    for name, value in now.items():
      patch.setenv(name.upper(), str(value).lower() if value is True else str(value))
    yield
  for name, value in before.items():
    jax.config.update(name, value)
