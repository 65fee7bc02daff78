"""Token ids of texts, as stock pipelines compute them."""
# Shapes: B texts, L tokens.

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from prefpaint_jax.models.config import CLIPTextConfig


def tokenize(
  tokenizer: Any, config: CLIPTextConfig, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray | None]:
  """Computes the token ids [B, L] of texts, and their attention mask [B, L] if the encoder uses it.

  L is the smaller of the tokenizer's `model_max_length` and the encoder's number of positions. A
  longer text is cut, with one warning.

  Raises:
    ValueError: a token has no row in the text encoder's embedding.
  """
  length = min(tokenizer.model_max_length, config.max_position_embeddings)
  whole = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
  cut = [tokenizer.decode(ids[length - 1 : -1]) for ids in whole if len(ids) > length]
  if cut:
    logging.warning(
      "text: cut to %d tokens, the most that the text encoder takes; left out: %s",
      length,
      "; ".join(map(repr, cut)),
    )
  tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True)
  ids = np.asarray(tokens["input_ids"], np.int32)
  if ids.max() >= config.vocab_size:
    raise ValueError(
      f"text: the token {tokenizer.convert_ids_to_tokens(int(ids.max()))} has the id {ids.max()}; "
      f"expected ids below {config.vocab_size}, the rows of the text encoder; use the tokenizer of "
      "this text encoder, or add the token's embedding to it"
    )
  return ids, np.asarray(tokens["attention_mask"]) if config.use_attention_mask else None
