"""Reward-error bound of a linear head: V = λI + Σ zzᵀ, ‖z‖_{V⁻¹}, and the trust weight γ.

For r = wᵀz fitted by ridge regression on features z_i, |wᵀz − w*ᵀz| ≤ C ‖z‖_{V⁻¹} (Abbasi-Yadkori
et al. 2011, theorem 2; PrefPaint, arXiv 2410.21966). V is accumulated, factored and stored in
float64 on the host; what runs per sample on the device takes the Cholesky factor.
"""
# Shapes: N training samples, B batch, D features.

import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

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

  @property
  def matrix(self) -> np.ndarray:
    """V [D, D] float64."""
    return self.chol @ self.chol.T


def check_bound(bound: Bound, width: int) -> None:
  """Raise unless the bound is for features of this width."""
  if bound.width != width:
    raise ValueError(
      f"the bound is for {bound.width} features and the reward model has {width}: "
      "use the bound that was fitted with this reward model"
    )


def _whiten(chol: jax.Array | np.ndarray, z: jax.Array) -> jax.Array:
  """L⁻¹ zᵀ [D, B], in float32 at least."""
  z = jnp.asarray(z)
  z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
  return solve_triangular(jnp.asarray(chol, z.dtype), z.T, lower=True)


def mahalanobis_norm(chol: jax.Array | np.ndarray, z: jax.Array) -> jax.Array:
  """‖z‖_{V⁻¹} = sqrt(zᵀ V⁻¹ z) [B], with V = L Lᵀ and z [B, D]; zero only for z = 0."""
  return jnp.linalg.norm(_whiten(chol, z), axis=0)


def released_norm(chol: jax.Array | np.ndarray, z: jax.Array) -> jax.Array:
  """‖z V⁻¹‖₂ [B], the norm that the released PrefPaint code uses in place of ‖z‖_{V⁻¹}."""
  whitened = _whiten(chol, z)
  solved = solve_triangular(jnp.asarray(chol, whitened.dtype), whitened, trans=1, lower=True)
  return jnp.linalg.norm(solved, axis=0)


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
