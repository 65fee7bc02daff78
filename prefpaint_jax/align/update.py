"""The update: policy loss, gradients summed over passes and devices, one optimiser step.

The loss is that of the algorithm (`align.algorithms`); that of each sample is multiplied by the
trust weight of its reward (PrefPaint, arXiv 2410.21966, sec. 4). Rollout and update share one
`predict`, one dtype and one log-probability, so at equal parameters the importance ratio is 1 to
rounding.
"""
# Shapes: B samples, T rollout steps, k trained steps of an update, h w latents.

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from prefpaint_jax.align.algorithms import Terms, algorithm_of
from prefpaint_jax.align.nft import old_policy_decay
from prefpaint_jax.align.rollout import chunk_size
from prefpaint_jax.align.settings import Settings
from prefpaint_jax.align.state import (
  Batch,
  Experience,
  Frozen,
  Sampler,
  Scores,
  TrainState,
  gather,
  log_prob_weight,
  merged_params,
)
from prefpaint_jax.kernels.dispatch import dispatch
from prefpaint_jax.models.conditioning import Prompts
from prefpaint_jax.runtime import sharding
from prefpaint_jax.weights.names import Params


def batch_of(sampler: Sampler, experience: Experience, indices: Int[Array, " k"]) -> Batch:
  """Selects what the steps `indices` of an update train on."""
  prompts, record, scores = experience
  examples = algorithm_of(sampler.settings).examples(sampler, record, indices)
  return Batch(prompts, indices, examples, scores)


