"""Novelty of samples: how far their features are from those of samples of the base policy.

‖z‖_{V⁻¹} bounds the error of a reward only if V is of the features that the reward was trained on.
Public rewards come without them. With V = λI + Σ zzᵀ over samples of the base policy the norm is no
bound, but it still says whether the policy has left the region that the run began in.
"""
# Shapes: N samples, D features.

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from prefpaint_jax.align.held_out import HeldOut
from prefpaint_jax.align.run import Run
from prefpaint_jax.preference.bound import Bound, load_bound, save_bound
from prefpaint_jax.preference.moments import gram
from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.waiting import waiting

FILE_NAME = "novelty.safetensors"
RIDGE = 0.01  # λ as a share of the mean eigenvalue of Σ zzᵀ


def fit(features: Float[np.ndarray, "N D"]) -> Bound:
  """Computes V, scaled so that the mean of ‖z‖_{V⁻¹} over the base policy's samples is 1.

  V is of every second sample and its scale of the others: norms of the samples that V is of are
  smaller.

  Raises:
    ValueError: features are not finite, are all 0, or of fewer than two samples.
  """
  fitted, others = features[::2], np.asarray(features[1::2], np.float64)
  total = gram(fitted)
  ridge = RIDGE * np.trace(total) / len(total)
  if not (len(others) and ridge > 0):
    raise ValueError(
      f"novelty: {len(features)} samples of the base policy, features up to "
      f"{np.abs(features).max(initial=0.0):g}; expected two samples and features that are not 0"
    )
  found = Bound.from_gram(total, len(fitted), ridge)
  scale = float(np.linalg.norm(others @ found.whitening.T, axis=1).mean())
  return dataclasses.replace(found, chol=found.chol * scale, lam=ridge * scale**2)


def with_novelty(run: Run, base: HeldOut, count: int, workdir: Path) -> Run:
  """Returns the run with L⁻¹ of novelty, which is computed once and stored in the workdir.

  All processes call it. The result is the same whether it is read or computed.

  Args:
    base: samples prompts of training.
    count: N, at least.
  """
  path = workdir / FILE_NAME
  if not multihost_utils.broadcast_one_to_all(np.array(path.is_file())):
    with waiting(f"sampling {count} prompts with the base policy, for novelty"):
      found = fit(base.features(run.begin, count))
    if jax.process_index() == 0:
      save_bound(found, path)
    multihost_utils.sync_global_devices("novelty")
  whitening = load_bound(path).whitening.astype(np.float32)
  placed = sharding.place(run.frozen.whitening.sharding, whitening)
  return run._replace(frozen=run.frozen._replace(whitening=placed))
