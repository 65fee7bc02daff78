"""Scores of candidates from comparisons of two: the Bradley-Terry model."""
# Shapes: C candidates of one prompt.

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from prefpaint_jax.data.agreement import nominal_agreement
from prefpaint_jax.data.answers import Answer
from prefpaint_jax.data.rating_files import Rating

# Standard deviation of the normal prior of a score. A candidate that wins its only comparison has
# a winning probability of 0.81 with it.
PRIOR = 2.0


def bradley_terry(wins: np.ndarray) -> np.ndarray:
  """Computes the most probable scores s [C] of compared candidates.

  Candidate i wins against j with probability σ(s_i − s_j). The scores maximise

    Σ_ij wins_ij log σ(s_i − s_j) − Σ_i s_i² / (2 PRIOR²).

  The first term alone is the likelihood of Bradley and Terry (1952), whose maximum is infinite for
  a candidate that always wins. The prior makes the maximum finite and unique, with mean 0.

  Args:
    wins: [C, C], how often i was better than j; each equal comparison is half a win for both.
  """
  from scipy.optimize import minimize  # here, because the import takes a second

  wins = np.asarray(wins, np.float64)

  def loss(scores: np.ndarray) -> tuple[float, np.ndarray]:
    margins = scores[:, None] - scores[None, :]
    missed = wins * np.exp(-np.logaddexp(0, margins))  # wins · σ(−margin)
    value = (wins * np.logaddexp(0, -margins)).sum() + (scores**2).sum() / (2 * PRIOR**2)
    return value, missed.sum(0) - missed.sum(1) + scores / PRIOR**2

  def hessian(scores: np.ndarray) -> np.ndarray:
    margins = scores[:, None] - scores[None, :]
    curvature = (wins + wins.T) * np.exp(-np.logaddexp(0, margins) - np.logaddexp(0, -margins))
    return np.diag(curvature.sum(1) + 1 / PRIOR**2) - curvature

  start, options = np.zeros(len(wins)), {"gtol": 1e-10}
  found = minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options=options).x
  return found - found.mean()


def rate_comparisons(answers: Iterable[Answer]) -> dict[str, dict[str, Rating]]:
  """Computes the scores of compared candidates, for each prompt alone; repeats are left out.

  Returns:
    {candidate: {annotator: rating}}, with the same score for all annotators of a candidate.
  """
  by_prompt: dict[str, list[Answer]] = defaultdict(list)
  for answer in answers:
    if not answer.repeat:
      by_prompt[answer.image_id].append(answer)
  ratings: dict[str, dict[str, Rating]] = {}
  for compared in by_prompt.values():
    names = sorted({name for answer in compared for name in answer.candidates})
    scores = bradley_terry(count_wins(names, compared))
    for name, score in zip(names, scores.tolist(), strict=True):
      ratings[name] = {
        answer.annotator: Rating(answer.where, (score,))
        for answer in compared
        if name in answer.candidates
      }
  return ratings


def count_wins(names: Sequence[str], answers: Iterable[Answer]) -> np.ndarray:
  """Counts how often each candidate was better than each other one, [C, C]; equal: half a win."""
  wins = np.zeros((len(names), len(names)))
  for answer in answers:
    first, second = map(names.index, answer.candidates)
    wins[first, second] += (1 + answer.values[0]) / 2
    wins[second, first] += (1 - answer.values[0]) / 2
  return wins


def comparison_agreement(answers: Iterable[Answer]) -> tuple[float, float, float]:
  """Computes the `nominal_agreement` of comparisons; a unit is a pair. Repeats are left out.

  Each pair counts in both orders, so that the result does not depend on the candidates' names. In
  one order alone, annotators who all prefer the second of every pair would agree by chance.
  """
  chosen: dict[tuple[str, ...], list[float]] = defaultdict(list)
  for answer in answers:
    if not answer.repeat:
      chosen[answer.candidates].append(answer.values[0])
  table = np.full((len(chosen), max(map(len, chosen.values()), default=0)), np.nan)
  for row, values in zip(table, chosen.values(), strict=True):
    row[: len(values)] = values
  return nominal_agreement(np.concatenate([table, -table]))
