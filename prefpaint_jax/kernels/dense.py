"""Dense layers: kernel gradients without a transposed copy on a CPU, and a layer of two halves.

XLA:CPU would transpose one factor of the gradient first, which takes 1.3 to 3 times as long.
"""
# Shapes: I O features, F features of a half.

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

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


class DenseHalves(nn.Module):
  """The halves [..., F] and [..., F] of the output of a dense layer with 2 F features.

  Parameters are those of `nn.Dense`. On a TPU each half is a separate product, because XLA:TPU
  would write the whole output and read it again: an estimated 6 % more cycles of a transformer
  block. XLA:GPU would copy the halves of the kernel in every step.
  """

  features: int  # F
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array | np.ndarray, "... I"]) -> list[Float[Array, "... F"]]:
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 2 * self.features))
    bias = self.param("bias", nn.initializers.zeros, (2 * self.features,))
    return dispatch(HALVES, *nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype))


def one_product(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> list[jax.Array]:
  """Splits x W + b."""
  return jnp.split(dispatch(IMPLEMENTATIONS, x, kernel) + bias, 2, -1)


def two_products(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> list[jax.Array]:
  """Computes x W₁ + b₁ and x W₂ + b₂ for the halves of W and b."""
  halves = zip(jnp.split(kernel, 2, 1), jnp.split(bias, 2), strict=True)
  return [jnp.dot(x, half) + shift for half, shift in halves]


HALVES = {"reference": one_product, "tpu": two_products}
