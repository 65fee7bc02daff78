"""Every implementation of attention against the reference, torch, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

from prefpaint_jax.kernels import attention as module
from prefpaint_jax.kernels import chunked_attention as chunks
from prefpaint_jax.kernels.attention import IMPLEMENTATIONS, attention
from prefpaint_jax.kernels.chunked_attention import chunked_attention
from prefpaint_jax.kernels.dispatch import traced_for
from prefpaint_jax.runtime.compilation import fast_jit

pytestmark = pytest.mark.usefixtures("quick_compilation")

# B, L, M, H, D: one chunk; several of queries; several of heads; both, with another number of keys;
# one query.
SIZES = [(2, 8, 8, 3, 4), (2, 32, 32, 2, 4), (3, 8, 16, 4, 4), (2, 24, 10, 3, 5), (1, 1, 7, 2, 8)]


def arrays(sizes, dtype=np.float32):
  B, L, M, H, D = sizes
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(B, n, H, D)), dtype) for n in (L, M, M)]


def value_and_gradients(function, xs):
  def both(*xs):
    y, back = jax.vjp(function, *xs)
    weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return y, back(weight.astype(y.dtype))

  return jax.jit(both)(*xs)


@functools.cache
def expected(sizes, dtype=np.float32):
  return value_and_gradients(module.reference, arrays(sizes, dtype))


def assert_as_exact_as_the_reference(function, sizes) -> None:
  """In bfloat16: the error against float32 is at most 1.3 times the reference's."""
  xs = arrays(sizes, jnp.bfloat16)
  exact = value_and_gradients(module.reference, [x.astype(jnp.float32) for x in xs])
  ours, reference = value_and_gradients(function, xs), expected(sizes, jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(ours)} == {xs[0].dtype}
  for truth, a, b in zip(*map(jax.tree.leaves, (exact, ours, reference)), strict=True):
    error = lambda x, truth=truth: float(jnp.abs(x.astype(jnp.float32) - truth).mean())
    assert error(a) < 1.3 * error(b) + 1e-6


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("name, chunk", [("cpu", 16), ("cpu", 2**20), ("cuda", 16), ("tpu", 16)])
def test_implementation_equals_the_reference(name, chunk, sizes, monkeypatch):
  assert set(IMPLEMENTATIONS) == {"reference", "cpu", "cuda", "tpu"}
  monkeypatch.setattr(chunks, "CHUNK", chunk)
  monkeypatch.setattr(module, "GPU_CHUNK", chunk)
  monkeypatch.setattr(module, "FLASH", 9)  # more keys take the way of many tokens
  ours = value_and_gradients(IMPLEMENTATIONS[name], arrays(sizes))
  check = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6)
  jax.tree.map(check, ours, expected(sizes))


@pytest.mark.parametrize("name", ["cpu", "cuda", "tpu"])
def test_implementation_is_as_exact_as_the_reference_in_bfloat16(name, monkeypatch):
  monkeypatch.setattr(chunks, "CHUNK", 64)
  monkeypatch.setattr(module, "GPU_CHUNK", 64)
  monkeypatch.setattr(module, "FLASH", 9)
  assert_as_exact_as_the_reference(IMPLEMENTATIONS[name], (2, 24, 10, 3, 5))


@pytest.mark.parametrize("chunk", [16, 2**20])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_keys_of_one_text_serve_all_images(name, chunk, monkeypatch):
  monkeypatch.setattr(chunks, "CHUNK", chunk)
  query, key, value = arrays((3, 8, 16, 4, 4))
  repeated = lambda q, *kv: module.reference(q, *(jnp.repeat(x, 3, axis=0) for x in kv))
  xs = query, key[:1], value[:1]
  ours, theirs = (value_and_gradients(f, xs) for f in (IMPLEMENTATIONS[name], repeated))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), ours, theirs)