def policy_loss(
  sampler: Sampler,
  params: Params,
  base: Params | None,
  batch: Batch,
  count: Int[Array, ""],
  behaviour: Params | None = None,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
  """Computes the loss of the algorithm for k steps of each sample, and its metrics.

  All k steps go through the UNet as one batch of B k, in sample-major order, so that a batch that
  is split over devices stays split.

  Args:
    params: the trained parameters: the UNet's, or LoRA adapters of `base`.
    base: the base policy's parameters, for LoRA and for the KL term.
    count: samples times steps of the whole update. Losses and metrics are sums divided by it, so
      that those of all passes and devices add up to the mean.
    behaviour: the behaviour policy's parameters, for algorithms that compare with its output.
  """
  (modules, settings, steps), (prompts, indices, examples, scores) = sampler, batch
  algorithm = algorithm_of(settings)
  k, B = indices.shape[0], scores.reward.shape[0]
  per_sample = lambda x: jnp.repeat(x, k, axis=0)
  step = steps.at(jnp.tile(indices, B))
  valid = per_sample(scores.valid)
  # An invalid sample may be NaN throughout, and in a gradient 0 · NaN is NaN: mask the inputs.
  if_valid = lambda x: jnp.where(valid.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)
  flatten = lambda x: jnp.moveaxis(x, 0, 1).reshape(B * k, *x.shape[2:])
  examples = jax.tree.map(lambda x: if_valid(flatten(x)), examples)
  repeated = prompts.repeat(k)
  repeated = repeated._replace(masked_latents=if_valid(repeated.masked_latents))

  # One timestep for the whole batch is one row of the time embedding.
  timestep = step.timestep if k > 1 else step.timestep[0]
  predict = lambda params: modules.predict(params, repeated, examples.latents, timestep)
  output, old_output = predict(merged_params(settings, base, params)), None
  if not settings.keeps_chain:
    old_output = jax.lax.stop_gradient(output)
    if settings.reads_behaviour:
      old_output = predict(merged_params(settings, base, behaviour))
  weight = log_prob_weight(settings, repeated)
  advantages, trust = (if_valid(per_sample(x)) for x in (scores.advantages, scores.trust))
  terms = Terms(step, output, old_output, weight, advantages, trust)
  loss, metrics = algorithm.loss(sampler, examples, terms)
  metrics["policy_loss"] = loss
  if settings.kl_weight:
    outputs = output, predict(base)
    kl = algorithm.divergence(sampler, step, examples.latents, *outputs, weight)
    loss = loss + settings.kl_weight * kl
    metrics["kl_to_base"] = kl
  total = lambda x: jnp.sum(jnp.where(valid, x, 0.0))
  divisor = 1.0 if settings.loss_reduction == "sum" else count
  named = {f"{settings.algorithm}/{name}": total(x) / count for name, x in metrics.items()}
  return total(loss) / divisor, named


def update(
  sampler: Sampler,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  frozen: Frozen,
  experience: Experience,
  indices: Int[Array, " k"],
  mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes one optimiser step on the steps `indices` of a rollout.

  A pass takes `samples_per_pass` samples of each device and `timesteps_per_pass` steps of them
  through the UNet. The sum over passes is that of the whole batch, whose advantages, weights and
  count of valid samples it uses.

  With `gradient_accumulation` n > 1 gradients accumulate over iterations, and only the updates of
  every n-th iteration step the optimiser and clear the sum, as the released code does. On a `mesh`
  parameters are gathered once and gradients are reduced once, whatever the number of passes.

  Returns:
    The new state and the metrics of the algorithm, such as `ppo/policy_loss`.
  """
  settings = sampler.settings
  batch = batch_of(sampler, experience, indices)
  k = indices.shape[0]
  count = jnp.maximum(jnp.sum(batch.scores.valid), 1) * k

  def sum_passes(params, behaviour, base, count, batch):
    """Returns gradients and metrics of these samples, summed over the passes."""
    samples = batch.scores.reward.shape[0]
    size = chunk_size(samples, settings.samples_per_pass)
    steps = settings.timesteps_per_pass or k
    starts = jnp.arange(0, k, steps), jnp.arange(0, samples, size)
    every = tuple(x.reshape(-1) for x in jnp.meshgrid(*starts, indexing="ij"))

    def one_pass(first_step: int | jax.Array, first: int | jax.Array):
      part = batch
      if len(every[0]) > 1:
        part = _part(batch, first_step, steps, first, size)
      loss = lambda params: policy_loss(sampler, params, base, part, count, behaviour)
      gradients, metrics = jax.grad(loss, has_aux=True)(params)
      gradients = dispatch(LAYOUTS, gradients)
      # Gradients of rounded parameters are rounded, as within the UNet; their sums are float32.
      return jax.tree.map(lambda x: x.astype(jnp.float32), gradients), metrics

    if len(every[0]) == 1:
      return one_pass(0, 0)

    def add(total: Params, one: tuple[jax.Array, jax.Array]):
      gradients, metrics = one_pass(*one)
      return jax.tree.map(jnp.add, total, gradients), metrics

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    gradients, metrics = jax.lax.scan(add, zeros, every)
    return gradients, jax.tree.map(jnp.sum, metrics)

  if mesh is not None and mesh.size > 1:
    sum_passes = _per_device(sum_passes, mesh, state.params, batch.prompts)
  params, behaviour, base = gather(sampler, state.params, mesh), None, frozen.base
  if settings.reads_behaviour:
    behaviour = gather(sampler, state.behaviour, mesh)
  if settings.kl_weight and not settings.lora:
    base = gather(sampler, base, mesh)
  gradients, metrics = sum_passes(params, behaviour, base, count, batch)
  metrics[f"{settings.algorithm}/grad_norm"] = optax.tree.norm(gradients)
  n = settings.gradient_accumulation
  if n > 1:
    gradients = jax.tree.map(jnp.add, state.gradients, gradients)
    steps_now = state.iteration % n == n - 1
    state = jax.lax.cond(
      steps_now, lambda: _apply(settings, optimizer, state, gradients), lambda: state
    )
    kept = jax.tree.map(lambda x: jnp.where(steps_now, 0.0, x), gradients)
    state = state._replace(gradients=kept)
  else:
    state = _apply(settings, optimizer, state, gradients)
  return state, metrics


def _part(
  batch: Batch, first_step: int | jax.Array, steps: int, first: int | jax.Array, size: int
) -> Batch:
  """Selects `steps` steps of `size` samples, from the numbers `first_step` and `first` on."""
  prompts, indices, examples, scores = batch
  cut_steps = lambda x: jax.lax.dynamic_slice_in_dim(x, first_step, steps)
  indices, examples = jax.tree.map(cut_steps, (indices, examples))
  if size == scores.reward.shape[0]:
    return Batch(prompts, indices, examples, scores)
  cut = lambda x, axis=0: jax.lax.dynamic_slice_in_dim(x, first, size, axis)
  examples = jax.tree.map(lambda x: cut(x, 1), examples)
  return Batch(prompts.map_samples(cut), indices, examples, Scores(*map(cut, scores)))


def _row_major(tree: Params) -> Params:
  """Forces row-major layouts, so that XLA:GPU updates parameters in place.

  XLA:GPU transposes the gradients of convolution kernels. Fused with an optimiser step, they would
  make it write parameters and moments to new buffers and copy them: 15 GB an update of Stable
  Diffusion 1.5.
  """
  flat = jax.lax.optimization_barrier(jax.tree.map(jnp.ravel, tree))
  return jax.tree.map(lambda x, like: x.reshape(like.shape), flat, tree)


LAYOUTS = {"reference": lambda tree: tree, "cuda": _row_major}


def _per_device(sum_passes, mesh: Mesh, params: Params, prompts: Prompts):
  """Computes per-device gradients in shard_map and reduces each of them once per update.

  Without it XLA would gather parameters and reduce gradients in every pass. Each gradient ends
  with the sharding of its parameter.
  """
  layout = jax.tree.map(lambda x: x.spec, sharding.specs(params, sharding.DEFAULT_RULES, mesh))
  data, fsdp = mesh.axis_names

  def reduce(gradient: jax.Array, spec: P) -> jax.Array:
    if fsdp not in spec:
      return jax.lax.psum(gradient, mesh.axis_names)
    share = jax.lax.psum_scatter(gradient, fsdp, scatter_dimension=spec.index(fsdp), tiled=True)
    return jax.lax.psum(share, data) if mesh.shape[data] > 1 else share

  def sum_and_reduce(*arguments):
    gradients, metrics = sum_passes(*arguments)
    return jax.tree.map(reduce, gradients, layout), jax.lax.psum(metrics, mesh.axis_names)

  own, whole, own_in_time = P(mesh.axis_names), P(), P(None, mesh.axis_names)
  own_prompts = jax.tree.map(lambda is_own: own if is_own else whole, prompts.per_sample)
  batch = Batch(own_prompts, whole, own_in_time, own)
  return jax.shard_map(
    sum_and_reduce,
    mesh=mesh,
    in_specs=(*(whole,) * 4, batch),
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
  """Counts the iteration, and refreshes the behaviour policy where the next one begins with it.

  Of iterations counted from 1, every `behaviour_refresh`-th begins with a copy of the policy, as in
  the released code. A refreshed policy samples that iteration, before its updates. NFT's old policy
  moves instead after every iteration that stepped the optimiser.
  """
  iteration = state.iteration + 1
  behaviour = state.behaviour
  if settings.algorithm == "nft":
    updates = iteration // settings.gradient_accumulation * settings.updates_per_iteration
    stepped = iteration % settings.gradient_accumulation == 0
    decay = jnp.where(stepped, old_policy_decay(settings.nft, updates), 1.0)
    behaviour = optax.incremental_update(state.params, behaviour, 1.0 - decay)
  elif behaviour is not None:
    refresh = (iteration + 1) % settings.behaviour_refresh == 0
    renew = lambda new, old: jnp.where(refresh, new.astype(old.dtype), old)
    behaviour = jax.tree.map(renew, state.params, behaviour)
  return state._replace(iteration=iteration, behaviour=behaviour)
