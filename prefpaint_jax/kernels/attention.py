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

from prefpaint_jax.kernels.chunked_attention import _backward, _forward, _in_blocks
from prefpaint_jax.kernels.dispatch import by_platform

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
