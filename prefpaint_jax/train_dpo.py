"""Aligns an inpainting model with preferences directly: Diffusion-DPO or CaPO on pairs of images.

  python -m prefpaint_jax.train_dpo --config=configs/dpo.py:mini --workdir=runs/dpo \\
    --config.preferences=DIR

Trains the UNet, or LoRA adapters, on pairs of candidates from a dataset of preferences. Writes
config.json, metrics.jsonl, TensorBoard events and checkpoints to the workdir, which other commands
open as a run of `train`. The same command resumes an interrupted run exactly.
"""
# Shapes: B pairs.

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prefpaint_jax.align.optimizer import optimizer_from
from prefpaint_jax.align.pair_update import PairFrozen, PairSettings, pair_loss, pair_terms
from prefpaint_jax.align.run import check_dtype
from prefpaint_jax.align.settings import Trust, check_adapters, check_workdir
from prefpaint_jax.data.pairs import Pairs, open_pairs, pair_loader, stack_pairs
from prefpaint_jax.data.preferences import open_training_splits
from prefpaint_jax.inpainter import Inpainter, open_policy
from prefpaint_jax.models import lora
from prefpaint_jax.models.pipeline import Modules
from prefpaint_jax.preference.bound import check_condition
from prefpaint_jax.rewards import load_reward
from prefpaint_jax.runtime import cli, fitting, sharding
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.runs import base_step
from prefpaint_jax.runtime.text import print_next
from prefpaint_jax.runtime.waiting import waiting
from prefpaint_jax.runtime.workdir import open_workdir
from prefpaint_jax.weights.names import Params

WRITES = ("checkpoints", "metrics.jsonl", "tensorboard")
FREE = ("num_iterations", "mesh.data", "mesh.fsdp")  # fields that a resumed run may change


def check(config: ConfigDict) -> None:
  """Raises ValueError for a config that cannot work."""
  check_fields(config, "dpo")
  if not config.preferences:
    raise ValueError(
      "config.preferences is empty; give the folder that prefpaint_jax.data.preferences wrote"
    )
  if config.num_iterations % config.gradient_accumulation:
    raise ValueError(
      f"config.num_iterations is {config.num_iterations}; expected a multiple of "
      f"gradient_accumulation={config.gradient_accumulation}, so that every batch is used; change "
      "one of them"
    )
  check_adapters(config)
  is_trusted = Trust(**config.trust).needs_bound
  if is_trusted and not config.reward:
    raise ValueError(
      f"config.reward is empty with trust.norm={config.trust.norm!r}; expected a reward model with "
      "a bound; give --config.reward=DIR"
    )
  if config.reward and not is_trusted:
    raise ValueError(
      f"config.reward is {config.reward} with trust.norm={config.trust.norm!r}, which reads no "
      "reward; give --config.trust.norm=mahalanobis, or leave the reward out"
    )


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """Makes the optimiser, which steps once in `gradient_accumulation` iterations."""
  optimizer, every = optimizer_from(config), config.gradient_accumulation
  if every == 1:
    return optimizer
  return optax.MultiSteps(optimizer, every).gradient_transformation()


def load(
  config: ConfigDict, policy: Inpainter, has_texts: bool
) -> tuple[PairSettings, PairFrozen, Params]:
  """Loads the reward and makes the fixed part of a run.

  Args:
    policy: the `Inpainter` to train.
    has_texts: prompts have texts, which the program then encodes.

  Returns:
    The settings, the frozen trees, and the parameters that the run trains first.
  """
  trust, reward = Trust(**config.trust), None
  if trust.needs_bound:
    reward = load_reward(config.reward, config.dtype)
    if reward.bound is None:
      raise ValueError(
        f"config.reward is {config.reward}, which has no bound; expected one for "
        f"trust.norm={trust.norm!r}; give a reward model of train_reward, or trust.norm=none"
      )
    check_condition(reward.bound.whitening, trust.norm)
  params = base = jax.device_get(policy.params["unet"])
  is_lora = config.lora.rank > 0
  if is_lora:
    key = jax.random.key(config.seed)
    params = lora.init(key, base, config.lora.rank, config.lora.targets)
    if config.lora.init:
      params = lora.read(config.lora.init, base, config.lora.rank, params)
  frozen = PairFrozen(
    vae=policy.params["vae"],
    # The UNet rounds its parameters anyway: in bfloat16 the reference takes half the memory.
    reference=policy.modules.round_params(base),
    context=policy.empty_context,
    text_encoders=policy.text_params if has_texts else None,
    reward=reward and reward.params,
    whitening=reward and reward.bound.whitening.astype(np.float32),
  )
  settings = PairSettings(
    loss=config.loss,
    beta=config.beta,
    region=config.region,
    lora=is_lora,
    trust=trust,
    reward=reward and reward.function,
  )
  return settings, frozen, params


