"""Examples of an evaluation, prompts with the samples of both sides: as a gallery or a grid."""
# Shapes: N prompts, S samples of each, H W pixels.

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from prefpaint_jax.data.grids import image_grid
from prefpaint_jax.data.images import resize_image, resize_prompt, to_bytes
from prefpaint_jax.evaluation.tables import show_typeset
from prefpaint_jax.evaluation.winrate import Scores

# Pixels of an image's longer side: images up to SMALL are shown enlarged, without smoothing; images
# above LARGEST are reduced to it.
SMALL = 96
LARGEST = 320
THUMBNAIL = 256  # largest side of the images that an evaluation keeps, in pixels


class Example(NamedTuple):
  """One prompt of the gallery, with one sample of each side and their scores.

  Images are [H, W, 3], floats in [0, 1] or uint8.
  """

  name: str
  prompt: np.ndarray  # the image with a grey hole
  baseline: np.ndarray
  policy: np.ndarray
  scores: Mapping[str, tuple[float, float]]  # by judge: (policy's score, baseline's score)
  original: np.ndarray | None = None  # the true image, if it is known
  text: str = ""


def thumbnail(image: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
  """Reduces an image [H, W, 3] in [0, 1] to uint8 with no side longer than THUMBNAIL.

  Args:
    mask: [H, W, 1]; its hole is shown in grey, which differs from black pixels.
  """
  scale = min(1.0, THUMBNAIL / max(image.shape[:2]))
  size = tuple(max(1, round(scale * side)) for side in image.shape[:2])
  if mask is None:
    return to_bytes(resize_image(image, size))
  image, mask = resize_prompt(image, mask, size)
  return to_bytes(np.where(mask > 0, 0.5, image))


def choose(gains: np.ndarray, each: int = 6) -> dict[str, np.ndarray]:
  """Chooses prompts with the largest gains, gains near the median, and the smallest gains.

  Args:
    gains: [N]; prompts whose gain is not finite are left out.
    each: number of prompts in a section; fewer if N is small. No prompt is in two sections.

  Returns:
    {section: indices of prompts, largest gain first}.
  """
  order = _ranked(np.asarray(gains, np.float64))
  number = len(order)
  each = min(each, max(1, number // 3))
  middle = (number - each) // 2
  sections = {
    "Largest gains": order[:each],
    "Near the median": order[middle : middle + each] if number > 2 else order[:0],
    "Smallest gains, or largest losses": order[max(each, number - each) :],
  }
  return {title: indices for title, indices in sections.items() if len(indices)}


def make_examples(
  names: Sequence[str],
  prompts: Sequence[np.ndarray],
  baseline: Sequence[np.ndarray],
  policy: Sequence[np.ndarray],
  scores: Mapping[str, Scores],
  originals: Sequence[np.ndarray | None],
  texts: Sequence[str],
) -> list[Example]:
  """Makes an example of each prompt, with the scores of its first samples.

  Args:
    names: N names of prompts.
    prompts: N images with grey holes.
    baseline: the baseline's first sample of each prompt.
    policy: the policy's first sample of each prompt.
    scores: by judge.
    originals: N true images; None where the true content of the hole is unknown.
    texts: N texts of the prompts; empty where there is none.
  """
  first = {
    judge: [np.asarray(side)[:, 0].tolist() for side in sides] for judge, sides in scores.items()
  }
  judged = ({judge: (p[i], b[i]) for judge, (p, b) in first.items()} for i in range(len(names)))
  columns = names, prompts, baseline, policy, judged, originals, texts
  return [Example(*row) for row in zip(*columns, strict=True)]


def _ranked(gains: np.ndarray) -> np.ndarray:
  """Returns the indices of the finite gains [N], largest gain first."""
  order = np.argsort(-gains, kind="stable")
  return order[np.isfinite(gains[order])]


def _gains(examples: Sequence[Example]) -> np.ndarray:
  """Returns the gains [N] by the first judge."""
  scores = np.array([next(iter(example.scores.values())) for example in examples])
  return scores[:, 0] - scores[:, 1]


def make_gallery(examples: Sequence[Example], each: int = 6) -> dict[str, list[Example]]:
  """Returns `each` examples for each section of `choose`, by the gains of the first judge."""
  chosen = choose(_gains(examples), each)
  return {title: [examples[i] for i in indices] for title, indices in chosen.items()}


def draw_examples(
  examples: Sequence[Example], policy: str, baseline: str, number: int = 6
) -> np.ndarray:
  """Draws a grid, uint8 [H, W, 3]: a column for each of `number` examples, a row for each part.

  The examples are at evenly spaced ranks of the first judge's gain, the largest gain first, so that
  the grid shows as many losses as there are.

  Args:
    examples: one or more with finite scores.
    policy, baseline: names of the policies.
    number: the largest number of columns.
  """
  order = _ranked(_gains(examples))
  if not len(order):
    raise ValueError("examples: no prompt has a finite gain by the first judge; check its scores")
  number = min(number, len(order))
  shown = [examples[i] for i in order[(2 * np.arange(number) + 1) * len(order) // (2 * number)]]
  judge, sides = next(iter(shown[0].scores)), {"policy": 0, "baseline": 1}
  parts = ["prompt", "baseline", "policy"]
  rows = ["incomplete", f"baseline: {baseline}", f"policy: {policy}"]
  if all(example.original is not None for example in shown):
    parts.append("original")
    rows.append("true image")
  labels, marked = [], []
  for part in parts:
    for example in shown:
      own, pair = sides.get(part), example.scores[judge]
      labels.append("" if own is None else _label(example, own))
      marked.append(own is not None and pair[own] > pair[1 - own])
  images = np.stack([getattr(example, part) for part in parts for example in shown])
  return image_grid(
    images / 255 if images.dtype == np.uint8 else images,
    columns=number,
    scale=max(1, 256 // max(images.shape[1:3])),
    padding=9,
    labels=labels,
    marked=marked,
    rows=rows,
    caption=f"Framed: the higher score by {judge}. Columns: evenly spaced ranks of its gain.",
  )


def _label(example: Example, side: int) -> str:
  return "\n".join(f"{judge} {pair[side]:.2f}" for judge, pair in example.scores.items())


def render(gallery: Mapping[str, Sequence[Example]]) -> str:
  """Renders the gallery, section by section."""
  sections = "".join(
    f'<h3>{escape(title)}</h3><div class="gallery">{"".join(map(_example, examples))}</div>'
    for title, examples in gallery.items()
  )
  return (
    "<section><h2>Samples</h2>"
    '<p class="note">Samples of policy and baseline with the same seed, sorted by the gain of the '
    "first judge. The higher score of each judge is bold. The true image is shown where the true "
    f"content of the hole is known.</p>{sections}</section>"
  )


def _example(example: Example) -> str:
  """Renders the images side by side, and the judges' scores of the two samples."""
  parts = {"prompt": example.prompt, "baseline": example.baseline, "policy": example.policy}
  if example.original is not None:
    parts["true image"] = example.original
  heads = "".join(f"<span>{part}</span>" for part in parts)
  images = "".join(_image_tag(image, f"{example.name}: {part}") for part, image in parts.items())
  rows = ""
  for judge, (policy, baseline) in example.scores.items():
    rows += f"<span>{escape(judge)}</span>"
    for score, other in ((baseline, policy), (policy, baseline)):
      tag = "b" if score > other else "span"
      rows += f"<{tag}>{show_typeset('reward', score)}</{tag}>"
    rows += "<span></span>" * (len(parts) - 3)
  text = f'<p class="text">{escape(example.text)}</p>' if example.text else ""
  return (
    f'<figure style="--columns:{len(parts)}"><figcaption>{escape(example.name)}</figcaption>'
    f"{heads}{images}{text}{rows}</figure>"
  )


def _image_tag(image: np.ndarray, description: str) -> str:
  """Renders an <img> with embedded data: PNG up to SMALL, else JPEG of at most LARGEST pixels."""
  height, width, _ = image.shape
  longer = max(height, width)
  image = image / 255 if image.dtype == np.uint8 else image
  if longer > LARGEST:
    image = resize_image(image, tuple(max(1, round(x * LARGEST / longer)) for x in (height, width)))
  pixels = Image.fromarray(to_bytes(image))
  file_format, style = ("png", ' class="small"') if longer <= SMALL else ("jpeg", "")
  file = io.BytesIO()
  pixels.save(file, format=file_format, quality=88)
  data = base64.b64encode(file.getvalue()).decode()
  return f'<img{style} alt="{escape(description)}" src="data:image/{file_format};base64,{data}">'
