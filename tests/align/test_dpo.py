"""Losses of pairs, compared with the published formulas in torch, by value and gradient."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alignment_world import assert_trees_close, quick_jit

from prefpaint_jax import testing
from prefpaint_jax.align import dpo, pair_update
from prefpaint_jax.align.settings import Trust
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.models.pipeline import Modules
from prefpaint_jax.rewards.prefpaint import as_reward
from prefpaint_jax.runtime import sharding

PAIRS, SIDE, BETA = 3, 4, 50.0
SETTINGS = pair_update.PairSettings("dpo", BETA, "hole", lora=False, trust=Trust("none"))


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch", reason="parity needs torch: pip install torch")


def draw(*shape, seed=0) -> np.ndarray:
  return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def hole_masks() -> np.ndarray:
  """Masks [PAIRS, SIDE, SIDE, 1] of three areas."""
  masks = np.zeros((PAIRS, SIDE, SIDE, 1), np.float32)
  for row, width in enumerate((1, 2, 4)):
    masks[row, :, :width] = 1.0
  return masks


@pytest.mark.parametrize("region", ["all", "hole", "masked"])
@pytest.mark.parametrize("loss", ["dpo", "capo"])
def test_loss_and_gradient_of_a_linear_model_equal_the_published_formula_in_torch(
  torch, loss, region
):
  inputs, targets = (draw(2 * PAIRS, SIDE, SIDE, 4, seed=seed) for seed in (1, 2))
  kernel, reference = draw(4, 4, seed=3), draw(4, 4, seed=4)
  gaps, masks = np.abs(draw(PAIRS)), hole_masks()

  def ours(kernel):
    def errors(kernel):
      squared = (inputs @ kernel - targets) ** 2
      return dpo.region_error(squared, jnp.repeat(masks, 2, 0), region).reshape(PAIRS, 2)

    margin = dpo.preference_margin(errors(kernel), errors(jnp.asarray(reference)), BETA)
    own = dpo.dpo_loss(margin) if loss == "dpo" else dpo.capo_loss(margin, jnp.asarray(gaps))
    return own.mean(), margin

  (value, margin), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(kernel))

  # As the scripts: first all winners, then all losers; channels first.
  order = [*range(0, 2 * PAIRS, 2), *range(1, 2 * PAIRS, 2)]
  to_torch = lambda x: torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2)
  x, y = to_torch(inputs[order]), to_torch(targets[order])
  hole = to_torch(np.concatenate([masks, masks]))
  weights = torch.tensor(kernel, dtype=torch.float64, requires_grad=True)

  def losses(weights):
    squared = (torch.einsum("bihw,io->bohw", x, weights) - y).pow(2)
    if region == "hole":
      return (squared * hole).sum((1, 2, 3)) / hole.expand_as(squared).sum((1, 2, 3))
    return (squared * (hole if region == "masked" else 1.0)).mean(dim=[1, 2, 3])

  policy_w, policy_l = losses(weights).chunk(2)
  with torch.no_grad():
    reference_w, reference_l = losses(torch.tensor(reference, dtype=torch.float64)).chunk(2)
  inside = -0.5 * BETA * ((policy_w - policy_l) - (reference_w - reference_l))
  if loss == "dpo":
    expected = -torch.nn.functional.logsigmoid(inside).mean()
  else:
    expected = (torch.tensor(gaps, dtype=torch.float64) - inside).pow(2).mean()
  expected.backward()
  np.testing.assert_allclose(margin, inside.detach().numpy(), rtol=1e-4)
  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  np.testing.assert_allclose(gradient, weights.grad.numpy(), rtol=1e-3, atol=1e-5)
  accuracy = dpo.pair_metrics(margin, margin)["implicit_accuracy"].mean()
  np.testing.assert_allclose(accuracy, (inside > 0).double().mean().item(), rtol=1e-6)


def test_area_of_the_hole_scales_the_margin_only_where_errors_are_masked():
  """Errors of equal size per latent: the margin of "masked" falls as the area of the hole."""
  masks = hole_masks()
  errors = lambda size, region: dpo.region_error(
    jnp.full((PAIRS, SIDE, SIDE, 4), size), jnp.asarray(masks), region
  )

  def margins(region):
    policy = jnp.stack([errors(1.0, region), errors(3.0, region)], axis=1)
    return dpo.preference_margin(policy, jnp.zeros((PAIRS, 2)), BETA)

  areas = masks.mean((1, 2, 3))
  np.testing.assert_allclose(areas, [0.25, 0.5, 1.0])
  np.testing.assert_allclose(margins("hole"), BETA, rtol=1e-6)
  np.testing.assert_allclose(margins("all"), BETA, rtol=1e-6)
  np.testing.assert_allclose(margins("masked"), BETA * areas, rtol=1e-6)


def test_known_latents_do_not_change_the_error_of_the_hole():
  squared, masks = map(jnp.asarray, (draw(PAIRS, SIDE, SIDE, 4) ** 2, hole_masks()))
  changed = squared + 9.0 * (1.0 - masks)
  for region in ("hole", "masked"):
    before, after = (dpo.region_error(x, masks, region) for x in (squared, changed))
    np.testing.assert_array_equal(before, after)


def test_hole_without_latents_has_no_error_and_no_gradient():
  """mask_latents="corner" misses thin holes."""
  empty = jnp.zeros((1, SIDE, SIDE, 1))
  for region in ("hole", "masked"):
    error = lambda x, region=region: dpo.region_error(x, empty, region).sum()
    value, gradient = jax.value_and_grad(error)(jnp.ones((1, SIDE, SIDE, 4)))
    assert value == 0.0 and not gradient.any()


# ------------------------------------------------------------- the tiny networks, a linear UNet
class Linear(Modules):
  """The tiny networks with the UNet a · latents."""

  def predict(self, unet_params, prompts, latents, timestep):
    return unet_params["a"] * latents


@functools.cache
def world():
  """Returns (modules, frozen trees, batch) of the tiny models and two pairs."""
  policy, reward = testing.tiny_inpainter(), testing.tiny_reward()
  images, masks = testing.tiny_prompts(2)
  rng = np.random.default_rng(0)
  to_bytes = lambda x: np.round(255 * x).astype(np.uint8)
  drawn = rng.uniform(size=(2, 2, *images.shape[1:]))
  candidates = np.where(masks[:, None] > 0, drawn, images[:, None])
  batch = {
    "candidates": to_bytes(candidates),
    "masked_image": to_bytes(images * (1 - masks)),
    "mask": masks.astype(np.uint8),
    "score_gap": np.array([0.4, 0.2], np.float32),
  }
  frozen = pair_update.PairFrozen(
    vae=policy.params["vae"],
    reference=policy.params["unet"],
    context=policy.empty_context,
    text_encoders=None,
    reward=reward.params,
    whitening=reward.bound.whitening.astype(np.float32),
  )
  return policy.modules, frozen, batch, reward


def terms_of(settings, frozen, params, batch, seed=0):
  modules = world()[0]
  terms = quick_jit(functools.partial(pair_update.pair_terms, modules, settings))
  return terms(frozen, params, batch, jax.random.key(seed))


@pytest.mark.slow
@pytest.mark.parametrize("region", ["all", "hole", "masked"])
def test_policy_equal_to_the_reference_has_a_loss_of_exactly_log_2(region):
  _, frozen, batch, _ = world()
  settings = dataclasses.replace(SETTINGS, beta=5000.0, region=region)
  terms, trust = terms_of(settings, frozen, frozen.reference, batch)
  np.testing.assert_array_equal(terms["margin"], 0.0)
  np.testing.assert_array_equal(terms["loss"], np.float32(math.log(2)))
  np.testing.assert_array_equal(terms["implicit_accuracy"], 0.0)  # as in the published code
  assert trust is None


def recorded_terms(loss: str, prediction_type: str = "epsilon", trust: Trust = SETTINGS.trust):
  """Returns the terms of a linear UNet with a = 0.7, the reference's a = 0.9, and the draws."""
  modules, frozen, batch, reward = world()
  fields = {field.name: getattr(modules, field.name) for field in dataclasses.fields(modules)}
  schedule = dataclasses.replace(modules.schedule, prediction_type=prediction_type)
  linear = Linear(**fields | {"schedule": schedule})
  function = as_reward("tiny", reward.network, reward.params).function
  settings = dataclasses.replace(SETTINGS, loss=loss, trust=trust, reward=function)
  frozen = frozen._replace(reference={"a": jnp.float32(0.9)})
  batch = jax.tree.map(lambda x: np.tile(x, (8,) + (1,) * (x.ndim - 1)), batch)

  def run(frozen, batch, key):
    draws, add_noise = [], ddim.add_noise

    def record(schedule, clean, noise, t):
      draws.append((clean, noise, t))
      return add_noise(schedule, clean, noise, t)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(ddim, "add_noise", record)
      arguments = linear, settings, frozen, {"a": jnp.float32(0.7)}, batch, key
      return pair_update.pair_terms(*arguments), pair_update.pair_loss(*arguments), draws[0]

  found = quick_jit(run)(frozen, batch, jax.random.key(0))
  return *jax.device_get(found), batch, schedule