def make_judge(
  modules: Modules,
  settings: PairSettings,
  frozen: PairFrozen,
  pairs: Pairs,
  batch_size: int,
  mesh: Mesh,
  tokenize: Callable | None,
) -> Callable[[Params], tuple[float, dict[str, float]]]:
  """Makes the judge of `fitting.fit`: means of `dpo.pair_metrics` over all validation pairs.

  Every call has the same timesteps and noise.
  """

  @jax.jit
  def total(frozen: PairFrozen, params: Params, batch: Any, is_pair: jax.Array, key: jax.Array):
    terms, _ = pair_terms(modules, settings, frozen, params, batch, key)
    return {name: jnp.sum(jnp.where(is_pair, x, 0.0)) for name, x in terms.items()}

  def judge(params: Params) -> tuple[float, dict[str, float]]:
    sums = dict.fromkeys(("loss", "implicit_accuracy", "margin"), 0.0)
    for first in range(0, len(pairs), batch_size):
      numbers = first + sharding.local_rows(mesh, batch_size)
      batch = stack_pairs([pairs[min(i, len(pairs) - 1)] for i in numbers.tolist()], tokenize)
      arrays = sharding.to_global(mesh, (batch, numbers < len(pairs)))
      key = jax.random.fold_in(jax.random.key(0), first)
      found = jax.device_get(total(frozen, params, *arrays, key))
      sums = {name: sums[name] + float(x) for name, x in found.items()}
    metrics = {f"validation/{name}": x / len(pairs) for name, x in sums.items()}
    return metrics["validation/implicit_accuracy"], metrics

  return judge


def train_dpo(config: ConfigDict, workdir: Path) -> Params | None:
  """Trains a policy on pairs as `config` says; resumes the run in `workdir` if there is one.

  Returns:
    The trained parameters, of the UNet or of its adapters; None if the command was asked to stop.
  """
  check(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  sharding.check_batch(config.batch_size, mesh)
  check_workdir(config, workdir)
  is_writer = jax.process_index() == 0
  with open_workdir(config, workdir, "train_dpo", WRITES, FREE, is_writer=is_writer) as write:
    return _train_dpo(config, workdir, mesh, write)


def _train_dpo(
  config: ConfigDict, workdir: Path, mesh: Mesh, write_config: Callable[[], None]
) -> Params | None:
  """Trains in a workdir that this process holds; see `train_dpo`."""
  check_dtype(config.dtype, mesh.devices.flat[0])
  splits = open_training_splits(config.preferences, config.size)
  judged = ("train", "validation") if config.judge_every else ("train",)
  pairs = open_pairs({name: splits[name] for name in judged}, config.pairs, config.preferences)
  is_new = not any(workdir.glob("checkpoints/*"))
  with waiting(f"loading {config.policy}"):
    step = base_step(config.policy, workdir, is_new)
    policy = open_policy(config.policy, config.dtype, step, config.remat)
    policy.modules = modules = dataclasses.replace(policy.modules, mask_latents=config.mask_latents)
    modules.latent_shape(1, config.size, config.size)  # raises ValueError for a wrong size
    has_texts = any(one.has_texts for one in pairs.values())
    settings, frozen, params = load(config, policy, has_texts)
  tokenize = policy.tokenize if has_texts else None
  frozen = jax.device_put(frozen, sharding.replicated(mesh))
  judge = None
  if config.judge_every:
    held_out = pairs["validation"]
    judge = make_judge(modules, settings, frozen, held_out, config.batch_size, mesh, tokenize)
  process = jax.process_index(), jax.process_count()
  loader = pair_loader(pairs["train"], config.batch_size, config.seed, *process, tokenize)
  params = fitting.fit(
    functools.partial(pair_loss, modules, settings),
    (frozen,),
    params,
    make_optimizer(config),
    loader,
    workdir,
    mesh,
    jax.random.key(config.seed + 1),
    iterations=config.num_iterations,
    ema_decay=config.ema_decay,
    checkpoint_every=config.checkpoint_every,
    log_every=config.log_every,
    judge=judge,
    judge_every=config.judge_every,
    keep_best=False,
    restored=write_config,
  )
  if params is not None and jax.process_index() == 0:
    print(f"{workdir}: {len(pairs['train'])} pairs, {config.num_iterations} iterations")
    print_next(
      ("inpaint", f"--model={workdir}", "--image=IMAGE", "--mask=MASK", "--output=OUT.png"),
      ("export", f"--workdir={workdir}", f"--output={workdir}_exported"),
    )
  return params


if __name__ == "__main__":
  cli.run_with_config(train_dpo)
