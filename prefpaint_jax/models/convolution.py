"""Convolution of stride 1 by one product, where XLA's own is slow: on a CPU, by a large kernel.

At a UNet's lowest resolutions a kernel is many times as large as the picture. XLA would turn such a
kernel around for the gradient of its input, with one thread; products of the pixels' neighbourhoods
take it as it lies. Other devices convolve as ever.
Shapes: B batch, H W pixels, I O features, K kernel side.
"""

import functools

import jax
import jax.numpy as jnp

LARGE = 4  # times the elements of the picture


def convolve(x: jax.Array, kernel: jax.Array, strides, padding, **options) -> jax.Array:
  """`jax.lax.conv_general_dilated` of [B, H, W, I] with [K, K, I, O], as Flax calls it."""
  K = kernel.shape[0]
  same = K % 2 == 1 and kernel.shape[1] == K and tuple(strides) == (1, 1)
  same = same and [tuple(pads) for pads in padding] == [(K // 2, K // 2)] * 2
  if same and kernel.size > LARGE * x.size:
    return _by_product(x, kernel)
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _as_ever(x: jax.Array, kernel: jax.Array) -> jax.Array:
  pad = kernel.shape[0] // 2
  layout = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(pad, pad)] * 2, dimension_numbers=layout)


def _neighbourhoods(K: int, x: jax.Array) -> jax.Array:
  """[B, H, W, I] -> [B, H, W, K K I], zero beyond the border."""
  _, H, W, _ = x.shape
  pads = (K // 2, K // 2)
  padded = jnp.pad(x, ((0, 0), pads, pads, (0, 0)))
  shifted = [padded[:, i : i + H, j : j + W] for i in range(K) for j in range(K)]
  return jnp.concatenate(shifted, axis=-1)


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _by_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jax.lax.platform_dependent(x, kernel, cpu=_product, default=_as_ever)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  near = _neighbourhoods(kernel.shape[0], x)
  flat = kernel.reshape(-1, kernel.shape[-1])
  return _einsum("bhwn,no->bhwo", near, flat).astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array):
  return _by_product(x, kernel), (x, kernel)


def _backward(residuals, dy: jax.Array):
  def product(x, kernel, dy):
    near, back = jax.vjp(functools.partial(_neighbourhoods, kernel.shape[0]), x)
    dkernel = _einsum("bhwn,bhwo->no", near, dy).reshape(kernel.shape).astype(kernel.dtype)
    flat = kernel.reshape(-1, kernel.shape[-1])
    (dx,) = back(_einsum("bhwo,no->bhwn", dy, flat).astype(x.dtype))
    return dx, dkernel

  def as_ever(x, kernel, dy):
    return jax.vjp(_as_ever, x, kernel)[1](dy)

  return jax.lax.platform_dependent(*residuals, dy, cpu=product, default=as_ever)


_by_product.defvjp(_forward, _backward)
