"""Convolution whose passes a CPU's compiler has a fast program for, wherever they stand.

XLA hands a convolution to a library on a CPU, if image, kernel and result lie as [B, H, W, C]
and [K, K, I, O]. It rearranges others for that, as those of gradients are, but not within a loop,
where they take up to 50 times as long. Here the gradients are written in that form.

At a UNet's lowest resolutions a kernel is many times as large as the picture, and turning it around
for the gradient of its input takes longest; products of the pixels' neighbourhoods take the kernel
as it lies. At the others float32 takes half of the multiplications, if rows are whole tiles: see
`winograd`. Other devices convolve as ever.
Shapes: B batch, H W pixels, I O features, K kernel side.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prefpaint_jax.kernels import winograd
from prefpaint_jax.kernels.dense import product_of_rows
from prefpaint_jax.kernels.dispatch import by_platform

LARGE = 4  # times the elements of the picture
THIN = 2  # times the features of the picture, at most: those of a neighbourhood of the result
FEW = 8  # pictures
NARROW = 16  # features
MANY = 512  # pixels of all pictures
LAYOUT = ("NHWC", "HWIO", "NHWC")

# Anything else is left to XLA altogether.
PLAIN = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1}


class Window(NamedTuple):
  strides: tuple[int, int]
  pads: tuple[tuple[int, int], tuple[int, int]]


def convolve(x: jax.Array, kernel: jax.Array, strides, padding, **options) -> jax.Array:
  """`jax.lax.conv_general_dilated` of [B, H, W, I] with [K, K, I, O], as Flax calls it."""
  if any(options.get(name, value) != value for name, value in PLAIN.items()):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
  if isinstance(padding, str):
    spatial = x.shape[1:3], kernel.shape[:2]
    padding = jax.lax.padtype_to_pads(*spatial, strides, padding)
  return _convolve(Window(tuple(strides), tuple(map(tuple, padding))), x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  as_ever = functools.partial(_as_ever, window)
  if _is_large(window, x, kernel):
    return by_platform(x, kernel, cpu=_product, default=as_ever)
  if _suits_winograd(window, x, kernel):
    return by_platform(x, kernel, cpu=winograd.convolve, default=as_ever)
  if _is_thin(window, kernel):
    return by_platform(x, kernel, cpu=_thin, default=as_ever)
  return as_ever(x, kernel)


def _as_ever(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jax.lax.conv_general_dilated(x, kernel, *window, dimension_numbers=LAYOUT)


def _forward(window: Window, x: jax.Array, kernel: jax.Array):
  return _convolve(window, x, kernel), (x, kernel)


def _backward(window: Window, residuals, dy: jax.Array):
  gradients = functools.partial(_gradients, window)
  if _is_large(window, *residuals):
    gradients = _product_gradients
  elif _suits_winograd(window, *residuals):
    gradients = winograd.gradients

  def as_ever(x: jax.Array, kernel: jax.Array, dy: jax.Array):
    (dx,) = jax.linear_transpose(lambda x: _as_ever(window, x, kernel), x)(dy)
    (dkernel,) = jax.linear_transpose(lambda kernel: _as_ever(window, x, kernel), kernel)(dy)
    return dx, dkernel

  return by_platform(*residuals, dy, cpu=gradients, default=as_ever)


_convolve.defvjp(_forward, _backward)


def _gradients(window: Window, x: jax.Array, kernel: jax.Array, dy: jax.Array):
  """Those of image and kernel, as two convolutions."""
  if kernel.shape[:2] == (1, 1) and window == ((1, 1), ((0, 0), (0, 0))):
    dkernel = product_of_rows(x, dy)[None, None].astype(kernel.dtype)
    return jnp.einsum("bhwo,io->bhwi", dy, kernel[0, 0]), dkernel
  if _is_thin(window, kernel):
    return _thin_gradients(x, kernel, dy)
  # Along each axis: the picture's side, the kernel's, the padding before, and the reach of dy.
  sides = x.shape[1:3], kernel.shape[:2], window.pads, dy.shape[1:3], window.strides
  axes = [(n, k, before, (m - 1) * s + 1) for n, k, (before, _), m, s in zip(*sides, strict=True)]
  convolution = functools.partial(
    jax.lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=LAYOUT
  )
  dx = convolution(
    dy,
    kernel[::-1, ::-1].swapaxes(2, 3),
    padding=[(k - 1 - before, n - reach + before) for n, k, before, reach in axes],
    lhs_dilation=window.strides,
  )
  if x.shape[0] < FEW and window.strides == (1, 1):
    return dx, _kernel_gradient_by_rows(window, x, kernel, dy)
  # The batch becomes the features, and the result [I, K, K, O].
  dkernel = convolution(
    x.transpose(3, 1, 2, 0),
    dy.transpose(1, 2, 0, 3),
    padding=[(before, k - 1 - n + reach - before) for n, k, before, reach in axes],
    rhs_dilation=window.strides,
  )
  return dx, dkernel.transpose(1, 2, 0, 3)


### By products.
def _kernel_gradient_by_rows(window: Window, x: jax.Array, kernel: jax.Array, dy: jax.Array):
  """A product for each row of the kernel, of neighbours along W as features: dy moves along H.

  For a few pictures half of the time of a convolution, whose features would be those few.
  """
  K = kernel.shape[0]
  (top, bottom), sides = window.pads
  H, W = x.shape[1], dy.shape[2]
  padded = jnp.pad(x, ((0, 0), (0, 0), sides, (0, 0)))
  near = jnp.concatenate([padded[:, :, j : j + W] for j in range(K)], axis=-1)
  same = (0, 0, 0)
  dy = jax.lax.pad(dy, dy.dtype.type(0), (same, (K - 1 - top, K - 1 - bottom, 0), same, same))
  rows = [product_of_rows(near, dy[:, K - 1 - i : K - 1 - i + H]) for i in range(K)]
  return jnp.stack(rows).reshape(kernel.shape).astype(kernel.dtype)


def _thin(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Every pixel times the whole kernel, each product added to the pixel that sees it there.

  Half to a quarter of the library's time, which works on 16 features at least.
  """
  K, _, features, few = kernel.shape
  H, W = x.shape[1:3]
  products = _einsum("bhwi,in->bhwn", x, kernel.transpose(2, 0, 1, 3).reshape(features, -1))
  pads = (K // 2, K // 2)
  padded = jnp.pad(products, ((0, 0), pads, pads, (0, 0)))
  parts = enumerate(jnp.split(padded, K * K, axis=-1))
  seen = [part[:, n // K : n // K + H, n % K : n % K + W] for n, part in parts]
  return sum(seen[1:], seen[0]).astype(x.dtype)


def _thin_gradients(x: jax.Array, kernel: jax.Array, dy: jax.Array):
  """Products with dy's neighbourhoods, which are small where it has few features."""
  K, _, features, few = kernel.shape
  near = _neighbourhoods(K, dy)
  turned = kernel[::-1, ::-1].swapaxes(2, 3).reshape(-1, features)
  dx = _einsum("bhwn,ni->bhwi", near, turned).astype(x.dtype)
  dkernel = product_of_rows(x, near)
  dkernel = dkernel.reshape(features, K, K, few)[:, ::-1, ::-1].transpose(1, 2, 0, 3)
  return dx, dkernel.astype(kernel.dtype)


def _is_same(window: Window, kernel: jax.Array) -> bool:
  """Whether every pixel of the result is in the middle of what it sees."""
  K = kernel.shape[0]
  return K % 2 == 1 and kernel.shape[1] == K and window == ((1, 1), ((K // 2, K // 2),) * 2)


def _is_thin(window: Window, kernel: jax.Array) -> bool:
  K, _, features, few = kernel.shape
  return _is_same(window, kernel) and K > 1 and K * K * few <= THIN * features


def _is_large(window: Window, x: jax.Array, kernel: jax.Array) -> bool:
  return _is_same(window, kernel) and kernel.size > LARGE * x.size


def _suits_winograd(window: Window, x: jax.Array, kernel: jax.Array) -> bool:
  same = kernel.shape[0] == 3 and _is_same(window, kernel)
  whole = x.shape[2] % winograd.TILE == 0 and x.dtype == kernel.dtype == jnp.float32
  pays = math.prod(x.shape[:3]) >= MANY and min(kernel.shape[2:]) >= NARROW
  return same and whole and pays


def _neighbourhoods(K: int, x: jax.Array) -> jax.Array:
  """[B, H, W, I] -> [B, H, W, K K I], zero beyond the border."""
  _, H, W, _ = x.shape
  pads = (K // 2, K // 2)
  padded = jnp.pad(x, ((0, 0), pads, pads, (0, 0)))
  shifted = [padded[:, i : i + H, j : j + W] for i in range(K) for j in range(K)]
  return jnp.concatenate(shifted, axis=-1)


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  near = _neighbourhoods(kernel.shape[0], x)
  flat = kernel.reshape(-1, kernel.shape[-1])
  return _einsum("bhwn,no->bhwo", near, flat).astype(x.dtype)


def _product_gradients(x: jax.Array, kernel: jax.Array, dy: jax.Array):
  near, back = jax.vjp(functools.partial(_neighbourhoods, kernel.shape[0]), x)
  dkernel = product_of_rows(near, dy).reshape(kernel.shape).astype(kernel.dtype)
  flat = kernel.reshape(-1, kernel.shape[-1])
  (dx,) = back(_einsum("bhwo,no->bhwn", dy, flat).astype(x.dtype))
  return dx, dkernel


### Of a picture enlarged by nearest neighbours.
def enlarge_and_convolve(x: jax.Array, kernel: jax.Array, *unused, **options) -> jax.Array:
  """`convolve` of x enlarged to [B, 2H, 2W, I] by nearest neighbours, with padding 1; K is 3.

  Takes what Flax calls a convolution with, and has no choice.
  """
  del unused, options
  if kernel.size > 2 * LARGE * 4 * x.size:  # the enlarged picture's; folding pays for longer
    return _enlarged(x, kernel)
  return _enlarge(x, kernel)


@jax.custom_vjp
def _enlarge(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return by_platform(x, kernel, cpu=_folded, default=_enlarged)


def _enlarge_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array):
  of = lambda function: lambda x, kernel, dy: jax.vjp(function, x, kernel)[1](dy)
  return by_platform(*residuals, dy, cpu=of(_folded), default=of(_enlarged))


_enlarge.defvjp(lambda x, kernel: (_enlarge(x, kernel), (x, kernel)), _enlarge_backward)


def _enlarged(x: jax.Array, kernel: jax.Array) -> jax.Array:
  B, H, W, _ = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None, :], (B, H, 2, W, 2, x.shape[-1]))
  return convolve(x.reshape(B, 2 * H, 2 * W, -1), kernel, (1, 1), ((1, 1), (1, 1)))


def _folded(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Each of a pixel's four copies sees 2 x 2 pixels, some through a sum of the kernel.

  4/9 of the work, and nothing enlarged is convolved: on a CPU two thirds of the time; on a TPU
  taking the copies apart and together costs as much.
  """

  def fold(kernel: jax.Array, axis: int, copy: int) -> jax.Array:
    first, middle, last = jnp.split(kernel, 3, axis)
    parts = [first + middle, last] if copy else [first, middle + last]
    return jnp.concatenate(parts, axis)

  def copies(i: int, j: int) -> jax.Array:
    pads = ((1 - i, i), (1 - j, j))
    return convolve(x, fold(fold(kernel, 0, i), 1, j), (1, 1), pads)

  B, H, W, _ = x.shape
  rows = [jnp.stack([copies(i, 0), copies(i, 1)], axis=3) for i in (0, 1)]
  return jnp.stack(rows, axis=2).reshape(B, 2 * H, 2 * W, -1)
