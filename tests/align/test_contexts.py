"""Texts of prompts in a run: their contexts on every mesh, and guidance by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alignment_world import TEXTS, contexts, make_settings, one_rollout, quick_jit, world

from prefpaint_jax import testing
from prefpaint_jax.align import texts as texts_lib
from prefpaint_jax.align.rollout import drop_texts
from prefpaint_jax.align.texts import Texts
from prefpaint_jax.models.conditioning import Context, Guidance, combine
from prefpaint_jax.runtime import sharding


@pytest.fixture
def make_texts(monkeypatch):
  def make(rows: int | None = None, devices: int = 1):
    inpainter = testing.tiny_inpainter()
    empty = inpainter.empty_context
    if rows:
      monkeypatch.setattr(texts_lib, "KEPT_BYTES", rows * empty.tokens.nbytes)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    calls = []

    def tokenize(texts):
      calls.append([text for text in texts if text])
      return inpainter.tokenize(texts)

    texts = Texts(inpainter.modules, inpainter.text_params, tokenize, empty, mesh, 4)
    return inpainter, texts, calls

  return make


@pytest.mark.parametrize("devices", [1, 4])
def test_contexts_equal_those_of_the_inpainter(make_texts, devices):
  inpainter, texts, _ = make_texts(devices=devices)
  context = texts(TEXTS)
  assert len(context.tokens.sharding.device_set) == devices
  expected = inpainter.encode_text(TEXTS).tokens
  np.testing.assert_allclose(context.tokens, expected, atol=1e-5)


def test_texts_that_come_again_are_not_encoded_again(make_texts):
  inpainter, texts, calls = make_texts(rows=4)
  for batch in (
    ["a", "b", "a", ""],
    ["b", "a", "c", "c"],
    ["d", "e", "d", "b"],
    ["a", "b", "a", "c"],
  ):
    np.testing.assert_allclose(texts(batch).tokens, inpainter.encode_text(batch).tokens, atol=1e-5)
  # There are four rows besides that of the empty text; "e" takes the row of "a".
  assert calls == [["a", "b"], ["c"], ["d", "e"], ["a"]]


def test_empty_texts_need_no_encoder(make_texts):
  inpainter, texts, calls = make_texts()
  np.testing.assert_array_equal(
    texts([""] * 4).tokens, jnp.repeat(inpainter.empty_context.tokens, 4, 0)
  )
  assert not calls
  assert "_params" not in vars(texts)


def test_guided_prediction_is_the_sum_of_two_predictions():
  modules, params, _, frozen = world()
  prompts, trajectory, _ = one_rollout()
  B, latents = len(prompts.mask), trajectory.latents[0]
  own = contexts(sharding.make_mesh(devices=jax.devices()[:1]), "float32", 4)
  own = Context(jnp.tile(own.tokens, (B // 4, 1, 1)))

  @quick_jit
  def predict(context, guidance=None):
    conditioned = modules.condition(prompts, context, guidance)
    return modules.predict(params, conditioned, latents, jnp.full(B, 501))

  with_text, without = predict(own), predict(frozen.context)
  guided = predict(own, Guidance(jnp.float32(3.0), frozen.context))
  assert np.abs(with_text - without).max() > 0.01
  np.testing.assert_allclose(guided, without + 3.0 * (with_text - without), atol=2e-5)
  # The texts of samples are repeated and cut with them.
  both = modules.condition(prompts, own, Guidance(jnp.float32(3.0), frozen.context))
  assert both.repeat(2).context.tokens.shape[0] == 2 * B
  assert both.repeat(2).guidance.negative.tokens.shape[0] == 1
  jax.tree.map(np.testing.assert_array_equal, combine(*both.partition()), both)


def test_dropped_texts_are_the_empty_text_in_the_given_share():
  _, _, _, frozen = world()
  context = Context(frozen.context.broadcast(4000).tokens + 1)
  dropped = drop_texts(make_settings(text_dropout=0.3), frozen, context, jax.random.key(0)).tokens
  is_empty = np.asarray(dropped == frozen.context.tokens).all((1, 2))
  np.testing.assert_array_equal(dropped[~is_empty], context.tokens[~is_empty])
  assert is_empty.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 4000))
