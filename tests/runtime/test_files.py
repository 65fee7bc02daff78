"""JSON files: what is read, and the one line for each broken file."""

import json

import pytest

from prefpaint_jax.runtime.files import (
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
