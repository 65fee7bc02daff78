"""Prompts drawn from images: a crop of an image and a random mask."""
# Shapes: H W pixels of an image, h w of a prompt, n prompts.

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prefpaint_jax.data import images, masks, warping
from prefpaint_jax.data.examples import SPLITS, in_test
from prefpaint_jax.data.pictures import (
  Cached,
  FolderPictures,
  Picture,
  RecordPictures,
  open_mixture,
)

if TYPE_CHECKING:
  from prefpaint_jax.data.examples import Prompt, in_test


FITS = ("crop", "pad", "random")
NEW_VIEW = "warping"  # unlike the masks that are only laid on a picture, this one moves it
MASKS = (*masks.DRAW, NEW_VIEW)


# ---------------------------------------------------------------------------------------------- cut
def centre_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """[H, W, 3] -> [h, w, 3]: the largest rectangle of that form in the middle, resized."""
  scale = min(old / new for old, new in zip(image.shape[:2], size, strict=True))
  cut = [max(1, round(scale * length)) for length in size]
  top, left = ((old - new) // 2 for old, new in zip(image.shape[:2], cut, strict=True))
  return images.resize_image(image[top : top + cut[0], left : left + cut[1]], size)


def fit_inside(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """[H, W, 3] -> the same picture, as large as [h, w, 3] has room for it."""
  scale = min(new / old for old, new in zip(image.shape[:2], size, strict=True))
  height, width = (max(1, round(scale * old)) for old in image.shape[:2])
  return images.resize_image(image, (height, width))


def region(image: np.ndarray, split: str, test_share: float) -> np.ndarray:
  """The split's part of [H, W, 3]: "test" is the right `test_share` of its width."""
  border = round((1.0 - test_share) * image.shape[1])
  return image[:, :border] if split == "train" else image[:, border:]


def random_square(
  rng: np.random.Generator, image: np.ndarray, sides: tuple[int, int]
) -> np.ndarray:
  """A square of [H, W, 3], its side drawn from `sides` as far as fits; mirrored half the time."""
  height, width = image.shape[:2]
  longest = min(sides[1], height, width)
  side = int(rng.integers(min(sides[0], longest), longest + 1))
  top, left = (int(rng.integers(length - side + 1)) for length in (height, width))
  square = image[top : top + side, left : left + side]
  return square[:, ::-1] if rng.random() < 0.5 else square


# --------------------------------------------------------------------------------------------- draw
class DrawnPrompts(Sequence):
  """Prompts drawn from pictures; each depends on the pictures, seed, split and its index alone.

  `source` is one source of pictures or a mixture; every run through a source's pictures takes them
  in a new order. `number` None draws as many prompts as there are pictures. `fit` says what of a
  picture is seen at `size`, a side or (height, width):
    "crop"    the middle, as much as fills it;
    "pad"     all of it; the border around it is missing, too;
    "random"  squares with sides from `crop`, mirrored half of the time.
  `test_share` of the pictures are held out for the split "test", by a hash of their names; with
  "random" it is that share of each picture's width, at the right, so that no pixel is in both.
  `kinds` says how often each of `MASKS` is drawn: "warping" moves the picture to a new view, whose
  holes nobody has seen; "holes" are such holes in the picture as it is. Random crops that are
  nearly one colour (no channel has a standard deviation of `min_std`) are drawn again, 20 times at
  most.

  Beside what every prompt has, these say `source`, `picture` (its id), and `complete`: whether the
  image is known under the mask.
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
      raise ValueError(f"split is {split!r}: pictures are split into {' and '.join(SPLITS)}")
    self._size = (size, size) if isinstance(size, int) else tuple(size)
    self._seed, self._split, self._fit, self._crop = seed, SPLITS.index(split), fit, tuple(crop)
    self._test_share, self._min_std = test_share, min_std
    kinds = {"outpainting": 1.0, "warping": 1.0} if kinds is None else kinds
    self._check(kinds)

    mixture = open_mixture(source)
    self._sources = [Cached(p) if fit == "random" else p for _, p in mixture]
    members = [self._members(pictures) for pictures in self._sources]
    number = sum(map(len, members)) if number is None else number
    self._source = interleave([weight for weight, _ in mixture], number)
    self._picture, self._kind = np.zeros((2, number), np.int32)
    for index, mine in enumerate(members):
      turns = np.flatnonzero(self._source == index)
      # The last number keeps this stream apart from those of the prompts.
      rng = np.random.default_rng([seed, self._split, index, 1])
      epochs = np.tile(mine, (-(-len(turns) // len(mine)), 1))
      self._picture[turns] = rng.permuted(epochs, axis=1).ravel()[: len(turns)]
      self._kind[turns] = interleave([kinds.get(name, 0.0) for name in MASKS], len(turns))

  def _check(self, kinds: Mapping[str, float]) -> None:
    if self._fit not in FITS:
      raise ValueError(f"fit is {self._fit!r}: give one of {', '.join(FITS)}")
    if self._fit == "random" and self._size[0] != self._size[1]:
      raise ValueError(f"size is {self._size}: with fit 'random' prompts are square, give one side")
    if not 1 <= self._crop[0] <= self._crop[1]:
      raise ValueError(f"crop is {self._crop}: give the least and the largest side, in pixels")
    if not 0.0 <= self._test_share <= 1.0:
      raise ValueError(f"test_share is {self._test_share}: give a number from 0 to 1")
    for name, weight in kinds.items():
      if name not in MASKS:
        raise ValueError(f"kinds has no mask called {name!r}: give some of {', '.join(MASKS)}")
      if not 0.0 <= weight < np.inf:
        raise ValueError(f"kinds: the weight of {name} is {weight}: give 0 or more")
    if not sum(kinds.values()):
      raise ValueError("kinds: no mask has a weight above 0: give one to some")

  def _members(self, pictures: FolderPictures | RecordPictures | Cached) -> np.ndarray:
    """The indices of the split's pictures."""
    everyone = np.arange(len(pictures))
    if self._fit == "random":
      return everyone
    held_out = [in_test(pictures.id(index), self._test_share) for index in everyone]
    mine = everyone[np.array(held_out) == self._split]
    if not len(mine):
      raise ValueError(
        f"{pictures.source}: none of its {len(everyone)} pictures is in {SPLITS[self._split]!r} "
        f"with test_share {self._test_share}: add pictures or change test_share"
      )
    return mine

  def __len__(self) -> int:
    return len(self._source)

  def id(self, index: int) -> str:
    """The prompt's id, which needs no decoding."""
    index = range(len(self))[index]
    picture = self._sources[self._source[index]].id(self._picture[index])
    return f"{SPLITS[self._split]}_{index:05d}_{re.sub(r'[^A-Za-z0-9-]+', '_', picture)[-80:]}"

  def __getitem__(self, index: int) -> Prompt:
    index = range(len(self))[index]
    rng = np.random.default_rng([self._seed, self._split, index])
    picture = self._sources[self._source[index]][self._picture[index]]
    image = self._cut(rng, picture)
    kind = MASKS[self._kind[index]]
    try:
      image, mask, number = draw_hole(rng, image, kind)
    except ValueError as error:
      raise ValueError(f"{picture.source}: picture {picture.id}: {error}") from None
    complete = kind != NEW_VIEW
    if image.shape[:2] != self._size:
      image, mask, complete = pad(image, self._size, 0.0), pad(mask, self._size, 1.0), False
    return {
      "id": self.id(index),
      "kind": number,
      "image": image,
      "mask": mask,
      "source": picture.source,
      "picture": picture.id,
      "complete": complete,
    }

  def _cut(self, rng: np.random.Generator, picture: Picture) -> np.ndarray:
    """What is seen of a picture, [h, w, 3] or, before it is padded, less."""
    if self._fit == "crop":
      return centre_crop(picture.image, self._size)
    if self._fit == "pad":
      return fit_inside(picture.image, self._size)
    mine = region(picture.image, SPLITS[self._split], self._test_share)
    if not mine.size:
      raise ValueError(
        f"{picture.source}: picture {picture.id} is too small, {picture.image.shape[1]} pixels "
        f"wide: test_share {self._test_share} leaves {SPLITS[self._split]!r} none of it"
      )
    for _ in range(20):
      image = images.resize_image(random_square(rng, mine, self._crop), self._size)
      if image.std(axis=(0, 1)).max() >= self._min_std:
        break
    return image


def draw_hole(
  rng: np.random.Generator, image: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray, int]:
  """A picture [h, w, 3], a mask [h, w, 1] of one of `MASKS`, and the kind of the two."""
  if name == NEW_VIEW:
    view = warping.draw_view(rng, image)
    return view.image, view.mask, masks.WARPING
  kind, draw = masks.DRAW[name]
  return image, draw(rng, *image.shape[:2]), kind


def pad(image: np.ndarray, size: tuple[int, int], value: float) -> np.ndarray:
  """[h', w', C] in the middle of [h, w, C]."""
  rooms = [new - old for new, old in zip(size, image.shape[:2], strict=True)]
  widths = [(room // 2, room - room // 2) for room in rooms]
  return np.pad(image, [*widths, (0, 0)], constant_values=value)


def interleave(weights: Sequence[float], number: int) -> np.ndarray:
  """[number] indices into `weights`, each as often as its weight says and evenly spread.

  The k-th turn of an index of share s comes at time (k + 1/2) / s, so the counts of any beginning
  are those of Sainte-Laguë's apportionment, and a longer result begins with the shorter one.
  """
  shares = np.asarray(weights, np.float64) / np.sum(weights)
  counts = np.where(shares > 0, np.ceil(shares * number) + len(shares), 0).astype(int)
  owners = np.repeat(np.arange(len(shares)), counts)
  times = [(np.arange(n) + 0.5) / share for n, share in zip(counts, shares, strict=True) if n]
  return owners[np.argsort(np.concatenate(times), kind="stable")][:number]
