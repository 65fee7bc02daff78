"""Reward-error bound of a linear head: V = λI + Σ zzᵀ, ‖z‖_{V⁻¹}, and the trust weight γ.

Ridge regression fits a reward r = wᵀz to features z_i. Its error has the bound
|wᵀz − w*ᵀz| ≤ C ‖z‖_{V⁻¹} (Abbasi-Yadkori et al. 2011, theorem 2; PrefPaint, arXiv 2410.21966). The
host accumulates V batch by batch, factors it as V = L Lᵀ and stores it, all in float64. The device
computes only a product with L⁻¹ for each sample.
"""
# Shapes: N training samples, B batch, D features.

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.linalg import cho_solve, solve_triangular

from prefpaint_jax.preference.moments import Moments, Number, Scalar, Unchecked, gram

FILE_NAME = "bound.safetensors"
_SCALARS = {"lam": float, "count": int, "noise_scale": float, "norm_bound": float}


def _cholesky(matrix: Float64[np.ndarray, "D D"], name: str) -> Float64[np.ndarray, "D D"]:
  """Computes the lower Cholesky factor L, with L Lᵀ = `matrix`."""
  try:
    return np.linalg.cholesky(matrix)
  except np.linalg.LinAlgError:
    smallest = np.linalg.eigvalsh(matrix)[0]
    raise ValueError(
      f"{name} is not positive definite, its smallest eigenvalue is {smallest:.3g}; "
      "raise lam, or check the source of the matrix"
    ) from None


def _symmetric(matrix: Unchecked, name: str) -> Float64[np.ndarray, "D D"]:
  """Returns the symmetric part of a matrix [D, D] in float64."""
  matrix = np.asarray(matrix, np.float64)
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
    raise ValueError(f"{name} has shape {matrix.shape}; give a square matrix")
  if not np.isfinite(matrix).all():
    raise ValueError(f"{name} has entries that are not finite; check the source of the matrix")
  return (matrix + matrix.T) / 2


@dataclass(frozen=True, eq=False)
class Bound:
  """The Cholesky factor of V, and the scalars of the constant C."""

  chol: Float64[np.ndarray, "D D"]  # L, lower; V = L Lᵀ
  lam: float  # λ, the ridge
  count: int | None = None  # N; None: unknown
  noise_scale: Number | None = None  # R, sub-Gaussian scale of the annotation noise
  norm_bound: Number | None = None  # S ≥ ‖w*‖

  @classmethod
  def fit(
    cls,
    features: Unchecked,
    lam: Number,
    noise_scale: Number | None = None,
    norm_bound: Number | None = None,
  ) -> "Bound":
    """Computes the bound from all training features [N, D]; see `from_gram`."""
    return cls.from_gram(gram(features), len(features), lam, noise_scale, norm_bound)

  @classmethod
  def from_gram(
    cls,
    gram: Unchecked,
    count: Scalar,
    lam: Number,
    noise_scale: Number | None = None,
    norm_bound: Number | None = None,
  ) -> "Bound":
    """Computes the bound from Σ zzᵀ [D, D].

    Args:
      count: N, the number of samples in the sum.
      lam: λ, positive.
      noise_scale: R; None: unknown, `confidence` then raises an error.
      norm_bound: S; None: unknown, `confidence` then raises an error.

    Raises:
      ValueError: if λ is not positive or V is not positive definite.
    """
    if not lam > 0:
      raise ValueError(f"lam is {lam}; use a positive ridge")
    matrix = _symmetric(gram, "the Gram matrix")
    chol = _cholesky(matrix + lam * np.eye(len(matrix)), "V")
    return cls(chol, float(lam), int(count), noise_scale, norm_bound)

  @classmethod
  def from_inverse(cls, v_inverse: Unchecked) -> "Bound":
    """Computes the bound from V⁻¹ [D, D] in any precision.

    λ becomes the smallest eigenvalue of V. This is exact if the training features span fewer than D
    directions; otherwise it is too large.

    Raises:
      ValueError: if V⁻¹ is not square, finite and positive definite.
    """
    v_inverse = _symmetric(v_inverse, "V⁻¹")
    inverse_chol = np.linalg.inv(_cholesky(v_inverse, "V⁻¹"))
    matrix = inverse_chol.T @ inverse_chol
    return cls(_cholesky(matrix, "V"), float(np.linalg.eigvalsh(matrix)[0]))

  @property
  def width(self) -> int:
    """D, the number of features."""
    return len(self.chol)

  @functools.cached_property
  def whitening(self) -> Float64[np.ndarray, "D D"]:
    """L⁻¹. It maps V to the identity, so ‖L⁻¹z‖ = ‖z‖_{V⁻¹}."""
    return solve_triangular(self.chol, np.eye(self.width), lower=True)

  @property
  def matrix(self) -> Float64[np.ndarray, "D D"]:
    """V."""
    return self.chol @ self.chol.T


