"""Large sums: of norms over whole pictures, with one multiply-add and gradients, and of squares.

A CPU's compiler makes a tree of windows of a large sum, which takes five to twenty times as long as
to read the picture once. Two sums at a time, of a few pixels each, it leaves as they are.
Shapes: B batch, H W pixels, C channels.
"""

from typing import Any

import jax
import jax.numpy as jnp

from prefpaint_jax.kernels.dispatch import by_platform

FEW = 16  # pixels of a partial sum
SMALL = 4096  # numbers


def pixel_sums(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The sums of two [B, H, W, C] over their pixels: [B, C] each."""
  whole = lambda a, b: (a.sum((1, 2)), b.sum((1, 2)))
  return by_platform(a, b, cpu=_by_few, default=whole)


def _by_few(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  B, H, W, C = a.shape
  a, b = a.reshape(B, H * W, C), b.reshape(B, H * W, C)
  while (pixels := a.shape[1]) > 1:
    few = next((n for n in range(FEW, 1, -1) if pixels % n == 0), pixels)
    a, b = (x.reshape(B, pixels // few, few, C) for x in (a, b))
    add = lambda some, more: (some[0] + more[0], some[1] + more[1])
    a, b = jax.lax.reduce((a, b), (jnp.zeros((), a.dtype),) * 2, add, (2,))
  return a[:, 0], b[:, 0]


@jax.custom_vjp
def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The sums of x and of x² over the pixels of [B, H, W, C]: [B, C] each."""
  return pixel_sums(x, jnp.square(x))


def _moments_backward(x: jax.Array, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
  of_sum, of_squares = (gradient[:, None, None] for gradient in gradients)
  return (of_sum + 2.0 * x * of_squares,)


moments.defvjp(lambda x: (moments(x), x), _moments_backward)


@jax.custom_vjp
def scale_and_shift(x: jax.Array, gain: jax.Array, offset: jax.Array) -> jax.Array:
  """[B, H, W, C] times [B, C] plus [B, C]."""
  return x * gain[:, None, None] + offset[:, None, None]


def _scale_and_shift_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array):
  x, gain = residuals
  return dy * gain[:, None, None], *pixel_sums(dy * x, dy)


scale_and_shift.defvjp(
  lambda x, gain, offset: (scale_and_shift(x, gain, offset), (x, gain)), _scale_and_shift_backward
)


def norm(tree: Any) -> jax.Array:
  """The Euclidean norm [] of all numbers of a tree of float32 arrays that lie on one device."""
  squares = lambda x: by_platform(x, cpu=_squares, default=_squares_as_ever)
  return jnp.sqrt(sum(map(squares, jax.tree.leaves(tree))))


def _squares_as_ever(x: jax.Array) -> jax.Array:
  return jnp.sum(jnp.square(x))


def _squares(x: jax.Array) -> jax.Array:
  if x.size < SMALL or x.size // x.shape[-1] % 2:
    return _squares_as_ever(x)
  halves = jnp.square(x).reshape(2, 1, -1, 1, x.shape[-1])
  return sum(half.sum() for half in _by_few(*halves))
