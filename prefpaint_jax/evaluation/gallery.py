"""The gallery of a report: prompts with the samples of both sides."""
# Shapes: N prompts, S samples of each, H W pixels.

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

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
  gains = np.asarray(gains, np.float64)
  order = np.argsort(-gains, kind="stable")
  order = order[np.isfinite(gains[order])]
  number = len(order)
  each = min(each, max(1, number // 3))
  middle = (number - each) // 2
  sections = {
    "Largest gains": order[:each],
    "Near the median": order[middle : middle + each] if number > 2 else order[:0],
    "Smallest gains, or largest losses": order[max(each, number - each) :],
  }
  return {title: indices for title, indices in sections.items() if len(indices)}


def make_gallery(
  names: Sequence[str],
  prompts: Sequence[np.ndarray],
  baseline: Sequence[np.ndarray],
  policy: Sequence[np.ndarray],
  scores: Mapping[str, Scores],
  each: int = 6,
) -> dict[str, list[Example]]:
  """Makes the gallery: the sections of `choose` for the first samples' scores by the first judge.

  Args:
    names: N names of prompts.
    prompts: N images with grey holes.
    baseline: the baseline's first sample of each prompt.
    policy: the policy's first sample of each prompt.
    scores: by judge.
    each: number of prompts in a section.

  Returns:
    {section: examples}.
  """
  first = {judge: [side[:, 0] for side in sides] for judge, sides in scores.items()}
  policy_scores, baseline_scores = next(iter(first.values()))
  return {
    title: [
      Example(
        names[i],
        prompts[i],
        baseline[i],
        policy[i],
        {judge: tuple(float(side[i]) for side in sides) for judge, sides in first.items()},
      )
      for i in indices
    ]
    for title, indices in choose(policy_scores - baseline_scores, each).items()
  }


def render(gallery: Mapping[str, Sequence[Example]]) -> str:
  """Renders the gallery, section by section."""
  sections = "".join(
    f'<h3>{escape(title)}</h3><div class="gallery">{"".join(map(_example, examples))}</div>'
    for title, examples in gallery.items()
  )
  return f"<section><h2>Prompt, baseline, policy (same seed)</h2>{sections}</section>"


def _example(example: Example) -> str:
  """Renders three images side by side, and the judges' scores of the two samples."""
  images = "".join(
    _image_tag(getattr(example, part), f"{example.name}: {part}")
    for part in ("prompt", "baseline", "policy")
  )
  rows = ""
  for judge, (policy, baseline) in example.scores.items():
    rows += f"<span>{escape(judge)}</span>"
    for score, other in ((baseline, policy), (policy, baseline)):
      tag = "b" if score > other else "span"
      rows += f"<{tag}>{show_typeset('reward', score)}</{tag}>"
  return f"<figure>{images}{rows}<figcaption>{escape(example.name)}</figcaption></figure>"


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
