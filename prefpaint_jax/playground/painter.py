"""The models behind the page: an upload becomes an image, an image with a mask becomes samples."""
# Shapes: S samples, H W pixels.

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, PngImagePlugin

from prefpaint_jax import mini
from prefpaint_jax.data.decoding import open_bytes
from prefpaint_jax.data.images import (
  load_image,
  load_mask,
  resize_image,
  resize_prompt,
  to_bytes,
)
from prefpaint_jax.data.prompts import final_split, open_prompts
from prefpaint_jax.data.records import encode_png
from prefpaint_jax.inpainter import Inpainter, open_policy
from prefpaint_jax.playground.jobs import Job
from prefpaint_jax.rewards import load_reward
from prefpaint_jax.runtime.config_fields import SEED
from prefpaint_jax.runtime.ranges import Integer
from prefpaint_jax.runtime.runs import open_run, pinned_step

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF")  # PIL runs programs to read others
MOST_SIDE = 4096
MOST_SHOWN = 1536  # pixels of a side that the page shows; downloads have all of them
MOST_TEXT = 1000
LONGEST = 2  # ratio of the sides of an image
RANGES = {"steps": Integer(1, 200), "samples": Integer(1, 8), "seed": SEED}
_DECODING = threading.Lock()  # one image at a time, because it takes 48 bytes a pixel


class Settings(NamedTuple):
  """What a job is asked for, besides image and mask."""

  steps: int = 50
  samples: int = 4
  seed: int = 0
  text: str = ""

  @classmethod
  def parse(cls, given: dict[str, Any]) -> "Settings":
    """Checks the fields of a request; raises ValueError that names one."""
    for name, value in given.items():
      if name not in cls._fields:
        raise ValueError(f"{name}: no such field; expected some of {', '.join(cls._fields)}")
      if name in RANGES and not RANGES[name].contains(value):
        raise ValueError(f"{name} is {str(value)[:40]!r}; expected {RANGES[name]}")
    text = given.get("text", "")
    if not isinstance(text, str) or len(text) > MOST_TEXT or not _is_unicode(text):
      raise ValueError(f"text: expected a text of at most {MOST_TEXT} characters")
    return cls(**given)


class Upload(NamedTuple):
  """An image that was sent: the file, and the part of it that is inpainted."""

  content: bytes
  box: tuple[slice, slice]  # rows and columns of the image that are kept
  full: tuple[int, int]  # (height, width) of the whole image
  shown: bytes  # PNG for the page

  @property
  def size(self) -> tuple[int, int]:
    """(height, width) of the part."""
    rows, columns = self.box
    return rows.stop - rows.start, columns.stop - columns.start

  def load(self) -> np.ndarray:
    """Decodes the part, [H, W, 3] in [0, 1]."""
    with _DECODING:
      return load_image(self.content)[self.box]


