"""Fits a reward model and the bound on its error.

  python -m prefpaint_jax.train_reward --config=configs/reward.py:mini --workdir=runs/reward

A policy paints candidates for crops of photographs, the simulated annotators score them, the
network learns the scores, and its last layer is refitted in closed form, so that the bound's
assumption holds. Writes WORKDIR/reward, and prints how it does on parts of the photographs that
neither it nor the policy has seen.
"""
# Shapes: N prompts, C candidates of each, H W pixels, D features.

import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from scipy import stats

from prefpaint_jax import app, mini, reward, simulation
from prefpaint_jax.bound import Bound, effective_rank, gram, mahalanobis_norm
from prefpaint_jax.data import prompts as prompt_io
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.metrics import MetricsWriter, progress
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.models.reward import RewardNetwork
from prefpaint_jax.reward import RewardModel


class Preferences(NamedTuple):
  """Scored candidates of N prompts."""

  candidates: np.ndarray  # uint8 [N, C, H, W, 3]
  masked: np.ndarray  # uint8 [N, H, W, 3], the hole black
  scores: np.ndarray  # float32 [N, C], the annotators' mean, 0 to 7
  truth: np.ndarray  # float32 [N, C], what they would say without noise


def collect(config: ConfigDict, split: str, number: int, painted: int, perturbed: int):
  """Paints, perturbs and scores candidates for `number` fresh prompts of a split."""
  photos = prompt_io.load_photos(mini.locate(config.photos, "photos"))
  seed = config.seed + 1  # other crops than those of the prompts that the policy is aligned on
  crops = prompt_io.crop_prompts(
    photos, split, number, config.size, seed, config.train_share, config.crop
  )
  batch = prompt_io.stack(list(crops))
  images, masks = batch["image"], batch["mask"]
  key, rng = jax.random.key(seed), np.random.default_rng([seed, split == "test"])
  policies = [Inpainter.from_pretrained(name) for name in config.policies]
  fillings, chunk = [], 128
  for sample in range(painted):
    policy = policies[sample % len(policies)]
    parts = [
      policy(
        images[i : i + chunk],
        masks[i : i + chunk],
        key=jax.random.fold_in(jax.random.fold_in(key, sample), i),
        num_steps=config.num_steps,
        eta=config.eta,
      )
      for i in range(0, number, chunk)
    ]
    fillings.append(np.concatenate(parts))
  for i in range(perturbed):
    source = fillings[i % (painted + 1)] if i % (painted + 1) < painted else images
    fillings.append(simulation.perturb(rng, source, masks))
  stacked = np.stack(fillings, axis=1)

  truth, scores = [], []
  for column in range(stacked.shape[1]):
    true = simulation.true_preference(stacked[:, column], masks)
    said = simulation.annotate(rng, true, config.num_annotators, config.annotator_noise)
    truth.append(true["combined"])
    scores.append(simulation.combine(said).mean(axis=1))
  to_bytes = lambda x: np.round(255.0 * x).astype(np.uint8)
  return Preferences(
    to_bytes(stacked),
    to_bytes(images * (1.0 - masks)),
    np.stack(scores, axis=1).astype(np.float32),
    np.stack(truth, axis=1).astype(np.float32),
  )


def dihedral(key: jax.Array, *images: jax.Array) -> tuple[jax.Array, ...]:
  """The same random mirroring and transposition of [N, ..., H, W, 3] for all of `images`, by N."""
  number = images[0].shape[0]
  choices = jax.random.bernoulli(key, shape=(3, number))

  def apply(x: jax.Array) -> jax.Array:
    for choice, change in zip(
      choices,
      (lambda x: jnp.flip(x, -2), lambda x: jnp.flip(x, -3), lambda x: x.swapaxes(-2, -3)),
      strict=True,
    ):
      x = jnp.where(choice.reshape(-1, *(1,) * (x.ndim - 1)), change(x), x)
    return x

  return tuple(map(apply, images))


