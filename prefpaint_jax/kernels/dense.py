"""Dense layers, whose kernels' gradients a CPU need not turn factors around for.

Left to itself XLA makes a transposed copy of one factor, and takes 1.3 to 3 times as long.
Shapes: I O features.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from prefpaint_jax.kernels.dispatch import by_platform


def product_of_rows(x: jax.Array, dy: jax.Array) -> jax.Array:
  """[..., I] with [..., O] -> [I, O], in float32 or wider: the gradient of a kernel, on a CPU."""
  x, dy = (array.reshape(-1, array.shape[-1]) for array in (x, dy))
  wide = jnp.promote_types(x.dtype, jnp.float32)
  multiply = functools.partial(jnp.einsum, "ni,no->io", preferred_element_type=wide)
  rows, features, out = *x.shape, dy.shape[1]
  if rows * (features - out) <= features * out:
    return multiply(x, dy)
  # The library turns the first factor around itself, slowly: the narrower one had better be it,
  # unless turning the result takes longer.
  return jax.lax.optimization_barrier(multiply(dy, x)).T


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[..., I] with [I, O] -> [..., O]."""
  return jnp.dot(x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array):
  x, kernel = residuals

  def as_ever(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jax.linear_transpose(lambda kernel: jnp.dot(x, kernel), kernel)(dy)[0]

  (dx,) = jax.linear_transpose(lambda x: jnp.dot(x, kernel), x)(dy)
  of_rows = lambda x, dy: product_of_rows(x, dy).astype(kernel.dtype)
  return dx, by_platform(x, dy, cpu=of_rows, default=as_ever)


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _backward)


def _dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, **options) -> jax.Array:
  """`product`, as Flax calls it where no option of its Dense is set."""
  del dimension_numbers, options
  return product(x, kernel)


Dense = functools.partial(nn.Dense, dot_general=_dot_general)
