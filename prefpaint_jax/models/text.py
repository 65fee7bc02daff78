"""Token ids of texts, as stock pipelines compute them."""
# Shapes: B texts, L tokens.

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from prefpaint_jax.models.config import CLIPTextConfig
from prefpaint_jax.runtime.text import first_line


def load_tokenizer(content: Mapping[str, bytes], name: str, kind: str = "CLIPTokenizer") -> Any:
  """Makes a tokenizer of transformers from its files.

  Args:
    content: file name -> content.
    name: of the tokenizer, for the message.
    kind: its class.

  Raises:
    ValueError: the files cannot be read.
  """
  # Without it transformers warns that torch is not installed; the tokenizer does not need torch.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers  # slow to import

  with tempfile.TemporaryDirectory(prefix="tokenizer") as folder:
    for file, data in content.items():
      (Path(folder) / file).write_bytes(data)
    try:
      return getattr(transformers, kind).from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises many types
      raise ValueError(
        f"{name}: cannot be read ({first_line(error)}); copy that of the base model"
      ) from error


def tokenize(
  tokenizer: Any, config: CLIPTextConfig, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray | None]:
  """Computes the token ids [B, L] of texts, and their attention mask [B, L] if the encoder uses it.

  L is the smaller of the tokenizer's `model_max_length` and the encoder's number of positions. A
  longer text is cut, with one warning in the life of the process.

  Raises:
    ValueError: a token has no row in the text encoder's embedding.
  """
  length = min(tokenizer.model_max_length, config.max_position_embeddings)
  whole = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
  for text, tokens in zip(texts, whole, strict=True):
    if len(tokens) > length:
      _warn_of_cut(text, length, tokenizer.decode(tokens[length - 1 : -1]))
  tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
  ids = np.asarray(tokens["input_ids"], np.int32)
  if ids.max() >= config.vocab_size:
    raise ValueError(
      f"text: the token {tokenizer.convert_ids_to_tokens(int(ids.max()))} has the id {ids.max()}; "
      f"expected ids below {config.vocab_size}, the rows of the text encoder; use the tokenizer of "
      "this text encoder, or add the token's embedding to it"
    )
  return ids, np.asarray(tokens["attention_mask"], np.int32) if config.use_attention_mask else None


@functools.cache  # the policies of a run and its repetitions encode a text many times
def _warn_of_cut(text: str, length: int, left_out: str) -> None:
  """Logs that `text` is cut to `length` tokens."""
  logging.warning(
    "text: cut to %d tokens, the most that the text encoder takes; left out: %r", length, left_out
  )


def list_texts(text: Any, number: int, name: str = "text") -> list[str]:
  """Returns one text, or one for each of `number` images.

  Raises:
    ValueError: `text` is neither a text nor a list of 1 or `number` texts. The message has `name`.
  """
  texts = [text] if isinstance(text, str) else text
  if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
    raise ValueError(f"{name} is {text!r}; expected a text or a list of texts; give '' for no text")
  if len(texts) not in (1, number):
    raise ValueError(f"{name}: {len(texts)} texts for {number} images; give one, or one for each")
  return list(texts)
