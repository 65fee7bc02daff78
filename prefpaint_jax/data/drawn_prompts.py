"""Draws prompts from images: a crop of an image and a random mask."""
# Shapes: H W pixels of an image, h w pixels of a prompt.

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from prefpaint_jax.data import images, masks, warping
from prefpaint_jax.data.examples import SPLITS, Prompt, in_test
from prefpaint_jax.data.pictures import (
  Cached,
  FolderPictures,
  RecordPictures,
  SourceImage,
  open_mixture,
)

FITS = ("crop", "pad", "random")
NEW_VIEW = "warping"  # also warps the image; the other masks leave the image unchanged
MASKS = (*masks.DRAW, NEW_VIEW)


def centre_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Cuts the largest centred rectangle with the aspect ratio of `size`, and resizes it.

  [H, W, 3] -> [h, w, 3].
  """
  scale = min(old / new for old, new in zip(image.shape[:2], size, strict=True))
  cut = [max(1, round(scale * length)) for length in size]
  top, left = ((old - new) // 2 for old, new in zip(image.shape[:2], cut, strict=True))
  return images.resize_image(image[top : top + cut[0], left : left + cut[1]], size)


def fit_inside(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes an image [H, W, 3] to the largest size of its aspect ratio that fits into [h, w]."""
  scale = min(new / old for old, new in zip(image.shape[:2], size, strict=True))
  height, width = (max(1, round(scale * old)) for old in image.shape[:2])
  return images.resize_image(image, (height, width))


def region(image: np.ndarray, split: str, test_share: float) -> np.ndarray:
  """Returns the split's columns of an image [H, W, 3].

  "test" is the share `test_share` of the width at the right, "train" is the rest.
  """
  border = round((1.0 - test_share) * image.shape[1])
  return image[:, :border] if split == "train" else image[:, border:]


def random_square(
  rng: np.random.Generator, image: np.ndarray, sides: tuple[int, int]
) -> np.ndarray:
  """Draws a square crop of an image [H, W, 3] and mirrors it with probability 1/2.

  Args:
    sides: the least and the largest side in pixels; the image's shorter side bounds both.
  """
  height, width = image.shape[:2]
  longest = min(sides[1], height, width)
  side = int(rng.integers(min(sides[0], longest), longest + 1))
  top, left = (int(rng.integers(length - side + 1)) for length in (height, width))
  square = image[top : top + side, left : left + side]
  return square[:, ::-1] if rng.random() < 0.5 else square


