"""Trains a reward model on preferences and bounds its error.

  python -m prefpaint_jax.train_reward --config=configs/reward.py --workdir=runs/reward \\
    --config.preferences=DIR

1. Trains the network on human scores, and keeps the parameters with the highest pair accuracy on
   the validation split.
2. Refits the last layer by ridge regression, which the error bound assumes. With `config.whiten`
   whitens the features first.
3. Estimates the noise scale R of the bound on the test split, which nothing was chosen on, and
   compares the bound with the errors there.

Writes reward/ (for `--config.reward` of `train` and for `RewardModel.from_pretrained`),
calibration.png, calibration.json, metrics and checkpoints to the workdir. The same command resumes
an interrupted run.
"""
# Shapes: N prompts, C candidates of each, D features.

import dataclasses
import functools
from collections.abc import Callable, Mapping
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
from prefpaint_jax.preference.bound import FILE_NAME, Bound, refit
from prefpaint_jax.preference.fit import (
  ScoredPreferences,
  Scorer,
  batch_loss,
  held_out_metrics,
  initial_params,
  label_params,
  moments_of,
  score_all,
)
from prefpaint_jax.preference.whitening import whiten
from prefpaint_jax.reward import RewardModel
from prefpaint_jax.runtime import cli, fitting, sharding
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.files import check_output_folder, write_json
from prefpaint_jax.runtime.text import print_next
from prefpaint_jax.runtime.workdir import open_workdir
from prefpaint_jax.weights.names import Params


def check(config: ConfigDict) -> None:
  """Raises ValueError for a config that cannot work."""
  check_fields(config, "reward")
  if not config.preferences:
    raise ValueError(
      "config.preferences is empty; give the folder that prefpaint_jax.data.preferences wrote"
    )
  if not (config.score_weight > 0 or config.pair_weight > 0):
    raise ValueError("score_weight and pair_weight are both 0; there is nothing to learn")
  if not (config.score_weight > 0 or config.ridge > 0):
    raise ValueError("score_weight is 0, so the reward has no scale; give ridge above 0")
  if config.whiten and config.network.activation != "identity":
    raise ValueError(
      f"whiten is True with network.activation {config.network.activation!r} after the features; "
      "expected a linear layer, which can hold the whitening; give network.activation=identity"
    )


