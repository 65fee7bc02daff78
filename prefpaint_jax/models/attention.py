"""Scaled dot-product attention that never holds the whole matrix of scores.

Queries are taken in blocks and, backwards, their weights are computed again from the logarithm of
each row's sum (Dao et al. 2022, arXiv 2205.14135): memory is linear in the number of tokens, and a
block's scores stay in a cache. On NVIDIA GPUs cuDNN's kernel does the same where it can, on TPUs
Pallas's for many tokens: not every TPU's compiler keeps scores out of the memory.
Shapes: B batch, L queries, M keys, H heads, D features of a head, G = B H, n queries of a block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

# Scores of a block: 16 MB of float32. A CPU is slower with more, and no faster with fewer.
BLOCK = 2**22
FLASH = 512  # queries and keys of a block of Pallas's kernel


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """softmax(Q Kᵀ / √D) V of query [B, L, H, D] over key and value [B, M, H, D]; sums in float32."""
  B, L, H, D = query.shape
  half = query.dtype in (jnp.bfloat16, jnp.float16)
  if jax.default_backend() == "gpu" and half and D % 8 == 0 and D <= 128:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
  suits = half and L % FLASH == key.shape[1] % FLASH == 0
  return (_by_kernel if suits else _in_blocks)(query, key, value)


@jax.custom_vjp
def _by_kernel(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  return jax.lax.platform_dependent(query, key, value, tpu=_flash, default=_in_blocks)


def _gradients(arrays: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
  of = lambda function: lambda dy, *arrays: jax.vjp(function, *arrays)[1](dy)
  return jax.lax.platform_dependent(dy, *arrays, tpu=of(_flash), default=of(_in_blocks))


_by_kernel.defvjp(lambda *arrays: (_by_kernel(*arrays), arrays), _gradients)


def _flash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  from jax.experimental.pallas.ops.tpu import flash_attention  # only where it is needed

  blocks = {field.name: FLASH for field in dataclasses.fields(flash_attention.BlockSizes)}
  y = flash_attention.flash_attention(
    *(x.swapaxes(1, 2) for x in (query, key, value)),
    sm_scale=query.shape[-1] ** -0.5,
    block_sizes=flash_attention.BlockSizes(**blocks | {"block_b": 1}),
  )
  return y.swapaxes(1, 2)


def _in_blocks(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  B, L, H, D = query.shape
  M = key.shape[1]
  n = _divisor(L, min(BLOCK // M, max(512, BLOCK // (M * B * H))))
  g = _divisor(B * H, BLOCK // (n * M))
  grouped = lambda x: x.swapaxes(1, 2).reshape(-1, g, x.shape[1], D)
  arrays = tuple(map(grouped, (query, key, value)))
  y = _map(lambda xs: _blocked(n, *xs), arrays)
  return y.reshape(B, H, L, D).swapaxes(1, 2)


def _divisor(number: int, most: int) -> int:
  """The largest one that is at most `most`; 1 in any case."""
  return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(1, most))


def _map(function, xs):
  """`jax.lax.map`, without a loop where there is one to map over."""
  if jax.tree.leaves(xs)[0].shape[0] > 1:
    return jax.lax.map(function, xs)
  return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda x: x[0], xs)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(n: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """[g, L, D] over [g, M, D], n queries of every head at a time."""
  return _forward(n, query, key, value)[0]


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


def _forward(n, query, key, value):
  turned_key = _turn(key)
  # A column of ones sums the weights in the product that has to be made anyway.
  extended = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)

  def block(q: jax.Array):
    scores = _scores(q, turned_key)
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - highest).astype(value.dtype)
    sums = _einsum("gnm,gmd->gnd", weights, extended)
    y, total = sums[..., :-1], sums[..., -1:]
    return (y / total).astype(query.dtype), highest + jnp.log(total)

  y, log_total = map(_join, _map(block, _split(query, n)))
  return y, (query, key, value, y, log_total)


def _backward(n, residuals, dy):
  query, key, value, y, log_total = residuals
  turned_key, turned_value = _turn(key), _turn(value)
  # Row sums of dS ∘ P in closed form.
  delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)

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


_blocked.defvjp(_forward, _backward)
