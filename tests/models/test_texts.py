"""Token ids and contexts of texts are those of stock pipelines, or an error."""

import logging

import numpy as np
import pytest

from prefpaint_jax import testing
from prefpaint_jax.models.config import CLIPTextConfig
from prefpaint_jax.models.text import tokenize


def test_text_beyond_the_limit_is_cut_with_one_warning_that_says_what(inpainter, caplog):
  config = inpainter.modules.text_encoder.config
  with caplog.at_level(logging.WARNING, logger="absl"):
    ids, _ = tokenize(inpainter.tokenizers[0], config, ["x" * 75 + "yz", "short"])
  assert len(caplog.records) == 1 and "'yz'" in caplog.text
  assert ids.shape == (2, 77)
  caplog.clear()
  tokenize(inpainter.tokenizers[0], config, ["x" * 75])
  assert not caplog.records


def test_a_text_is_reported_as_cut_once_in_a_run(inpainter, caplog):
  config = inpainter.modules.text_encoder.config
  with caplog.at_level(logging.WARNING, logger="absl"):
    for _ in range(3):
      tokenize(inpainter.tokenizers[0], config, ["u" * 75 + "one", "short", "v" * 75 + "two"])
  assert [record.getMessage()[-5:] for record in caplog.records] == ["'one'", "'two'"]


def test_token_without_a_row_in_the_text_encoder_is_refused_by_name():
  painter = testing.tiny_inpainter()
  painter.tokenizers[0].add_tokens(["<cat-toy>"])
  with pytest.raises(
    ValueError, match=r"the token <cat-toy> has the id 514; expected ids below 514"
  ):
    painter.encode_text(["a <cat-toy>"])


def test_model_max_length_of_the_tokenizer_is_the_length_of_the_context(inpainter):
  config = CLIPTextConfig.from_dict(inpainter.configs["text_encoder"])
  tokenizer = testing.tiny_inpainter().tokenizers[0]
  tokenizer.model_max_length = 16
  ids, mask = tokenize(tokenizer, config, ["a red tree"])
  assert ids.shape == (1, 16) and mask is None


def test_attention_mask_gives_the_hidden_state_of_transformers(inpainter):
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  transformers = pytest.importorskip("transformers")
  import jax.numpy as jnp
  from parity import assert_parity, params_of, randomise, template_of

  from prefpaint_jax.models.clip import CLIPTextModel

  sizes = {"vocab_size": 514, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
  config = transformers.CLIPTextConfig(**sizes, num_attention_heads=2)
  theirs = randomise(transformers.CLIPTextModel(config))
  ours = CLIPTextModel(CLIPTextConfig.from_dict(config.to_dict() | {"use_attention_mask": True}))
  ids, mask = tokenize(inpainter.tokenizers[0], ours.config, ["a red tree"])
  assert mask is not None and 0 < mask.sum() < mask.size
  with torch.no_grad():
    args = torch.tensor(ids), torch.tensor(mask)
    expected = theirs(args[0], attention_mask=args[1]).last_hidden_state
  params = params_of(theirs, template_of(ours, jnp.zeros((1, 4), jnp.int32)))
  found = ours.apply({"params": params}, ids, mask)
  assert_parity(found, expected)
  assert not np.allclose(found, ours.apply({"params": params}, ids), atol=1e-3)
