"""The objective of an alignment: rewards by name, their weights, and their combination.

"prefpaint*1,seam*0.5" names two rewards and their weights; without a weight it is 1. `combine` is
  sum      the weighted sum of the scores: for rewards of fixed scale;
  gdpo     each reward is standardised within its prompt, weighted and summed (GDPO, arXiv
           2601.05242), so that the widest reward does not outweigh the others;
  winrate  the weighted share of the prompt's other samples that a sample beats: free of scale.
"""
# Shapes: P prompts, S samples of each, B = P S samples.

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from prefpaint_jax.rewards import prefpaint, table
from prefpaint_jax.rewards.functions import load_function
from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.runtime.compilation import enable_cache
from prefpaint_jax.runtime.suggestions import suggest
from prefpaint_jax.runtime.weighted_names import split_names


class Objective(NamedTuple):
  """Rewards, their weights and their combination. Programs get the parameters as arguments."""

  rewards: tuple[Reward, ...]
  weights: tuple[float, ...] = (1.0,)
  combine: str = "sum"

  @property
  def params(self) -> tuple[Any, ...]:
    """The parameters of the rewards."""
    return tuple(reward.params for reward in self.rewards)

  @property
  def trusted(self) -> Reward | None:
    """The reward whose features give the trust weight: the first with a bound, or with features."""
    found = [reward for reward in self.rewards if reward.feature_dim]
    return next((reward for reward in found if reward.bound), found[0] if found else None)

  @property
  def has_host_rewards(self) -> bool:
    """Whether a reward runs on the host."""
    return any(reward.on_host for reward in self.rewards)

  def tokenize(self, texts: Sequence[str]) -> tuple[Any, ...] | None:
    """Tokenizes P texts for each reward that reads texts; None if no reward does."""
    if not any(reward.tokenize for reward in self.rewards):
      return None
    return tuple(reward.tokenize and reward.tokenize(texts) for reward in self.rewards)

  def host_scores(
    self, images: np.ndarray, masked_images: np.ndarray, masks: np.ndarray, texts: Sequence[str]
  ) -> tuple[np.ndarray | None, ...]:
    """Computes the scores [B] of the rewards on the host, and None for others."""
    arrays = images, masked_images, masks, texts
    return tuple(one.on_arrays(*arrays) if one.on_host else None for one in self.rewards)

  def weighted(self, scores: Sequence[Float[Array, " B"]]) -> Float[Array, " B"]:
    """Computes the weighted sum of the scores, whatever the combination."""
    return sum(weight * one for weight, one in zip(self.weights, scores, strict=True))


def is_function(name: str) -> bool:
  """Returns whether a name is `FILE.py:FUNCTION`."""
  return re.search(r"\.py:\w*$", name) is not None


def label_rewards(names: Sequence[str]) -> list[str]:
  """Returns a short and unique label of each reward, for metrics and tables.

  It is the NAME of NAME@WEIGHTS, the FUNCTION of FILE.py:FUNCTION, or the last part of a path; the
  whole name if another reward has that label.
  """
  labels = []
  for name in names:
    if is_function(name):
      label = name.rpartition(":")[2]
    elif table.find(name):
      label = name.partition("@")[0]
    else:
      parts = Path(name).parts
      label = "/".join(parts[-2:]) if parts[-1] == "reward" else parts[-1]  # train_reward's folder
    labels.append(name if label in (*labels, *names) else label)
  return labels


def load_rewards(names: Sequence[str], dtype: str = "float32") -> dict[str, Reward]:
  """Loads rewards by their labels; see `label_rewards` and `load_reward`."""
  return {
    label: load_reward(name, dtype) for label, name in zip(label_rewards(names), names, strict=True)
  }


def warn_without_texts(rewards: Iterable[Reward], has_texts: bool, prompts: str) -> None:
  """Prints a line for each reward that reads texts, if the prompts have none."""
  for reward in rewards:
    if reward.tokenize and not has_texts and jax.process_index() == 0:
      line = f"{prompts} has no texts: the reward {reward.name} reads the empty text"
      print(line, file=sys.stderr)


def load_reward(name: str | Path, dtype: str = "float32") -> Reward:
  """Loads a reward: call the result with images. Enables JAX's compilation cache.

  Args:
    name: a name of `table.TABLE`, "mini", a folder, a hub name, or FILE.py:FUNCTION.
    dtype: compute dtype of its network.

  Raises:
    ValueError: there is no such reward, or it cannot be read.
  """
  enable_cache()
  return _open(str(name), dtype)


