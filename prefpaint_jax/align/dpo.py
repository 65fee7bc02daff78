"""Losses of pairs of images, one preferred to the other: Diffusion-DPO and CaPO.

Both compare how well the policy denoises the winner w and the loser l of a pair with how well the
reference does. With the prediction errors e,

  inside = −β/2 [(e_w − e_l) − (e_w^ref − e_l^ref)].

Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, eq. 14) minimises −log σ(inside). CaPO (Lee et
al. 2025, arXiv 2502.02588) minimises (Δ − inside)², where Δ is the difference of the calibrated
scores of w and l.
"""
# Shapes: B pairs or images, h w latents, c latent channels.

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prefpaint_jax.diffusion.ddim import mean_over_elements


def region_error(
  squared: Float[Array, "B h w c"], mask: Float[Array, "B h w 1"], region: str
) -> Float[Array, " B"]:
  """Computes the prediction error of each image from its squared errors.

  Args:
    squared: squared differences between the UNet's output and its target.
    mask: 1 = a latent of the hole.
    region: "all": the mean over all latents, as Diffusion-DPO. "hole": the mean over the hole's
      latents, so that the error's scale does not depend on the area of the hole. "masked": the sum
      over the hole's latents divided by the number of all latents, as Follow-Your-Preference
      (arXiv 2509.23082): a hole of a tenth of the image then acts as a tenth of β.
  """
  if region == "all":
    return mean_over_elements(squared, None)
  if region == "hole":
    return mean_over_elements(squared, mask)
  if region == "masked":
    return mean_over_elements(squared * mask, None)
  raise ValueError(f"region is {region!r}; expected 'all', 'hole' or 'masked'")


def preference_margin(
  errors: Float[Array, "B 2"], reference_errors: Float[Array, "B 2"], beta: float
) -> Float[Array, " B"]:
  """Computes `inside` of each pair.

  It is above 0 where the policy prefers the winner more than the reference does.

  Args:
    errors: e_w and e_l of the policy.
    reference_errors: the same of the reference.
    beta: β.
  """
  policy_gap, reference_gap = (e[:, 0] - e[:, 1] for e in (errors, reference_errors))
  return -0.5 * beta * (policy_gap - reference_gap)


def dpo_loss(margin: Float[Array, " B"]) -> Float[Array, " B"]:
  """Computes −log σ(inside), log 2 where the policy is the reference."""
  return -jax.nn.log_sigmoid(margin)


def capo_loss(margin: Float[Array, " B"], score_gap: Float[Array, " B"]) -> Float[Array, " B"]:
  """Computes (Δ − inside)².

  Args:
    margin: `inside`.
    score_gap: Δ, of `data.pairs.calibrated_scores`.
  """
  return (score_gap - margin) ** 2


def pair_metrics(
  loss: Float[Array, " B"], margin: Float[Array, " B"]
) -> dict[str, Float[Array, " B"]]:
  """Returns the terms whose means over pairs are the metrics.

  `implicit_accuracy` is 1 where `inside` is above 0, as in Diffusion-DPO's code: 0 where the policy
  is the reference.
  """
  accurate = (margin > 0).astype(jnp.float32)
  return {"loss": loss, "implicit_accuracy": accurate, "margin": margin}
