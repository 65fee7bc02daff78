"""The inpaint command: files of its three tasks, and one-line errors for wrong flags."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prefpaint_jax import testing
from prefpaint_jax.data import images as image_io
from prefpaint_jax.data.depth import synthetic_depth
from prefpaint_jax.data.images import save_png

ROOT = Path(__file__).parents[1]
SIZE = (10, 12)

# Runs in a new process, because the flags of two commands cannot be defined in one process.
RUN_ALL = """
import contextlib, io, json, sys
import jax
from absl import flags
from absl.testing import flagsaver
from prefpaint_jax import inpaint
jax.config.update("jax_disable_most_optimizations", True)  # compilation takes half the time
answers = {}
for name, arguments in json.load(sys.stdin).items():
  with flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()) as printed:
    try:
      flags.FLAGS(["inpaint", *arguments])
      inpaint.main()
      answers[name] = printed.getvalue()
    except ValueError as error:
      answers[name] = f"error: {error}"
print(json.dumps(answers))
"""
WRONG = {
  "nothing": ([], "nothing to inpaint; give --mask=M.png, --extend=left=256 .* or --move=x,y,z"),
  "samples of nothing": (["--num_samples=2"], "nothing to inpaint"),
  "two tasks": (["--mask=mask.png", "--extend=left=4"], "--mask and --extend do not go together"),
  "samples of an extension": (
    ["--extend=left=4", "--num_samples=2"],
    "--num_samples and --extend do not go together",
  ),
  "best view": (["--move=1,0,0", "--best"], "--best and --move do not go together"),
  "depth": (["--depth=depth.npy"], "--depth without --move or --turn"),
  "views": (["--views=3"], "--views without --move or --turn"),
  "best": (["--mask=mask.png", "--num_samples=2", "--best"], "--best without --reward"),
  "no number": (["--extend=left=abc"], "left is 'abc'; expected a whole number"),
  "no side": (["--extend=up=3"], "'up' is no side"),
  "negative": (["--extend=left=-3"], "left is -3; expected 0 or more"),
  "zero": (["--extend=left=0,top=0"], "all sides are 0"),
  "no depth": (["--move=1,0,0"], "--depth is missing; .* --depth=synthetic"),
  "short move": (["--move=1,0", "--depth=synthetic"], "--move=1,0: give 3 numbers"),
  "worded turn": (["--turn=left,0", "--depth=synthetic"], "--turn=left,0: give 2 numbers"),
  "other depth": (
    ["--move=1,0,0", "--depth=small.npy"],
    "depth is 5x4 pixels, its image 12x10",
  ),
  "camera": (["--move=1,0,0", "--intrinsics=3"], "give fx,fy,cx,cy"),
  "GIF": (["--extend=left=4", "--output=O.gif"], "ends in .png, .jpg, .jpeg or .webp$"),
  "no adapters": (["--mask=mask.png", "--lora=nowhere"], "nowhere: not found; give a file of LoRA"),
  "nameless adapters": (["--mask=mask.png", "--lora="], "lora is ''; expected"),
  "worded scale": (
    ["--mask=mask.png", "--lora=policy:much"],
    "its scale is 'much'; expected a num",
  ),
  "BMP": (["--move=1,0,0", "--output=O.bmp"], "ends in .png, .jpg, .jpeg, .webp or .gif$"),
  "photograph": (["--mask=photo.png"], "photo.png: a colour photograph; expected a mask"),
  "folder of masks": (["--mask=masks"], "--mask=masks is a folder; expected the mask of image.png"),
}
RIGHT = {
  "one": ["--mask=mask.png"],
  "folder": ["--image=images", "--mask=masks", "--output=filled"],
  "small": ["--mask=mask.png", "--output=small.jpg"],
  "three": ["--mask=mask.png", "--num_samples=3", "--reward=reward"],
  "best": ["--mask=mask.png", "--num_samples=3", "--reward=reward", "--best"],
  "said": ["--mask=mask.png", "--text=a cold house", "--guidance_scale=1", "--reward=mine.py:says"],
  "extended": ["--extend=left=5,bottom=3"],
  "view": ["--move=0.3,0,0", "--depth=depth.npy", "--intrinsics=10,10,5.5,4.5"],
  "strip": ["--move=0.3,0,0", "--turn=-4,2", "--depth=synthetic", "--views=3"],
  "sweep": ["--turn=10,0", "--depth=depth.npy", "--views=3", "--output=sweep.gif"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("inpaint")
  testing.tiny_inpainter().save_pretrained(folder / "policy")
  testing.tiny_reward().save_pretrained(folder / "reward")
  (folder / "mine.py").write_text(
    "def says(masks, texts):\n"
    "  return [len(text) + mask.sum() for mask, text in zip(masks, texts)]\n"
    "says.host = True\n"
  )
  coarse = np.random.default_rng(0).uniform(size=(3, 3, 3))
  image = np.round(255 * image_io.resize_image(coarse, SIZE)).astype(np.uint8)
  mask = np.zeros(SIZE, np.uint8)
  mask[:, 6:] = 255
  save_png(folder / "image.png", image)
  save_png(folder / "mask.png", mask)
  noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
  save_png(folder / "photo.png", noise)
  for name, kind in (("images", "image"), ("masks", "mask")):
    (folder / name).mkdir()
    shutil.copy(folder / f"{kind}.png", folder / name / "a.png")
    shutil.copy(folder / f"{kind}.png", folder / name / f"b{'_mask' * (kind == 'mask')}.png")
  np.save(folder / "depth.npy", synthetic_depth(1, *SIZE))
  np.save(folder / "small.npy", np.ones((4, 5)))
  return folder


@pytest.fixture(scope="module")
def answers(folder) -> dict[str, str]:
  """Returns the printed text or the error of each case."""
  common = ["--model=policy", "--image=image.png", "--num_steps=2"]
  cases = {f"wrong {name}": arguments for name, (arguments, _) in WRONG.items()}
  cases |= {f"right {name}": arguments for name, arguments in RIGHT.items()}
  cases = {
    name: [*common, f"--output={name.split()[-1]}.png", *arguments]
    for name, arguments in cases.items()
  }
  done = subprocess.run(
    [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{RUN_ALL}"],
    input=json.dumps(cases),
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def read(path: Path) -> np.ndarray:
  return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags_give_a_one_line_error(answers, name):
  answer = answers[f"wrong {name}"]
  assert answer.startswith("error: ") and "\n" not in answer
  assert re.search(WRONG[name][1], answer), answer


@pytest.mark.slow
def test_samples_are_written_to_numbered_files_with_their_rewards(answers, folder):
  image = read(folder / "image.png")
  printed = answers["right three"].splitlines()
  for i in range(3):
    with Image.open(folder / f"three_{i}.png") as file:
      text = file.text
    assert text.keys() == {"model", "seed", "reward"}
    assert printed[i] == f"three_{i}.png reward {text['reward']}"
    np.testing.assert_array_equal(read(folder / f"three_{i}.png")[:, :6], image[:, :6])
  assert answers["right one"] == "one.png\n"
  assert read(folder / "one.png").shape == image.shape


@pytest.mark.slow
def test_a_folder_gives_the_files_of_its_images_one_by_one(answers, folder):
  assert answers["right folder"] == "filled/a.png\nfilled/b.png\n"
  for name in "ab":
    np.testing.assert_array_equal(read(folder / "filled" / f"{name}.png"), read(folder / "one.png"))


@pytest.mark.slow
def test_the_suffix_gives_the_format(answers, folder):
  with Image.open(folder / "small.jpg") as file:
    assert file.format == "JPEG" and file.getexif()[0x010E] == "model: policy; seed: 0"
  assert np.abs(read(folder / "small.jpg").astype(int) - read(folder / "one.png")).mean() < 8


@pytest.mark.slow
def test_a_reward_reads_the_mask_and_the_text(answers):
  score = 10 * 6 + len("a cold house")
  assert answers["right said"] == f"said.png reward {score:.4f}\n"


@pytest.mark.slow
def test_best_writes_the_sample_of_the_greatest_reward_and_lists_all_rewards(answers, folder):
  rewards = [Image.open(folder / f"three_{i}.png").text["reward"] for i in range(3)]
  best = max(range(3), key=lambda i: float(rewards[i]))
  text = Image.open(folder / "best.png").text
  assert text == {
    "model": "policy",
    "seed": "0",
    "reward": rewards[best],
    "rewards": " ".join(rewards),
    "sample": str(best),
  }
  np.testing.assert_array_equal(read(folder / "best.png"), read(folder / f"three_{best}.png"))
  assert not (folder / "best_0.png").exists()
  assert answers["right best"] == f"best.png reward {rewards[best]} the best of 3\n"


@pytest.mark.slow
def test_extension_keeps_the_pixels_of_the_image(answers, folder):
  assert answers["right extended"] == "extended.png\n"
  extended = read(folder / "extended.png")
  assert extended.shape == (13, 17, 3)
  np.testing.assert_array_equal(extended[:10, 5:], read(folder / "image.png"))


@pytest.mark.slow
def test_views_are_written_to_an_image_a_strip_or_a_gif(answers, folder):
  assert read(folder / "view.png").shape == (*SIZE, 3)
  strip = read(folder / "strip.png")
  assert strip.shape == (SIZE[0] + 4, 4 * (SIZE[1] + 4), 3)
  np.testing.assert_array_equal(strip[2:-2, 2:14], read(folder / "image.png"))
  assert answers["right sweep"] == "sweep.gif\n"
  with Image.open(folder / "sweep.gif") as gif:
    assert gif.n_frames == 4 and gif.size == SIZE[::-1]


def test_error_of_the_command_is_one_line(folder):
  done = subprocess.run(
    [sys.executable, "-m", "prefpaint_jax.inpaint", "--image=none.png", "--output=o.png"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1].startswith("error: nothing to inpaint; give --mask=")