def _open(name: str, dtype: str, bound: str | None = None, *, abstract: bool = False) -> Reward:
  if is_function(name):
    return load_function(name)
  found = table.find(name)
  if found is None:
    _check_name(name)
    return prefpaint.outline(name, dtype) if abstract else prefpaint.load(name, dtype, bound)
  module, weights = found
  if module is prefpaint:
    weights = weights or prefpaint.RELEASED
    return prefpaint.outline(weights, dtype) if abstract else prefpaint.load(weights, dtype, bound)
  load = getattr(module, "outline", module.load) if abstract else module.load
  return load(name, weights, dtype)


def _check_name(name: str) -> None:
  """Raises ValueError, with the nearest name, for what is neither a name nor may be a folder."""
  if name == "mini" or Path(name).exists():
    return
  if "," in name or "*" in name:
    raise ValueError(f"reward {name!r} is a list; expected one reward here; give one name")
  if "/" in name or "\\" in name:
    return
  nearest = suggest(name, (*table.TABLE, "mini"))
  expected = f"one of {', '.join(table.TABLE)}, mini, a folder, a hub name, or FILE.py:FUNCTION"
  advice = f"did you mean {nearest}?" if nearest else f"give {expected}"
  raise ValueError(f"reward {name!r}: no such reward; {advice}")


def open_objective(
  names: str, combine: str = "sum", dtype: str = "float32", bound: str | None = None
) -> Objective:
  """Loads the rewards of an objective.

  Args:
    names: as "NAME*WEIGHT,NAME".
    combine: one of COMBINATIONS.
    dtype: compute dtype of the networks.
    bound: file of the bound of the first learned reward; None: that of its folder.
  """
  return _objective(names, combine, lambda name, own: _open(name, dtype, own and bound))


def open_judges(names: Sequence[str], dtype: str = "float32", abstract: bool = False) -> Objective:
  """Loads rewards that only judge; their names become their labels.

  Args:
    abstract: makes shapes in the place of parameters; reads no weights.
  """
  judges = tuple(
    dataclasses.replace(_open(name, dtype, abstract=abstract), name=label)
    for name, label in zip(names, label_rewards(names), strict=True)
  )
  return Objective(judges, (1.0,) * len(judges))


def outline_objective(names: str, combine: str = "sum", dtype: str = "float32") -> Objective:
  """Makes the objective with shapes in the place of parameters; reads no weights."""
  return _objective(names, combine, lambda name, _: _open(name, dtype, abstract=True))


def _objective(names: str, combine: str, load: Callable[[str, bool], Reward]) -> Objective:
  """Makes an objective; `load` takes a name, and whether it is the first learned reward."""
  found = split_names(names)
  own = [name for name, _ in found]
  learned = [name for name in own if _is_learned(name)]
  rewards = (load(name, name in learned[:1]) for name in own)
  rewards = tuple(
    dataclasses.replace(reward, name=label)
    for reward, label in zip(rewards, label_rewards(own), strict=True)
  )
  return Objective(rewards, tuple(weight for _, weight in found), combine)


def _is_learned(name: str) -> bool:
  """Returns whether a name is of a reward model, which may have a bound."""
  found = table.find(name)
  return not is_function(name) and (found is None or found[0] is prefpaint)


def combined(
  objective: Objective, scores: Sequence[Float[Array, " B"]], valid: Bool[Array, " B"], samples: int
) -> Float[Array, " B"]:
  """Combines the scores of the rewards to one reward for each sample.

  Args:
    valid: samples whose scores count.
    samples: S, consecutive samples of one prompt; 1: compares all samples.
  """
  if objective.combine != "sum":
    S = samples if samples > 1 else len(valid)
    within = _standardised if objective.combine == "gdpo" else _win_rates
    known = valid.reshape(-1, S)
    scores = [within(one.reshape(-1, S), known).reshape(-1) for one in scores]
  return objective.weighted(scores)


def _standardised(scores: Float[Array, "P S"], known: Bool[Array, "P S"]) -> Float[Array, "P S"]:
  """Subtracts each prompt's mean and divides by its standard deviation."""
  count = jnp.maximum(known.sum(-1, keepdims=True), 1)
  mean = jnp.sum(scores, -1, keepdims=True, where=known) / count
  centred = jnp.where(known, scores - mean, 0.0)
  variance = jnp.sum(centred**2, -1, keepdims=True) / jnp.maximum(count - 1, 1)
  return centred / (jnp.sqrt(variance) + 1e-4)


def _win_rates(scores: Float[Array, "P S"], known: Bool[Array, "P S"]) -> Float[Array, "P S"]:
  """Computes the share of a prompt's other samples that each sample beats; a tie counts half."""
  others = known[:, None, :] & ~jnp.eye(known.shape[-1], dtype=bool)
  wins = jnp.sign(scores[..., :, None] - scores[..., None, :])
  wins = jnp.where(others, 0.5 * (1.0 + wins), 0.0)
  return jnp.sum(wins, -1) / jnp.maximum(others.sum(-1), 1)
