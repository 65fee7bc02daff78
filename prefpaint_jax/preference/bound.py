"""Reward-error bound of a linear head: V = λI + Σ zzᵀ, ‖z‖_{V⁻¹}, and the trust weight γ.

For r = wᵀz fitted by ridge regression on features z_i, |wᵀz − w*ᵀz| ≤ C ‖z‖_{V⁻¹} (Abbasi-Yadkori
et al. 2011, theorem 2; PrefPaint, arXiv 2410.21966). V is accumulated batch by batch, factored and
stored in float64 on the host; what runs per sample on the device is a product with L⁻¹, V = L Lᵀ.
"""
# Shapes: N training samples, B batch, D features.

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.linalg import cho_solve, solve_triangular

FILE_NAME = "bound.safetensors"
_SCALARS = {"lam": float, "count": int, "noise_scale": float, "norm_bound": float}


def gram(features: np.ndarray | jax.Array) -> np.ndarray:
  """Σ zzᵀ [D, D] in float64, of features [N, D]; add the results of several batches."""
  features = np.asarray(features, np.float64)
  if features.ndim != 2:
    raise ValueError(f"features have shape {features.shape}: give [samples, width]")
  if not np.isfinite(features).all():
    bad = int((~np.isfinite(features).all(axis=1)).sum())
    raise ValueError(f"{bad} of {len(features)} feature rows are not finite: leave them out")
  return features.T @ features


def _cholesky(matrix: np.ndarray, name: str) -> np.ndarray:
  """Lower L [D, D] float64 with L Lᵀ = matrix."""
  try:
    return np.linalg.cholesky(matrix)
  except np.linalg.LinAlgError:
    smallest = np.linalg.eigvalsh(matrix)[0]
    raise ValueError(
      f"{name} is not positive definite, its smallest eigenvalue is {smallest:.3g}: "
      "raise lam, or check where the matrix comes from"
    ) from None


def _square(matrix: np.ndarray | jax.Array, name: str) -> np.ndarray:
  """The symmetric part of `matrix` [D, D] in float64."""
  matrix = np.asarray(matrix, np.float64)
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
    raise ValueError(f"{name} has shape {matrix.shape}: give a square matrix")
  if not np.isfinite(matrix).all():
    raise ValueError(f"{name} has entries that are not finite: check where it comes from")
  return (matrix + matrix.T) / 2


