"""A reward: a pure function of samples, its parameters, and what it needs."""
# Shapes: P prompts, S samples of each, B = P S samples, H W pixels, D features.

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from prefpaint_jax.data.images import load_images
from prefpaint_jax.preference.bound import Bound
from prefpaint_jax.runtime.text import first_line
from prefpaint_jax.weights.names import Params

LIKE = "the same number of samples for each masked image"


@dataclasses.dataclass(frozen=True, eq=False)
class Reward:
  """A reward. Call it with images to get scores; programs call `function` with arrays.

  Attributes:
    name: the name under which metrics and errors speak of it.
    function: `(params, images, masked_images, masks, texts)` -> scores [B] and features [B, D], or
      None instead of features. images [B, H, W, 3] are samples in [0, 1]; masked_images
      [P, H, W, 3], black in the hole, and masks [P, H, W, 1], 1 = missing, are shared by S
      consecutive samples; texts is the result of `tokenize` for P texts, or None.
    params: a tree of arrays or of shapes.
    tokenize: texts -> arrays [P, ...]; None: the reward reads no texts.
    feature_dim: D, or 0.
    bound: on the error of the reward, from its training features; or None.
    on_host: `function` is Python that JAX cannot compile; it gets NumPy arrays and texts.
    source, licence: of the weights.
  """

  name: str
  function: Callable[..., tuple[Any, Any]]
  params: Params = dataclasses.field(default_factory=dict)
  tokenize: Callable[[Sequence[str]], Any] | None = None
  feature_dim: int = 0
  bound: Bound | None = None
  on_host: bool = False
  source: str = ""
  licence: str = ""

  def __call__(
    self,
    images: Any,
    masked_images: Any,
    masks: Any = None,
    texts: str | Sequence[str] | None = None,
  ) -> np.ndarray:
    """Computes scores [B] of samples; see `score`."""
    return self.score(images, masked_images, masks, texts)[0]

  def score(
    self,
    images: Any,
    masked_images: Any,
    masks: Any = None,
    texts: str | Sequence[str] | None = None,
  ) -> tuple[np.ndarray, np.ndarray | None]:
    """Computes scores [B] and features [B, D] of samples; None instead of features if D is 0.

    Args:
      images: B samples of one size: PIL images, paths or arrays (uint8, or float in [0, 1]); a list
        or an array [B, H, W, 3] of them, or one.
      masked_images: P of the same, black in the hole; B/P consecutive samples share one.
      masks: P arrays [H, W, 1], 1 = missing; default: the pixels that are black in the masked
        image.
      texts: one for all samples, or P texts; default: the empty text.

    Raises:
      ValueError: inputs cannot be read, or do not have matching sizes or numbers; or the reward
        does not return B scores.
    """
    images, masked_images = load_images(images), load_images(masked_images, "masked_images")
    B, P = len(images), len(masked_images)
    if B % P:
      raise ValueError(f"{B} samples of {P} masked images; give {LIKE}")
    if masks is None:
      masks = np.all(masked_images == 0, axis=-1, keepdims=True)
    masks = np.broadcast_to(np.asarray(masks, np.float32), (*masked_images.shape[:3], 1))
    texts = [texts or ""] if texts is None or isinstance(texts, str) else list(texts)
    if len(texts) not in (1, P):
      raise ValueError(
        f"texts: {len(texts)} texts for {P} masked images; give one, or one for each"
      )
    texts = texts * (P // len(texts))
    if self.on_host:
      return self.on_arrays(images, masked_images, masks, texts), None
    tokens = self.tokenize(texts) if self.tokenize else None
    try:
      scores, features = self._program(self._placed, images, masked_images, masks, tokens)
    except ValueError as error:  # JAX adds lines to an error of a function that it traces
      raise ValueError(first_line(error)) from error
    return self._checked(scores, B), None if features is None else np.asarray(features)

  @functools.cached_property
  def _placed(self) -> Params:
    return jax.device_put(self.params)  # once, not in every call

  @functools.cached_property
  def _program(self) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    return jax.jit(self.function)

  def on_arrays(
    self, images: np.ndarray, masked_images: np.ndarray, masks: np.ndarray, texts: Sequence[str]
  ) -> np.ndarray:
    """Calls a reward on the host; returns float32 scores [B].

    Raises:
      ValueError: the function fails, or returns no B numbers. The message is one line.
    """
    try:
      scores, _ = self.function(self.params, images, masked_images, masks, texts)
      scores = np.asarray(scores, np.float32)
    except Exception as error:  # whatever the user's code raises
      raise failed(self.name, error) from error
    return self._checked(scores, len(images))

  def _checked(self, scores: Any, B: int) -> np.ndarray:
    """Returns scores as float32 [B]; raises ValueError if they have another shape."""
    check_shape(self.name, np.shape(scores), B)
    return np.asarray(scores, np.float32)


def failed(name: str, error: Exception) -> ValueError:
  """Returns the one-line error of a reward whose code raises `error`."""
  found = str(error).strip().splitlines()
  return ValueError(f"reward {name}: failed with {type(error).__name__}: {''.join(found[:1])}")


def check_shape(name: str, shape: Sequence[int], B: int) -> None:
  """Raises ValueError if the scores of a reward are not one for each of B samples."""
  if tuple(shape) != (B,):
    raise ValueError(
      f"reward {name}: returned an array of {list(shape)}; expected {[B]}, a score for each sample"
    )
