"""LPIPS v0.1 (Zhang et al. 2018, arXiv 1801.03924): a perceptual distance of two images.

The features of a classifier are normalised along the channels; squared differences are weighted by
a linear layer, averaged over the pixels and summed over the layers. Modules have the names of
torchvision's and lpips' files.
"""
# Shapes: B images, H W pixels, C channels.

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax.runtime.suggestions import suggest
from prefpaint_jax.weights.files import load_file
from prefpaint_jax.weights.folder import local_path
from prefpaint_jax.weights.names import Params, to_tree

# Of images in [-1, 1]: lpips' ScalingLayer.
_SHIFT, _SCALE = np.float32([-0.030, -0.088, -0.188]), np.float32([0.458, 0.448, 0.450])
_AT_ONCE = 16  # images; the first features of one of 512x512 pixels have 17 MB


class Conv(NamedTuple):
  """A convolution that is followed by ReLU."""

  features: int
  kernel: int
  stride: int = 1
  padding: int = 0


class Pool(NamedTuple):
  """A maximum over 3x3 pixels with stride 2."""

  ceil: bool


class Fire(NamedTuple):
  """SqueezeNet's block: a convolution, and the concatenation of two of its result."""

  squeeze: int
  expand: int


class Network(NamedTuple):
  """A classifier of torchvision.

  Attributes:
    files: glob of its file.
    layers: by index in torchvision's `features`.
    outputs: indices of the layers whose features are compared.
    minimum: the smallest image, in pixels of a side.
  """

  files: str
  layers: dict[int, Conv | Pool | Fire]
  outputs: tuple[int, ...]
  minimum: int


NETWORKS = {
  "squeeze": Network(
    "squeezenet1_1-*.pth",
    {
      0: Conv(64, 3, 2),
      2: Pool(ceil=True),
      3: Fire(16, 64),
      4: Fire(16, 64),
      5: Pool(ceil=True),
      6: Fire(32, 128),
      7: Fire(32, 128),
      8: Pool(ceil=True),
      9: Fire(48, 192),
      10: Fire(48, 192),
      11: Fire(64, 256),
      12: Fire(64, 256),
    },
    outputs=(0, 4, 7, 9, 10, 11, 12),
    minimum=17,
  ),
  "alex": Network(
    "alexnet-owt-*.pth",
    {
      0: Conv(64, 11, 4, 2),
      2: Pool(ceil=False),
      3: Conv(192, 5, 1, 2),
      5: Pool(ceil=False),
      6: Conv(384, 3, 1, 1),
      8: Conv(256, 3, 1, 1),
      10: Conv(256, 3, 1, 1),
    },
    outputs=(0, 3, 6, 8, 10),
    minimum=31,
  ),
}


class _Fire(nn.Module):
  """Computes `Fire`."""

  sizes: Fire

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    squeeze, expand = self.sizes
    x = _conv(Conv(squeeze, 1), "squeeze", x)
    halves = (
      _conv(Conv(expand, 1), "expand1x1", x),
      _conv(Conv(expand, 3, 1, 1), "expand3x3", x),
    )
    return jnp.concatenate(halves, axis=-1)


