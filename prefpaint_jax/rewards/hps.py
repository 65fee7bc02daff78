"""Human Preference Score v2.1 (Wu et al. 2023): open_clip's ViT-H-14, trained on choices."""
# Shapes: P prompts, S samples of each, B = P S samples, L tokens, E embedding.

import html
import importlib
import re
from pathlib import Path
from typing import Any

import jax

from prefpaint_jax.rewards import clip_files
from prefpaint_jax.rewards.clip_files import VIT_H, VIT_H_14
from prefpaint_jax.rewards.clip_towers import Towers, make_towers
from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.weights import folder as weights
from prefpaint_jax.weights.names import Params

PUBLISHED, FILE, LICENCE = "xswu/HPSv2", "HPS_v2.1_compressed.pt", "Apache-2.0"
CONFIG = "open_clip_config.json"


def load(name: str, given: str = "", dtype: str = "float32") -> Reward:
  """Loads HPS v2.1, in the layout of open_clip.

  Args:
    given: the file, or a folder or hub name with HPS_v2.1_compressed.pt; beside it may be an
      `open_clip_config.json` (default: ViT-H-14) and the tokenizer's vocabulary.
    dtype: compute dtype. The released script computes in float16.

  Raises:
    ValueError: files are missing, damaged or of another model.
  """
  path = weights.local_path(given or PUBLISHED, name)
  if not path.is_file():
    folder = weights.resolve(given or PUBLISHED, (FILE, CONFIG))
    path = folder / FILE
    if not path.is_file():
      raise ValueError(f"{folder}: no {FILE}; download it from {PUBLISHED}, or give hps-v2.1@FILE")
  towers = make_towers(_config(path.parent), dtype, with_text=True)
  params = clip_files.load_open_clip(path, towers.shapes())
  tokenize = clip_files.tokenizer_of(path.parent, VIT_H, towers, _clean)
  return clip_files.as_reward(name, _score, towers, params, tokenize, given or PUBLISHED, LICENCE)


def outline(name: str, given: str = "", dtype: str = "float32") -> Reward:
  """Makes the reward of shapes, of a local folder's config or, for other names, ViT-H-14's."""
  path = weights.local_path(given or PUBLISHED, name)
  config = _config(path.parent if path.is_file() else path)
  return clip_files.outline(name, _score, config, given or PUBLISHED, LICENCE, dtype)


def _config(folder: Path) -> dict[str, Any]:
  """Reads the sizes of the model, in the form of transformers."""
  if not (folder / CONFIG).is_file():
    return clip_files.from_open_clip(VIT_H_14)
  return clip_files.from_open_clip(weights.read_config(folder, CONFIG).get("model_cfg"))


def _score(
  towers: Towers,
  params: Params,
  images: jax.Array,
  masked_images: jax.Array,
  masks: jax.Array,
  texts: Any,
) -> tuple[jax.Array, jax.Array]:
  """Computes cosines [B], without a scale, and embeddings [B, E]."""
  return towers.cosines(params, towers.letterbox(images), texts)


def _clean(text: str) -> str:
  """Repairs a text as open_clip does: by ftfy, then HTML entities.

  Raises:
    ValueError: ftfy could change the text, and is not installed.
  """
  whole = html.unescape(html.unescape(text))
  if not re.fullmatch(r"[\t\n\r -~]*", whole):  # ftfy changes nothing of others
    try:
      ftfy = importlib.import_module("ftfy")
    except ImportError as error:
      raise ValueError(
        f"text {text!r}: not ASCII, and ftfy, by which hps-v2.1 repairs such texts, is not "
        "installed; pip install ftfy"
      ) from error
    whole = html.unescape(html.unescape(ftfy.fix_text(text)))
  return whole.strip()
