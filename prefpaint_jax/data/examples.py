"""Definitions that all datasets share: splits, prompts, batches, criteria of annotators."""
# Shapes: b prompts in a batch, H W pixels.

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

SPLITS = ("train", "test")
UNSEEN = "unseen"  # split of whole images that nothing was trained on, for the final judgement
VALIDATION = "validation"  # split of preferences that chooses the checkpoint of a reward model
VALIDATION_SHARE = 0.1  # of the training images

MAX_SCORE = 7.0
SIMULATED = "simulated_"  # prefix of the names of simulated annotators
# Weights of the criteria in the combined score.
CRITERIA = {"structure": 0.3, "texture": 0.3, "overall": 0.4}


class Prompt(TypedDict):
  """An image and its mask. The missing pixels hold the true content if known, else black."""

  id: str
  kind: int  # index into masks.KINDS
  image: np.ndarray  # float32 [H, W, 3] in [0, 1]
  mask: np.ndarray  # float32 [H, W, 1], 1 = missing
  source: NotRequired[str]
  picture: NotRequired[str]  # id of the image that the prompt was drawn from
  complete: NotRequired[bool]  # the missing pixels of `image` hold the true content
  text: NotRequired[str]


def stack(prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
  """Stacks prompts of one size.

  Returns:
    id, kind, complete, text [b], image [b, H, W, 3], mask [b, H, W, 1]. `text` is an array of
    strings; the text of a prompt without one is empty.

  Raises:
    ValueError: two prompts differ in size. The message names them.
  """
  first = prompts[0]
  for prompt in prompts:
    if prompt["image"].shape != first["image"].shape:
      sizes = [f"{p['id']} is {p['image'].shape[0]}x{p['image'].shape[1]}" for p in (first, prompt)]
      raise ValueError(f"prompts of two sizes in one batch: {', '.join(sizes)}; give a size")
  return {
    "id": np.array([prompt["id"] for prompt in prompts]),
    "kind": np.array([prompt["kind"] for prompt in prompts], np.int32),
    "complete": np.array([prompt.get("complete", False) for prompt in prompts]),
    "text": np.array([prompt.get("text", "") for prompt in prompts]),
    "image": np.stack([prompt["image"] for prompt in prompts]),
    "mask": np.stack([prompt["mask"] for prompt in prompts]),
  }


def concatenate(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Concatenates dictionaries of arrays with the same names along the first axis."""
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def in_test(name: str, test_share: float) -> bool:
  """Returns whether the image called `name` is held out. Only a hash of the name decides."""
  return _hash(name) < test_share


def in_validation(names: Sequence[str]) -> list[bool]:
  """Returns for the image of each training prompt whether it is in the validation split.

  A hash of the name decides, which is independent of the hash of `in_test`. At least one image is
  in the split. If all prompts have one image, the result is True for all of them.
  """
  hashes = {name: _hash(f"{VALIDATION} {name}") for name in names}
  chosen = {name for name, value in hashes.items() if value < VALIDATION_SHARE}
  if not 0 < len(chosen) < len(hashes):
    chosen = {min(hashes, key=hashes.get)}
  return [name in chosen for name in names]


def _hash(name: str) -> float:
  """Returns a number in [0, 1] that depends only on `name`."""
  digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
  return int.from_bytes(digest[:8], "big") / 2**64
