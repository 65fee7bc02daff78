"""Fit of a reward model to human scores: loss, augmentation, scores of held-out preferences."""
# Shapes: N prompts, b prompts of a batch, C candidates of each, H W pixels, D features.

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from flax.traverse_util import path_aware_map
from jax.experimental import multihost_utils

from prefpaint_jax.data import masks as mask_io
from prefpaint_jax.data import preferences as preference_io
from prefpaint_jax.models import reward
from prefpaint_jax.models.config import CLIPVisionConfig, RewardConfig
from prefpaint_jax.models.reward import RewardNetwork
from prefpaint_jax.preference import simulation
from prefpaint_jax.preference.bound import mahalanobis_norm
from prefpaint_jax.preference.moments import Moments, sum_over_processes
from prefpaint_jax.runtime import sharding
from prefpaint_jax.weights import folder as weights
from prefpaint_jax.weights.names import Params

with epy.lazy_imports():
  import grain


AUGMENTATIONS = ("none", "mirror", "dihedral")


class ScoredPreferences(NamedTuple):
  """The candidates of N prompts with their human scores and their rewards."""

  kinds: np.ndarray  # int32 [N], kind of the mask
  valid: np.ndarray  # bool [N, C], False for padding
  scores: np.ndarray  # [N, C], normalised human scores
  truth: np.ndarray  # [N, C], scores without the annotators' noise; NaN if unknown
  rewards: np.ndarray  # [N, C]
  norms: np.ndarray  # [N, C], ‖z‖_{V⁻¹}; NaN without a bound


def to_float(images: jax.Array) -> jax.Array:
  """Converts uint8 images to float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255.0


def augment(
  key: jax.Array, augmentation: str, candidates: jax.Array, masked: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Applies one random symmetry per prompt, to its masked image and to all its candidates.

  Args:
    augmentation: "none"; "mirror": flips left and right with probability 1/2; "dihedral": any
      symmetry of the square.
    candidates: [b, C, H, W, 3].
    masked: masked images [b, H, W, 3].
  """
  changes = [lambda x: jnp.flip(x, -2), lambda x: jnp.flip(x, -3), lambda x: x.swapaxes(-2, -3)]
  changes = changes[: {"none": 0, "mirror": 1, "dihedral": 3}[augmentation]]
  choices = jax.random.bernoulli(key, shape=(len(changes), masked.shape[0]))
  for choice, change in zip(choices, changes, strict=True):
    candidates, masked = (
      jnp.where(choice.reshape(-1, *(1,) * (x.ndim - 1)), change(x), x)
      for x in (candidates, masked)
    )
  return candidates, masked


