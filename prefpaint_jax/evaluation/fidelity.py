"""Fidelity of the known pixels: MSE, PSNR and LPIPS, as papers on inpainting report them.

With the protocol "brushnet" the numbers are those of BrushNet's script (TencentARC/BrushNet,
examples/brushnet/evaluate_brushnet.py; Ju et al. 2024, arXiv 2403.06976), which differ:
- The sum of squared differences over three channels is divided by the number of known pixels. The
  MSE is therefore 3 times the true one, and PSNR is 4.77 dB lower.
- PSNR is 1000 dB where the MSE is below 1e-10.
- Samples are saved as JPEG of PIL's default quality (75) and scored from the file.
- Blended samples are made of bytes: the blurred mask is rounded, and the result is cut to integers.
- There is one sample for each prompt: here the first one.
"""
# Shapes: N prompts, S samples of each, B images, H W pixels.

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from prefpaint_jax.data.images import to_bytes
from prefpaint_jax.evaluation.winrate import bootstrap_means

BRUSHNET = "brushnet"
MEASURES = ("psnr", "mse", "lpips")  # in the order of the tables
_READING = (
  "PSNR (dB) is better if higher, MSE and LPIPS if lower. Brackets are 95 % bootstrap intervals "
  "over prompts"
)
RULE = (
  f"Known pixels of the samples against those of the prompts. {_READING}. PSNR is infinite where "
  "no known pixel changes; such prompts are left out of it."
)
BRUSHNET_RULE = (
  "Known pixels of the samples against those of the prompts, by BrushNet's protocol: its MSE is 3 "
  f"times the mean squared error, its PSNR 4.77 dB lower. {_READING}, with one sample of each."
)

_RADIUS, _SIGMA = 10, 3.5  # cv2.GaussianBlur of 21x21 pixels and sigma 0


def measure(
  samples: np.ndarray,
  masks: np.ndarray,
  originals: np.ndarray,
  protocol: str = "",
  lpips: Callable[[np.ndarray, np.ndarray], Any] | None = None,
) -> dict[str, np.ndarray]:
  """Computes "psnr" and "mse", and "lpips" if there is one, each [B].

  Args:
    samples: [B, H, W, 3] in [0, 1].
    masks: [B, H, W, 1], 1 = inpainted; a pixel at least is known.
    originals: the prompts' images [B, H, W, 3].
    protocol: "" or "brushnet"; see the module.
    lpips: LPIPS of images and others in [-1, 1]; see `models.lpips.load`.
  """
  known = 1.0 - np.asarray(masks, np.float64)
  errors = ((np.asarray(samples, np.float64) - originals) * known) ** 2
  mse = errors.sum((1, 2, 3)) / known.sum((1, 2, 3))
  if protocol != BRUSHNET:
    mse = mse / 3
  with np.errstate(divide="ignore"):
    psnr = -10.0 * np.log10(mse)
  if protocol == BRUSHNET:
    psnr = np.where(mse < 1e-10, 1000.0, psnr)
  found = {"psnr": psnr, "mse": mse}
  if lpips is not None:
    pair = (np.asarray(2 * x * known - 1, np.float32) for x in (samples, originals))
    found["lpips"] = np.asarray(lpips(*pair), np.float64)
  return found


def blend(
  samples: np.ndarray, masks: np.ndarray, originals: np.ndarray, protocol: str = ""
) -> np.ndarray:
  """Blends samples with the prompts' images across the border of the hole.

  The weight of a sample is 1 - (1 - m) (1 - blurred m) for a mask m: 1 in the hole, and falling to
  0 within 10 pixels of it.

  Args:
    samples: [B, H, W, 3], whole: with their own known pixels.
    masks: [B, H, W, 1], 1 = inpainted.
    originals: the prompts' images [B, H, W, 3].
    protocol: "" or "brushnet"; see the module.

  Returns:
    float32 [B, H, W, 3].
  """
  blurred = np.stack([blur(mask[..., 0]) for mask in masks])[..., None]
  if protocol == BRUSHNET:
    blurred = np.round(255 * blurred) / 255
    samples, originals = (to_bytes(x).astype(np.float64) for x in (samples, originals))
  weights = 1.0 - (1.0 - masks) * (1.0 - blurred)
  blended = originals * (1.0 - weights) + samples * weights
  return np.asarray(np.floor(blended) / 255 if protocol == BRUSHNET else blended, np.float32)


def blur(mask: np.ndarray) -> np.ndarray:
  """Blurs a mask [H, W] as cv2.GaussianBlur(mask, (21, 21), 0), which mirrors at the borders."""
  kernel = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
  blurred = np.asarray(mask, np.float64)
  for axis in (0, 1):  # "mirror" is cv2's BORDER_REFLECT_101
    blurred = ndimage.correlate1d(blurred, kernel / kernel.sum(), axis, mode="mirror")
  return blurred


def through_jpeg(samples: np.ndarray) -> np.ndarray:
  """Saves images [B, H, W, 3] in [0, 1] as JPEG of PIL's default quality, and reads them."""
  results = []
  for pixels in to_bytes(samples):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG")
    results.append(np.asarray(Image.open(file), np.float32) / 255)
  return np.stack(results)


def counted(values: np.ndarray, protocol: str) -> np.ndarray:
  """Returns the samples that count for a mean over prompts: the first, or all of [N, S]."""
  return np.asarray(values, np.float64)[:, : 1 if protocol == BRUSHNET else None]


def compare(
  policy: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray], protocol: str = ""
) -> dict[str, Any]:
  """Compares the fidelity of policy and baseline.

  Args:
    policy: measures [N, S] of the policy's samples, by name.
    baseline: those of the baseline's samples.
    protocol: "" or "brushnet".

  Returns:
    {"rule", "measures": {name: {"prompts", "left_out", "baseline", "policy", "change"}}}, the last
    three as {"value", "low", "high"}; they are absent if no prompt has finite measures of both. It
    can be written as JSON.
  """
  measures = {}
  for name in (name for name in MEASURES if name in policy):
    old, new = (counted(side[name], protocol).mean(1) for side in (baseline, policy))
    with np.errstate(invalid="ignore"):  # the difference of two infinities
      columns = np.stack([old, new, new - old], axis=1)
    finite = np.isfinite(columns).all(1)
    found: dict[str, Any] = {"prompts": int(finite.sum()), "left_out": int((~finite).sum())}
    if finite.any():
      resampled = bootstrap_means(columns[finite])
      low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
      bounds = zip(columns[finite].mean(0), low, high, strict=True)
      for key, numbers in zip(("baseline", "policy", "change"), bounds, strict=True):
        found[key] = dict(zip(("value", "low", "high"), map(float, numbers), strict=True))
    measures[name] = found
  return {"rule": BRUSHNET_RULE if protocol == BRUSHNET else RULE, "measures": measures}
