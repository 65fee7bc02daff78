"""The commands and programs in README.md and docs/ are complete: they are parsed, and run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prefpaint_jax import Inpainter, mini
from prefpaint_jax.rewards import load_reward

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])


def snippets(language: str) -> list[tuple[str, str]]:
  """Returns (page:line, content) of the code blocks in a language."""
  found = []
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
      found.append((f"{page.name}:{text[: match.start()].count(chr(10)) + 1}", match[1]))
  return found


def commands() -> list[tuple[str, list[str]]]:
  """Returns (page:line, words) of the commands of this package."""
  found = []
  for place, block in snippets("sh"):
    for line in block.replace("\\\n", " ").splitlines():
      for words in re.findall(r"python -m prefpaint_jax\.(.*?)(?= && |$)", line):
        found.append((place, shlex.split(words, comments=True)))
  return found


# Parses each command line in a fork of one process, up to the call of the command's function.
PARSE = """
import json, os, runpy, sys, tempfile
from absl import app
import prefpaint_jax.train, prefpaint_jax.evaluate, prefpaint_jax.collect, matplotlib
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.config_fields import CONFIGS

def parse(main, flags_parser):
  flags_parser(sys.argv)
  if "config" in app.flags.FLAGS:
    names = [file for file, (_, commands) in CONFIGS.items() if words[0] in commands]
    check_fields(app.flags.FLAGS.config, *names)
  os._exit(0)

app.run = parse
failed = []
for place, words in json.load(sys.stdin):
  with tempfile.TemporaryFile("w+") as printed:
    child = os.fork()
    if not child:
      os.dup2(printed.fileno(), 2)
      sys.argv = list(words)
      sys.modules.pop(f"prefpaint_jax.{words[0]}", None)
      try:
        runpy.run_module(f"prefpaint_jax.{words[0]}", run_name="__main__", alter_sys=True)
      except BaseException as error:
        print(error, file=sys.stderr, flush=True)
      os._exit(1)
    if os.waitpid(child, 0)[1]:
      printed.seek(0)
      failed.append(f"{place}: {' '.join(words)}: {printed.read()}")
print(*failed, sep="\\n", end="")
"""


def test_every_command_in_the_docs_has_options_and_fields_that_exist():
  assert len(commands()) > 20
  ended = subprocess.run(
    [sys.executable, "-c", PARSE],
    input=json.dumps(commands()),
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert not ended.stdout, ended.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  """A folder with the files that the programs name."""
  folder = tmp_path_factory.mktemp("snippets")
  photo = Image.open(mini.locate("mini", "photos") / "coffee.jpg")
  photo.resize((96, 64)).save(folder / "photo.png")
  mask = np.zeros((64, 96), np.uint8)
  mask[16:48, 30:60] = 255
  Image.fromarray(mask).save(folder / "mask.png")
  (folder / "runs" / "reward").mkdir(parents=True)
  (folder / "runs" / "reward" / "reward").symlink_to(mini.locate("mini", "reward"))
  Inpainter.from_pretrained("mini").save_pretrained(folder / "aligned")  # as `export` does
  return folder


def test_the_rewards_of_the_docs_equal_their_definition(tmp_path):
  programs = [text for place, text in snippets("python") if place.startswith("rewards.md")]
  brightness = next(text for text in programs if text.startswith("# my_rewards.py"))
  service = next(text for text in programs if "host = True" in text)
  (tmp_path / "my_rewards.py").write_text(brightness)
  (tmp_path / "service.py").write_text(
    service + "\n\ndef ask_my_server(image, text):\n  return image[0, 0, 0] + len(text)\n"
  )
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(4, 6, 8, 3)).astype(np.float32)
  masks = np.zeros((2, 6, 8, 1), np.float32)
  masks[0, 2:4, 1:5], masks[1, :, 6:] = 1, 1
  masked = images[::2] * (1 - masks)
  scores = load_reward(f"{tmp_path}/my_rewards.py:brightness")(images, masked, masks)
  expected = [images[i][masks[i // 2][..., 0] == 1].mean() for i in range(4)]
  np.testing.assert_allclose(scores, expected, rtol=1e-5)
  scores = load_reward(f"{tmp_path}/service.py:service")(images, masked, masks, ["a", "bcd"])
  np.testing.assert_allclose(scores, images[:, 0, 0, 0] + [1, 1, 3, 3], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "program"), snippets("python"), ids=lambda x: x[:20])
def test_every_program_in_the_docs_runs(place, program, folder):
  if "import torch" in program:
    pytest.importorskip("torch", reason="stock diffusers needs torch: pip install torch")
  ended = subprocess.run(
    [sys.executable, "-c", program],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert ended.returncode == 0, f"{place}: {ended.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize(
  ("script", "arguments", "printed", "file"),
  [
    ("paint", [], "rewards, best first", "paint.png"),
    ("align_mini", ["2"], "mean reward", "align_mini.png"),
    ("label_and_fit", ["20"], "grey: reward", "label/reward/reward/config.json"),
  ],
)
def test_every_example_runs(script, arguments, printed, file, tmp_path):
  ended = subprocess.run(
    [sys.executable, str(ROOT / "docs" / "examples" / f"{script}.py"), *arguments],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert ended.returncode == 0, ended.stderr[-2000:]
  assert printed in ended.stdout and (tmp_path / file).is_file()
