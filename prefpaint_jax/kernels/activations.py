"""silu, gelu and the gated linear unit."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from prefpaint_jax.kernels.dispatch import by_platform


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
  """x / (1 + exp(−x)).

  On a CPU as this quotient: its compiler computes a last product again for everyone who reads it.
  """
  quotient = lambda x: x / (1.0 + jnp.exp(-x))
  return by_platform(x, cpu=quotient, default=nn.silu)


def _silu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
  share = nn.sigmoid(x)
  return (dy * (share * (1.0 + x * (1.0 - share))),)


silu.defvjp(lambda x: (silu(x), x), _silu_backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
  """Φ(x), by erf as PyTorch does: erfc, as in Flax, takes longer."""
  return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def gelu(x: jax.Array) -> jax.Array:
  """x Φ(x), in float32."""
  wide = x.astype(jnp.float32)
  return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gated(hidden: jax.Array, gate: jax.Array) -> jax.Array:
  return hidden * gelu(gate)


@jax.custom_vjp
def gated(hidden: jax.Array, gate: jax.Array) -> jax.Array:
  """hidden · gelu(gate), of which a CPU keeps nothing else for the gradients."""
  return _gated(hidden, gate)


def _gated_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array):
  def anew(hidden: jax.Array, gate: jax.Array, dy: jax.Array):
    """With Φ(gate) computed once more, and once for both: left to itself XLA keeps three arrays."""
    hidden, gate = jax.lax.optimization_barrier((hidden, gate))
    wide = gate.astype(jnp.float32)
    share = jax.lax.optimization_barrier(_normal_cdf(wide))
    density = jnp.exp(-0.5 * wide * wide) * (1.0 / math.sqrt(2.0 * math.pi))
    dgate = dy * hidden * (share + wide * density)
    return (dy * wide * share).astype(hidden.dtype), dgate.astype(gate.dtype)

  as_ever = lambda hidden, gate, dy: jax.vjp(_gated, hidden, gate)[1](dy)
  return by_platform(*residuals, dy, cpu=anew, default=as_ever)


gated.defvjp(lambda hidden, gate: (gated(hidden, gate), (hidden, gate)), _gated_backward)
