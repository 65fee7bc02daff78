"""Dense layers whose kernel gradients need no transposed copy on a CPU.

XLA:CPU would transpose one factor of the gradient first, which takes 1.3 to 3 times as long.
"""
# Shapes: I O features.

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from prefpaint_jax.kernels.dispatch import dispatch


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, **options) -> jax.Array:
  """Multiplies [..., I] with [I, O]: `nn.Dense`'s argument of that name, at its other defaults."""
  del dimension_numbers, options
  return dispatch(IMPLEMENTATIONS, x, kernel)


@jax.custom_vjp
def cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x W, with the gradient Σ xᵀ dy over rows."""
  return jnp.dot(x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array):
  x, kernel = residuals
  (dx,) = jax.linear_transpose(lambda x: jnp.dot(x, kernel), x)(dy)
  rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
  dkernel = jnp.einsum("ni,no->io", *rows, preferred_element_type=jnp.float32)
  return dx, dkernel.astype(kernel.dtype)


cpu.defvjp(lambda x, kernel: (cpu(x, kernel), (x, kernel)), _backward)

IMPLEMENTATIONS = {"reference": jnp.dot, "cpu": cpu}
Dense = functools.partial(nn.Dense, dot_general=dot_general)