@pytest.mark.slow
@pytest.mark.parametrize(
  ("loss", "prediction_type"),
  [("dpo", "epsilon"), ("capo", "v_prediction"), ("dpo", "sample")],
)
def test_pair_shares_its_timestep_and_with_dpo_its_noise_and_terms_equal_diffusers(
  torch, loss, prediction_type
):
  diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers")
  (terms, _), (mean, metrics), (clean, noise, t), batch, schedule = recorded_terms(
    loss, prediction_type
  )
  winner, loser = slice(0, None, 2), slice(1, None, 2)
  np.testing.assert_array_equal(t[winner], t[loser])
  assert len(set(t.tolist())) > 8 and t.min() >= 0 and t.max() < 1000
  assert np.array_equal(noise[winner], noise[loser]) == (loss == "dpo")
  np.testing.assert_allclose(noise.std(), 1.0, atol=0.1)

  scheduler = diffusers.DDPMScheduler(
    trained_betas=1.0 - schedule.alphas_cumprod / np.append(1.0, schedule.alphas_cumprod[:-1]),
    prediction_type=prediction_type,
  )
  x0, epsilon = (torch.tensor(x).permute(0, 3, 1, 2) for x in (clean, noise))
  steps = torch.tensor(t, dtype=torch.int64)
  noisy = scheduler.add_noise(x0, epsilon, steps)
  target = {"epsilon": epsilon, "sample": x0}.get(prediction_type)
  target = scheduler.get_velocity(x0, epsilon, steps) if target is None else target
  factor = world()[0].vae.config.factor
  hole = torch.tensor(batch["mask"]).permute(0, 3, 1, 2).float()
  hole = torch.nn.functional.max_pool2d(hole, factor).repeat_interleave(2, 0)
  error = lambda a: ((a * noisy - target) ** 2 * hole).sum((1, 2, 3)) / (4 * hole.sum((1, 2, 3)))
  gap = lambda a: error(a)[winner] - error(a)[loser]
  inside = -0.5 * BETA * (gap(0.7) - gap(0.9))
  np.testing.assert_allclose(terms["margin"], inside.numpy(), rtol=1e-3, atol=1e-3)
  expected = -torch.nn.functional.logsigmoid(inside)
  if loss == "capo":
    expected = (torch.tensor(batch["score_gap"]) - inside) ** 2
  np.testing.assert_allclose(terms["loss"], expected.numpy(), rtol=3e-3, atol=1e-3)
  np.testing.assert_allclose(mean, terms["loss"].mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics["dpo/implicit_accuracy"], (inside > 0).float().mean())


