"""The optimiser: AdamW or plain SGD, a warm-up, clipping, and moments in half the memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

Params = Any  # a tree of arrays


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
  """AdamW or plain SGD (which reads no other setting of AdamW's than the learning rate).

  The rate is constant after a linear warm-up; gradients are clipped by global norm if asked.
  """
  rate = learning_rate
  if warmup_updates:
    rate = lambda count: learning_rate * jnp.minimum(1.0, (count + 1) / warmup_updates)
  if name == "adamw":
    optimizer = optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay)
  elif name == "sgd":
    optimizer = optax.sgd(rate)
  else:
    raise ValueError(f"optimizer is {name!r}; give 'adamw' or 'sgd'")
  if moments_dtype == "bfloat16":
    optimizer = in_bfloat16(optimizer)
  elif moments_dtype != "float32":
    raise ValueError(f"moments_dtype is {moments_dtype!r}; give 'float32' or 'bfloat16'")
  return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def optimizer_from(config: ConfigDict) -> optax.GradientTransformation:
  """The optimiser of an alignment config."""
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
  count: jax.Array  # int32 [], updates done
  inner: optax.OptState


def in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Keeps the optimiser's moments in bfloat16, rounded up or down at random by their nearness.

  Rounded to the nearest, a moment that changes by 0.1 % an update would not change at all.
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

  def update(gradients, state: RoundedState, params=None):
    changes, inner = optimizer.update(gradients, restore(state.inner), params)
    return changes, RoundedState(state.count + 1, store(inner, state.count + 1))

  return optax.GradientTransformation(init, update)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
  """float32 -> one of the two nearest bfloat16, whose mean over keys is x."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(
    jnp.bfloat16
  )
