"""Group normalisation, with SiLU if wanted, as one op that has its own backward pass on a CPU."""
# Shapes: B batch, H W pixels, C channels, G groups.

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prefpaint_jax.kernels.dispatch import dispatch

FEW = 16  # pixels of a partial sum


class Norm(NamedTuple):
  """The static arguments: number of groups, what is added to the variance, and the activation."""

  groups: int
  epsilon: float
  silu: bool


def group_norm(
  norm: Norm,
  x: Float[Array | np.ndarray, "B H W C"],
  scale: Float[Array | np.ndarray, " C"],
  bias: Float[Array | np.ndarray, " C"],
) -> Float[Array, "B H W C"]:
  """Computes silu((x - mean) / sqrt(variance + ε) · scale + bias) in float32, silu if `norm` asks.

  Mean and variance are those of a group of channels of one image.
  """
  op = {name: functools.partial(function, norm) for name, function in IMPLEMENTATIONS.items()}
  return dispatch(op, *map(jnp.asarray, (x, scale, bias)))


def reference(norm: Norm, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
  """gain · x + offset, whose gain and offset come from Σ x and Σ x² of each channel."""
  x = x.astype(jnp.float32)
  to_group = lambda x: x.reshape(len(x), norm.groups, -1).sum(-1)
  to_channel = lambda x: jnp.repeat(x, scale.size // norm.groups, axis=1)
  sums = x.sum((1, 2)), jnp.square(x).sum((1, 2))
  gain, offset = _affine(norm, x.shape, to_group, to_channel, *sums, scale, bias)
  y = x * gain[:, None, None] + offset[:, None, None]
  return nn.silu(y) if norm.silu else y


def _affine(norm: Norm, shape, to_group, to_channel, total, squares, scale, bias):
  """Returns gain and offset [B, C] from the sums [B, C] of x and x²."""
  _, H, W, C = shape
  count = H * W * C // norm.groups
  mean, mean_square = to_group(total) / count, to_group(squares) / count
  variance = jnp.maximum(mean_square - jnp.square(mean), 0.0)
  gain = to_channel(jax.lax.rsqrt(variance + norm.epsilon)) * scale
  return gain, bias - to_channel(mean) * gain


def _cpu_affine(norm: Norm, shape, *arrays):
  """`_affine` by products with the membership of channels in groups.

  Otherwise XLA:CPU would fuse the groups' arithmetic into the map and repeat it for every pixel.
  """
  member = jnp.repeat(jnp.eye(norm.groups), shape[-1] // norm.groups, axis=1)
  dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
  to_group, to_channel = (lambda x: dot(x, member.T)), (lambda x: dot(x, member))
  return _affine(norm, shape, to_group, to_channel, *arrays)


def _cpu_sums(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the sums [B, C] of two arrays over their pixels.

  XLA:CPU rewrites a large sum as a tree of windows, which takes five to twenty times as long as
  reading the array. It leaves two sums at a time, of a few pixels each, as they are.
  """
  B, H, W, C = a.shape
  a, b = a.reshape(B, H * W, C), b.reshape(B, H * W, C)
  while (pixels := a.shape[1]) > 1:
    few = next((n for n in range(FEW, 1, -1) if pixels % n == 0), pixels)
    a, b = (x.reshape(B, pixels // few, few, C) for x in (a, b))
    add = lambda some, more: (some[0] + more[0], some[1] + more[1])
    a, b = jax.lax.reduce((a, b), (jnp.zeros((), a.dtype),) * 2, add, (2,))
  return a[:, 0], b[:, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cpu(norm: Norm, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
  """The reference, with sums that XLA:CPU computes in one pass over x."""
  return _forward(norm, x, scale, bias)[0]


def _forward(norm: Norm, x: jax.Array, scale: jax.Array, bias: jax.Array):
  wide = x.astype(jnp.float32)
  sums = _cpu_sums(wide, jnp.square(wide))
  gain, offset = _cpu_affine(norm, x.shape, *sums, scale, bias)
  y = wide * gain[:, None, None] + offset[:, None, None]
  # A quotient: XLA:CPU would recompute a final product in every consumer.
  return (y / (1.0 + jnp.exp(-y)) if norm.silu else y), (x, scale, bias, *sums, gain, offset)


def _backward(norm: Norm, residuals, dy: jax.Array):
  x, scale, bias, *sums, gain, offset = residuals
  wide = x.astype(jnp.float32)
  if norm.silu:
    y = wide * gain[:, None, None] + offset[:, None, None]
    share = nn.sigmoid(y)
    dy = dy * (share * (1.0 + y * (1.0 - share)))
  affine = functools.partial(_cpu_affine, norm, x.shape)
  dtotal, dsquares, dscale, dbias = jax.vjp(affine, *sums, scale, bias)[1](_cpu_sums(dy * wide, dy))
  dx = dy * gain[:, None, None] + dtotal[:, None, None] + 2.0 * wide * dsquares[:, None, None]
  return dx.astype(x.dtype), dscale, dbias


cpu.defvjp(_forward, _backward)

IMPLEMENTATIONS = {"reference": reference, "cpu": cpu}
