"""One iteration of alignment: rollout, score, update; pure functions for jit on any mesh.

DDPO-style policy gradient over the DDIM chain with PPO clipping, each sample weighted by the trust
in its reward (PrefPaint, arXiv 2410.21966, sec. 4). Rollout and update share one `predict`, one
dtype and one scoring function, so at equal weights the importance ratio is 1 to rounding.
"""
# Shapes: P prompts, S samples each, B = P S samples, T rollout steps, k trained steps of an update,
# H W pixels, h w latents, D features.

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from prefpaint_jax import bound, diffusion, lora, reward, rl, sharding
from prefpaint_jax.compilation import by_platform
from prefpaint_jax.diffusion import Steps, Trajectory
from prefpaint_jax.inpainter import Modules, Params, Prompts
from prefpaint_jax.models import sums
from prefpaint_jax.models.reward import RewardNetwork
from prefpaint_jax.settings import Settings, Trust


class Frozen(NamedTuple):
  """Trees that do not change: arguments of every program, never constants inside one."""

  vae: Params
  reward: Params
  whitening: jax.Array | None  # of the reward's bound, [D, D]
  context: jax.Array  # [1, L, D], of the empty text
  base: Params | None  # the UNet before alignment, for the KL term and for LoRA


class TrainState(NamedTuple):
  iteration: jax.Array  # int32 []
  params: Params
  opt_state: optax.OptState
  behaviour: Params | None  # None: the policy itself (refreshed every iteration)
  ema: Params | None
  gradients: Params | None  # what accumulates between updates


class Scores(NamedTuple):
  reward: jax.Array  # [B]
  valid: jax.Array  # bool [B], the reward is finite
  trust: jax.Array  # [B], γ
  advantages: jax.Array  # [B]


def init_state(
  settings: Settings, optimizer: optax.GradientTransformation, params: Params
) -> TrainState:
  """The state before the first iteration, of the policy's parameters or of its adapters."""
  copy = lambda dtype=None: jax.tree.map(lambda x: jnp.array(x, dtype), params)  # never shared
  return TrainState(
    iteration=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    behaviour=copy(settings.behaviour_dtype) if settings.behaviour_refresh > 1 else None,
    ema=copy() if settings.ema_decay else None,
    gradients=jax.tree.map(jnp.zeros_like, params) if settings.gradient_accumulation > 1 else None,
  )


def merged(settings: Settings, base: Params | None, params: Params) -> Params:
  """The parameters that the UNet takes, of those that are trained."""
  return lora.merge(base, params) if settings.lora else params


def gather(modules: Modules, settings: Settings, params: Params, mesh: Mesh | None) -> Params:
  """What is trained, whole on every device and rounded as the UNet reads it: once, not per pass."""
  if not settings.lora:
    params = modules.round_params(params)
  if mesh is None or mesh.shape["fsdp"] == 1:
    return params
  # As it lies, or the compiler may send what is not rounded yet.
  split = sharding.specs(params, sharding.DEFAULT_RULES, mesh)
  params = jax.lax.with_sharding_constraint(params, split)
  return jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))


def in_chunks(function, size: int, mesh: Mesh | None, params: Params, *arrays: jax.Array):
  """`function(params, *arrays)` on each device's own examples, at most `size` (0: all) at a time.

  What is computed for one example must not depend on the others; no device waits for another.
  """

  def local(params: Params, *arrays: jax.Array):
    batch = arrays[0].shape[0]
    chunk = max(n for n in range(1, min(size or batch, batch) + 1) if batch % n == 0)
    if chunk == batch:
      return function(params, *arrays)
    split = lambda x: x.reshape(-1, chunk, *x.shape[1:])
    join = lambda x: x.reshape(batch, *x.shape[2:])
    one = lambda some: function(params, *some)
    return jax.tree.map(join, jax.lax.map(one, tuple(map(split, arrays))))

  if mesh is None or mesh.size == 1:
    return local(params, *arrays)
  own = P(mesh.axis_names)
  specs = (P(), *(own,) * len(arrays))
  spread = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)
  return spread(params, *arrays)


