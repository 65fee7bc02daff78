"""Attention in blocks against the plain formula, torch, and its own gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from prefpaint_jax.kernels import attention as module
from prefpaint_jax.kernels import chunked_attention
from prefpaint_jax.kernels.attention import attention
from prefpaint_jax.runtime.compilation import fast_jit

# One block; several of queries; several of heads; both, with another number of keys; one query.
SIZES = [(2, 8, 8, 3, 4), (2, 32, 32, 2, 4), (3, 8, 16, 4, 4), (2, 24, 10, 3, 5), (1, 1, 7, 2, 8)]


def arrays(sizes, dtype=np.float32):
  B, L, M, H, D = sizes
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(B, n, H, D)), dtype) for n in (L, M, M)]


def value_and_gradients(function, xs):
  weight = jnp.cos(jnp.arange(xs[0].size, dtype=jnp.float32)).reshape(xs[0].shape)
  loss = lambda xs: (function(*xs).astype(jnp.float32) * weight).sum()
  return jax.jit(function)(*xs), jax.jit(jax.grad(loss))(xs)


@pytest.mark.parametrize("block", [16, 256, 2**21])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_blocks_give_what_the_plain_formula_gives(sizes, block, monkeypatch):
  monkeypatch.setattr(chunked_attention, "BLOCK", block)
  xs = arrays(sizes)
  ours = value_and_gradients(attention, xs)
  plain = value_and_gradients(jax.nn.dot_product_attention, xs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours, plain)


@pytest.mark.parametrize("block", [16, 2**21])
def test_keys_of_one_text_serve_all_pictures(block, monkeypatch):
  monkeypatch.setattr(chunked_attention, "BLOCK", block)
  query, key, value = arrays((3, 8, 16, 4, 4))

  def plain(query, key, value):
    key, value = (jnp.broadcast_to(x, (3, *x.shape[1:])) for x in (key, value))
    return jax.nn.dot_product_attention(query, key, value)

  xs = query, key[:1], value[:1]
  expected = value_and_gradients(plain, xs)
  for function in (attention, module._on_tpu, module._on_gpu):
    ours = value_and_gradients(function, xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), ours, expected)


def test_a_cpu_makes_one_kernel_of_it():
  text = fast_jit()(attention).lower(*arrays((2, 256, 256, 8, 24))).compile().as_text()
  assert text.count("kind=kCustom") == 1


def test_attention_equals_torch(monkeypatch):
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  monkeypatch.setattr(chunked_attention, "BLOCK", 64)
  xs = arrays((2, 32, 16, 4, 8))
  theirs = torch.nn.functional.scaled_dot_product_attention(
    *(torch.tensor(np.asarray(x)).transpose(1, 2) for x in xs)
  )
  np.testing.assert_allclose(attention(*xs), theirs.transpose(1, 2).numpy(), atol=2e-6)


@pytest.mark.parametrize("block", [64, 2**21])
def test_bfloat16_is_as_near_to_the_truth_as_the_plain_formula(block, monkeypatch):
  monkeypatch.setattr(chunked_attention, "BLOCK", block)
  xs = arrays((2, 32, 32, 2, 8), jnp.bfloat16)
  truth = value_and_gradients(attention, [x.astype(jnp.float32) for x in xs])
  ours = value_and_gradients(attention, xs)
  plain = value_and_gradients(jax.nn.dot_product_attention, xs)
  assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype(jnp.bfloat16)}
  for exact, a, b in zip(*map(jax.tree.leaves, (truth, ours, plain)), strict=True):
    error = lambda x, exact=exact: float(jnp.abs(x.astype(jnp.float32) - exact).mean())
    assert error(a) < 1.3 * error(b) + 1e-6


def test_scores_of_all_tokens_are_nowhere():
  L = 4096
  xs = [jax.ShapeDtypeStruct((1, L, 1, 8), jnp.float32)] * 3
  gradient = jax.jit(jax.grad(lambda xs: attention(*xs).sum()))
  assert f"f32[1,{L},{L}]" not in gradient.lower(xs).compile().as_text()
  plain = jax.jit(jax.grad(lambda xs: jax.nn.dot_product_attention(*xs).sum()))
  assert f"{L},{L}]" in plain.lower(xs).compile().as_text()


def test_kernel_for_tpus_gives_what_the_plain_formula_gives(monkeypatch):
  monkeypatch.setattr(module, "FLASH", 128)
  xs = arrays((1, 256, 384, 2, 40), jnp.bfloat16)
  exact = value_and_gradients(jax.nn.dot_product_attention, [x.astype(jnp.float32) for x in xs])
  plain = value_and_gradients(jax.nn.dot_product_attention, xs)
  with pltpu.force_tpu_interpret_mode():
    ours = value_and_gradients(module._flash, xs)
  for truth, a, b in zip(*map(jax.tree.leaves, (exact, ours, plain)), strict=True):
    error = lambda x, truth=truth: float(jnp.abs(x.astype(jnp.float32) - truth).mean())
    assert error(a) < 1.3 * error(b)


@pytest.mark.parametrize(
  "L, M, dtype, expected",
  [
    (1024, 1024, jnp.bfloat16, True),
    (1024, 77, jnp.bfloat16, False),
    (256, 256, jnp.bfloat16, False),
    (1024, 1024, jnp.float32, False),
  ],
)
def test_kernel_is_for_many_tokens_on_tpus(L, M, dtype, expected):
  xs = [jax.ShapeDtypeStruct((1, n, 2, 40), dtype) for n in (L, M, M)]
  gradient = jax.grad(lambda *xs: attention(*xs).astype(jnp.float32).sum(), argnums=(0, 1, 2))

  def has_kernel(function, platform) -> bool:
    text = jax.jit(function).trace(*xs).lower(lowering_platforms=(platform,)).as_text()
    return "tpu_custom_call" in text

  for function in (attention, gradient):
    assert has_kernel(function, "tpu") == expected
    assert not has_kernel(function, "cpu")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("M, loops", [(77, False), (512, False), (1000, True)])
def test_few_keys_are_not_taken_in_blocks_on_accelerators(M, loops, platform):
  xs = [jax.ShapeDtypeStruct((4, n, 8, 40), jnp.float32) for n in (4096, M, M)]
  gradient = jax.grad(lambda *xs: attention(*xs).sum(), argnums=(0, 1, 2))
  for function in (attention, gradient):
    lowered = jax.jit(function).trace(*xs).lower(lowering_platforms=(platform,))
    assert ("stablehlo.while" in lowered.as_text()) == loops


def test_gradients_beside_the_kernel_are_those_of_blocks():
  xs = arrays((1, 512, 512, 1, 8), jnp.bfloat16)
  through, blocks = (value_and_gradients(f, xs) for f in (attention, chunked_attention._in_blocks))
  jax.tree.map(np.testing.assert_array_equal, through, blocks)


@pytest.mark.parametrize("keys", [77, 78])
def test_cudnn_is_asked_for_no_more_than_it_takes_gradients_of(keys, monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)  # as if it were here
  query, key = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 64, 8, 40), (1, keys, 8, 40))
  )
  loss = lambda *xs: module._by_cudnn(*xs).astype(jnp.float32).sum()
  found = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), query, key, key)
  assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (query, key, key)]


@pytest.mark.parametrize("keys", [7, 8])
def test_a_key_that_is_not_looked_at_changes_nothing(keys, monkeypatch):
  """With the plain formula in cuDNN's place, which takes the same arguments."""
  plain = functools.partial(jax.nn.dot_product_attention, implementation="xla")
  monkeypatch.setattr(module, "_cudnn", plain)
  query, key, value = arrays((3, 8, keys, 4, 8))
  xs = query, key[:1], value[:1]
  shared = lambda q, *kv: plain(q, *(jnp.broadcast_to(x, (3, *x.shape[1:])) for x in kv))
  ours, expected = (value_and_gradients(f, xs) for f in (module._by_cudnn, shared))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), ours, expected)