def ridge(moments: Moments, lam: Number) -> Float64[np.ndarray, "D ..."]:
  """Computes the head w [D] that minimises Σ (y − wᵀz)² + λ‖w‖².

  If `moments.cross` is [D, K], for K sets of targets, the result is [D, K].
  """
  bound = Bound.from_gram(moments.gram, moments.count, lam)
  return cho_solve((bound.chol, True), moments.cross)


def residual_scale(moments: Moments, w: Float[np.ndarray, " D"]) -> float:
  """Computes the root mean square of y − wᵀz over the samples of `moments`.

  On samples that w was not fitted to, it estimates R and includes the error of w. On the training
  samples it is too small, by a factor of about sqrt(1 − D/N).

  Raises:
    ValueError: if `moments` has no samples.
  """
  if not moments.count > 0:
    raise ValueError("the moments have no samples, so no residuals; give held-out samples")
  # The three terms cancel to 1e-16 of Σ y²: residuals below 1e-8 of the targets are not resolved.
  squares = moments.squares - 2 * w @ moments.cross + w @ moments.gram @ w
  return float(np.sqrt(max(squares, 0.0) / moments.count))


def refit(
  moments: Moments,
  lam: Number,
  held_out: Moments | None = None,
  norm_bound: Number | None = None,
) -> tuple[Float64[np.ndarray, " D"], Bound]:
  """Computes the head w of ridge regression and the bound on its error.

  Args:
    moments: moments of the training samples.
    lam: λ.
    held_out: moments of the samples that R is estimated from; default: the training samples.
    norm_bound: S; default: ‖w‖, an estimate of the unknown ‖w*‖ that can be too small.
  """
  w = ridge(moments, lam)
  noise_scale = residual_scale(moments if held_out is None else held_out, w)
  norm_bound = float(np.linalg.norm(w)) if norm_bound is None else norm_bound
  return w, Bound.from_gram(moments.gram, moments.count, lam, noise_scale, norm_bound)


def check_bound(bound: Bound, width: int) -> None:
  """Raises ValueError unless the bound is for `width` features."""
  if bound.width != width:
    raise ValueError(
      f"the bound is for {bound.width} features and the reward model has {width}; "
      "use the bound that was fitted with this reward model"
    )


# Largest condition number of V up to which a norm in float32 is right to 0.5 %, whatever z is. For
# z along the largest eigenvector, terms of size ‖z‖/√λmin cancel to ‖z‖/√λmax; without the square
# roots in the released norm.
CONDITION = {"mahalanobis": 1e10, "released": 1e6}


def check_condition(whitening: Float[Array | np.ndarray, "D D"], norm: str) -> None:
  """Raises ValueError if V is too ill-conditioned for a norm in float32.

  Args:
    whitening: L⁻¹; nothing is checked while JAX traces it.
    norm: a key of `CONDITION`.
  """
  if isinstance(whitening, jax.core.Tracer):
    return
  scales = np.linalg.svd(np.asarray(whitening, np.float64), compute_uv=False)
  condition = np.inf if scales[-1] == 0 else (scales[0] / scales[-1]) ** 2
  if not condition <= CONDITION[norm]:
    raise ValueError(
      f"the condition number of V is {condition:.1e}; expected at most {CONDITION[norm]:.0e} "
      f"for the norm {norm!r}, which float32 cannot resolve beyond; fit the bound with a "
      "larger ridge lam"
    )


def _product(
  z: Float[Array | np.ndarray, "B D"], matrix: Float[Array | np.ndarray, "D D"]
) -> Float[Array, "B D"]:
  """Computes z times `matrix` in float32 or higher precision, inputs and products included."""
  dtype = jnp.promote_types(jnp.result_type(z), jnp.float32)
  return jnp.matmul(jnp.asarray(z, dtype), jnp.asarray(matrix, dtype), precision="highest")


def mahalanobis_norm(
  whitening: Float[Array | np.ndarray, "D D"], z: Float[Array | np.ndarray, "B D"]
) -> Float[Array, " B"]:
  """Computes ‖z‖_{V⁻¹} = sqrt(zᵀ V⁻¹ z) with L⁻¹ = `Bound.whitening`; 0 only for z = 0.

  Raises:
    ValueError: V is too ill-conditioned; see `check_condition`.
  """
  check_condition(whitening, "mahalanobis")
  return jnp.linalg.norm(_product(z, whitening.T), axis=1)