def decode(
  modules: Modules,
  vae_params: Params,
  latents: jax.Array,
  prompts: Prompts,
  chunk: int,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Final latents -> images [B, H, W, 3] in [0, 1], the known pixels put back."""
  images = in_chunks(modules.decode, chunk, mesh, vae_params, latents)
  return jnp.where(prompts.mask > 0, images, prompts.masked_image)


def encode_prompts(
  modules: Modules,
  settings: Settings,
  frozen: Frozen,
  images: jax.Array,
  masks: jax.Array,
  mesh: Mesh | None = None,
) -> Prompts:
  """Images [P, H, W, 3] in [0, 1] and masks [P, H, W, 1] -> Prompts of B samples."""
  encode = functools.partial(modules.encode_prompts, context=None)
  prompts = in_chunks(encode, settings.decode_batch, mesh, frozen.vae, images, masks)
  return prompts._replace(context=frozen.context).repeat(settings.samples_per_prompt)


def region(settings: Settings, prompts: Prompts) -> jax.Array | None:
  """Weight of each latent in the log-probability: [B, h, w, 1], or None for all alike.

  A latent belongs to the hole if any pixel of its own is missing.
  """
  if settings.log_prob_region == "all":
    return None
  B, h, w, _ = prompts.mask_latents.shape
  factor = prompts.mask.shape[1] // h
  return prompts.mask.reshape(B, h, factor, w, factor, 1).max((2, 4))


def _start_chain(modules, settings, policy, frozen, images, masks, key, mesh):
  """How a chain begins: prompts, the policy as a `predict`, its noise, and the key of its steps."""
  prompts = encode_prompts(modules, settings, frozen, images, masks, mesh)
  predict = modules.predict
  # Once, not in every step; from there on each device is on its own.
  policy = gather(modules, settings, policy, mesh)
  if mesh is not None and mesh.size > 1:
    own = P(mesh.axis_names)
    predict = jax.shard_map(
      predict,
      mesh=mesh,
      in_specs=(P(), Prompts(*(own,) * 4, context=P()), own, P()),
      out_specs=own,
      check_vma=False,
    )
  policy = modules.round_params(merged(settings, frozen.base, policy))
  noise_key, chain_key = jax.random.split(key)
  noise = jax.random.normal(noise_key, prompts.masked_latents.shape)
  return prompts, functools.partial(predict, policy, prompts), noise, chain_key


def rollout(
  modules: Modules,
  settings: Settings,
  steps: Steps,
  policy: Params,
  frozen: Frozen,
  images: jax.Array,
  masks: jax.Array,
  key: jax.Array,
  mesh: Mesh | None = None,
) -> tuple[Prompts, Trajectory, jax.Array]:
  """Paints S samples of each prompt: the prompts as latents, the chain, and images [B, H, W, 3]."""
  prompts, predict, noise, key = _start_chain(
    modules, settings, policy, frozen, images, masks, key, mesh
  )
  weight = region(settings, prompts)
  trajectory = diffusion.rollout(predict, modules.schedule, steps, noise, key, weight)
  final = trajectory.latents[-1]
  painted = decode(modules, frozen.vae, final, prompts, settings.decode_batch, mesh)
  return prompts, trajectory, painted


def paint(
  modules: Modules,
  settings: Settings,
  steps: Steps,
  policy: Params,
  frozen: Frozen,
  images: jax.Array,
  masks: jax.Array,
  key: jax.Array,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Images [P, H, W, 3] as `rollout` paints them, one of each prompt, keeping no trajectory."""
  settings = dataclasses.replace(settings, samples_per_prompt=1)
  prompts, predict, noise, key = _start_chain(
    modules, settings, policy, frozen, images, masks, key, mesh
  )
  latents = diffusion.sample(predict, modules.schedule, steps, noise, key)
  return decode(modules, frozen.vae, latents, prompts, settings.decode_batch, mesh)


def trust_weights(trust: Trust, whitening: jax.Array | None, features: jax.Array) -> jax.Array:
  """γ [B] of features [B, D]."""
  if trust.norm == "none":
    return jnp.ones(features.shape[0])
  if trust.norm == "constant":
    return jnp.full(features.shape[0], trust.constant)
  norm = bound.mahalanobis_norm if trust.norm == "mahalanobis" else bound.released_norm
  return bound.trust_weight(
    norm(whitening, features), trust.k, trust.b, trust.minimum, trust.maximum
  )


def score(
  network: RewardNetwork,
  settings: Settings,
  frozen: Frozen,
  prompts: Prompts,
  painted: jax.Array,
  mesh: Mesh | None = None,
) -> tuple[Scores, dict[str, jax.Array]]:
  """Rewards, trust weights and advantages of the painted images, and their metrics."""
  S = settings.samples_per_prompt
  # Whole prompts per chunk: the masked image of a prompt is embedded once.
  grouped = painted.reshape(-1, S, *painted.shape[1:])

  def evaluate(params: Params, images: jax.Array, masked_images: jax.Array):
    flat = images.reshape(-1, *images.shape[2:])
    rewards, features = reward.apply(network, params, flat, masked_images)
    return rewards.reshape(-1, S), features.reshape(-1, S, features.shape[-1])

  chunk = -(-settings.decode_batch // S)
  shown = prompts.masked_image.reshape(-1, S, *painted.shape[1:])[:, 0]
  rewards, features = in_chunks(evaluate, chunk, mesh, frozen.reward, grouped, shown)
  rewards, features = rewards.reshape(-1), features.reshape(-1, features.shape[-1])
  valid = jnp.isfinite(rewards) & jnp.isfinite(features).all(-1)
  features = jnp.where(valid[:, None], features, 0.0)
  rewards = jnp.where(valid, rewards, 0.0)
  weigh = functools.partial(trust_weights, settings.trust)
  trust = in_chunks(weigh, 0, mesh, frozen.whitening, features)
  advantages = rl.standardise(rewards, valid, S, settings.advantage_std, settings.advantage_clip)

  mean = lambda x: rl.masked_mean(x, valid)
  centre = mean(rewards)
  metrics = {
    "reward/mean": centre,
    "reward/std": jnp.sqrt(mean((rewards - centre) ** 2)),
    "reward/min": jnp.min(rewards, where=valid, initial=jnp.inf),
    "reward/max": jnp.max(rewards, where=valid, initial=-jnp.inf),
    "reward/nan_fraction": 1.0 - jnp.mean(valid),
    "trust/mean": mean(trust),
    "trust/std": jnp.sqrt(mean((trust - mean(trust)) ** 2)),
    "trust/min": jnp.min(trust, where=valid, initial=jnp.inf),
    "trust/max": jnp.max(trust, where=valid, initial=-jnp.inf),
  }
  if S > 1:
    groups = valid.reshape(-1, S)
    within = jnp.std(rewards.reshape(-1, S), axis=1, ddof=1, where=groups)
    metrics["reward/within_prompt_std"] = rl.masked_mean(within, groups.sum(1) > 1)
  return Scores(rewards, valid, trust, advantages), metrics


def policy_loss(
  modules: Modules,
  settings: Settings,
  steps: Steps,
  params: Params,
  base: Params | None,
  prompts: Prompts,
  trajectory: Trajectory,
  scores: Scores,
  indices: jax.Array,
  count: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Loss [] and metrics of the steps `indices` [k]: sums over samples and steps, over `count`.

  All steps go through the UNet as one batch of B k, sample-major so that a sharded batch stays.
  `count` [] is of the whole update, so that its passes and the devices' shares add up to the mean.
  """
  k, B = indices.shape[0], scores.reward.shape[0]
  flatten = lambda x: jnp.moveaxis(x, 0, 1).reshape(B * k, *x.shape[2:])
  per_sample = lambda x: jnp.repeat(x, k, axis=0)
  step = steps.at(jnp.tile(indices, B))
  valid = per_sample(scores.valid)
  # A sample without a reward may be NaN throughout, and in a gradient 0 · NaN is NaN.
  if_valid = lambda x: jnp.where(valid[:, None, None, None], x, 0.0)
  latents = if_valid(flatten(trajectory.latents[indices]))
  x_prev = if_valid(flatten(trajectory.latents[indices + 1]))
  old_log_prob = flatten(trajectory.log_probs[indices])
  repeated = prompts.repeat(k)
  repeated = repeated._replace(masked_latents=if_valid(repeated.masked_latents))

  schedule = modules.schedule
  policy = merged(settings, base, params)
  timestep = step.timestep if k > 1 else step.timestep[0]
  output = modules.predict(policy, repeated, latents, timestep)
  weight = region(settings, repeated)
  mean = diffusion.predict_mean(schedule, step, latents, output)
  log_prob = diffusion.log_prob(x_prev, mean, step.sigma, weight)
  loss, ppo = rl.ppo_loss(
    log_prob,
    old_log_prob,
    per_sample(scores.advantages),
    per_sample(scores.trust),
    settings.clip_range,
    valid,
  )
  terms = {
    "ppo/clip_fraction": ppo["clipped"],
    "ppo/approx_kl": ppo["approx_kl"],
    "ppo/ratio_mean": ppo["ratio"],
    "ppo/policy_loss": loss,
  }
  if settings.kl_weight:
    base_output = modules.predict(base, repeated, latents, timestep)
    base_mean = diffusion.predict_mean(schedule, step, latents, base_output)
    kl = diffusion.gaussian_kl(mean, base_mean, step.sigma, weight)
    loss = loss + settings.kl_weight * kl
    terms["ppo/kl_to_base"] = kl
  total = lambda x: jnp.sum(jnp.where(valid, x, 0.0))
  divisor = 1.0 if settings.loss_reduction == "sum" else count
  return total(loss) / divisor, {name: total(x) / count for name, x in terms.items()}


def update(
  modules: Modules,
  settings: Settings,
  steps: Steps,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  frozen: Frozen,
  prompts: Prompts,
  trajectory: Trajectory,
  scores: Scores,
  indices: jax.Array,
  mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimiser update from the steps `indices` [k] of a rollout.

  With `gradient_accumulation` n > 1, gradients add up over iterations and only the updates of every
  n-th iteration step the optimiser, each clearing the sum: the released code's rhythm. On a `mesh`
  parameters are gathered and gradients are reduced once, whatever the number of passes.
  """
  passes = indices.reshape(-1, settings.timesteps_per_pass or indices.shape[0])
  count = jnp.maximum(jnp.sum(scores.valid), 1) * indices.shape[0]

  def add_up(params, base, count, passes, *rollout):
    """Gradients and metrics of these samples, summed over all passes."""

    def one_pass(some: jax.Array):
      loss = lambda params: policy_loss(
        modules, settings, steps, params, base, *rollout, some, count
      )
      gradients, metrics = jax.grad(loss, has_aux=True)(params)
      gradients = by_platform(gradients, cuda=_laid_out, default=lambda x: x)
      # Of rounded parameters they are rounded too, as within the UNet; sums are not.
      return jax.tree.map(lambda x: x.astype(jnp.float32), gradients), metrics

    if passes.shape[0] == 1:
      return one_pass(passes[0])

    def add(total: Params, some: jax.Array):
      gradients, metrics = one_pass(some)
      return jax.tree.map(jnp.add, total, gradients), metrics

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    gradients, metrics = jax.lax.scan(add, zeros, passes)
    return gradients, jax.tree.map(jnp.sum, metrics)

  if mesh is not None and mesh.size > 1:
    add_up = _on_shares(add_up, mesh, state.params)
  params, base = gather(modules, settings, state.params, mesh), frozen.base
  if settings.kl_weight and not settings.lora:
    base = gather(modules, settings, base, mesh)
  gradients, metrics = add_up(params, base, count, passes, prompts, trajectory, scores)
  norm = optax.tree.norm if mesh is not None and mesh.size > 1 else sums.norm
  metrics["ppo/grad_norm"] = norm(gradients)
  n = settings.gradient_accumulation
  if n > 1:
    gradients = jax.tree.map(jnp.add, state.gradients, gradients)
    do_step = state.iteration % n == n - 1
    state = jax.lax.cond(
      do_step, lambda: _apply(settings, optimizer, state, gradients), lambda: state
    )
    kept = jax.tree.map(lambda x: jnp.where(do_step, 0.0, x), gradients)
    state = state._replace(gradients=kept)
  else:
    state = _apply(settings, optimizer, state, gradients)
  return state, metrics


def _laid_out(tree: Params) -> Params:
  """The same arrays, in memory as their shapes say.

  On a GPU gradients of kernels are turned around. Where that is fused with an optimiser's step, the
  step is not made in place: parameters and moments are written elsewhere and copied.
  """
  flat = jax.lax.optimization_barrier(jax.tree.map(jnp.ravel, tree))
  return jax.tree.map(lambda x, like: x.reshape(like.shape), flat, tree)


def _on_shares(add_up, mesh: Mesh, params: Params):
  """`add_up` on each device's samples with the whole policy, and the sum over devices, once.

  Left to itself the compiler would gather parameters and exchange gradients in every pass. Each
  gradient ends where its parameter lies.
  """
  layout = jax.tree.map(lambda x: x.spec, sharding.specs(params, sharding.DEFAULT_RULES, mesh))
  data, fsdp = mesh.axis_names

  def reduce(gradient: jax.Array, spec: P) -> jax.Array:
    if fsdp not in spec:
      return jax.lax.psum(gradient, mesh.axis_names)
    share = jax.lax.psum_scatter(gradient, fsdp, scatter_dimension=spec.index(fsdp), tiled=True)
    return jax.lax.psum(share, data) if mesh.shape[data] > 1 else share

  def add_up_and_reduce(*arguments):
    gradients, metrics = add_up(*arguments)
    return jax.tree.map(reduce, gradients, layout), jax.lax.psum(metrics, mesh.axis_names)

  own, whole = P(mesh.axis_names), P()
  own_in_time = P(None, mesh.axis_names)
  return jax.shard_map(
    add_up_and_reduce,
    mesh=mesh,
    in_specs=(
      *(whole,) * 4,
      Prompts(*(own,) * 4, context=whole),
      Trajectory(own_in_time, own_in_time, whole),
      own,
    ),
    out_specs=(layout, whole),
    check_vma=False,
  )


def _apply(
  settings: Settings,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  gradients: Params,
) -> TrainState:
  changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, changes)
  ema = state.ema
  if ema is not None:
    ema = optax.incremental_update(params, ema, 1.0 - settings.ema_decay)
  return state._replace(params=params, opt_state=opt_state, ema=ema)


def end_iteration(settings: Settings, state: TrainState) -> TrainState:
  """Counts the iteration and, every `behaviour_refresh` of them, refreshes the behaviour policy."""
  iteration = state.iteration + 1
  behaviour = state.behaviour
  if behaviour is not None:
    refresh = iteration % settings.behaviour_refresh == 0
    renew = lambda new, old: jnp.where(refresh, new.astype(old.dtype), old)
    behaviour = jax.tree.map(renew, state.params, behaviour)
  return state._replace(iteration=iteration, behaviour=behaviour)
