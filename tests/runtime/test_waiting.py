"""Lines before long work."""

import jax
import pytest

from prefpaint_jax.runtime import waiting


@pytest.fixture
def seconds(tmp_path, monkeypatch):
  """Makes each reading of the clock seven seconds later than the one before."""
  monkeypatch.setattr(waiting, "_speaks", True)
  monkeypatch.setattr(waiting.Timer, "start", lambda timer: timer.function(*timer.args))
  clock = iter(range(0, 1000, 7))
  monkeypatch.setattr(waiting.time, "monotonic", lambda: next(clock))
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def test_the_second_time_the_line_has_the_seconds_of_the_first_of_the_same_size(seconds, capsys):
  for size in (1, 2, 1):
    with waiting.waiting("compiling the update", size):
      pass
  assert capsys.readouterr().err.splitlines() == [
    "compiling the update ...",
    "compiling the update ...",
    "compiling the update (7 s the last time) ...",
  ]


def test_a_program_from_the_cache_does_not_change_the_seconds(seconds, capsys, tmp_path):
  with waiting.waiting("compiling"):
    waiting._count("/jax/compilation_cache/cache_hits")
  assert not (tmp_path / waiting.FILE).exists()


@pytest.mark.parametrize("content", ["", "[]", '{"compiling": "x"}', "{"])
def test_a_damaged_file_of_seconds_is_ignored(seconds, capsys, tmp_path, content):
  (tmp_path / waiting.FILE).write_text(content)
  with waiting.waiting("compiling"):
    pass
  assert capsys.readouterr().err == "compiling ...\n"


def test_library_functions_are_silent(capsys):
  with waiting.waiting("compiling"):
    pass
  assert capsys.readouterr().err == ""


def test_an_error_at_once_stays_one_line(capsys, monkeypatch):
  monkeypatch.setattr(waiting, "_speaks", True)
  with pytest.raises(ValueError), waiting.waiting("loading"):
    raise ValueError("no such folder")
  assert capsys.readouterr().err == ""
