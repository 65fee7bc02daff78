"""2-D convolution whose gradients use layouts that XLA:CPU has fast kernels for, inside loops too.

XLA:CPU hands a convolution to a library if image, kernel and result are [B, H, W, C], [K, K, I, O]
and [B, H, W, O]. Outside loops it rearranges the convolutions of gradients for that; inside loops
it does not, and they take up to 50 times as long. On GPU and TPU this is
`jax.lax.conv_general_dilated`.
"""
# Shapes: B batch, H W pixels, h w pixels of the result, I O features, K kernel side.

import functools
from typing import NamedTuple

import jax

from prefpaint_jax.kernels.dispatch import dispatch

LAYOUT = ("NHWC", "HWIO", "NHWC")
# Other values of these options are left to XLA on every platform.
PLAIN = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1}
PLAIN |= {"precision": None, "preferred_element_type": None}


class Window(NamedTuple):
  """The strides and the padding of a convolution, along height and width."""

  strides: tuple[int, int]
  pads: tuple[tuple[int, int], tuple[int, int]]


def conv2d(x: jax.Array, kernel: jax.Array, strides, padding, **options) -> jax.Array:
  """Convolves [B, H, W, I] with [K, K, I, O]: `nn.Conv`'s argument `conv_general_dilated`."""
  if any(options.get(name, value) != value for name, value in PLAIN.items()):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
  window = Window(tuple(strides), tuple(map(tuple, padding)))
  op = {name: functools.partial(function, window) for name, function in IMPLEMENTATIONS.items()}
  return dispatch(op, x, kernel)


def reference(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """y[b, i, j, o] = Σ x[b, s i + k - p, s j + l - p, c] kernel[k, l, c, o]; strides s, pads p."""
  return jax.lax.conv_general_dilated(x, kernel, *window, dimension_numbers=LAYOUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cpu(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The reference, with both gradients written as convolutions in the layout above."""
  return reference(window, x, kernel)


def _backward(window: Window, residuals, dy: jax.Array):
  x, kernel = residuals
  # Along each axis: the image's side, the kernel's, the padding before, and the reach of dy.
  sides = x.shape[1:3], kernel.shape[:2], window.pads, dy.shape[1:3], window.strides
  axes = [(n, k, before, (m - 1) * s + 1) for n, k, (before, _), m, s in zip(*sides, strict=True)]
  convolve = functools.partial(
    jax.lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=LAYOUT
  )
  dx = convolve(
    dy,
    kernel[::-1, ::-1].swapaxes(2, 3),
    padding=[(k - 1 - before, n - reach + before) for n, k, before, reach in axes],
    lhs_dilation=window.strides,
  )
  # The batch takes the place of the features; the result is [I, K, K, O].
  dkernel = convolve(
    x.transpose(3, 1, 2, 0),
    dy.transpose(1, 2, 0, 3),
    padding=[(before, k - 1 - n + reach - before) for n, k, before, reach in axes],
    rhs_dilation=window.strides,
  )
  return dx, dkernel.transpose(1, 2, 0, 3)


cpu.defvjp(lambda window, x, kernel: (cpu(window, x, kernel), (x, kernel)), _backward)

IMPLEMENTATIONS = {"reference": reference, "cpu": cpu}