def preference_loss(
  rewards: jax.Array,
  scores: jax.Array,
  valid: jax.Array,
  score_weight: float,
  pair_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the weighted sum of the squared error and the Bradley-Terry loss.

  The Bradley-Terry loss is the mean over all pairs of candidates of one prompt. It leaves out pairs
  with equal scores, which have no order.

  Args:
    rewards: [b, C].
    scores: [b, C].
    valid: bool [b, C], False for padding.
    score_weight: weight of the squared error.
    pair_weight: weight of the Bradley-Terry loss.

  Returns:
    The loss and the metrics `train/*`.
  """
  squared = jnp.mean((rewards - scores) ** 2, where=valid)
  gap, difference = (x[:, :, None] - x[:, None, :] for x in (rewards, scores))
  better = (difference > 0) & valid[:, :, None] & valid[:, None, :]
  pairs = jnp.maximum(better.sum(), 1)
  pair_loss = jnp.sum(jnp.where(better, jax.nn.softplus(-gap), 0.0)) / pairs
  accuracy = jnp.sum(better & (gap > 0)) / pairs
  loss = score_weight * squared + pair_weight * pair_loss
  metrics = {"loss": loss, "mse": squared, "pair_loss": pair_loss, "pair_accuracy": accuracy}
  return loss, {f"train/{name}": value for name, value in metrics.items()}


def batch_loss(
  network: RewardNetwork,
  augmentation: str,
  score_weight: float,
  pair_weight: float,
  params: Params,
  batch: Mapping[str, jax.Array],
  key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes `preference_loss` of a batch of `data.preferences`, with augmentation and dropout."""
  augment_key, dropout_key = jax.random.split(key)
  candidates, masked = augment(
    augment_key, augmentation, batch["candidates"], batch["masked_image"]
  )
  rewards, _ = reward.apply(
    network,
    params,
    to_float(candidates).reshape(-1, *masked.shape[1:]),
    to_float(masked),
    deterministic=False,
    rngs={"dropout": dropout_key},
  )
  scores = batch["scores"]
  return preference_loss(
    rewards.reshape(scores.shape), scores, batch["valid"], score_weight, pair_weight
  )


def pair_accuracy(rewards: np.ndarray, scores: np.ndarray, valid: np.ndarray) -> float:
  """Computes the share of pairs of candidates that rewards and scores order alike.

  Both candidates of a pair belong to one prompt; all arrays are [N, C]. Pairs with equal scores are
  left out. Equal rewards count half. The result is NaN if no pair is left.
  """
  first, second = np.triu_indices(scores.shape[1], 1)
  reward_order, score_order = (np.sign(x[:, first] - x[:, second]) for x in (rewards, scores))
  counted = valid[:, first] & valid[:, second] & (np.abs(score_order) == 1)
  if not counted.any():
    return float("nan")
  return float(np.mean(0.5 + 0.5 * (reward_order * score_order)[counted]))


def held_out_metrics(scored: ScoredPreferences, name: str = "held_out") -> dict[str, float]:
  """Computes `NAME/*`: error, correlations and pair accuracy, of all prompts and by kind."""
  from scipy import stats  # here, because the import is slow

  metrics = {}
  kinds = {f"{mask_io.KINDS[k]}/": scored.kinds == k for k in np.unique(scored.kinds)}
  for kind, chosen in {"": np.full(scored.kinds.shape, True), **kinds}.items():
    valid = scored.valid[chosen]
    rewards, scores = scored.rewards[chosen][valid], scored.scores[chosen][valid]
    if len(rewards) < 2:
      continue
    varied = np.ptp(rewards) > 0 and np.ptp(scores) > 0
    by_prompt = scored.rewards[chosen], scored.scores[chosen], valid
    metrics |= {
      f"{name}/{kind}mse": float(np.mean((rewards - scores) ** 2)),
      f"{name}/{kind}pearson": float(stats.pearsonr(rewards, scores)[0]) if varied else 0.0,
      f"{name}/{kind}spearman": float(stats.spearmanr(rewards, scores)[0]) if varied else 0.0,
      f"{name}/{kind}pair_accuracy": pair_accuracy(*by_prompt),
    }
  return metrics


class Scorer:
  """Computes rewards and features of preferences. Each process scores its share of the prompts."""

  def __init__(self, network: RewardNetwork, batch_size: int):
    self._mesh = sharding.make_mesh(devices=jax.local_devices())
    self._batch_size = -(-batch_size // self._mesh.size) * self._mesh.size

    @jax.jit
    def score(params: Params, candidates: jax.Array, masked: jax.Array):
      flat = to_float(candidates).reshape(-1, *masked.shape[1:])
      rewards, features = reward.apply(network, params, flat, to_float(masked))
      shape = candidates.shape[:2]
      return rewards.reshape(shape), features.reshape(*shape, -1)

    self._score = score

  def __call__(
    self, params: Params, preferences: preference_io.StoredPreferences
  ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
    """Yields batches, with rewards [b, C] and features [b, C, D] of their candidates.

    All processes yield the same number of batches of one size. The rows that fill up the last
    batches are not valid.
    """
    params = jax.device_put(params, sharding.replicated(self._mesh))
    share = -(-len(preferences) // jax.process_count())
    rows = -(-share // self._batch_size) * self._batch_size
    count = preferences.num_candidates

    def row(i: int) -> dict[str, np.ndarray]:
      number = i * jax.process_count() + jax.process_index()
      one = preferences[min(number, len(preferences) - 1)]
      padded = preference_io.stack([one], count)
      is_real = number < len(preferences) and i < share
      return padded | {"valid": padded["valid"] & is_real, "mask": one["mask"][None]}

    join = lambda rows: {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
    batches = grain.MapDataset.range(rows).map(row).batch(self._batch_size, batch_fn=join)
    for batch in batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)):
      images = jax.device_put(
        (batch["candidates"], batch["masked_image"]), sharding.batch_sharding(self._mesh)
      )
      yield batch, *jax.device_get(self._score(params, *images))


def score_all(
  scorer: Scorer,
  params: Params,
  preferences: preference_io.StoredPreferences,
  whitening: np.ndarray | None = None,
  metadata: Mapping[str, Any] | None = None,
) -> ScoredPreferences:
  """Scores all preferences. Every process must call it, and gets the results of all processes.

  Args:
    whitening: `Bound.whitening` [D, D], for the norms; None: the norms are NaN.
    metadata: the dataset's metadata, for the simulated annotators' preference as the truth; None:
      the truth is NaN.
  """
  parts = []
  for batch, rewards, features in scorer(params, preferences):
    norms = truth = np.full(rewards.shape, np.nan, np.float32)
    if whitening is not None:
      flat = mahalanobis_norm(whitening, features.reshape(-1, features.shape[-1]))
      norms = np.asarray(flat).reshape(rewards.shape)
    if metadata is not None:
      masks = np.repeat(batch["mask"], rewards.shape[1], axis=0)
      images = batch["candidates"].reshape(-1, *batch["candidates"].shape[2:]) / 255.0
      texts = [str(text) for text in np.repeat(batch["text"], rewards.shape[1])]
      true_scores = simulation.true_preference(images, masks, texts)
      criteria = metadata["weights"]
      total = sum(criteria.values())
      combined = sum(weight / total * true_scores[name] for name, weight in criteria.items())
      truth = ((combined - metadata["mean"]) / metadata["std"]).reshape(rewards.shape)
    truth = truth.astype(np.float32)
    parts.append((batch["kind"], batch["valid"], batch["scores"], truth, rewards, norms))
  own = tuple(map(np.concatenate, zip(*parts, strict=True)))
  return ScoredPreferences(*multihost_utils.process_allgather(own, tiled=True))


def moments_of(
  scorer: Scorer, params: Params, preferences: preference_io.StoredPreferences
) -> Moments:
  """Computes the moments of all preferences' features and scores.

  Every process must call it, and gets the moments of all processes.
  """
  moments = None
  for batch, _, features in scorer(params, preferences):
    moments = Moments.zeros(features.shape[-1]) if moments is None else moments
    moments = moments.add(features[batch["valid"]], batch["scores"][batch["valid"]])
  return sum_over_processes(moments)


def initial_params(network: RewardNetwork, clip: str, seed: int) -> Params:
  """Initialises parameters at random; loads the CLIP tower if `clip` is given.

  Args:
    clip: a folder or hub name of a CLIP model; "": the tower is random too.

  Raises:
    ValueError: if the network fuses early or its tower differs from the CLIP model's.
  """
  size = network.config.vision.image_size
  pixels = jnp.zeros((1, size, size, 3))
  params = jax.jit(network.init)(jax.random.key(seed), pixels, pixels)["params"]
  if not clip:
    return params
  if network.config.fusion == "early":
    raise ValueError(
      "config.network.fusion is 'early', but a CLIP tower has 3 input channels; give "
      "--config.network.fusion=late or --config.clip=''"
    )
  folder = weights.resolve(clip, ("config.json", "*.safetensors", "*.bin"))
  vision = CLIPVisionConfig.from_dict(weights.read_config(folder))
  if vision != network.config.vision:
    raise ValueError(
      f"config.network.vision is {network.config.vision}; {clip} has {vision}; make them equal"
    )
  params["clip"] = weights.load_params(folder, params["clip"])
  return params


def label_params(config: RewardConfig, frozen_share: float, params: Params) -> Params:
  """Labels every array as "trained" or "frozen"; returns a tree like `params`.

  Args:
    frozen_share: share of the CLIP tower's blocks that are frozen, from the input on, together with
      the embeddings before them; 0: trains all parameters; 1: freezes the whole tower.
  """
  layers = config.vision.num_hidden_layers
  last = round(frozen_share * layers)
  frozen = {f"layers_{i}" for i in range(last)}
  frozen |= {"embeddings", "pre_layrnorm"} if last else set()
  frozen |= {"post_layernorm", "visual_projection"} if frozen_share == 1 else set()
  is_frozen = lambda path, _: path[0] == "clip" and bool(frozen & set(path))
  return path_aware_map(lambda *leaf: "frozen" if is_frozen(*leaf) else "trained", params)
