"""Files: folders of killed processes, JSON, and the one line for each broken file."""

import json
import subprocess
import sys
import textwrap

import pytest

from prefpaint_jax.runtime.files import (
  atomic_folder,
  atomic_path,
  check_folder,
  check_output,
  check_output_folder,
  read_json,
  read_json_lines,
  write_json,
)


def test_json_is_read_as_it_was_written(tmp_path):
  content = {"a": [1, 2.5, None], "b": {"c": "é"}}
  write_json(tmp_path / "x.json", content)
  assert read_json(tmp_path / "x.json") == content


@pytest.mark.parametrize(
  "content, expected, words",
  [
    (b"", dict, "is not JSON (empty); expected an object"),
    (b'{"a": 1,\n "b": }', dict, "is not JSON (line 2, column 7: Expecting value)"),
    (b"[1]", dict, "holds a JSON value of type list; expected an object"),
    (b"null", list, "holds a JSON value of type NoneType; expected an array"),
    (b"\xff\xfe\x00x", dict, "is not"),
    (b"\x80", dict, "is not text in UTF-8"),
    (b"[" * 100_000, list, "is "),
  ],
)
def test_broken_json_is_one_line_with_file_and_place(tmp_path, content, expected, words):
  (tmp_path / "x.json").write_bytes(content)
  with pytest.raises(ValueError) as error:
    read_json(tmp_path / "x.json", expected)
  assert str(error.value).startswith(str(tmp_path / "x.json"))
  assert words in str(error.value)
  assert "\n" not in str(error.value)


def test_lines_of_json_name_the_broken_line(tmp_path):
  file = tmp_path / "x.jsonl"
  file.write_text(json.dumps({"id": 1}) + "\n\n" + json.dumps({"id": 2}) + "\n")
  assert read_json_lines(file, ["id"]) == [{"id": 1}, {"id": 2}]
  with pytest.raises(ValueError, match=r"x\.jsonl, line 1: no field 'name'"):
    read_json_lines(file, ["name"])
  file.write_text('{"id": 1}\n{"id"\n')
  with pytest.raises(ValueError, match=r"x\.jsonl, line 2 is not JSON"):
    read_json_lines(file)


def test_check_of_an_output_leaves_nothing_and_admits_what_can_be_written(tmp_path):
  (tmp_path / "old.png").write_text("old")
  for name in ("old.png", "new.png", "new/folder/x.png"):
    check_output(tmp_path / name, {"--image": tmp_path / "other.png", "--mask": None})
  check_folder(tmp_path / "new")
  check_output_folder(tmp_path / "new")
  check_output_folder(tmp_path, replaces=["old.png"])
  assert [path.name for path in tmp_path.iterdir()] == ["old.png"]


def test_folder_without_the_right_to_write_is_named(tmp_path, monkeypatch):
  def refuse(dir):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write everywhere
  message = f"{tmp_path} takes no files .Permission denied.; give another path"
  for check in (check_output, check_output_folder, check_folder):
    with pytest.raises(ValueError, match=message):
      check(tmp_path / "a" / "b")


@pytest.mark.parametrize("earlier", [None, "empty", "whole"])
def test_folder_of_a_process_killed_at_any_step_is_whole_after_the_next_call(tmp_path, earlier):
  code = f"""
    import os, pathlib, shutil, sys
    from prefpaint_jax.runtime.files import atomic_folder

    root, earlier = pathlib.Path({str(tmp_path)!r}), {earlier!r}
    names, steps = ("a", "b"), iter(())

    def write(path, text):
      with atomic_folder(path, replaces=names) as new:
        for name in names:
          next(steps, None)
          (new / name).write_text(text)

    def content(path):
      return {{file.name: file.read_text() for file in path.iterdir()}}

    def killable(function):
      def call(*arguments, **options):
        next(steps, None)
        return function(*arguments, **options)
      return call

    def until(number):
      for _ in range(number):
        yield
      os._exit(9)

    for module, name in [(os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")]:
      setattr(module, name, killable(getattr(module, name)))
    kills = 0
    for number in range(100):
      path = root / str(number) / "new"
      path.parent.mkdir()
      if earlier:
        path.mkdir()
      if earlier == "whole":
        write(path, "earlier")
      child = os.fork()
      if child == 0:
        steps = until(number)
        write(path, "later")
        os._exit(0)
      status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
      found = path.exists() and content(path)
      whole = [{{name: text for name in names}} for text in ("earlier", "later")]
      assert not found or found in whole, found
      if not found or earlier == "whole":  # export refuses a folder with files
        write(path, "last")
        assert content(path) == {{name: "last" for name in names}}
      assert [other.name for other in path.parent.iterdir()] == ["new"], status
      if status == 0:
        break
      kills += 1
    print(kills)
  """
  ended = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
  )
  assert ended.returncode == 0, ended.stderr
  assert 3 < int(ended.stdout) < 99


@pytest.mark.parametrize("writer", [atomic_path, atomic_folder])
def test_error_of_a_full_disk_names_the_output_and_leaves_the_earlier_one(tmp_path, writer):
  path = tmp_path / "new"
  with writer(path) as partial:
    (partial if writer is atomic_path else partial / "file").write_text("earlier")
  options = {"replaces": ["file"]} if writer is atomic_folder else {}
  with (
    pytest.raises(OSError, match="No space left on device") as error,
    writer(path, **options),
    open("/dev/full", "w", buffering=1) as full,
  ):
    full.write("\n")
  assert error.value.filename == str(path)
  file = path if writer is atomic_path else path / "file"
  assert file.read_text() == "earlier"
  assert [other.name for other in tmp_path.iterdir()] == ["new"]