def test_attention_equals_torch(monkeypatch):
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  monkeypatch.setattr(chunks, "CHUNK", 64)
  xs = arrays((2, 32, 16, 4, 8))
  theirs = torch.nn.functional.scaled_dot_product_attention(
    *(torch.tensor(np.asarray(x)).transpose(1, 2) for x in xs)
  )
  np.testing.assert_allclose(attention(*xs), theirs.transpose(1, 2).numpy(), atol=2e-6)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older XLA makes slower programs of it")
def test_xla_makes_one_kernel_of_it_on_a_cpu():
  jit = fast_jit(Mesh(jax.local_devices()[:1], "one"))
  text = jit(attention).lower(*arrays((2, 256, 256, 8, 24))).compile().as_text()
  assert text.count("kind=kCustom") == 1


def test_chunks_never_hold_the_scores_of_all_tokens():
  L = 4096
  xs = [jax.ShapeDtypeStruct((1, L, 1, 8), jnp.float32)] * 3
  gradient = lambda function: jax.jit(jax.grad(lambda xs: function(*xs).sum()))
  assert f"f32[1,{L},{L}]" not in gradient(chunked_attention).lower(xs).compile().as_text()
  assert f"{L},{L}]" in gradient(module.reference).lower(xs).compile().as_text()


@pytest.mark.slow
def test_flash_attention_in_interpret_mode_equals_the_reference(monkeypatch):
  monkeypatch.setattr(module, "FLASH", 128)
  with pltpu.force_tpu_interpret_mode():
    assert_as_exact_as_the_reference(module.flash, (1, 256, 384, 2, 40))


def lowered(function, platform: str, xs) -> str:
  lowering = "cuda" if platform == "cuda" else platform
  traced = jax.jit(traced_for(platform, function)).trace(*xs)
  return traced.lower(lowering_platforms=(lowering,)).as_text()


def gradient(*xs):
  return jax.grad(lambda *xs: attention(*xs).astype(jnp.float32).sum(), argnums=(0, 1, 2))(*xs)


@pytest.mark.parametrize(
  "L, M, dtype, expected",
  [
    (1024, 1024, jnp.bfloat16, True),
    (1024, 77, jnp.bfloat16, False),
    (256, 256, jnp.bfloat16, False),
    (1024, 1024, jnp.float32, False),
  ],
)
def test_tpus_take_the_flash_kernel_for_many_tokens(L, M, dtype, expected):
  xs = [jax.ShapeDtypeStruct((1, n, 2, 40), dtype) for n in (L, M, M)]
  for function in (attention, gradient):
    assert ("tpu_custom_call" in lowered(function, "tpu", xs)) == expected
    assert "tpu_custom_call" not in lowered(function, "cpu", xs)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("M, loops", [(77, False), (512, False), (1000, True)])
def test_accelerators_do_not_chunk_few_keys(M, loops, platform):
  xs = [jax.ShapeDtypeStruct((4, n, 8, 40), jnp.float32) for n in (4096, M, M)]
  for function in (attention, gradient):
    assert ("stablehlo.while" in lowered(function, platform, xs)) == loops


@pytest.mark.parametrize("keys", [77, 78])
def test_cudnn_is_given_shapes_that_it_has_gradients_for(keys, monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo

  # As if cuDNN were installed; shapes are checked, nothing is computed.
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  query, key = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 64, 8, 40), (1, keys, 8, 40))
  )
  loss = lambda *xs: module.cudnn(*xs).astype(jnp.float32).sum()
  found = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), query, key, key)
  assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (query, key, key)]


@pytest.mark.parametrize("keys", [7, 8])
def test_the_padded_key_changes_nothing(keys, monkeypatch):
  """XLA's attention takes the place of cuDNN's: it has the same arguments."""
  xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")
  monkeypatch.setattr(module, "_cudnn", xla)
  query, key, value = arrays((3, 8, keys, 4, 8))
  xs = query, key[:1], value[:1]
  ours, theirs = (value_and_gradients(f, xs) for f in (module.cudnn, module.reference))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), ours, theirs)