def make_optimizer(config: ConfigDict, network: RewardNetwork) -> optax.GradientTransformation:
  """Makes the optimiser, which leaves the frozen parameters unchanged."""
  optimizer = fitting.warmup_cosine(
    config.learning_rate, config.warmup_iterations, config.iterations, config.weight_decay
  )
  labels = functools.partial(label_params, network.config, config.frozen_share)
  return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def train_reward(config: ConfigDict, workdir: Path) -> RewardModel | None:
  """Trains a reward model as `config` says; resumes the run in `workdir` if there is one.

  Returns:
    The reward model; None if the command was asked to stop.
  """
  check(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  sharding.check_batch(config.batch_size, mesh)
  writes = "checkpoints", "metrics.jsonl", "reward", "calibration.json", "calibration.png"
  is_writer = jax.process_index() == 0
  with open_workdir(config, workdir, "train_reward", writes, is_writer=is_writer) as write_config:
    return _train_reward(config, workdir, mesh, write_config)


def _train_reward(
  config: ConfigDict, workdir: Path, mesh: jax.sharding.Mesh, write_config: Callable[[], None]
) -> RewardModel | None:
  """Trains a reward model in a workdir that this process holds; see `train_reward`."""
  names = ("config.json", "model.safetensors", FILE_NAME)
  check_output_folder(workdir / "reward", replaces=names)

  ### Data.
  size = config.size or None
  train, validation, test = preference_io.open_splits(config.preferences, size).values()
  metadata = preference_io.read_metadata(config.preferences)
  truth = metadata if _has_truth(config, metadata) else None
  network = RewardNetwork(RewardConfig.from_dict(config.network.to_dict()), jnp.dtype(config.dtype))
  is_writer = jax.process_index() == 0

  ### Network: the parameters with the highest pair accuracy on the validation split.
  params = initial_params(network, config.clip, config.seed)
  scorer = Scorer(network, config.batch_size)

  def judge(params: Params) -> tuple[float, dict[str, float]]:
    metrics = held_out_metrics(score_all(scorer, params, validation), "validation")
    return metrics["validation/pair_accuracy"], metrics

  params = fitting.fit(
    functools.partial(
      batch_loss, network, config.augmentation, config.score_weight, config.pair_weight
    ),
    (),
    params,
    make_optimizer(config, network),
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
    judge=judge,
    judge_every=config.judge_every,
    restored=write_config,
  )
  if params is None:
    return None

  ### Last layer: ridge regression on the features, and the bound on its error.
  moments = moments_of(scorer, params, train)
  if config.whiten:
    params = whiten(params, moments, network.dtype)
    moments = moments_of(scorer, params, train)
  w, bound = refit(moments, config.ridge, moments_of(scorer, params, test), config.norm_bound)
  if config.noise_scale is not None:
    bound = dataclasses.replace(bound, noise_scale=config.noise_scale)
  params["mlp"]["last_layer"]["kernel"] = w[:, None].astype(np.float32)
  model = RewardModel(network, params, bound)

  ### Report: the reward and its bound on the test split.
  scored = score_all(scorer, params, test, bound.whitening, truth)
  if is_writer:
    model.save_pretrained(workdir / "reward")
    report(config, scored, bound, workdir, metadata)
  return model


def report(
  config: ConfigDict,
  scored: ScoredPreferences,
  bound: Bound,
  workdir: Path,
  metadata: Mapping[str, Any],
) -> None:
  """Prints and writes the reward's metrics and its bound's calibration on the test split.

  Args:
    scored: the test split, with norms, and with the truth if there is one.
    metadata: metadata of the preference dataset, which calibration.json repeats.
  """
  has_truth = _has_truth(config, metadata)
  kinds = np.broadcast_to(scored.kinds[:, None], scored.valid.shape)[scored.valid]
  flat = {
    name: values[scored.valid] for name, values in scored._asdict().items() if name != "kinds"
  }
  samples = calibration.Samples(
    flat["norms"],
    flat["rewards"],
    flat["scores"],
    flat["truth"] if has_truth else None,
    [mask_io.KINDS[k] for k in kinds],
  )
  calibrated = calibration.calibrate(samples, bound, config.trust.k, config.trust.b)
  metrics = held_out_metrics(scored)
  if has_truth:
    metrics |= held_out_metrics(scored._replace(scores=scored.truth), "truth")
  calibration_plot.plot(calibrated, samples, workdir / "calibration.png")
  content = {
    "metrics": metrics,
    "calibration": dataclasses.asdict(calibrated),
    "data": dict(metadata),
  }
  write_json(workdir / "calibration.json", content)

  titles = {"held_out": "annotated scores", "truth": "noise-free scores"}
  if config.simulated_preference and not has_truth:
    print("scores of pairs are not compared with the simulated preference: its unit is another one")
  number = np.count_nonzero(scored.valid.any(1))  # without those that fill the last batch
  print(f"{number} test prompts, {len(kinds)} candidates:")
  for name, title in titles.items():
    for kind in ("", *(f"{kind}/" for kind in mask_io.KINDS)):
      part = {m: metrics.get(f"{name}/{kind}{m}") for m in ("pair_accuracy", "spearman", "mse")}
      if part["mse"] is not None:
        print(
          f"  {title}, {kind[:-1] or 'all'}: pair accuracy {part['pair_accuracy']:.3f}, Spearman "
          f"{part['spearman']:.3f}, mean squared error {part['mse']:.3f}"
        )
  print(calibration.describe(calibrated))
  print(f"{workdir / 'reward'}: open with RewardModel.from_pretrained or --config.reward")
  run = ("--config=configs/rl.py", f"--workdir={workdir}_run", "--config.prompts=FOLDER")
  print_next(("train", *run, f"--config.reward={workdir / 'reward'}"))


def _has_truth(config: ConfigDict, metadata: Mapping[str, Any]) -> bool:
  """Returns whether the simulated preference is the truth; its unit is not that of pairs."""
  return config.simulated_preference and "pairs" not in metadata.get("alpha", ())


if __name__ == "__main__":
  cli.run_with_config(train_reward)
