"""Tests of workdirs: one command and one process each, and nothing of a user's is overwritten."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from preference_world import load_config

from prefpaint_jax.runtime.workdir import LOCK, exclusive, open_workdir, read_workdir

WRITES = ("checkpoints", "metrics.jsonl")


def open_as(command: str, workdir: Path, **fields):
  return open_workdir(ConfigDict({"seed": 0, "size": 8} | fields), workdir, command, WRITES)


def contents(folder: Path) -> dict[str, bytes]:
  files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("progress", [(), ("checkpoints/1",), ("batches/00000.npz",)])
def test_workdir_of_another_command_is_refused_and_unchanged(tmp_path, progress):
  with open_as("train", tmp_path / "run"):
    pass
  for name in progress:
    (tmp_path / "run" / name).parent.mkdir()
    (tmp_path / "run" / name).write_text("saved")
  before = contents(tmp_path / "run")
  message = "run is the workdir of train; give another --workdir to evaluate"
  with pytest.raises(ValueError, match=message), open_as("evaluate", tmp_path / "run"):
    pass
  assert contents(tmp_path / "run") == before


def test_run_of_an_earlier_version_had_no_guidance(tmp_path):
  with open_as("collect", tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "1").write_text("saved")
  with open_as("collect", tmp_path, guidance_scale=1.0):
    pass
  (tmp_path / "config.json").write_text('{"command": "collect", "seed": 0, "size": 8}')
  message = r"guidance_scale was 1\.0, now 3\.0"
  with pytest.raises(ValueError, match=message), open_as("collect", tmp_path, guidance_scale=3.0):
    pass


def test_evaluation_of_an_earlier_version_had_two_policies_and_no_protocol(tmp_path):
  config = load_config("eval")
  (tmp_path / "batches").mkdir()
  (tmp_path / "batches" / "00000.npz").write_text("saved")
  new = ("rivals", "protocol", "blended", "lpips")
  earlier = {name: value for name, value in config.to_dict().items() if name not in new}
  (tmp_path / "config.json").write_text(json.dumps({"command": "evaluate"} | earlier))
  opened = lambda: open_workdir(config, tmp_path, "evaluate", (), progress="batches/*.npz")
  config.protocol = "brushnet"
  with pytest.raises(ValueError, match='protocol was "", now "brushnet"'), opened():
    pass
  config.protocol = ""
  with opened():
    pass


def test_config_of_a_model_is_not_replaced(tmp_path):
  (tmp_path / "config.json").write_text('{"hidden_size": 8, "architectures": ["CLIPModel"]}')
  before = contents(tmp_path)
  with (
    pytest.raises(ValueError, match="is the workdir of another program"),
    open_as("train", tmp_path),
  ):
    pass
  assert contents(tmp_path) == before


COMMANDS = {
  "train": "rl",
  "evaluate": "eval",
  "collect": "collect",
  "pretrain": "pretrain",
  "train_reward": "reward",
  "data.preferences": "preferences",
}


@pytest.mark.parametrize("owner", COMMANDS)
def test_run_of_an_earlier_version_is_opened_by_its_own_command_alone(tmp_path, owner):
  configs = {command: load_config(name) for command, name in COMMANDS.items()}
  file = tmp_path / "config.json"
  for command, config in configs.items():
    file.write_text(json.dumps(configs[owner].to_dict()))  # names no command
    before = file.read_bytes()
    if command == owner:
      with open_workdir(config, tmp_path, command, ()):
        pass
    else:
      message = "is the workdir of another program"
      with pytest.raises(ValueError, match=message), open_workdir(config, tmp_path, command, ()):
        pass
      assert file.read_bytes() == before


def test_run_of_an_earlier_version_is_resumed(tmp_path):
  # Its config.json names no command and has not all of today's fields.
  (tmp_path / "config.json").write_text('{"seed": 0, "size": 8}')
  with open_as("train", tmp_path, added=True):
    pass
  assert read_workdir(tmp_path, "train").added


@pytest.mark.parametrize("present", WRITES)
def test_folder_that_no_command_made_is_refused(tmp_path, present):
  (tmp_path / present).write_text("mine")
  message = f"has {present} but no config.json, so train did not make it"
  with pytest.raises(ValueError, match=message), open_as("train", tmp_path):
    pass
  assert contents(tmp_path) == {present: b"mine"}


def test_folder_with_other_files_is_accepted_and_said_once(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr("absl.logging.warning", lambda text, *values: said.append(text % values))
  (tmp_path / "log.txt").write_text("mine")
  for _ in range(2):
    with open_as("train", tmp_path):
      pass
  (line,) = said
  assert line.startswith(f"{tmp_path} holds files of something else, such as log.txt; train")
  assert read_workdir(tmp_path).to_dict() == {"seed": 0, "size": 8}


def test_failed_start_leaves_no_folder(tmp_path):
  with pytest.raises(KeyError), open_as("train", tmp_path / "new"):
    raise KeyError
  assert not (tmp_path / "new").exists()
  with pytest.raises(KeyError), open_as("train", tmp_path / "new"):
    (tmp_path / "new" / "metrics.jsonl").write_text("{}")
    raise KeyError
  assert (tmp_path / "new" / "config.json").is_file()


def test_refused_start_leaves_the_config_of_a_run_that_has_saved(tmp_path):
  save_every = lambda: read_workdir(tmp_path).save_every
  with open_as("train", tmp_path, save_every=1):
    pass
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  with pytest.raises(KeyError), open_as("train", tmp_path, save_every=2):
    raise KeyError  # the checkpoint does not match
  assert save_every() == 1
  with pytest.raises(KeyError), open_as("train", tmp_path, save_every=3) as write_config:
    write_config()
    raise KeyError  # later
  assert save_every() == 3
  with open_as("train", tmp_path, save_every=4):
    assert save_every() == 3
  assert save_every() == 4


def test_readers_name_the_command_of_a_workdir(tmp_path):
  with open_as("evaluate", tmp_path):
    pass
  with pytest.raises(ValueError, match="is the workdir of evaluate; give one of train"):
    read_workdir(tmp_path, "train")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", r"config\.json is not JSON \(empty\)"),
    ("[1]", r"config\.json holds a JSON value of type list; expected an object"),
    ('{"seed": ', r"config\.json is not JSON"),
  ],
)
def test_damaged_config_is_named_and_kept(tmp_path, text, message):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=message), open_as("train", tmp_path):
    pass
  assert (tmp_path / "config.json").read_text() == text


def test_file_as_workdir_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="file is a file; give a folder as --workdir"):
    open_as("train", tmp_path / "file").__enter__()


HOLD = """
import sys, time
from pathlib import Path
from prefpaint_jax.runtime.workdir import exclusive
with exclusive(Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


def hold(folder: Path) -> subprocess.Popen:
  """Starts a process that holds a folder, and waits until it does."""
  command = [sys.executable, "-c", textwrap.dedent(HOLD), str(folder)]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  return process


def test_second_process_is_refused_with_the_name_of_the_first(tmp_path):
  process = hold(tmp_path)
  before = contents(tmp_path)
  try:
    message = f"is in use by process {process.pid} on {socket.gethostname()}"
    with pytest.raises(ValueError, match=message), open_as("train", tmp_path):
      pass
    assert contents(tmp_path) == before
  finally:
    process.kill()
    process.communicate()
  with open_as("train", tmp_path):  # a killed process leaves no lock
    pass


def test_lock_is_released_on_an_error_and_held_once_in_a_process(tmp_path):
  with pytest.raises(KeyError), exclusive(tmp_path):
    raise KeyError
  with exclusive(tmp_path):
    message = f"is in use by process {os.getpid()}"
    with pytest.raises(ValueError, match=message), exclusive(tmp_path):
      pass


def test_command_is_kept_beside_the_fields(tmp_path):
  with open_as("train", tmp_path):
    pass
  stored = json.loads((tmp_path / "config.json").read_text())
  assert stored == {"command": "train", "seed": 0, "size": 8}
