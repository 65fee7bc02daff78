"""The loss of DiffusionNFT and its old policy (Zheng et al. 2025, arXiv 2509.16117).

The final latents x0 of a sample are noised to x_t = sqrt(ᾱ) x0 + sqrt(1−ᾱ) ε. The network's output
at x_t implies clean latents x̂0. Two implicit policies, x̂0⁺ = β x̂0 + (1−β) x̂0_old and
x̂0⁻ = (1+β) x̂0_old − β x̂0, are regressed on x0: the first with a weight that grows with the
advantage, the second with the rest of the weight. The published form mixes velocities; for one x_t,
x̂0 is affine in the velocity, in ε and in v alike, so the mixture of x̂0 is the same policy for every
prediction type.
"""
# Shapes: B samples, h w latents, c channels.

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prefpaint_jax.align.settings import Nft
from prefpaint_jax.diffusion.ddim import Latents, Weight, mean_over_elements

SMALLEST_ERROR = 1e-5  # of the mean absolute error that a squared error is divided by


def optimality(advantages: Float[Array | np.ndarray, " B"], clip: float) -> Float[Array, " B"]:
  """Computes r in [0, 1] from advantages in ±`clip`: 1 for the best sample, ½ at advantage 0."""
  return jnp.clip(0.5 * advantages / clip + 0.5, 0.0, 1.0)


def nft_loss(
  original: Latents,
  old_original: Latents,
  x0: Latents,
  advantages: Float[Array | np.ndarray, " B"],
  clip: float,
  beta: float,
  weight: Weight | None = None,
) -> Float[Array, " B"]:
  """Computes C [r ‖x̂0⁺ − x0‖² / w⁺ + (1−r) ‖x̂0⁻ − x0‖² / w⁻] / β, with means for ‖·‖².

  w± = max(mean |x̂0± − x0|, 1e-5) has no gradient. At x̂0 = x̂0_old the gradient with respect to x̂0
  is 2 A (x̂0 − x0) / w over the number of elements: it does not depend on β and C.

  Args:
    original: x̂0 of the trained policy.
    old_original: x̂0 of the old policy; no gradient.
    x0: final latents of a sample of the old policy.
    advantages: A, within ±`clip`.
    clip: C, the largest absolute advantage.
    weight: weights of the means, 1 for latents of the hole, for example; None: equal weights. The
      loss of a sample does not depend on the area of its hole.
  """
  old_original = jax.lax.stop_gradient(old_original)

  def regression(policy: jax.Array) -> jax.Array:
    error = policy - x0
    size = jax.lax.stop_gradient(mean_over_elements(jnp.abs(error), weight))
    return mean_over_elements(error**2, weight) / jnp.maximum(size, SMALLEST_ERROR)

  positive = regression(beta * original + (1 - beta) * old_original)
  negative = regression((1 + beta) * old_original - beta * original)
  r = optimality(advantages, clip)
  return clip * (r * positive + (1 - r) * negative) / beta


def old_policy_decay(settings: Nft, updates: int | jax.Array) -> jax.Array:
  """Computes how much of the old policy stays after the iteration that ends with `updates`."""
  decay = settings.decay_rate * (updates - settings.decay_start)
  return jnp.clip(decay, 0.0, settings.decay_maximum)