class DrawnPrompts(Sequence):
  """A sequence of prompts drawn from images.

  A prompt depends only on the images, the seed, the split and its index. A prompt has the fields
  `source`, `picture` (the ID of its image) and `complete` besides the required ones. If a source
  has texts, `has_texts` is True and a prompt has the text of its image.

  Args:
    source: a source of images or a mixture of sources (see `data.pictures`). Each epoch over a
      source takes its images in a new order.
    split: "train" or "test".
    number: number of prompts; None: one for each image.
    size: side, or (height, width), of a prompt in pixels.
    seed: of the order, the crops and the masks.
    fit: "crop": the centre of the image, at the aspect ratio of the prompt; "pad": the whole
      image, with a border that is missing too; "random": square crops, mirrored with probability
      1/2.
    crop: the least and the largest side of the random crops, in pixels of the image.
    test_share: share of the images held out for "test", chosen by a hash of their names. With
      fit="random": share of each image's width, at the right, so that the splits share no pixel.
    kinds: weight of each of `MASKS`. "warping" moves the camera, and the true content of the holes
      is unknown; "holes" draws similar holes and keeps the image. Default: "outpainting" and
      "warping" in equal shares.
    min_std: random crops whose channels all have a smaller standard deviation are nearly uniform
      and are drawn again, up to 20 times.
  """

  def __init__(
    self,
    source: str | Path,
    split: str,
    number: int | None,
    size: int | tuple[int, int],
    seed: int = 0,
    fit: str = "crop",
    crop: tuple[int, int] = (48, 176),
    test_share: float = 0.1,
    kinds: Mapping[str, float] | None = None,
    min_std: float = 0.04,
  ):
    if split not in SPLITS:
      raise ValueError(f"split is {split!r}; expected {' or '.join(SPLITS)}")
    self._size = (size, size) if isinstance(size, int) else tuple(size)
    self._seed, self._split, self._fit, self._crop = seed, SPLITS.index(split), fit, tuple(crop)
    self._test_share, self._min_std = test_share, min_std
    kinds = {"outpainting": 1.0, "warping": 1.0} if kinds is None else kinds
    self._check(kinds)

    mixture = open_mixture(source)
    self._sources = [Cached(p) if fit == "random" else p for _, p in mixture]
    self.has_texts = any(source.has_texts for source in self._sources)
    members = [self._members(source) for source in self._sources]
    number = sum(map(len, members)) if number is None else number
    self._source = interleave([weight for weight, _ in mixture], number)
    self._image, self._kind = np.zeros((2, number), np.int32)
    for index, mine in enumerate(members):
      turns = np.flatnonzero(self._source == index)
      # The last number makes this stream differ from the streams of the prompts.
      rng = np.random.default_rng([seed, self._split, index, 1])
      epochs = np.tile(mine, (-(-len(turns) // len(mine)), 1))
      self._image[turns] = rng.permuted(epochs, axis=1).ravel()[: len(turns)]
      self._kind[turns] = interleave([kinds.get(name, 0.0) for name in MASKS], len(turns))

  def _check(self, kinds: Mapping[str, float]) -> None:
    """Raises ValueError for invalid arguments."""
    if self._fit not in FITS:
      raise ValueError(f"fit is {self._fit!r}; expected one of {', '.join(FITS)}")
    if self._fit == "random" and self._size[0] != self._size[1]:
      raise ValueError(f"size is {self._size}; with fit 'random' prompts are square: give one side")
    if not 1 <= self._crop[0] <= self._crop[1]:
      raise ValueError(f"crop is {self._crop}; expected the least and the largest side, in pixels")
    if not 0.0 <= self._test_share <= 1.0:
      raise ValueError(f"test_share is {self._test_share}; expected a number from 0 to 1")
    for name, weight in kinds.items():
      if name not in MASKS:
        raise ValueError(f"kinds has an unknown mask {name!r}; expected some of {', '.join(MASKS)}")
      if not 0.0 <= weight < np.inf:
        raise ValueError(f"kinds: the weight of {name} is {weight}; expected 0 or more")
    if not sum(kinds.values()):
      raise ValueError("kinds: no mask has a weight above 0; give at least one")

  def _members(self, source: FolderPictures | RecordPictures | Cached) -> np.ndarray:
    """Returns the indices of the split's images."""
    everyone = np.arange(len(source))
    if self._fit == "random":
      return everyone
    held_out = [in_test(source.id(index), self._test_share) for index in everyone]
    mine = everyone[np.array(held_out) == self._split]
    if not len(mine):
      raise ValueError(
        f"{source.source}: none of its {len(everyone)} images is in {SPLITS[self._split]!r} "
        f"with test_share {self._test_share}; add images or change test_share"
      )
    return mine

  def __len__(self) -> int:
    return len(self._source)

  def id(self, index: int) -> str:
    """Returns the prompt's ID without decoding its image."""
    index = range(len(self))[index]
    name = self._sources[self._source[index]].id(self._image[index])
    return f"{SPLITS[self._split]}_{index:05d}_{re.sub(r'[^A-Za-z0-9-]+', '_', name)[-80:]}"

  def __getitem__(self, index: int) -> Prompt:
    index = range(len(self))[index]
    rng = np.random.default_rng([self._seed, self._split, index])
    original = self._sources[self._source[index]][self._image[index]]
    image = self._cut(rng, original)
    kind = MASKS[self._kind[index]]
    try:
      image, mask, number = draw_hole(rng, image, kind)
    except ValueError as error:
      raise ValueError(f"{original.source}: image {original.id}: {error}") from None
    complete = kind != NEW_VIEW
    if image.shape[:2] != self._size:
      image, mask, complete = pad(image, self._size, 0.0), pad(mask, self._size, 1.0), False
    prompt: Prompt = {
      "id": self.id(index),
      "kind": number,
      "image": image,
      "mask": mask,
      "source": original.source,
      "picture": original.id,
      "complete": complete,
    }
    if self.has_texts:
      prompt["text"] = original.text
    return prompt

  def _cut(self, rng: np.random.Generator, original: SourceImage) -> np.ndarray:
    """Crops or resizes an image to [h, w, 3]; to less with fit="pad", before padding."""
    if self._fit == "crop":
      return centre_crop(original.image, self._size)
    if self._fit == "pad":
      return fit_inside(original.image, self._size)
    mine = region(original.image, SPLITS[self._split], self._test_share)
    if not mine.size:
      raise ValueError(
        f"{original.source}: image {original.id} is {original.image.shape[1]} pixels wide; with "
        f"test_share {self._test_share} no column is in {SPLITS[self._split]!r}: remove the image"
      )
    for _ in range(20):
      image = images.resize_image(random_square(rng, mine, self._crop), self._size)
      if image.std(axis=(0, 1)).max() >= self._min_std:
        break
    return image


def draw_hole(
  rng: np.random.Generator, image: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray, int]:
  """Draws a mask for an image [h, w, 3].

  Args:
    name: one of `MASKS`.

  Returns:
    The image, warped if `name` is "warping"; the mask [h, w, 1]; its kind, an index into
    masks.KINDS.
  """
  if name == NEW_VIEW:
    view = warping.draw_view(rng, image)
    return view.image, view.mask, masks.WARPING
  kind, draw = masks.DRAW[name]
  return image, draw(rng, *image.shape[:2]), kind


def pad(image: np.ndarray, size: tuple[int, int], value: float) -> np.ndarray:
  """Pads an image [h', w', C] with `value` on all sides to [h, w, C]."""
  rooms = [new - old for new, old in zip(size, image.shape[:2], strict=True)]
  widths = [(room // 2, room - room // 2) for room in rooms]
  return np.pad(image, [*widths, (0, 0)], constant_values=value)


def interleave(weights: Sequence[float], number: int) -> np.ndarray:
  """Returns `number` indices into `weights`, in proportion to the weights and evenly spread.

  Index i with share s_i occurs for the k-th time (k = 0, 1, ...) at time (k + 1/2) / s_i, and the
  result is sorted by time. Therefore every prefix has the counts of Sainte-Laguë's apportionment,
  and a shorter result is a prefix of a longer one.
  """
  shares = np.asarray(weights, np.float64) / np.sum(weights)
  counts = np.where(shares > 0, np.ceil(shares * number) + len(shares), 0).astype(int)
  owners = np.repeat(np.arange(len(shares)), counts)
  times = [(np.arange(n) + 0.5) / share for n, share in zip(counts, shares, strict=True) if n]
  return owners[np.argsort(np.concatenate(times), kind="stable")][:number]