@pytest.mark.slow
def test_loss_of_a_pair_is_multiplied_by_the_mean_trust_of_its_candidates():
  trust = Trust("mahalanobis", k=0.8, b=0.3)
  (terms, weights), (loss, metrics), _, batch, _ = recorded_terms("dpo", trust=trust)
  reward = world()[-1]
  features = np.stack(
    [
      reward.score(candidates / 255.0, masked[None] / 255.0)[1]
      for candidates, masked in zip(batch["candidates"], batch["masked_image"], strict=True)
    ]
  ).astype(np.float64)
  V = reward.bound.chol @ reward.bound.chol.T
  norm = np.sqrt(
    np.einsum("pcd,pcd->pc", features, np.linalg.solve(V, features[..., None])[..., 0])
  )
  expected = np.exp(0.3 - 0.8 * norm).mean(1)
  np.testing.assert_allclose(weights, expected, rtol=1e-4)
  np.testing.assert_allclose(loss, np.mean(expected * terms["loss"]), rtol=1e-4)
  np.testing.assert_allclose(metrics["trust/mean"], expected.mean(), rtol=1e-4)
  assert np.ptp(expected) > 1e-3


@pytest.mark.slow
def test_text_of_a_prompt_is_the_context_of_both_its_candidates():
  policy, (_, frozen, batch, _) = testing.tiny_inpainter(), world()
  changed = jax.tree.map(lambda x: 1.1 * x, frozen.reference)
  margin = lambda frozen, batch: terms_of(SETTINGS, frozen, changed, batch)[0]["margin"]
  plain = margin(frozen, batch)
  with_encoder = frozen._replace(text_encoders=policy.text_params)
  tokens = lambda texts: {"ids_0": policy.tokenize(texts)[0][0]}
  empty, own = (margin(with_encoder, batch | tokens(x)) for x in (["", ""], ["", "a door"]))
  np.testing.assert_allclose(empty, plain, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(own[0], empty[0])
  assert abs(own[1] - empty[1]) > 1e-3


@pytest.mark.slow
def test_two_devices_equal_one():
  modules, frozen, batch, _ = world()
  changed = jax.tree.map(lambda x: 1.01 * x, frozen.reference)
  settings = dataclasses.replace(SETTINGS, loss="capo")
  loss = functools.partial(pair_update.pair_loss, modules, settings)
  results = []
  for number in (1, 2):
    mesh = sharding.make_mesh(devices=jax.devices()[:number])
    placed = jax.device_put((frozen, changed), sharding.replicated(mesh))
    rows = sharding.to_global(mesh, batch)
    step = quick_jit(jax.value_and_grad(loss, argnums=1, has_aux=True))
    results.append(jax.device_get(step(*placed, rows, jax.random.key(0))))
  ((ours, _), gradient), ((theirs, _), expected) = results
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)
  assert_trees_close(gradient, expected, 1e-4)
