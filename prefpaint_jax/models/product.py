"""Dense layers, whose kernels' gradients a CPU need not turn factors around for.

Left to itself XLA makes a transposed copy of one factor, and takes 1.3 to 3 times as long.
Shapes: I O features.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from prefpaint_jax.compilation import by_platform


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[..., I] with [I, O] -> [..., O]."""
  return jnp.dot(x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array):
  x, kernel = residuals

  def of_rows(x: jax.Array, dy: jax.Array) -> jax.Array:
    x, dy = (rows.reshape(-1, rows.shape[-1]) for rows in (x, dy))
    return jnp.einsum("ni,no->io", x, dy)

  def as_ever(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jax.linear_transpose(lambda kernel: jnp.dot(x, kernel), kernel)(dy)[0]

  (dx,) = jax.linear_transpose(lambda x: jnp.dot(x, kernel), x)(dy)
  return dx, by_platform(x, dy, cpu=of_rows, default=as_ever)


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _backward)


def _dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, **options) -> jax.Array:
  """`product`, as Flax calls it where no option of its Dense is set."""
  del dimension_numbers, options
  return product(x, kernel)


Dense = functools.partial(nn.Dense, dot_general=_dot_general)
