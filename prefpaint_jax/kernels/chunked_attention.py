"""Attention in chunks of queries, with a backward pass that recomputes the weights."""

import functools

import jax
import jax.numpy as jnp

# Scores of a block: 4 MB of float32. A CPU's gradients take up to 1.5 times as long with four times
# as many, and no less time with fewer.
BLOCK = 2**20


def _fold(x: jax.Array, key: jax.Array) -> jax.Array:
  """[B, L, H, D] with the pictures that share keys, one below the other."""
  return x.reshape(len(key), -1, *x.shape[2:])


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
