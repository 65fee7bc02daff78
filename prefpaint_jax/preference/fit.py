"""Fits a reward model to scores: losses, augmentation, held-out metrics."""
# Shapes: N prompts, b of them in a batch, C candidates of each, H W pixels, D features.

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
from prefpaint_jax.preference.bound import Moments, mahalanobis_norm, sum_over_processes
from prefpaint_jax.runtime import sharding
from prefpaint_jax.weights import folder as weights

with epy.lazy_imports():
  import grain


Params = Any  # a tree of arrays
AUGMENTATIONS = ("none", "mirror", "dihedral")


class Judged(NamedTuple):
  """Candidates of N prompts, as people and as a reward model see them."""

  kinds: np.ndarray  # int32 [N], of mask
  valid: np.ndarray  # bool [N, C], False for padding
  scores: np.ndarray  # [N, C], normalised
  truth: np.ndarray  # [N, C], the same without the annotators' noise; NaN where it is not known
  rewards: np.ndarray  # [N, C]
  norms: np.ndarray  # [N, C], ‖z‖_{V⁻¹}; NaN before there is a bound


def to_float(images: jax.Array) -> jax.Array:
  return images.astype(jnp.float32) / 255.0


def augment(
  key: jax.Array, how: str, candidates: jax.Array, masked: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The same random symmetry for a prompt [b, H, W, 3] and its candidates [b, C, H, W, 3].

  "mirror": left and right are exchanged half of the time; "dihedral": any symmetry of a square.
  """
  changes = [lambda x: jnp.flip(x, -2), lambda x: jnp.flip(x, -3), lambda x: x.swapaxes(-2, -3)]
  changes = changes[: {"none": 0, "mirror": 1, "dihedral": 3}[how]]
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
  """Weighted sum of the squared error and Bradley-Terry's loss over all pairs of one prompt.

  rewards, scores, valid: [b, C]. Pairs with equal scores say nothing and count for nothing.
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
  how: str,
  score_weight: float,
  pair_weight: float,
  params: Params,
  batch: Mapping[str, jax.Array],
  key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`preference_loss` of a batch of `data.preferences`, augmented, with dropout."""
  augment_key, dropout_key = jax.random.split(key)
  candidates, masked = augment(augment_key, how, batch["candidates"], batch["masked_image"])
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
  """Share of the pairs of one prompt [N, C] that the rewards order as the scores do.

  Pairs with equal scores are left out, equal rewards count half; NaN where no pair is left.
  """
  first, second = np.triu_indices(scores.shape[1], 1)
  order, said = (np.sign(x[:, first] - x[:, second]) for x in (rewards, scores))
  counted = valid[:, first] & valid[:, second] & (np.abs(said) == 1)
  return float(np.mean(0.5 + 0.5 * (order * said)[counted])) if counted.any() else float("nan")


def agreement(judged: Judged) -> dict[str, float]:
  """Held-out metrics, of all prompts and of each kind apart."""
  from scipy import stats  # slow to import

  metrics = {}
  kinds = {f"{mask_io.KINDS[k]}/": judged.kinds == k for k in np.unique(judged.kinds)}
  for name, chosen in {"": np.full(judged.kinds.shape, True), **kinds}.items():
    valid = judged.valid[chosen]
    rewards, scores = judged.rewards[chosen][valid], judged.scores[chosen][valid]
    if len(rewards) < 2:
      continue
    varied = np.ptp(rewards) > 0 and np.ptp(scores) > 0
    by_prompt = judged.rewards[chosen], judged.scores[chosen], valid
    metrics |= {
      f"held_out/{name}mse": float(np.mean((rewards - scores) ** 2)),
      f"held_out/{name}pearson": float(stats.pearsonr(rewards, scores)[0]) if varied else 0.0,
      f"held_out/{name}spearman": float(stats.spearmanr(rewards, scores)[0]) if varied else 0.0,
      f"held_out/{name}pair_accuracy": pair_accuracy(*by_prompt),
    }
  return metrics


class Judge:
  """Scores preferences with a network: this process its share of the prompts, on its devices."""

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
    """Batches, with rewards [b, C] and features [b, C, D] of their candidates.

    All processes get as many batches of one size; what fills them up is not valid.
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
      pictures = jax.device_put(
        (batch["candidates"], batch["masked_image"]), sharding.batch_sharding(self._mesh)
      )
      yield batch, *jax.device_get(self._score(params, *pictures))


def judge_all(
  judge: Judge,
  params: Params,
  preferences: preference_io.StoredPreferences,
  whitening: np.ndarray | None = None,
  metadata: Mapping[str, Any] | None = None,
) -> Judged:
  """What the network says of all preferences, on every process.

  With the data set's `metadata`, the truth is the simulated annotators' preference.
  """
  parts = []
  for batch, rewards, features in judge(params, preferences):
    norms = truth = np.full(rewards.shape, np.nan, np.float32)
    if whitening is not None:
      flat = mahalanobis_norm(whitening, features.reshape(-1, features.shape[-1]))
      norms = np.asarray(flat).reshape(rewards.shape)
    if metadata is not None:
      masks = np.repeat(batch["mask"], rewards.shape[1], axis=0)
      pictures = batch["candidates"].reshape(-1, *batch["candidates"].shape[2:]) / 255.0
      said = simulation.true_preference(pictures, masks)
      total = sum(metadata["weights"].values())
      combined = sum(weight / total * said[name] for name, weight in metadata["weights"].items())
      truth = ((combined - metadata["mean"]) / metadata["std"]).reshape(rewards.shape)
    parts.append(
      Judged(
        batch["kind"], batch["valid"], batch["scores"], truth.astype(np.float32), rewards, norms
      )
    )
  mine = Judged(*map(np.concatenate, zip(*parts, strict=True)))
  return Judged(*multihost_utils.process_allgather(tuple(mine), tiled=True))


def moments_of(
  judge: Judge, params: Params, preferences: preference_io.StoredPreferences
) -> Moments:
  """What ridge regression on the features has to know of all preferences, on every process."""
  moments = None
  for batch, _, features in judge(params, preferences):
    moments = Moments.zeros(features.shape[-1]) if moments is None else moments
    moments = moments.add(features[batch["valid"]], batch["scores"][batch["valid"]])
  return sum_over_processes(moments)


def initial_params(network: RewardNetwork, clip: str, seed: int) -> Params:
  """Fresh parameters, but for the CLIP tower's where `clip` names a folder or hub model."""
  size = network.config.vision.image_size
  pixels = jnp.zeros((1, size, size, 3))
  params = jax.jit(network.init)(jax.random.key(seed), pixels, pixels)["params"]
  if not clip:
    return params
  if network.config.fusion == "early":
    raise ValueError("config.clip: a CLIP tower sees 3 channels, network.fusion='early' has more")
  folder = weights.resolve(clip, ("config.json", "*.safetensors", "*.bin"))
  vision = CLIPVisionConfig.from_dict(weights.read_config(folder))
  if vision != network.config.vision:
    raise ValueError(f"{clip} is {vision}, network.vision is {network.config.vision}: make them so")
  params["clip"] = weights.load_params(folder, params["clip"])
  return params


def trained(config: RewardConfig, frozen_share: float, params: Params) -> Any:
  """For every array "trained" or "frozen".

  `frozen_share` of the CLIP tower's blocks, the first ones, and what is before them is frozen; 0:
  nothing is, 1: the whole tower.
  """
  layers = config.vision.num_hidden_layers
  last = round(frozen_share * layers)
  frozen = {f"layers_{i}" for i in range(last)}
  frozen |= {"embeddings", "pre_layrnorm"} if last else set()
  frozen |= {"post_layernorm", "visual_projection"} if frozen_share == 1 else set()
  is_frozen = lambda path, _: path[0] == "clip" and bool(frozen & set(path))
  return path_aware_map(lambda *leaf: "frozen" if is_frozen(*leaf) else "trained", params)