def preference_loss(
  rewards: jax.Array, scores: jax.Array, pair_weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Squared error, plus Bradley-Terry over all pairs of one prompt; rewards, scores [N, C]."""
  squared = jnp.mean((rewards - scores) ** 2)
  gap, truth = (x[:, :, None] - x[:, None, :] for x in (rewards, scores))
  better = truth > 0  # ties say nothing
  pairs = jnp.sum(jnp.where(better, jax.nn.softplus(-gap), 0.0)) / jnp.maximum(better.sum(), 1)
  accuracy = jnp.sum(better & (gap > 0)) / jnp.maximum(better.sum(), 1)
  loss = squared + pair_weight * pairs
  return loss, {"loss": loss, "squared_error": squared, "pair_loss": pairs, "accuracy": accuracy}


def fit(config: ConfigDict, network: RewardNetwork, data: Preferences, workdir: Path):
  """Parameters that minimise the loss against the normalised scores."""
  mean, std = float(data.scores.mean()), float(data.scores.std())
  size = network.config.vision.image_size
  pixels = jnp.zeros((1, size, size, 3))
  params = jax.jit(network.init)(jax.random.key(config.seed), pixels, pixels)["params"]
  rate = optax.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, config.warmup_iterations, config.iterations
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=config.weight_decay)
  )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, candidates, masked, scores, key):
    candidates, masked = (x.astype(jnp.float32) / 255.0 for x in (candidates, masked))
    augment_key, dropout_key = jax.random.split(key)
    candidates, masked = dihedral(augment_key, candidates, masked)

    def loss(params):
      flat = candidates.reshape(-1, *candidates.shape[2:])
      rewards, _ = reward.apply(
        network, params, flat, masked, deterministic=False, rngs={"dropout": dropout_key}
      )
      return preference_loss(
        rewards.reshape(scores.shape), (scores - mean) / std, config.pair_weight
      )

    gradients, metrics = jax.grad(loss, has_aux=True)(params)
    changes, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, changes), opt_state, metrics

  rng = np.random.default_rng(config.seed)
  opt_state = optimizer.init(params)
  writer, bar = MetricsWriter(workdir), progress(config.iterations)
  key = jax.random.key(config.seed + 1)
  for iteration in range(config.iterations):
    chosen = rng.choice(len(data.scores), config.batch_size, replace=False)
    batch = (data.candidates[chosen], data.masked[chosen], data.scores[chosen])
    params, opt_state, metrics = step(params, opt_state, *batch, jax.random.fold_in(key, iteration))
    if (iteration + 1) % config.log_every == 0:
      metrics = {name: float(value) for name, value in metrics.items()}
      writer.write(iteration + 1, metrics)
      bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    bar.update()
  bar.close()
  writer.close()
  return params


def predict(model: RewardModel, data: Preferences) -> tuple[np.ndarray, np.ndarray]:
  """Rewards [N, C] and features [N, C, D] of all candidates."""
  rewards, features, chunk = [], [], 128
  for i in range(0, len(data.scores), chunk):
    candidates, masked = (x[i : i + chunk] / 255.0 for x in (data.candidates, data.masked))
    r, z = model.score(candidates.reshape(-1, *candidates.shape[2:]), masked)
    rewards.append(r.reshape(candidates.shape[:2]))
    features.append(z.reshape(*candidates.shape[:2], -1))
  return np.concatenate(rewards), np.concatenate(features)


def refit(features: np.ndarray, targets: np.ndarray, ridge: float) -> tuple[np.ndarray, Bound]:
  """Ridge regression w [D] of targets [n] on features [n, D] in float64, and its bound.

  R is the standard deviation of the residuals, S the norm of w (Abbasi-Yadkori et al. 2011).
  """
  features, targets = features.astype(np.float64), targets.astype(np.float64)
  V = gram(features) + ridge * np.eye(features.shape[1])
  w = np.linalg.solve(V, features.T @ targets)
  residual = float(np.std(targets - features @ w))
  return w, Bound.fit(features, ridge, noise_scale=residual, norm_bound=float(np.linalg.norm(w)))


def pair_accuracy(rewards: np.ndarray, truth: np.ndarray) -> float:
  """Share of the pairs of one prompt [N, C] that the rewards order as the truth does."""
  pairs = list(itertools.combinations(range(truth.shape[1]), 2))
  agree = [
    np.sign(rewards[:, i] - rewards[:, j]) == np.sign(truth[:, i] - truth[:, j]) for i, j in pairs
  ]
  return float(np.mean(agree))


def train_reward(config: ConfigDict, workdir: Path) -> RewardModel:
  app.open_workdir(config, workdir, free=())
  data = collect(config, "train", config.num_prompts, config.painted, config.perturbed)
  network = RewardNetwork(RewardConfig.from_dict(config.network.to_dict()), jnp.dtype(config.dtype))
  params = fit(config, network, data, workdir)

  ### The last layer in closed form, and with it the bound, on the features of all candidates.
  model = RewardModel(network, params)
  _, features = predict(model, data)
  flat = features.reshape(-1, features.shape[-1])
  targets = (data.scores - data.scores.mean()) / data.scores.std()
  w, model.bound = refit(flat, targets.reshape(-1), config.ridge)
  model.params["mlp"]["last_layer"]["kernel"] = jnp.asarray(w[:, None], jnp.float32)
  model.save_pretrained(workdir / "reward")

  ### How it does where nothing was trained, on what policies paint by themselves.
  held_out = collect(config, "test", config.held_out_prompts, 4, 0)
  rewards, features = predict(model, held_out)
  norms = np.asarray(mahalanobis_norm(model.bound.chol, features.reshape(-1, flat.shape[-1])))
  error = np.abs(rewards - (held_out.truth - data.scores.mean()) / data.scores.std()).reshape(-1)
  rank = stats.spearmanr(rewards.reshape(-1), held_out.truth.reshape(-1))[0]
  print(
    f"held out: pair accuracy {pair_accuracy(rewards, held_out.truth):.3f} against the noise-free "
    f"preference, Spearman {rank:.3f}"
  )
  print(
    f"bound: effective rank {effective_rank(model.bound):.1f} of {model.bound.width}, ‖z‖ "
    f"{norms.mean():.3f} ± {norms.std():.3f}, rank correlation of |error| and ‖z‖ "
    f"{stats.spearmanr(error, norms)[0]:.3f}"
  )
  return model


if __name__ == "__main__":
  app.run_with_config(train_reward)