def released_norm(
  whitening: Float[Array | np.ndarray, "D D"], z: Float[Array | np.ndarray, "B D"]
) -> Float[Array, " B"]:
  """Computes ‖z V⁻¹‖₂, which the released PrefPaint code uses in place of ‖z‖_{V⁻¹}.

  Raises:
    ValueError: V is too ill-conditioned; see `check_condition`.
  """
  check_condition(whitening, "released")
  return jnp.linalg.norm(_product(_product(z, whitening.T), whitening), axis=1)


def trust_weight(
  norm: Float[Array | np.ndarray, " B"],
  k: Number,
  b: Number,
  minimum: Number | None = None,
  maximum: Number | None = None,
) -> Float[Array, " B"]:
  """Computes γ = exp(−k·norm + b), clipped to [minimum, maximum]; None: no limit."""
  return jnp.clip(jnp.exp(-k * norm + b), minimum, maximum)


def confidence(bound: Bound, delta: Number) -> float:
  """Computes C so that, with probability 1 − δ or more, |wᵀz − w*ᵀz| ≤ C ‖z‖_{V⁻¹} for all z.

  C = R sqrt(2 ln(det(V)^½ det(λI)^−½ / δ)) + sqrt(λ) S.

  Raises:
    ValueError: if δ is not between 0 and 1, or the bound has no R or no S.
  """
  if not 0 < delta < 1:
    raise ValueError(f"delta is {delta}; use a probability between 0 and 1")
  for field in ("noise_scale", "norm_bound"):
    if getattr(bound, field) is None:
      raise ValueError(f"the bound has no {field}; give it when fitting the bound")
  # ln det(V)^½ is the sum of the logarithms of L's diagonal; det(V) itself can overflow.
  log_ratio = np.log(np.diag(bound.chol)).sum() - 0.5 * bound.width * np.log(bound.lam)
  spread = bound.noise_scale * np.sqrt(2 * (log_ratio - np.log(delta)))
  return float(spread + np.sqrt(bound.lam) * bound.norm_bound)


def effective_rank(bound: Bound) -> float:
  """Computes the number of directions that the training features span, from 1 to D.

  It is exp of the entropy of the eigenvalues of V − λI = Σ zzᵀ, normalised to sum 1 (Roy and
  Vetterli 2007); 0 if Σ zzᵀ is 0. If it is near 1, ‖z‖_{V⁻¹} measures little more than the distance
  of z from one line through the origin.
  """
  eigenvalues = np.maximum(np.linalg.eigvalsh(bound.matrix) - bound.lam, 0)
  if not eigenvalues.any():
    return 0.0
  share = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
  return float(np.exp(-(share * np.log(share)).sum()))


def _file(path: str | os.PathLike) -> Path:
  """Returns the file of a path that may be a folder."""
  path = Path(path)
  return path if path.suffix == ".safetensors" else path / FILE_NAME


def save_bound(bound: Bound, path: str | os.PathLike) -> None:
  """Writes V and the scalars to a .safetensors file, or to bound.safetensors in a folder."""
  path = _file(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  scalars = {name: getattr(bound, name) for name in _SCALARS}
  metadata = {name: str(value) for name, value in scalars.items() if value is not None}
  save_file({"V": bound.matrix}, path, metadata)


def load_bound(path: str | os.PathLike) -> Bound:
  """Reads a bound that `save_bound` wrote.

  Raises:
    ValueError: if the file is missing or damaged. The message names the file.
  """
  path = _file(path)
  if not path.is_file():
    raise ValueError(f"bound {path}: no such file; fit the bound with the reward model")
  try:
    with safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
      matrix = file.get_tensor("V")
    scalars = {name: read(metadata[name]) for name, read in _SCALARS.items() if name in metadata}
    lam = scalars.pop("lam")
    if not (lam > 0 and all(np.isfinite(value) for value in (lam, *scalars.values()))):
      raise ValueError(f"lam is {lam}, with {scalars}: not finite, or not positive")
  except (SafetensorError, KeyError, ValueError) as error:
    raise ValueError(
      f"bound {path}: cannot be read ({error}); expected a tensor V and a metadata field lam"
    ) from None
  return Bound(_cholesky(_symmetric(matrix, f"V of {path}"), f"V of {path}"), lam, **scalars)
