"""Attention in chunks of queries, with a backward pass that recomputes the weights.

The backward pass needs only the logarithm of each row's sum (Dao et al. 2022, arXiv 2205.14135):
memory is linear in the number of tokens, and the scores of a chunk stay in a CPU's cache.
"""
# Shapes: B batch, b = B or 1 batch of keys, L queries, M keys, H heads, D features of a head;
# G = b H groups, g of them at a time, n queries of a chunk.

import functools

import jax
import jax.numpy as jnp

# Scores of a chunk, 4 MB of float32. With 16 MB gradients take up to 1.5 times as long on a CPU.
CHUNK = 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, chunk: int | None = None
) -> jax.Array:
  """Computes attention [B, L, H, D] of query [B, L, H, D] over key and value [b, M, H, D].

  Args:
    chunk: scores that are computed at a time, at most; default: CHUNK.
  """
  return _forward(query, key, value, chunk)[0]


def _forward(query, key, value, chunk: int | None):
  folded = _fold(query, key)
  n, g = _sizes(query, key, chunk)
  arrays = tuple(_group(x, g) for x in (folded, key, value))
  y, log_total = _map(lambda xs: _group_forward(n, *xs), arrays)
  return _ungroup(y, folded).reshape(query.shape), log_total


def _forward_rule(query, key, value, chunk: int | None):
  y, log_total = _forward(query, key, value, chunk)
  return y, (query, key, value, y, log_total)


def _backward_rule(chunk: int | None, residuals, dy: jax.Array):
  query, key, value, y, log_total = residuals
  n, g = _sizes(query, key, chunk)
  folded = _fold(query, key)
  # delta: the row sums of dS ∘ P in closed form.
  delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)
  queries = tuple(_group(_fold(x, key), g) for x in (query, dy, delta))
  arrays = *queries, log_total, _group(key, g), _group(value, g)
  dquery, dkey, dvalue = _map(lambda xs: _group_backward(n, *xs), arrays)
  dquery = _ungroup(dquery, folded).reshape(query.shape)
  return dquery, _ungroup(dkey, key), _ungroup(dvalue, value)


chunked_attention.defvjp(_forward_rule, _backward_rule)


def _sizes(query: jax.Array, key: jax.Array, chunk: int | None) -> tuple[int, int]:
  """Returns the queries of a chunk and the groups that are taken at once."""
  most, G, M = chunk or CHUNK, len(key) * key.shape[2], key.shape[1]
  n = _divisor(query.size // (G * key.shape[3]), most // M)
  return n, _divisor(G, most // (n * M))


def _divisor(number: int, most: int) -> int:
  """Returns the largest divisor that is at most `most`, and at least 1."""
  return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(1, most))


def _fold(x: jax.Array, key: jax.Array) -> jax.Array:
  """Joins the tokens of images that share keys: [B, L, H, D] -> [b, B L / b, H, D]."""
  return x.reshape(len(key), -1, *x.shape[2:])


def _group(x: jax.Array, g: int) -> jax.Array:
  """[b, L, H, D] -> [G / g, g, L, D]."""
  return x.swapaxes(1, 2).reshape(-1, g, x.shape[1], x.shape[3])


def _ungroup(x: jax.Array, like: jax.Array) -> jax.Array:
  return x.reshape(like.shape[0], like.shape[2], -1, like.shape[3]).swapaxes(1, 2)


def _map(function, xs):
  """Computes `jax.lax.map`, without a loop over a single element."""
  if jax.tree.leaves(xs)[0].shape[0] > 1:
    return jax.lax.map(function, xs)
  return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda x: x[0], xs)))


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _transpose(x: jax.Array) -> jax.Array:
  """[g, M, D] -> [g, D, M]. On a CPU thin products are up to four times as fast with keys last."""
  return jax.lax.optimization_barrier(x).swapaxes(1, 2)  # XLA would make it part of the product


def _scores(query: jax.Array, transposed_key: jax.Array) -> jax.Array:
  return _einsum("gnd,gdm->gnm", query * query.shape[-1] ** -0.5, transposed_key)


def _split(x: jax.Array, n: int) -> jax.Array:
  """[g, L, D] -> [L / n, g, n, D]."""
  return x.reshape(x.shape[0], -1, n, x.shape[-1]).swapaxes(0, 1)


def _join(x: jax.Array) -> jax.Array:
  """[L / n, g, n, D] -> [g, L, D]."""
  return x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1])


def _group_forward(n: int, query: jax.Array, key: jax.Array, value: jax.Array):
  """Returns attention [g, L, D] over [g, M, D] and the logarithms of the row sums [g, L, 1]."""
  transposed_key = _transpose(key)

  def one_chunk(q: jax.Array):
    scores = _scores(q, transposed_key)
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    y = _einsum("gnm,gmd->gnd", weights.astype(value.dtype), value)
    return (y / total).astype(query.dtype), highest + jnp.log(total)

  return tuple(map(_join, _map(one_chunk, _split(query, n))))


def _group_backward(n: int, query, dy, delta, log_total, key, value):
  """Returns the gradients [g, L, D], [g, M, D] and [g, M, D] of query, key and value."""
  transposed_key, transposed_value = _transpose(key), _transpose(value)

  def one_chunk(xs):
    q, dy, delta, log_total = xs
    weights = jnp.exp(_scores(q, transposed_key) - log_total)
    dvalue = _einsum("gnd,gnm->gdm", dy, weights.astype(dy.dtype))
    dscores = weights * (_einsum("gnd,gdm->gnm", dy, transposed_value) - delta)
    dscores = (dscores * query.shape[-1] ** -0.5).astype(query.dtype)
    dkey = _einsum("gnd,gnm->gdm", q, dscores)
    return (dkey, dvalue), _einsum("gnm,gmd->gnd", dscores, key).astype(query.dtype)

  chunks = tuple(_split(x, n) for x in (query, dy, delta, log_total))
  if len(chunks[0]) == 1:
    transposed, dquery = one_chunk(jax.tree.map(lambda x: x[0], chunks))
    dquery = dquery[None]
  else:

    def add(carry, xs):
      one, dquery = one_chunk(xs)
      return jax.tree.map(jnp.add, carry, one), dquery

    zeros = (jnp.zeros(transposed_key.shape, jnp.float32),) * 2
    transposed, dquery = jax.lax.scan(add, zeros, chunks)
  dkey, dvalue = map(_transpose, transposed)
  return _join(dquery), dkey.astype(key.dtype), dvalue.astype(value.dtype)
