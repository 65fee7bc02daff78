"""Inpaints the missing part of an image, extends it, or renders new views of it.

  python -m prefpaint_jax.inpaint --model=MODEL --image=I --mask=M --output=O.png
  python -m prefpaint_jax.inpaint --model=MODEL --image=I --extend=left=256,right=256 --output=O.png
  python -m prefpaint_jax.inpaint --model=MODEL --image=I --depth=D.npy --move=0.3,0,0 \\
    --turn=-5,0 --views=8 --output=O.gif

The mask is white where the image is missing. Folders as --image, --mask and --output are inpainted
image by image: the mask of NAME.jpg is NAME.* or NAME_mask.*, or one file for all, and the result
is NAME.png. Elsewhere the suffix of --output gives the format: PNG, JPEG or WebP.

With --num_samples=N the samples are written to O_0.png, O_1.png, ...; with --best only the sample
of the greatest reward is written, to O.png. Several views are written to a GIF, or side by side to
a PNG, after the image itself.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from prefpaint_jax.data import images as image_io
from prefpaint_jax.data.depth import load_depth, synthetic_depth
from prefpaint_jax.data.grids import image_grid
from prefpaint_jax.data.image_files import FORMATS, Pair, check_drawn, find_pairs, save_image
from prefpaint_jax.data.images import to_bytes
from prefpaint_jax.data.warping import Intrinsics
from prefpaint_jax.editing import extension
from prefpaint_jax.editing.extension import Borders
from prefpaint_jax.editing.views import sweep
from prefpaint_jax.inpainter import Inpainter, open_policy
from prefpaint_jax.rewards import load_reward
from prefpaint_jax.rewards.objective import warn_without_texts
from prefpaint_jax.runtime import cli
from prefpaint_jax.runtime.cli import within
from prefpaint_jax.runtime.config_fields import COUNT, ETA, GUIDANCE_SCALE, NUM_STEPS, SEED
from prefpaint_jax.runtime.files import atomic_path, check_output
from prefpaint_jax.runtime.metrics import progress
from prefpaint_jax.runtime.ranges import Number, Several
from prefpaint_jax.runtime.waiting import waiting
from prefpaint_jax.weights import adapters

_MODEL = flags.DEFINE_string(
  "model", "mini", "Folder, single file, hub name, workdir of a run, or mini."
)
_LORA = flags.DEFINE_string("lora", None, "LoRA adapters of the model: FILE or FILE:SCALE.")
_IMAGE = flags.DEFINE_string("image", None, "Image, or a folder of images.", required=True)
_OUTPUT = flags.DEFINE_string(
  "output", None, "PNG, JPEG or WebP to write, GIF for views, or a folder.", required=True
)
_TEXT = flags.DEFINE_string("text", "", "Description of the missing part, or empty.")
_NEGATIVE = flags.DEFINE_string("negative_text", None, "Description of what not to show.")
_NUM_STEPS = flags.DEFINE(within(NUM_STEPS), "num_steps", 50, "Denoising steps.")
_ETA = flags.DEFINE(within(ETA), "eta", 0.0, "Noise in each step, 0 to 1.")
_GUIDANCE = flags.DEFINE(
  within(GUIDANCE_SCALE), "guidance_scale", 7.5, "Strength of the text; 1 is none."
)
_SEED = flags.DEFINE(
  within(SEED), "seed", 0, "The same seed gives the same samples; 0 to 4294967295."
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
_MASK = flags.DEFINE_string("mask", None, "Mask, white = missing, or a folder of them.")
_NUM_SAMPLES = flags.DEFINE(within(COUNT), "num_samples", 1, "Number of samples.")
_REWARD = flags.DEFINE_string(
  "reward", None, "Reward that scores the samples: mini, seam, a folder, FILE.py:FUNCTION, ..."
)
_BEST = flags.DEFINE_bool("best", False, "Write only the sample of the greatest reward.")
_EXTEND = flags.DEFINE_string("extend", None, "Pixels to add: left=256,right=256,bottom=9.")
_MOVE = flags.DEFINE_string("move", None, "New view: x,y,z, to the right, down and forward.")
_TURN = flags.DEFINE_string("turn", None, "New view: yaw,pitch in degrees, to the right and up.")
_DEPTH = flags.DEFINE_string("depth", None, "Depth of the image: .npy, 16-bit PNG, or synthetic.")
_INTRINSICS = flags.DEFINE_string(
  "intrinsics",
  None,
  "Camera: focal lengths and centre in pixels, fx,fy,cx,cy, or a file of them; without it, a view "
  "of 60 degrees.",
)
_VIEWS = flags.DEFINE(within(COUNT), "views", 1, "Number of views along the way.")
_INPUTS = ("image", "mask", "depth", "intrinsics", "reward", "model")  # flags that may name a file


def main() -> None:
  """Runs the task that the flags ask for."""
  task = _choose_task()
  model = Path(_MODEL.value)
  if model.suffix.lower() in FORMATS and model.is_file():
    raise ValueError(
      f"--model={model}: an image; expected a model; give a folder, hub name, workdir or mini"
    )
  pairs = [Pair(Path(_IMAGE.value), Path(), Path(_OUTPUT.value))]
  if task is _inpaint:
    pairs = find_pairs(_IMAGE.value, _MASK.value, _OUTPUT.value)
  inputs = {f"--{name}": flags.FLAGS[name].value for name in _INPUTS}
  for pair in pairs:
    files = inputs | {"--image": pair.image, "--mask": pair.mask if task is _inpaint else None}
    for file in _files(pair.output):
      check_output(file, files)
  if task is _inpaint:
    _inpaint(pairs)
  else:
    task(image_io.load_image(_IMAGE.value), Path(_OUTPUT.value))


def _choose_task() -> Callable[..., None]:
  """Returns the task whose flags are given; raises ValueError for none, or for two tasks."""
  tasks = {
    _inpaint: ("mask", "num_samples", "reward", "best"),
    _extend: ("extend",),
    _show_views: ("move", "turn", "depth", "intrinsics", "views"),
  }
  is_given = lambda name: flags.FLAGS[name].value != flags.FLAGS[name].default
  given = {task: list(filter(is_given, names)) for task, names in tasks.items()}
  chosen = [task for task in tasks if given[task]]
  if len(chosen) > 1:
    first, second = (given[task][0] for task in chosen[:2])
    raise ValueError(f"--{first} and --{second} do not go together; leave one of them out")
  if given[_show_views] and not (_MOVE.value or _TURN.value):
    raise ValueError(
      f"--{given[_show_views][0]} without --move or --turn; give the camera of the new view"
    )
  if not chosen or (given[_inpaint] and not _MASK.value):
    raise ValueError(
      "nothing to inpaint; give --mask=M.png, --extend=left=256 (and other sides), or --move=x,y,z"
    )
  if chosen == [_inpaint] and Path(_IMAGE.value).is_dir():
    return _inpaint
  suffixes = (*FORMATS, *((".gif",) if chosen == [_show_views] else ()))
  if Path(_OUTPUT.value).suffix.lower() not in suffixes:
    ends = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
    raise ValueError(f"--output={_OUTPUT.value}: give a name that ends in {ends}")
  return chosen[0]


# ------------------------------------------------------------------------------------------- tasks
def _inpaint(pairs: Sequence[Pair]) -> None:
  """Inpaints the pixels under the mask of each image and writes the samples."""
  if _BEST.value and not _REWARD.value:
    raise ValueError("--best without --reward; name the reward that chooses, --reward=mini")
  load = lambda pair: image_io.load_pairs(str(pair.image), str(pair.mask))
  for pair in pairs:  # all are checked before the model is loaded
    check_drawn(pair.mask)
    load(pair)
  inpainter = _open_policy()
  reward = load_reward(_REWARD.value, _DTYPE.value) if _REWARD.value else None
  warn_without_texts([reward] if reward else [], bool(_TEXT.value), _IMAGE.value)
  written = []
  with _settings(len(pairs)) as settings:
    for pair in pairs:
      pair.output.parent.mkdir(parents=True, exist_ok=True)
      (image,), (mask,) = load(pair)
      samples = inpainter(image, mask, num_samples=_NUM_SAMPLES.value, **settings)
      rewards = None
      if reward:
        known, one = (image * (1.0 - mask))[None], mask[None]
        rewards = reward(samples, known, one, _TEXT.value)
      written += _write(pair.output, samples, rewards)
  print(*written, sep="\n")


def _write(output: Path, samples: np.ndarray, rewards: np.ndarray | None) -> Iterator[str]:
  """Writes samples [S, H, W, 3], or the best of them, and yields a line for each file."""
  kept = range(len(samples))
  if _BEST.value:
    if not np.isfinite(rewards).any():
      raise ValueError(f"--reward={_REWARD.value}: no sample has a finite reward; give another one")
    kept = [int(np.argmax(np.where(np.isfinite(rewards), rewards, -np.inf)))]
  for name, i in zip(_files(output), kept, strict=True):
    text = {} if rewards is None else {"reward": f"{rewards[i]:.4f}"}
    message = [str(name), *(f"{field} {value}" for field, value in text.items())]
    if _BEST.value:
      text |= {"sample": str(i), "rewards": " ".join(f"{reward:.4f}" for reward in rewards)}
      message += [f"the best of {len(rewards)}"]
    save_image(name, to_bytes(samples[i]), _fields(**text))
    yield " ".join(message)


def _extend(image: np.ndarray, output: Path) -> None:
  """Extends the image beyond its borders and writes it."""
  borders = Borders.parse(_EXTEND.value)
  inpainter = _open_policy()
  plan = extension.plan_windows(inpainter, image.shape[:2], borders)
  with _settings(len(plan.batches)) as settings:
    extended = extension.extend(inpainter, image, *borders, **settings)
  save_image(output, to_bytes(extended), _fields(extend=_EXTEND.value))
  print(output)


def _show_views(image: np.ndarray, output: Path) -> None:
  """Renders views along the way to a new view and writes them."""
  move = _numbers("move", _MOVE.value or "0,0,0", 3)
  turn = _numbers("turn", _TURN.value or "0,0", 2)
  intrinsics = Intrinsics.parse(_INTRINSICS.value) if _INTRINSICS.value else None
  depth = _read_depth(image.shape[:2])
  inpainter = _open_policy()
  with _settings(_VIEWS.value) as settings:
    views = sweep(inpainter, image, depth, intrinsics, move, turn, _VIEWS.value, **settings)
  if output.suffix.lower() == ".gif":
    _save_gif(output, [image, *views])
  else:
    shown = to_bytes(views[0])
    if len(views) > 1:
      shown = image_grid(np.stack([image, *views]), columns=len(views) + 1)
    text = {"move": ",".join(map(str, move)), "turn": ",".join(map(str, turn))}
    save_image(output, shown, _fields(**text))
  print(output)


# ---------------------------------------------------------------------------------- flags and files
def _open_policy() -> Inpainter:
  """Loads the model; says what the embedded one is for."""
  if _MODEL.value == "mini":
    advice = "mini inpaints at 32 pixels, as an example; for photographs give --model=FOLDER"
    print(advice, file=sys.stderr)
  if _LORA.value is not None:
    adapters.parse(_LORA.value)  # raises ValueError before the model is loaded
  with waiting(f"loading {_MODEL.value}"):
    inpainter = open_policy(_MODEL.value, _DTYPE.value)
    if _LORA.value is not None:
      inpainter.add_lora(_LORA.value)
  return inpainter


@contextmanager
def _settings(calls: int = 1) -> Iterator[dict[str, Any]]:
  """Yields keyword arguments for `Inpainter`, with one progress bar for `calls` of its calls."""

  def report(steps: int) -> None:
    compiling.close()
    bar.update(steps)

  with ExitStack() as compiling, closing(progress(calls * _NUM_STEPS.value, unit="step")) as bar:
    compiling.enter_context(waiting("compiling", f"{_MODEL.value} {_DTYPE.value}"))
    yield {
      "key": jax.random.key(_SEED.value),
      "num_steps": _NUM_STEPS.value,
      "eta": _ETA.value,
      "text": _TEXT.value,
      "negative_text": _NEGATIVE.value,
      "guidance_scale": _GUIDANCE.value,
      "report": report,
    }


def _numbers(flag: str, text: str, count: int) -> tuple[float, ...]:
  """Parses `count` finite numbers; raises ValueError that names the flag."""
  try:
    numbers = tuple(float(number) for number in text.split(","))
  except ValueError:
    numbers = ()
  if not Several(Number(-1e6, 1e6), count).contains(numbers):
    raise ValueError(f"--{flag}={text}: give {count} numbers from -1e6 to 1e6, separated by commas")
  return numbers


def _read_depth(size: tuple[int, int]) -> np.ndarray:
  """Loads the depth [height, width] that --depth names, or makes a synthetic one from the seed."""
  if not _DEPTH.value:
    raise ValueError(
      "--depth is missing; give a .npy or 16-bit PNG file, or --depth=synthetic for a random scene"
    )
  if _DEPTH.value == "synthetic":
    return synthetic_depth(_SEED.value, *size)
  return load_depth(_DEPTH.value, size)


def _files(output: Path) -> list[Path]:
  """Returns the files that the command writes: `output`, or one for each sample."""
  count = 1 if _BEST.value else _NUM_SAMPLES.value
  return [output] if count == 1 else [output.with_stem(f"{output.stem}_{i}") for i in range(count)]


def _fields(**others: str) -> dict[str, str]:
  """Returns the text fields of an image file: model, adapters, seed and `others`."""
  lora = {"lora": _LORA.value} if _LORA.value else {}
  return {"model": _MODEL.value, **lora, "seed": str(_SEED.value)} | others


def _save_gif(path: Path, images: list[np.ndarray]) -> None:
  """Writes images [H, W, 3] in [0, 1] as an endless GIF of 150 ms a frame."""
  first, *others = (Image.fromarray(to_bytes(image)) for image in images)
  with atomic_path(path) as partial:
    first.save(partial, format="GIF", save_all=True, append_images=others, duration=150, loop=0)


if __name__ == "__main__":
  cli.run(main)
