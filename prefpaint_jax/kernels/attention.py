"""Scaled dot-product attention: cuDNN's kernel, Pallas's flash attention, or chunks of queries.

No implementation holds the scores of many tokens at once. Over few keys, such as those of a text,
the formula itself is the fastest on accelerators.
"""
# Shapes: B batch, b = B or 1, L queries, M keys, H heads, D features of a head.

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prefpaint_jax.kernels.chunked_attention import chunked_attention
from prefpaint_jax.kernels.dispatch import dispatch

FLASH = 512  # queries and keys of a block of the flash kernel; below it the formula is used
GPU_CHUNK = 2**26  # scores of a chunk on a GPU, 256 MB: smaller chunks leave it idle between them


def attention(
  query: Float[Array | np.ndarray, "B L H D"],
  key: Float[Array | np.ndarray, "b M H D"],
  value: Float[Array | np.ndarray, "b M H D"],
) -> Float[Array, "B L H D"]:
  """Computes softmax(Q Kᵀ / √D) V; sums are float32.

  Keys and values of batch size 1 serve all queries.
  """
  return dispatch(IMPLEMENTATIONS, query, key, value)


def reference(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """softmax(Q Kᵀ / √D) V, as `jax.nn.dot_product_attention` defines it."""
  key, value = _broadcast(query, key, value)
  return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def cuda(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """cuDNN's kernel where it takes these arrays, else the formula or large chunks."""
  D, is_half = query.shape[-1], query.dtype in (jnp.bfloat16, jnp.float16)
  if is_half and D % 8 == 0 and D <= 128 and has_cudnn():
    return cudnn(query, key, value)
  if key.shape[1] <= FLASH:
    return reference(query, key, value)
  return chunked_attention(query, key, value, GPU_CHUNK)


def tpu(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Pallas's flash attention where the tokens fill its blocks, else the formula or chunks."""
  is_half = query.dtype in (jnp.bfloat16, jnp.float16)
  if is_half and query.shape[1] % FLASH == key.shape[1] % FLASH == 0:
    return flash(query, key, value)
  if key.shape[1] <= FLASH:
    return reference(query, key, value)
  return chunked_attention(query, key, value)


IMPLEMENTATIONS = {"reference": reference, "cpu": chunked_attention, "cuda": cuda, "tpu": tpu}


_cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


@functools.cache
def has_cudnn() -> bool:
  """Whether JAX's CUDA plugin is installed and every local GPU has cuDNN's kernel."""
  x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
  try:
    jax.eval_shape(_cudnn, x, x, x)
  except RuntimeError:  # no plugin
    return False
  gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
  return all(float(device.compute_capability) >= 8 for device in gpus)


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Computes attention with cuDNN's kernel, for half precision and up to 128 features per head."""
  key, value = _broadcast(query, key, value)
  M = key.shape[1]
  if M % 2 == 0:
    return _cudnn(query, key, value)
  # JAX refuses gradients for an odd number of keys, such as a text's 77: add one masked key.
  key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (key, value))
  return _cudnn(query, key, value, key_value_seq_lengths=jnp.full(len(query), M, jnp.int32))


def flash(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Computes attention with Pallas's flash kernel for TPUs; L and M are multiples of FLASH."""
  from jax.experimental.pallas.ops.tpu import flash_attention  # slow to import

  blocks = {field.name: FLASH for field in dataclasses.fields(flash_attention.BlockSizes)}
  y = flash_attention.flash_attention(
    *(x.swapaxes(1, 2) for x in (query, *_broadcast(query, key, value))),
    sm_scale=query.shape[-1] ** -0.5,
    block_sizes=flash_attention.BlockSizes(**blocks | {"block_b": 1}),
  )
  return y.swapaxes(1, 2)


def _broadcast(query: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
  """Repeats keys and values that serve all queries."""
  return [jnp.broadcast_to(x, (len(query), *x.shape[1:])) for x in arrays]
