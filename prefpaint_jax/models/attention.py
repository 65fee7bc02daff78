"""Scaled dot-product attention that never holds the whole matrix of scores.

Queries are taken in blocks and, backwards, their weights are computed again from the logarithm of
each row's sum (Dao et al. 2022, arXiv 2205.14135): memory is linear in the number of tokens, and a
block's scores stay in a cache. On NVIDIA GPUs cuDNN's kernel does the same where it can, on TPUs
Pallas's for many tokens: not every TPU's compiler keeps scores out of the memory. Over few keys,
as those of a text, both are else given the plain formula.
Shapes: B batch, L queries, M keys, H heads, D features of a head, G = B H, n queries of a block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from prefpaint_jax.compilation import by_platform

# Scores of a block: 4 MB of float32. A CPU's gradients take up to 1.5 times as long with four times
# as many, and no less time with fewer.
BLOCK = 2**20
GPU_BLOCK = 2**26  # 256 MB: a GPU would wait for itself between small ones
FLASH = 512  # queries and keys of a block of Pallas's kernel


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """softmax(Q Kᵀ / √D) V of query [B, L, H, D] over key and value [B or 1, M, H, D].

  Sums are in float32.
  """
  D, half = query.shape[-1], query.dtype in (jnp.bfloat16, jnp.float16)
  if half and D % 8 == 0 and D <= 128 and _has_cudnn():
    return by_platform(query, key, value, cuda=_by_cudnn, default=_attend)
  return _attend(query, key, value)


_cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


@functools.cache
def _has_cudnn() -> bool:
  """Whether programs may be for GPUs, here or, in a plan, elsewhere, that have the kernel."""
  x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
  try:
    jax.eval_shape(_cudnn, x, x, x)
  except RuntimeError:  # JAX's plugin for CUDA is not installed
    return False
  gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
  return all(float(device.compute_capability) >= 8 for device in gpus)


def _by_cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  key, value = _for_each(query, key, value)
  M = key.shape[1]
  if M % 2 == 0:
    return _cudnn(query, key, value)
  # JAX refuses gradients for an odd number of keys, as a text's 77: one more that is not looked at.
  key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (key, value))
  return _cudnn(query, key, value, key_value_seq_lengths=jnp.full(len(query), M, jnp.int32))


def _fold(x: jax.Array, key: jax.Array) -> jax.Array:
  """[B, L, H, D] with the pictures that share keys, one below the other."""
  return x.reshape(len(key), -1, *x.shape[2:])


@jax.custom_vjp
def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  return by_platform(query, key, value, tpu=_on_tpu, cuda=_on_gpu, default=_in_blocks)


def _attend_forward(*arrays: jax.Array):
  _, log_total = jax.eval_shape(_forward, *arrays)
  unused = lambda function: lambda *xs: (function(*xs), jnp.zeros_like(log_total))
  y, log_total = by_platform(*arrays, tpu=unused(_on_tpu), cuda=unused(_on_gpu), default=_forward)
  return y, (*arrays, y, log_total)


def _attend_backward(residuals: tuple[jax.Array, ...], dy: jax.Array):
  of = lambda function: lambda q, k, v, y, log_total, dy: jax.vjp(function, q, k, v)[1](dy)
  return by_platform(*residuals, dy, tpu=of(_on_tpu), cuda=of(_on_gpu), default=_backward)


_attend.defvjp(_attend_forward, _attend_backward)


def _on_tpu(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  half = query.dtype in (jnp.bfloat16, jnp.float16)
  L, M = query.shape[1], key.shape[1]
  if half and L % FLASH == M % FLASH == 0:
    return _flash(query, *_for_each(query, key, value))
  return _without_kernel(query, key, value)


def _on_gpu(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  return _without_kernel(query, key, value, GPU_BLOCK)


def _without_kernel(query, key, value, block: int | None = None) -> jax.Array:
  if key.shape[1] <= FLASH:  # few scores: blocks would cost more, in layouts turned around
    return jax.nn.dot_product_attention(query, *_for_each(query, key, value))
  return _in_blocks(query, key, value, block)


def _for_each(query: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
  """Keys and values for every picture, where one serves all."""
  return [jnp.broadcast_to(x, (len(query), *x.shape[1:])) for x in arrays]


def _flash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  from jax.experimental.pallas.ops.tpu import flash_attention  # only where it is needed

  blocks = {field.name: FLASH for field in dataclasses.fields(flash_attention.BlockSizes)}
  y = flash_attention.flash_attention(
    *(x.swapaxes(1, 2) for x in (query, key, value)),
    sm_scale=query.shape[-1] ** -0.5,
    block_sizes=flash_attention.BlockSizes(**blocks | {"block_b": 1}),
  )
  return y.swapaxes(1, 2)


### In blocks.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_blocks(query, key, value, block: int | None = None) -> jax.Array:
  """Of at most `block` scores, or else `BLOCK`."""
  return _forward(query, key, value, block)[0]


def _sizes(query: jax.Array, key: jax.Array, block: int | None) -> tuple[int, int]:
  """Queries of a block, and heads that are taken at once."""
  most, G, M = block or BLOCK, len(key) * key.shape[2], key.shape[1]
  n = _divisor(query.size // (G * key.shape[3]), most // M)
  return n, _divisor(G, most // (n * M))


def _group(x: jax.Array, g: int) -> jax.Array:
  """[B, L, H, D] -> [G / g, g, L, D]."""
  return x.swapaxes(1, 2).reshape(-1, g, x.shape[1], x.shape[3])


def _ungroup(x: jax.Array, like: jax.Array) -> jax.Array:
  return x.reshape(like.shape[0], like.shape[2], -1, like.shape[3]).swapaxes(1, 2)


def _forward(query: jax.Array, key: jax.Array, value: jax.Array, block: int | None = None):
  folded = _fold(query, key)
  n, g = _sizes(query, key, block)
  arrays = tuple(_group(x, g) for x in (folded, key, value))
  y, log_total = _map(lambda xs: _group_forward(n, *xs), arrays)
  return _ungroup(y, folded).reshape(query.shape), log_total


def _backward(query, key, value, y, log_total, dy, block: int | None = None):
  n, g = _sizes(query, key, block)
  folded = _fold(query, key)
  # Row sums of dS ∘ P in closed form.
  delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)
  queries = tuple(_group(_fold(x, key), g) for x in (query, dy, delta))
  arrays = *queries, log_total, _group(key, g), _group(value, g)
  dquery, dkey, dvalue = _map(lambda xs: _group_backward(n, *xs), arrays)
  dquery = _ungroup(dquery, folded).reshape(query.shape)
  return dquery, _ungroup(dkey, key), _ungroup(dvalue, value)


def _in_blocks_forward(query, key, value, block: int | None):
  y, log_total = _forward(query, key, value, block)
  return y, (query, key, value, y, log_total)


_in_blocks.defvjp(_in_blocks_forward, lambda block, residuals, dy: _backward(*residuals, dy, block))


def _divisor(number: int, most: int) -> int:
  """The largest one that is at most `most`; 1 in any case."""
  return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(1, most))


def _map(function, xs):
  """`jax.lax.map`, without a loop where there is one to map over."""
  if jax.tree.leaves(xs)[0].shape[0] > 1:
    return jax.lax.map(function, xs)
  return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda x: x[0], xs)))


# On a CPU products of thin matrices are up to four times as fast with keys along the last axis.
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _turn(x: jax.Array) -> jax.Array:
  """[g, M, D] -> [g, D, M], and not by way of another product, as XLA would have it."""
  return jax.lax.optimization_barrier(x).swapaxes(1, 2)


def _scores(query: jax.Array, turned_key: jax.Array) -> jax.Array:
  return _einsum("gnd,gdm->gnm", query * query.shape[-1] ** -0.5, turned_key)


def _split(x: jax.Array, n: int) -> jax.Array:
  """[g, L, D] -> [L / n, g, n, D]."""
  return x.reshape(x.shape[0], -1, n, x.shape[-1]).swapaxes(0, 1)


def _join(x: jax.Array) -> jax.Array:
  return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])


def _group_forward(n: int, query: jax.Array, key: jax.Array, value: jax.Array):
  """[g, L, D] over [g, M, D], n queries of every head at a time; and the logarithms of the sums."""
  turned_key = _turn(key)

  def block(q: jax.Array):
    scores = _scores(q, turned_key)
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    y = _einsum("gnm,gmd->gnd", weights.astype(value.dtype), value)
    return (y / total).astype(query.dtype), highest + jnp.log(total)

  return tuple(map(_join, _map(block, _split(query, n))))


def _group_backward(n: int, query, dy, delta, log_total, key, value):
  turned_key, turned_value = _turn(key), _turn(value)

  def block(xs):
    q, dy, delta, log_total = xs
    weights = jnp.exp(_scores(q, turned_key) - log_total)
    dvalue = _einsum("gnd,gnm->gdm", dy, weights.astype(dy.dtype))
    dscores = weights * (_einsum("gnd,gdm->gnm", dy, turned_value) - delta)
    dscores = (dscores * query.shape[-1] ** -0.5).astype(query.dtype)
    dkey = _einsum("gnd,gnm->gdm", q, dscores)
    return (dkey, dvalue), _einsum("gnm,gmd->gnd", dscores, key).astype(query.dtype)

  blocks = tuple(_split(x, n) for x in (query, dy, delta, log_total))
  if len(blocks[0]) == 1:
    turned, dquery = block(jax.tree.map(lambda x: x[0], blocks))
    dquery = dquery[None]
  else:

    def add(carry, xs):
      one, dquery = block(xs)
      return jax.tree.map(jnp.add, carry, one), dquery

    zeros = (jnp.zeros(turned_key.shape, jnp.float32),) * 2
    turned, dquery = jax.lax.scan(add, zeros, blocks)
  dkey, dvalue = map(_turn, turned)
  return _join(dquery), dkey.astype(key.dtype), dvalue.astype(value.dtype)