class Painter:
  """The model, the baseline beside which it is shown, and the reward that scores the samples.

  Args:
    model: folder, single file, hub name, workdir of a run, or "mini".
    baseline: the same; default: the base policy of the run if `model` is a workdir, else none.
    reward: as for `load_reward`; None: no scores.
    lora: adapters of the model, FILE or FILE:SCALE.
  """

  def __init__(
    self,
    model: str,
    baseline: str | None = None,
    reward: str | None = None,
    lora: str | None = None,
  ):
    run, step = open_run(model), None
    if baseline is None and run:
      baseline, step = run[0].policy, pinned_step(model)
    self.names = {"aligned" if baseline else "model": model}
    self.policies: dict[str, Inpainter] = {}
    self.policies[next(iter(self.names))] = aligned = open_policy(model)
    if lora is not None:
      aligned.add_lora(lora)
    if baseline:
      self.names["base"] = baseline
      self.policies["base"] = open_policy(baseline, step=step)
    self.reward_name, self.lora = reward, lora
    self.reward = load_reward(reward) if reward else None
    self._compiled: set[Any] = set()

  @property
  def _main(self) -> Inpainter:
    return next(iter(self.policies.values()))

  @property
  def has_texts(self) -> bool:
    """Whether the model reads texts."""
    return bool(self._main.modules.text_encoders)

  # ---------------------------------------------------------------------------------------- images
  def open(self, content: bytes) -> Upload:
    """Decodes an image file and chooses the part of it that is inpainted.

    Raises:
      ValueError: the file is no image, or it is too large.
    """
    header = open_bytes(content, "image")
    if header.format not in FORMATS:
      expected = "PNG, JPEG, WebP, BMP, TIFF or GIF"
      raise ValueError(f"image: the format is {header.format}; expected {expected}; convert it")
    if max(header.size) > MOST_SIDE:
      width, height = header.size
      raise ValueError(
        f"image: {width}x{height} pixels; expected at most {MOST_SIDE} a side; reduce it"
      )
    with _DECODING:
      image = load_image(content)
      full = image.shape[:2]
      box = self.choose_part(full)
      return Upload(content, box, full, shown_png(to_bytes(image[box])))

  def choose_part(self, full: tuple[int, int]) -> tuple[slice, slice]:
    """Chooses the largest part of an image, centred, whose working size is one of few.

    The networks are compiled for each size at which they work. Its shorter side is the native one;
    the longer one is a multiple of an eighth of it, up to LONGEST times. Little is cut: 6 % of the
    pixels at most for a ratio of the sides of up to LONGEST.
    """
    native, factor = self._main.modules.native_size, self._main.modules.vae.config.factor
    step = max(native // 8 // factor, 1) * factor
    allowed = range(native, LONGEST * native + 1, step)
    short, long = sorted(full)
    sizes = [(short, long), (short, short)]  # a square always has an allowed size
    sizes += [(short, round(short * x / native)) for x in allowed]
    sizes += [(round(long * native / x), long) for x in allowed]
    fits = lambda size: size[0] <= short and size[1] <= long and min(size) > 0
    for size in sorted(filter(fits, sizes), key=lambda size: size[0] * size[1], reverse=True):
      height, width = size if full[0] == short else size[::-1]
      works = sorted(self._main.working_size(height, width))
      if works[0] == native and works[1] in allowed:
        break
    top, left = (full[0] - height) // 2, (full[1] - width) // 2
    return slice(top, top + height), slice(left, left + width)

  def working_size(self, upload: Upload) -> tuple[int, int]:
    """Returns the (height, width) at which the model processes an upload."""
    return self._main.working_size(*upload.size)

  def examples(self, number: int = 8) -> Iterator[tuple[Upload, bytes | None]]:
    """Yields images of this package, each with the PNG of a mask, or None.

    They are the embedded prompts for a model of their size, and else the embedded photographs.
    """
    prompts = open_prompts("mini", final_split("mini"))
    if prompts[0]["image"].shape[0] == self._main.modules.native_size:
      for i in range(number):
        image, mask = prompts[i]["image"], prompts[i]["mask"]
        yield self.open(encode_png(image).getvalue()), encode_png(mask[..., 0]).getvalue()
    else:
      for file in sorted(Path(mini.locate("mini", "photos_unseen")).glob("*.jpg"))[:number]:
        yield self.open(file.read_bytes()), None

  # ------------------------------------------------------------------------------------ inpainting
  def kind(self, upload: Upload, settings: Settings) -> tuple:
    """Returns what the time of a job depends on."""
    return (
      self.working_size(upload),
      upload.size,
      settings.samples,
      settings.steps,
      bool(settings.text),
    )

  def paint(
    self, upload: Upload, mask: np.ndarray, settings: Settings, job: Job
  ) -> list[dict[str, Any]]:
    """Inpaints an image with each policy, from the same seed, as `prefpaint_jax.inpaint` does.

    Args:
      mask: [H, W, 1] of the upload's size.
      job: it is told what happens.

    Returns:
      For each policy {"label", "name", "files": PNGs as `inpaint` writes them, "shown": PNGs for
      the page, "rewards": one for each sample or None, "best": index of the greatest or None}.
    """
    image, results = upload.load(), []
    size = self.working_size(upload)
    # The reward is compiled for each size of its images: it gets those at which the model works.
    prompt = resize_prompt(image, mask, size) if self.reward else None
    job.total = settings.steps * len(self.policies)
    for label, policy in self.policies.items():
      program = policy.modules, size, settings.samples, bool(settings.text)
      is_new = program not in self._compiled
      job.compiles |= is_new
      job.report(f"compiling {label}" if is_new else f"painting {label}")
      samples = policy(
        image,
        mask,
        key=jax.random.key(settings.seed),
        num_steps=settings.steps,
        text=settings.text,
        num_samples=settings.samples,
        report=lambda steps, label=label: job.report(f"painting {label}", steps),
      )
      self._compiled.add(program)
      rewards = prompt and self._score(samples, *prompt, settings.text, job)
      results.append(self._encode(label, samples, rewards, settings.seed, job.report))
    return results

  def _score(
    self, samples: np.ndarray, image: np.ndarray, mask: np.ndarray, text: str, job: Job
  ) -> np.ndarray:
    """Computes the rewards of samples [S, H, W, 3] at the size of the prompt."""
    job.report("scoring")
    samples = np.stack([resize_image(sample, mask.shape[:2]) for sample in samples])
    return self.reward(samples, (image * (1.0 - mask))[None], mask[None], text)

  def _encode(
    self,
    label: str,
    samples: np.ndarray,
    rewards: np.ndarray | None,
    seed: int,
    report: Callable[[str], None],
  ) -> dict[str, Any]:
    """Makes the result of one policy; see `paint`."""
    files, shown = [], []
    lora = {"lora": self.lora} if self.lora and label != "base" else {}
    for i, sample in enumerate(samples):
      report("saving")
      text = {"model": self.names[label], **lora, "seed": str(seed)}
      if rewards is not None:
        text["reward"] = f"{rewards[i]:.4f}"
      pixels = to_bytes(sample)
      files.append(_png(pixels, text))
      shown.append(files[-1] if max(pixels.shape) <= MOST_SHOWN else shown_png(pixels))
    best = None
    if rewards is not None and np.isfinite(rewards).any():
      best = int(np.argmax(np.where(np.isfinite(rewards), rewards, -np.inf)))
    return {
      "label": label,
      "name": self.names[label],
      "files": files,
      "shown": shown,
      "rewards": None if rewards is None else [_number(x) for x in rewards],
      "best": best,
    }


def read_mask(content: bytes, size: tuple[int, int]) -> np.ndarray:
  """Decodes a mask [H, W, 1] of an image of `size`; raises ValueError for any other."""
  header = open_bytes(content, "mask")
  if header.format != "PNG" or header.size != size[::-1]:
    width, height = header.size
    raise ValueError(
      f"mask: {header.format} of {width}x{height} pixels; expected a PNG of {size[1]}x{size[0]}, "
      "the size of its image"
    )
  return load_mask(content, size)


def shown_png(pixels: np.ndarray) -> bytes:
  """Encodes a uint8 image [H, W, 3], reduced to at most MOST_SHOWN pixels a side."""
  image = Image.fromarray(pixels)
  image.thumbnail((MOST_SHOWN, MOST_SHOWN), Image.Resampling.LANCZOS)
  file = io.BytesIO()
  image.save(file, "PNG", compress_level=1)
  return file.getvalue()


def _png(pixels: np.ndarray, text: dict[str, str]) -> bytes:
  """Encodes a uint8 image as `data.images.save_png` writes it."""
  fields, file = PngImagePlugin.PngInfo(), io.BytesIO()
  for name, value in text.items():
    fields.add_text(name, value)
  Image.fromarray(pixels).save(file, format="PNG", pnginfo=fields)
  return file.getvalue()


def _number(value: float) -> float | None:
  """Returns a number that JSON has; None for NaN and infinities."""
  return float(value) if np.isfinite(value) else None


def _is_unicode(text: str) -> bool:
  """Whether a text has no half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
  return not any("\ud800" <= character <= "\udfff" for character in text)
