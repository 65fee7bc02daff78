"""Pairs of candidates of one prompt, the better one first, from a dataset of preferences."""
# Shapes: N prompts, C candidates of one, P pairs, b pairs of a batch on one process, H W pixels.

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from etils import epy

from prefpaint_jax.data.preferences import StoredPreferences
from prefpaint_jax.data.records import endless_batches

with epy.lazy_imports():
  import grain


class Pair(TypedDict):
  """Two candidates of one prompt."""

  text: str  # empty if the prompt has none
  masked_image: np.ndarray  # uint8 [H, W, 3], missing pixels black
  mask: np.ndarray  # uint8 [H, W, 1], 1 = missing
  candidates: np.ndarray  # uint8 [2, H, W, 3], the winner and the loser
  score_gap: np.float32  # difference of their calibrated scores


class Chosen(NamedTuple):
  """The numbers of a prompt and of two of its candidates."""

  prompt: int
  winner: int
  loser: int


def choose_pairs(ranks: Sequence[np.ndarray], which: str) -> list[Chosen]:
  """Chooses pairs of candidates of different ranks, prompt by prompt.

  Args:
    ranks: of the candidates of each prompt, int [C], 1 for the best; equal ranks are a tie.
    which: "extremes": the best and the worst candidate of each prompt, of several equal ones the
      first. "all": every two candidates of a prompt.
  """
  chosen = []
  for prompt, own in enumerate(ranks):
    if which == "extremes":
      pairs = [(int(np.argmin(own)), int(np.argmax(own)))]
    else:
      pairs = [(i, j) for i in range(len(own)) for j in range(len(own))]
    chosen += [Chosen(prompt, i, j) for i, j in pairs if own[i] < own[j]]
  return chosen


def calibrated_scores(scores: np.ndarray) -> np.ndarray:
  """Computes the mean of σ(s_i − s_j) over the other candidates j of each candidate i.

  It is the share of the others that i is expected to beat by the model of Bradley and Terry (CaPO,
  arXiv 2502.02588).

  Args:
    scores: [C], C ≥ 2.
  """
  scores = np.asarray(scores, np.float64)
  beats = 1.0 / (1.0 + np.exp(scores[None, :] - scores[:, None]))
  return (beats.sum(1) - 0.5) / (len(scores) - 1)  # a candidate beats itself with 0.5


class Pairs(Sequence[Pair]):
  """The pairs of a split of preferences. Indexing decodes the candidates of the pair's prompt.

  CaPO's scores are those of the dataset divided by their standard deviation over the training
  split, so that the pairs' gaps do not depend on the unit of the scores.

  Attributes:
    has_texts: whether a prompt of the split has a text.
  """

  def __init__(self, preferences: StoredPreferences, which: str):
    """Chooses the pairs; see `choose_pairs`."""
    self._preferences = preferences
    outlines = [preferences.outline(index) for index in range(len(preferences))]
    self._chosen = choose_pairs([ranks for ranks, _, _ in outlines], which)
    self.has_texts = any(text for *_, text in outlines)
    gap = lambda scores, one: scores[one.winner] - scores[one.loser]
    self._score_gaps = [
      np.float32(gap(calibrated_scores(outlines[one.prompt][1]), one)) for one in self._chosen
    ]

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> Pair:
    prompt, winner, loser = self._chosen[index]
    preference = self._preferences[prompt]
    return Pair(
      text=preference["text"],
      masked_image=preference["masked_image"],
      mask=preference["mask"],
      candidates=preference["candidates"][[winner, loser]],
      score_gap=self._score_gaps[index],
    )


def open_pairs(
  splits: dict[str, StoredPreferences], which: str, folder: str | Path
) -> dict[str, Pairs]:
  """Makes the pairs of each split.

  Args:
    splits: of `preferences.open_splits`.
    which: see `choose_pairs`.
    folder: of the dataset, for the error.

  Raises:
    ValueError: a split has no pair.
  """
  found = {split: Pairs(preferences, which) for split, preferences in splits.items()}
  for split, pairs in found.items():
    if not len(pairs):
      raise ValueError(
        f"preferences: {folder} has no two candidates of a prompt with different scores in its "
        f"{split} split; expected at least one such pair; add candidates or scores"
      )
  return found


def stack_pairs(
  pairs: Sequence[Pair], tokenize: Callable[[Sequence[str]], Any] | None = None
) -> dict[str, np.ndarray]:
  """Stacks pairs of one size to a batch.

  Args:
    pairs: b pairs.
    tokenize: texts -> (token IDs [b, L], attention mask [b, L] or None) of each text encoder; None:
      the batch has no tokens.

  Returns:
    {masked_image: uint8 [b, H, W, 3], mask: uint8 [b, H, W, 1], candidates: uint8 [b, 2, H, W, 3],
     score_gap: float32 [b]}, and the tokens of encoder number n as ids_n and attention_n.
  """
  names = "masked_image", "mask", "candidates", "score_gap"
  batch = {name: np.stack([pair[name] for pair in pairs]) for name in names}
  for number, (ids, attention) in enumerate(
    tokenize([pair["text"] for pair in pairs]) if tokenize else ()
  ):
    batch[f"ids_{number}"] = np.asarray(ids)
    if attention is not None:
      batch[f"attention_{number}"] = np.asarray(attention)
  return batch


def pair_loader(
  pairs: Pairs,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  tokenize: Callable[[Sequence[str]], Any] | None = None,
) -> grain.DatasetIterator:
  """Makes an endless iterator of the batches that `stack_pairs` returns; see `endless_batches`."""
  lock = threading.Lock()  # tokenizers are not safe in the loader's threads

  def locked(texts: Sequence[str]) -> Any:
    with lock:
      return tokenize(texts)

  stack = functools.partial(stack_pairs, tokenize=tokenize and locked)
  return endless_batches(
    pairs, batch_size, seed, process_index, process_count, True, stack, name="pairs"
  )
