"""Convolution by a product is the convolution, with its gradients, and only where it pays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax.kernels.convolution import convolve, enlarge_and_convolve

LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def plain(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1))):
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, **LAYOUT)


def arrays(size, channels, side=3, dtype=np.float32, count=2):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(count, *size, channels)), rng.normal(size=(side, side, channels, 8))
  return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def value_and_gradients(function, *arguments):
  y, back = jax.vjp(function, *arguments)
  return y, back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


def products(function, *arguments) -> bool:
  return "platform_index" in str(jax.make_jaxpr(function)(*arguments))


@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("size", [(2, 2), (1, 3)])
def test_large_kernels_give_what_a_convolution_gives(size, side, monkeypatch):
  monkeypatch.setattr("prefpaint_jax.kernels.convolution.LARGE", 0)
  x, kernel = arrays(size, 64, side)
  pads = ((side // 2,) * 2,) * 2
  ours = lambda x, kernel: convolve(x, kernel, (1, 1), pads, **LAYOUT)
  assert products(ours, x, kernel)
  expected = value_and_gradients(lambda x, kernel: plain(x, kernel, padding=pads), x, kernel)
  got = jax.jit(lambda *xs: value_and_gradients(ours, *xs))(x, kernel)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_bfloat16_stays_bfloat16():
  x, kernel = arrays((2, 2), 64, dtype=jnp.bfloat16)
  ours = lambda x, kernel: convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), **LAYOUT)
  got = value_and_gradients(ours, x, kernel)
  assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
  wide = value_and_gradients(plain, x.astype(jnp.float32), kernel.astype(jnp.float32))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wide), strict=True):
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.02, atol=0.02 * jnp.abs(b).max())


OTHERS = {  # side of the kernel, size, strides, padding
  "large picture": (3, (8, 6), (1, 1), ((1, 1), (1, 1))),
  "single pixels": (1, (4, 4), (1, 1), ((0, 0), (0, 0))),
  "strides": (3, (8, 8), (2, 2), ((1, 1), (1, 1))),
  "strides, odd sides": (3, (7, 5), (2, 2), ((1, 1), (1, 1))),
  "padding behind": (3, (8, 7), (2, 2), ((0, 1), (0, 1))),
  "strides of single pixels": (1, (5, 5), (2, 2), "VALID"),
  "padding wider than the kernel": (1, (5, 4), (1, 1), ((1, 1), (1, 2))),
  "uneven padding": (3, (5, 4), (1, 1), ((0, 1), (0, 1))),
  "uneven strides": (5, (9, 8), (2, 1), "SAME"),
  "pixels left out": (3, (8, 8), (3, 3), "VALID"),
}


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("side, size, strides, padding", OTHERS.values(), ids=OTHERS)
def test_gradients_are_those_of_the_convolution(side, size, strides, padding, count, monkeypatch):
  if strides != (1, 1) or padding == ((0, 1), (0, 1)):  # never by products, however large
    monkeypatch.setattr("prefpaint_jax.kernels.convolution.LARGE", 0)
  x, kernel = arrays(size, 4, side, count=count)
  ours = lambda x, kernel: convolve(x, kernel, strides, padding, **LAYOUT)
  assert not products(ours, x, kernel)
  expected = value_and_gradients(lambda *xs: plain(*xs, strides, padding), x, kernel)
  got = value_and_gradients(ours, x, kernel)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize("options", [{"rhs_dilation": (2, 2)}, {"feature_group_count": 2}])
def test_what_is_not_plain_is_left_to_xla(options):
  x, kernel = arrays((8, 8), 4)
  kernel = kernel[:, :, : 4 // options.get("feature_group_count", 1)]
  pads = ((1, 1), (1, 1))
  expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, **LAYOUT, **options)
  np.testing.assert_array_equal(convolve(x, kernel, (1, 1), pads, **LAYOUT, **options), expected)


@pytest.mark.parametrize("side", [3, 5])
def test_few_features_by_products(side, monkeypatch):
  x, kernel = arrays((7, 10), 110, side)
  pads = ((side // 2,) * 2,) * 2
  ours = lambda x, kernel: convolve(x, kernel, (1, 1), pads, **LAYOUT)
  expected = value_and_gradients(lambda *xs: plain(*xs, padding=pads), x, kernel)
  program = jax.make_jaxpr(lambda *xs: value_and_gradients(ours, *xs))
  convolutions = lambda: str(program(x, kernel)).count("conv_general_dilated")
  assert products(ours, x, kernel)
  got = value_and_gradients(ours, x, kernel)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)
  by_products = convolutions()
  monkeypatch.setattr("prefpaint_jax.kernels.convolution.THIN", 0)
  jax.clear_caches()
  assert convolutions() > by_products


@pytest.mark.parametrize("size, side", [((2, 2), 3), ((8, 8), 3), ((8, 8), 1)])
def test_other_devices_are_given_the_convolution_alone(size, side):
  x, kernel = arrays(size, 64, side)
  pads = ((side // 2,) * 2,) * 2

  def text(function) -> str:
    program = jax.jit(lambda *xs: value_and_gradients(function, *xs)).trace(x, kernel)
    return program.lower(lowering_platforms=("tpu",)).as_text()

  ours = text(lambda *xs: convolve(*xs, (1, 1), pads, **LAYOUT))
  expected = text(lambda *xs: plain(*xs, padding=pads))
  for operation in ("convolution", "dot_general", "transpose", "reverse"):
    assert ours.count(f"stablehlo.{operation}") == expected.count(f"stablehlo.{operation}")


@pytest.mark.parametrize("size, folds", [((5, 4), True), ((1, 1), False)])
def test_convolution_of_an_enlarged_picture(size, folds):
  x, kernel = arrays(size, 6)
  enlarged = lambda x: jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
  expected = value_and_gradients(lambda x, kernel: plain(enlarged(x), kernel), x, kernel)
  got = value_and_gradients(enlarge_and_convolve, x, kernel)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)

  def is_folded(platform: str) -> bool:
    traced = jax.jit(enlarge_and_convolve).trace(x, kernel)
    return "tensor<2x2x6x8x" in traced.lower(lowering_platforms=(platform,)).as_text()

  assert is_folded("cpu") == folds
  assert not is_folded("tpu")