class Moments(NamedTuple):
  """All that ridge regression has to know of its samples, however many: sums in float64."""

  gram: np.ndarray  # Σ zzᵀ [D, D]
  cross: np.ndarray  # Σ y z [D]
  squares: np.ndarray  # Σ y² []
  count: np.ndarray  # N []

  @classmethod
  def zeros(cls, width: int) -> "Moments":
    """Of no samples yet."""
    return cls(np.zeros((width, width)), np.zeros(width), np.zeros(()), np.zeros(()))

  @classmethod
  def of(cls, features: np.ndarray | jax.Array, targets: np.ndarray | jax.Array) -> "Moments":
    """Of features [B, D] and their targets [B], the normalised scores."""
    features, targets = (np.asarray(x, np.float64) for x in (features, targets))
    if targets.shape != features.shape[:1]:
      raise ValueError(
        f"targets have shape {targets.shape}, features {features.shape}: give one to each sample"
      )
    if not np.isfinite(targets).all():
      bad = int((~np.isfinite(targets)).sum())
      raise ValueError(f"{bad} of {len(targets)} targets are not finite: leave them out")
    count = np.float64(len(targets))
    return cls(gram(features), features.T @ targets, targets @ targets, count)

  def __add__(self, other: "Moments") -> "Moments":
    """Of both sets of samples together; of the same memory as each."""
    return Moments(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

  def add(self, features: np.ndarray | jax.Array, targets: np.ndarray | jax.Array) -> "Moments":
    """With one more batch of features [B, D] and targets [B]."""
    return self + Moments.of(features, targets)


def sum_over_processes(moments: Moments) -> Moments:
  """The moments of all processes together, the same to the last bit on each; all must call this."""
  sums = np.concatenate([np.ravel(part) for part in moments])
  # As the bytes that they are: JAX would round float64 to float32 on the way.
  gathered = multihost_utils.process_allgather(sums.view(np.uint32))
  total = np.ascontiguousarray(gathered).view(np.float64).sum(axis=0)
  ends = np.cumsum([part.size for part in moments])[:-1]
  parts = zip(np.split(total, ends), moments, strict=True)
  return Moments(*(flat.reshape(part.shape) for flat, part in parts))


@dataclass(frozen=True, eq=False)
class Bound:
  """The Cholesky factor of V, and what the constant of the bound needs."""

  chol: np.ndarray  # L [D, D] float64, lower; V = L Lᵀ
  lam: float  # λ, the ridge
  count: int | None = None  # N; None: not known
  noise_scale: float | None = None  # R, sub-Gaussian scale of the annotation noise
  norm_bound: float | None = None  # S ≥ ‖w*‖

  @classmethod
  def fit(
    cls,
    features: np.ndarray | jax.Array,
    lam: float,
    noise_scale: float | None = None,
    norm_bound: float | None = None,
  ) -> "Bound":
    """From all training features [N, D] at once."""
    return cls.from_gram(gram(features), len(features), lam, noise_scale, norm_bound)

  @classmethod
  def from_gram(
    cls,
    gram: np.ndarray,
    count: int,
    lam: float,
    noise_scale: float | None = None,
    norm_bound: float | None = None,
  ) -> "Bound":
    """From Σ zzᵀ [D, D] accumulated over `count` samples."""
    if not lam > 0:
      raise ValueError(f"lam is {lam}: use a positive ridge")
    matrix = _square(gram, "the Gram matrix")
    chol = _cholesky(matrix + lam * np.eye(len(matrix)), "V")
    return cls(chol, float(lam), int(count), noise_scale, norm_bound)

  @classmethod
  def from_inverse(cls, v_inverse: np.ndarray | jax.Array) -> "Bound":
    """From V⁻¹ [D, D] in any precision; λ is taken to be the smallest eigenvalue of V.

    That is exact when fewer than D directions were seen in training, and too large otherwise.
    """
    v_inverse = _square(v_inverse, "V⁻¹")
    inverse_chol = np.linalg.inv(_cholesky(v_inverse, "V⁻¹"))
    matrix = inverse_chol.T @ inverse_chol
    return cls(_cholesky(matrix, "V"), float(np.linalg.eigvalsh(matrix)[0]))

  @property
  def width(self) -> int:
    """D, the number of features."""
    return len(self.chol)

  @functools.cached_property
  def whitening(self) -> np.ndarray:
    """L⁻¹ [D, D] float64: it takes V to the identity, and so ‖L⁻¹z‖ = ‖z‖_{V⁻¹}."""
    return solve_triangular(self.chol, np.eye(self.width), lower=True)

  @property
  def matrix(self) -> np.ndarray:
    """V [D, D] float64."""
    return self.chol @ self.chol.T


def ridge(moments: Moments, lam: float) -> np.ndarray:
  """The w [D] float64 that minimises Σ (y − wᵀz)² + λ‖w‖²."""
  bound = Bound.from_gram(moments.gram, moments.count, lam)
  return cho_solve((bound.chol, True), moments.cross)


def residual_scale(moments: Moments, w: np.ndarray) -> float:
  """Root mean square of y − wᵀz over the samples that the moments are of.

  Of samples that w was not fitted on it is an estimate of R that counts the error of w in; of the
  training samples it is too small, by about sqrt(1 − D/N).
  """
  if not moments.count > 0:
    raise ValueError("the residuals of no samples have no scale: give held-out samples")
  # The three terms cancel to 1e-16 of Σ y²: residuals below 1e-8 of the targets are not resolved.
  squares = moments.squares - 2 * w @ moments.cross + w @ moments.gram @ w
  return float(np.sqrt(max(squares, 0.0) / moments.count))


def refit(
  moments: Moments, lam: float, held_out: Moments | None = None, norm_bound: float | None = None
) -> tuple[np.ndarray, Bound]:
  """The head w [D] of ridge regression and the bound on its error.

  Args:
    moments: of the training samples.
    lam: λ.
    held_out: of samples to estimate R from; default: the training samples.
    norm_bound: S; default: ‖w‖, which stands for the unknown ‖w*‖ and may be smaller.
  """
  w = ridge(moments, lam)
  noise_scale = residual_scale(moments if held_out is None else held_out, w)
  norm_bound = float(np.linalg.norm(w)) if norm_bound is None else norm_bound
  return w, Bound.from_gram(moments.gram, moments.count, lam, noise_scale, norm_bound)


def check_bound(bound: Bound, width: int) -> None:
  """Raise unless the bound is for features of this width."""
  if bound.width != width:
    raise ValueError(
      f"the bound is for {bound.width} features and the reward model has {width}: "
      "use the bound that was fitted with this reward model"
    )


def _product(z: jax.Array, matrix: jax.Array | np.ndarray) -> jax.Array:
  """z [B, D] times a matrix [D, D], in float32 at least and nowhere in less."""
  dtype = jnp.promote_types(jnp.result_type(z), jnp.float32)
  return jnp.matmul(jnp.asarray(z, dtype), jnp.asarray(matrix, dtype), precision="highest")


def mahalanobis_norm(whitening: jax.Array | np.ndarray, z: jax.Array) -> jax.Array:
  """‖z‖_{V⁻¹} = sqrt(zᵀ V⁻¹ z) [B] of z [B, D], with `Bound.whitening`; zero only for z = 0."""
  return jnp.linalg.norm(_product(z, whitening.T), axis=1)


def released_norm(whitening: jax.Array | np.ndarray, z: jax.Array) -> jax.Array:
  """‖z V⁻¹‖₂ [B], the norm that the released PrefPaint code uses in place of ‖z‖_{V⁻¹}."""
  return jnp.linalg.norm(_product(_product(z, whitening.T), whitening), axis=1)


def trust_weight(
  norm: jax.Array, k: float, b: float, minimum: float | None = None, maximum: float | None = None
) -> jax.Array:
  """γ = exp(−k·norm + b) [B], within [minimum, maximum] where given."""
  return jnp.clip(jnp.exp(-k * norm + b), minimum, maximum)


def confidence(bound: Bound, delta: float) -> float:
  """C with |wᵀz − w*ᵀz| ≤ C ‖z‖_{V⁻¹} for all z at once, with probability 1 − δ or more.

  C = R sqrt(2 ln(det(V)^½ det(λI)^−½ / δ)) + sqrt(λ) S.
  """
  if not 0 < delta < 1:
    raise ValueError(f"delta is {delta}: use a probability between 0 and 1")
  for field in ("noise_scale", "norm_bound"):
    if getattr(bound, field) is None:
      raise ValueError(f"the bound has no {field}: give it when fitting the bound")
  # ln det(V)^½ is the sum over the diagonal of L: no determinant that could overflow.
  log_ratio = np.log(np.diag(bound.chol)).sum() - 0.5 * bound.width * np.log(bound.lam)
  spread = bound.noise_scale * np.sqrt(2 * (log_ratio - np.log(delta)))
  return float(spread + np.sqrt(bound.lam) * bound.norm_bound)


def effective_rank(bound: Bound) -> float:
  """How many directions the training features span, from 1 to D (0: there were none).

  exp of the entropy of the eigenvalues of V − λI = Σ zzᵀ, normalised to sum 1 (Roy and Vetterli
  2007). Near 1, ‖z‖_{V⁻¹} is little more than the length of z off one line.
  """
  eigenvalues = np.maximum(np.linalg.eigvalsh(bound.matrix) - bound.lam, 0)
  if not eigenvalues.any():
    return 0.0
  share = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
  return float(np.exp(-(share * np.log(share)).sum()))


def _file(path: str | os.PathLike) -> Path:
  path = Path(path)
  return path if path.suffix == ".safetensors" else path / FILE_NAME


def save_bound(bound: Bound, path: str | os.PathLike) -> None:
  """Write V and the scalars to `path`, a folder (for bound.safetensors) or a .safetensors file."""
  path = _file(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  scalars = {name: getattr(bound, name) for name in _SCALARS}
  metadata = {name: str(value) for name, value in scalars.items() if value is not None}
  save_file({"V": bound.matrix}, path, metadata)


def load_bound(path: str | os.PathLike) -> Bound:
  """Read what `save_bound` wrote."""
  path = _file(path)
  if not path.is_file():
    raise ValueError(f"bound {path}: no such file; fit the bound with the reward model")
  try:
    with safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
      matrix = file.get_tensor("V")
    scalars = {name: read(metadata[name]) for name, read in _SCALARS.items() if name in metadata}
    lam = scalars.pop("lam")
  except (SafetensorError, KeyError, ValueError) as error:
    raise ValueError(
      f"bound {path}: cannot be read ({error}); it needs a tensor V and a metadata field lam"
    ) from None
  return Bound(_cholesky(_square(matrix, f"V of {path}"), f"V of {path}"), lam, **scalars)
