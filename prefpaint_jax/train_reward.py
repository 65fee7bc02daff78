"""Trains a reward model on preferences, and bounds its error.

  python -m prefpaint_jax.train_reward --config=configs/reward.py --workdir=runs/reward \
    --config.preferences=DIR

Fits the network to the scores, keeps the parameters that order held-out candidates best, refits the
last layer in closed form, so that the bound's assumption holds, and compares the bound with the
errors on held-out preferences. The workdir receives reward/ (for `--config.reward` of the alignment
and `RewardModel.from_pretrained`), calibration.png, calibration.json, metrics and checkpoints; the
same command resumes.
"""
# Shapes: N prompts, b of them in a batch, C candidates of each, H W pixels, D features.

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epy
from flax.traverse_util import path_aware_map
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from prefpaint_jax import app, calibration, fitting, reward, sharding, simulation
from prefpaint_jax.bound import Moments, mahalanobis_norm, refit, sum_over_processes
from prefpaint_jax.data import masks as mask_io
from prefpaint_jax.data import preferences as preference_io
from prefpaint_jax.models.config import CLIPVisionConfig, RewardConfig
from prefpaint_jax.models.reward import RewardNetwork
from prefpaint_jax.reward import RewardModel
from prefpaint_jax.weights import folder as weights

with epy.lazy_imports():
  import grain  # slow

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


def check(config: ConfigDict) -> None:
  if not config.preferences:
    raise ValueError(
      "config.preferences is empty: give the folder that prefpaint_jax.data.preferences wrote"
    )
  if config.augmentation not in AUGMENTATIONS:
    raise ValueError(
      f"augmentation is {config.augmentation!r}; give one of {', '.join(AUGMENTATIONS)}"
    )
  if not 0 <= config.frozen_share <= 1:
    raise ValueError(f"frozen_share is {config.frozen_share}; give a share from 0 to 1")
  if not (config.score_weight > 0 or config.pair_weight > 0):
    raise ValueError("score_weight and pair_weight are both 0; there is nothing to learn")
  if not (config.score_weight > 0 or config.ridge > 0):
    raise ValueError("without score_weight the reward has no scale; give ridge above 0")


def train_reward(config: ConfigDict, workdir: Path) -> RewardModel:
  ### Settings and data.
  check(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  sharding.check_batch(config.batch_size, mesh)
  size = config.size or None
  train = preference_io.open_preferences(config.preferences, "train", size)
  held_out = preference_io.open_preferences(config.preferences, "test", size)
  metadata = preference_io.read_metadata(config.preferences)
  truth = metadata if config.simulated_preference else None
  network = RewardNetwork(RewardConfig.from_dict(config.network.to_dict()), jnp.dtype(config.dtype))
  app.open_workdir(config, workdir)
  is_writer = jax.process_index() == 0

  ### The network: parameters that order held-out candidates as people do.
  params = initial_params(network, config.clip, config.seed)
  labels = functools.partial(trained, network.config, config.frozen_share)
  judge = Judge(network, config.batch_size)

  def judge_held_out(params: Params) -> tuple[float, dict[str, float]]:
    metrics = agreement(judge_all(judge, params, held_out))
    return metrics["held_out/pair_accuracy"], metrics

  params = fitting.fit(
    functools.partial(
      batch_loss, network, config.augmentation, config.score_weight, config.pair_weight
    ),
    (),
    params,
    optax.multi_transform(
      {
        "trained": fitting.warmup_cosine(
          config.learning_rate, config.warmup_iterations, config.iterations, config.weight_decay
        ),
        "frozen": optax.set_to_zero(),
      },
      labels,
    ),
    preference_io.preference_loader(
      train, config.batch_size, config.seed, jax.process_index(), jax.process_count()
    ),
    workdir,
    mesh,
    jax.random.key(config.seed + 1),
    iterations=config.iterations,
    ema_decay=config.ema_decay,
    checkpoint_every=config.checkpoint_every,
    log_every=config.log_every,
    judge=judge_held_out,
    judge_every=config.judge_every,
  )

  ### The last layer in closed form, and the bound on its error.
  moments = moments_of(judge, params, train)
  w, bound = refit(moments, config.ridge, moments_of(judge, params, held_out), config.norm_bound)
  if config.noise_scale is not None:
    bound = dataclasses.replace(bound, noise_scale=config.noise_scale)
  params["mlp"]["last_layer"]["kernel"] = w[:, None].astype(np.float32)
  model = RewardModel(network, params, bound)

  ### How far both can be trusted, where nothing was trained.
  judged = judge_all(judge, params, held_out, bound.whitening, truth)
  if is_writer:
    model.save_pretrained(workdir / "reward")
    report(config, judged, bound, workdir, metadata)
  return model


def report(
  config: ConfigDict, judged: Judged, bound: Any, workdir: Path, metadata: Mapping[str, Any]
) -> None:
  """Prints and writes what the held-out preferences say of the reward and of its bound."""
  kinds = np.broadcast_to(judged.kinds[:, None], judged.valid.shape)[judged.valid]
  flat = {
    name: values[judged.valid] for name, values in judged._asdict().items() if name != "kinds"
  }
  samples = calibration.Samples(
    flat["norms"],
    flat["rewards"],
    flat["scores"],
    flat["truth"] if config.simulated_preference else None,
    [mask_io.KINDS[k] for k in kinds],
  )
  found = calibration.calibrate(samples, bound, config.trust.k, config.trust.b)
  metrics = agreement(judged)
  if config.simulated_preference:
    noise_free = judged._replace(scores=judged.truth)
    names = {name.replace("held_out/", "truth/"): v for name, v in agreement(noise_free).items()}
    metrics |= names
  calibration.plot(found, samples, workdir / "calibration.png")
  content = {"metrics": metrics, "calibration": dataclasses.asdict(found), "data": dict(metadata)}
  (workdir / "calibration.json").write_text(json.dumps(content, indent=2) + "\n")

  titles = {"held_out": "annotated scores", "truth": "noise-free scores"}
  print(f"{len(judged.valid)} held-out prompts, {len(kinds)} candidates:")
  for name, title in titles.items():
    for kind in ("", *(f"{kind}/" for kind in mask_io.KINDS)):
      part = {m: metrics.get(f"{name}/{kind}{m}") for m in ("pair_accuracy", "spearman", "mse")}
      if part["mse"] is not None:
        print(
          f"  {title}, {kind[:-1] or 'all'}: pair accuracy {part['pair_accuracy']:.3f}, Spearman "
          f"{part['spearman']:.3f}, mean squared error {part['mse']:.3f}"
        )
  print(calibration.describe(found))
  print(f"{workdir / 'reward'}: open with RewardModel.from_pretrained or --config.reward")


if __name__ == "__main__":
  app.run_with_config(train_reward)
