"""Convolution of side 3 with half of the multiplications (Winograd 1980; Lavin and Gray 2016).

Four neighbours along W at a time, F(4, 3): the six pixels that they see and the three of a row of
the kernel are each taken to six numbers, whose products are taken back to four. Along H it stays a
convolution, so that what is transformed grows by a half only and rounding stays near float32's own
(in two dimensions it would grow by 9/4, and be ten times as large). Gradients are its transposes,
and need no more multiplications.
Shapes: B batch, H W pixels, t = W / 4 tiles of a row, I O features.
"""

import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax.kernels.dense import product_of_rows

TILE = 4

# For the points 0, ±1, ±2, ∞: y = BACK ((KERNEL k) ∘ (PIXELS x)).
PIXELS = np.array(
  [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
  ],
  np.float64,
)
KERNEL = np.array(
  [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
  ]
)
BACK = np.array(
  [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float64
)
Arrays = list[jax.Array]


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[B, H, 4 t, I] with [3, 3, I, O] and padding 1 -> [B, H, 4 t, O]."""
  products = map(_along_height, _combine(PIXELS, _windows(x)), _kernels(kernel))
  return _join(_combine(BACK, list(products)))


def gradients(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Those of `convolve`'s arguments."""
  H = x.shape[1]
  spread = _combine(BACK.T, _split(dy))
  turned = [k[::-1].swapaxes(2, 3) for k in _kernels(kernel)]
  dx = _add_windows(_combine(PIXELS.T, list(map(_along_height, spread, turned))))

  def kernel_gradient(pixels: jax.Array, spread: jax.Array) -> jax.Array:
    """[3, I, O] of one of the six: a row of the kernel saw dy a row later, or a row before."""
    padded = jnp.pad(spread, ((0, 0), (1, 1), (0, 0), (0, 0)))
    near = jnp.concatenate([padded[:, 2 - i : 2 - i + H] for i in range(3)], axis=-1)
    return product_of_rows(pixels, near).reshape(kernel.shape[2], 3, kernel.shape[3]).swapaxes(0, 1)

  parts = list(map(kernel_gradient, _combine(PIXELS, _windows(x)), spread))
  return dx, jnp.stack(_combine(KERNEL.T, parts), axis=1)


def _along_height(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[B, H, t, I] with [3, 1, I, O]."""
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), ((1, 1), (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _combine(matrix: np.ndarray, arrays: Arrays) -> Arrays:
  """Sums of the arrays, each with a row of the matrix as their factors."""

  def combine(row: np.ndarray) -> jax.Array:
    times = lambda factor, array: array if factor == 1 else float(factor) * array
    used = [times(row[i], arrays[i]) for i in np.flatnonzero(row)]
    return sum(used[1:], used[0])

  return list(map(combine, matrix))


def _kernels(kernel: jax.Array) -> Arrays:
  """Six of [3, 1, I, O]."""
  return _combine(KERNEL, jnp.split(kernel, 3, axis=1))


def _split(x: jax.Array) -> Arrays:
  """The four neighbours of every tile: [B, H, t, C] each."""
  B, H, W, C = x.shape
  tiles = x.reshape(B, H, W // TILE, TILE, C)
  return [tiles[:, :, :, i] for i in range(TILE)]


def _join(neighbours: Arrays) -> jax.Array:
  B, H, t, C = neighbours[0].shape
  return jnp.stack(neighbours, axis=3).reshape(B, H, TILE * t, C)


def _windows(x: jax.Array) -> Arrays:
  """The four of every tile between the last of the tile before and the first of the next."""
  neighbours = _split(x)
  return [_later(neighbours[-1]), *neighbours, _earlier(neighbours[0])]


def _add_windows(windows: Arrays) -> jax.Array:
  """The transpose of `_windows`."""
  before, first, *middle, last, after = windows
  return _join([first + _later(after), *middle, last + _earlier(before)])


def _later(x: jax.Array) -> jax.Array:
  """Each tile's becomes the next one's."""
  return jnp.pad(x[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))


def _earlier(x: jax.Array) -> jax.Array:
  return jnp.pad(x[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
