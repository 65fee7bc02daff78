"""The optimiser: AdamW or SGD, warm-up, gradient clipping, and moments in bfloat16."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int32
from ml_collections import ConfigDict

from prefpaint_jax.weights.names import Params


def make_optimizer(
  name: str,
  learning_rate: float,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  clip_norm: float | None = None,
  warmup_updates: int = 0,
  moments_dtype: str = "float32",
) -> optax.GradientTransformation:
  """Makes AdamW or plain SGD, with a constant learning rate after a linear warm-up.

  Args:
    name: "adamw" or "sgd". SGD ignores `b1`, `b2`, `eps` and `weight_decay`.
    clip_norm: the largest global norm of the gradients; None: no clipping.
    warmup_updates: updates in which the learning rate rises; 0: none.
    moments_dtype: "float32", or "bfloat16" for half the memory.

  Raises:
    ValueError: for an unknown `name` or `moments_dtype`.
  """
  rate = learning_rate
  if warmup_updates:
    rate = functools.partial(rate_of_update, learning_rate, warmup_updates)
  if name == "adamw":
    optimizer = optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay)
  elif name == "sgd":
    optimizer = optax.sgd(rate)
  else:
    raise ValueError(f"optimizer is {name!r}; expected 'adamw' or 'sgd'")
  if moments_dtype == "bfloat16":
    optimizer = in_bfloat16(optimizer)
  elif moments_dtype != "float32":
    raise ValueError(f"moments_dtype is {moments_dtype!r}; expected 'float32' or 'bfloat16'")
  return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def rate_of_update(learning_rate: float, warmup_updates: int, count: int | jax.Array) -> jax.Array:
  """Computes the learning rate of the update after `count` updates."""
  return learning_rate * jnp.minimum(1.0, (count + 1) / max(1, warmup_updates))


def rate_of_iteration(config: ConfigDict, iteration: int) -> float:
  """Computes the learning rate of the last update of an iteration, counted from 1.

  An iteration that only accumulates gradients has the rate of the last update before it; before the
  first update the rate is 0.
  """
  count = iteration // config.gradient_accumulation * config.updates_per_iteration
  return float(rate_of_update(config.learning_rate, config.warmup_updates, count - 1))


def counts_of_iteration(
  config: ConfigDict, images: int, passes: int, iteration: int
) -> dict[str, float]:
  """Returns the learning rate of an iteration, and what a run has cost up to it.

  Args:
    images: samples of an iteration.
    passes: forward passes of the UNet for a sample (`Settings.passes_per_sample`).
  """
  sampled = iteration * images
  return {
    f"{config.algorithm}/learning_rate": rate_of_iteration(config, iteration),
    "count/images": sampled,
    "count/unet_passes": sampled * passes,
  }


def optimizer_from(config: ConfigDict) -> optax.GradientTransformation:
  """Makes the optimiser from the fields of an alignment config."""
  return make_optimizer(
    config.optimizer,
    config.learning_rate,
    config.adam_b1,
    config.adam_b2,
    config.adam_eps,
    config.weight_decay,
    config.clip_norm,
    config.warmup_updates,
    config.moments_dtype,
  )


class RoundedState(NamedTuple):
  """The state of an optimiser whose moments are stored in bfloat16."""

  count: Int32[Array, ""]  # updates done
  inner: optax.OptState


def in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Stores the optimiser's moments in bfloat16 with stochastic rounding.

  Rounding to nearest would drop every change of a moment below 0.2 % of its value; the second
  moment of AdamW changes by about 0.1 % an update.
  """

  def restore(inner: optax.OptState) -> optax.OptState:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inner)

  def store(inner: optax.OptState, count: jax.Array) -> optax.OptState:
    leaves, tree = jax.tree.flatten(inner)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
    return tree.unflatten(
      stochastic_round(x, key) if x.dtype == jnp.float32 else x
      for x, key in zip(leaves, keys, strict=True)
    )

  def init(params: Params) -> RoundedState:
    count = jnp.zeros((), jnp.int32)
    return RoundedState(count, store(optimizer.init(params), count))

  def update(gradients: Params, state: RoundedState, params: Params | None = None):
    changes, inner = optimizer.update(gradients, restore(state.inner), params)
    return changes, RoundedState(state.count + 1, store(inner, state.count + 1))

  return optax.GradientTransformation(init, update)


def stochastic_round(x: Float32[Array, "*dims"], key: jax.Array) -> BFloat16[Array, "*dims"]:
  """Rounds each element to one of its two bfloat16 neighbours, so that the mean over keys is x."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(
    jnp.bfloat16
  )
