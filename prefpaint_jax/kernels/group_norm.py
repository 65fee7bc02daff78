"""GroupNorm's gain and offset from sums."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefpaint_jax.kernels.dispatch import by_platform


class _Norm(NamedTuple):
  """Of a GroupNorm: groups, numbers in each of one picture, and what is added to the variance."""

  groups: int
  count: int
  epsilon: float


def _map_of_norm(norm: _Norm, products: bool, total, squares, scale, bias):
  """The map's gain and offset [B, C] from the sums of x and of x² [B, C].

  Products with who is a member of which group keep a group's own arithmetic out of the map, where
  a CPU would do it again for every pixel. To a GPU each would be a call of a library.
  """
  B, C = total.shape
  G = norm.groups
  if products:
    member = jnp.repeat(jnp.eye(G), C // G, axis=1)
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    per_group, per_channel = (lambda x: dot(x, member.T)), (lambda x: dot(x, member))
  else:
    per_group = lambda x: x.reshape(B, G, C // G).sum(-1)
    per_channel = lambda x: jnp.repeat(x, C // G, axis=1)
  mean, squares = per_group(total) / norm.count, per_group(squares) / norm.count
  variance = jnp.maximum(squares - jnp.square(mean), 0.0)
  gain = per_channel(jax.lax.rsqrt(variance + norm.epsilon)) * scale
  return gain, bias - per_channel(mean) * gain


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gain_and_offset(norm: _Norm, *sums: jax.Array) -> tuple[jax.Array, jax.Array]:
  by = lambda products: functools.partial(_map_of_norm, norm, products)
  return by_platform(*sums, cuda=by(False), default=by(True))


def _gain_and_offset_backward(norm: _Norm, sums: tuple[jax.Array, ...], gradients):
  def by(products: bool):
    function = functools.partial(_map_of_norm, norm, products)
    return lambda gradients, *sums: jax.vjp(function, *sums)[1](gradients)

  return by_platform(gradients, *sums, cuda=by(False), default=by(True))


_gain_and_offset.defvjp(
  lambda norm, *sums: (_gain_and_offset(norm, *sums), sums), _gain_and_offset_backward
)
