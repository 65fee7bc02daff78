"""Whitening of a reward model's features, folded into the layer that computes them."""
# Shapes: N training samples, H width of the hidden layer, D features.

import jax.numpy as jnp
import numpy as np

from prefpaint_jax.models.blocks import Dtype
from prefpaint_jax.preference.moments import Moments
from prefpaint_jax.weights.names import Params


def whiten(params: Params, moments: Moments, dtype: Dtype) -> Params:
  """Returns parameters whose features are z' = Λ^-½ Uᵀ (z - μ), Σ = U Λ Uᵀ.

  Over the training samples z' has mean 0 and covariance I. The reward of the returned parameters is
  valid only after `bound.refit` has fitted the last layer to z'. Its mean over the training samples
  is then 0, the mean of the normalised scores.

  Eigenvalues of Σ below ε times the largest eigenvalue of Σ zzᵀ / N are raised to that value, where
  ε is the machine epsilon of `dtype`. The rounding error of z, about ε ‖z‖, then stays below about
  √ε in z'. A direction without variance keeps a variance of about 0.

  Args:
    params: parameters of a reward network without an activation after its features.
    moments: moments of the training samples, which give μ and Σ.
    dtype: compute dtype of the network.
  """
  mean = moments.total / moments.count
  second = moments.gram / moments.count
  variances, directions = np.linalg.eigh(second - np.outer(mean, mean))
  floor = float(jnp.finfo(dtype).eps) * np.linalg.eigvalsh(second)[-1]
  transform = directions / np.sqrt(np.maximum(variances, floor))
  head = params["mlp"]
  kernel, bias = (np.asarray(head["layers_2"][name], np.float64) for name in ("kernel", "bias"))
  folded = {"kernel": kernel @ transform, "bias": (bias - mean) @ transform}
  folded = {name: values.astype(np.float32) for name, values in folded.items()}
  return {**params, "mlp": {**head, "layers_2": folded}}
