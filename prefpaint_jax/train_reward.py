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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from prefpaint_jax.data import masks as mask_io
from prefpaint_jax.data import preferences as preference_io
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.models.reward import RewardNetwork
from prefpaint_jax.preference import calibration, calibration_plot
from prefpaint_jax.preference.bound import refit
from prefpaint_jax.preference.fit import (
  AUGMENTATIONS,
  Judge,
  Judged,
  Params,
  agreement,
  batch_loss,
  initial_params,
  judge_all,
  moments_of,
  trained,
)
from prefpaint_jax.reward import RewardModel
from prefpaint_jax.runtime import cli, fitting, sharding
from prefpaint_jax.runtime.workdir import open_workdir


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
  open_workdir(config, workdir)
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
  calibration_plot.plot(found, samples, workdir / "calibration.png")
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
  cli.run_with_config(train_reward)