class _Linear(nn.Module):
  """Weights the channels: lpips' linear layer, whose file calls it `model.1`."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Conv(1, (1, 1), use_bias=False, precision="highest", name="model_1")(x)


class LPIPS(nn.Module):
  """Computes the distance [B] of images and others, both [B, H, W, 3] in [-1, 1]."""

  kind: str  # of NETWORKS

  @nn.compact
  def __call__(self, images: jax.Array, others: jax.Array) -> jax.Array:
    network, B, distance = NETWORKS[self.kind], len(images), 0.0
    x = (jnp.concatenate([images, others]) - _SHIFT) / _SCALE
    for index, layer in network.layers.items():
      name = f"features_{index}"
      if isinstance(layer, Pool):
        x = _max_pool(x, layer.ceil)
      else:
        x = _Fire(layer, name=name)(x) if isinstance(layer, Fire) else _conv(layer, name, x)
      if index in network.outputs:
        features = x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-10)
        difference = (features[:B] - features[B:]) ** 2
        linear = _Linear(name=f"lin{network.outputs.index(index)}")
        distance += linear(difference).mean((1, 2, 3))
    return distance


def load(given: str, size: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """Loads LPIPS: a function of images and others [B, H, W, 3] in [-1, 1], which returns [B].

  Args:
    given: "squeeze@FOLDER" or "alex@FOLDER". The folder has torchvision's file of the classifier,
      and squeeze.pth or alex.pth of the package lpips (lpips/weights/v0.1). A FOLDER alone is
      squeeze's.
    size: pixels of the shorter side of the images.

  Raises:
    ValueError: files are missing, damaged or of another network, or the images are too small.
  """
  kind, at, folder = given.partition("@") if "@" in given else ("squeeze", "", given)
  if kind not in NETWORKS:
    nearest = suggest(kind, NETWORKS)
    advice = f"did you mean {nearest}?" if nearest else "give squeeze@FOLDER or a folder"
    raise ValueError(f"config.lpips is {given!r}; expected one of {', '.join(NETWORKS)}; {advice}")
  network = NETWORKS[kind]
  path = local_path(folder, "config.lpips")
  wanted = f"a folder with {network.files} of torchvision and {kind}.pth of lpips"
  if not path.is_dir():
    raise ValueError(f"config.lpips is {given!r}; expected {wanted}; give one")
  found = sorted(path.glob(network.files))
  if len(found) != 1 or not (path / f"{kind}.pth").is_file():
    lacks = f"{len(found)} files {network.files}" if len(found) != 1 else f"no {kind}.pth"
    raise ValueError(f"{path} has {lacks}; expected {wanted}; give such a folder")
  if size < network.minimum:
    raise ValueError(
      f"config.size is {size}; expected at least {network.minimum} for LPIPS of {kind}; give it, "
      'or config.lpips=""'
    )
  template, linear = shapes(kind), load_file(path / f"{kind}.pth")
  if mixed := [name for name in linear if not name.startswith("lin")]:
    raise ValueError(
      f"{path / f'{kind}.pth'}: has {mixed[0]}; expected lin0.model.1.weight, ...; give the file "
      "of the package lpips"
    )
  params = to_tree(load_file(found[0]) | linear, template, what=f"{found[0]} and {kind}.pth")
  return functools.partial(_distances(kind), params)


@functools.cache
def _distances(kind: str) -> Callable[[Params, np.ndarray, np.ndarray], jax.Array]:
  """Returns the compiled function of parameters, images and others."""

  def one(params: Params, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    return LPIPS(kind).apply({"params": params}, *(x[None] for x in pair))[0]

  def distances(params: Params, images: jax.Array, others: jax.Array) -> jax.Array:
    return jax.lax.map(functools.partial(one, params), (images, others), batch_size=_AT_ONCE)

  return jax.jit(distances)


@functools.cache
def shapes(kind: str) -> Params:
  """Returns the shapes of the parameters of a network of NETWORKS."""
  images = jnp.zeros((1, NETWORKS[kind].minimum, NETWORKS[kind].minimum, 3))
  return jax.eval_shape(lambda: LPIPS(kind).init(jax.random.key(0), images, images))["params"]


def _conv(layer: Conv, name: str, x: jax.Array) -> jax.Array:
  """Convolves and applies ReLU."""
  size, stride, padding = ((n, n) for n in layer[1:])
  padding = (padding, padding)
  # The default precision of TPUs and of new GPUs is lower, which LPIPS is published without.
  return nn.relu(nn.Conv(layer.features, size, stride, padding, precision="highest", name=name)(x))


def _max_pool(x: jax.Array, ceil: bool) -> jax.Array:
  """Pools as torch; with `ceil`, the last window may reach beyond the image by a pixel."""
  padding = [(0, (n - 3) % 2 if ceil else 0) for n in x.shape[1:3]]
  return nn.max_pool(x, (3, 3), (2, 2), padding)
