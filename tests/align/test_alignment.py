"""The policy loss and its gradient, compared with torch, diffusers' UNet and closed forms."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alignment_world import (
  STEPS,
  TOY,
  B,
  assert_trees_close,
  loss_of,
  made_up_scores,
  make_settings,
  one_rollout,
  quick_jit,
  sampler_of,
  steps_of,
  toy_loss,
  toy_prompts,
  toy_rollout,
  world,
)

from prefpaint_jax.align import update as update_lib
from prefpaint_jax.align.score import trust_weights
from prefpaint_jax.align.settings import TRUST_NORMS, Settings, Trust
from prefpaint_jax.align.state import Experience, init_state, log_prob_weight
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.models import architectures
from prefpaint_jax.weights import names

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def loss_and_gradient(settings: Settings, remat: bool = False):
  """Returns a function like `loss_of`'s that returns ((loss, metrics), gradients)."""
  modules = world()[0]
  modules = dataclasses.replace(modules, unet=modules.unet.clone(remat=remat))
  return quick_jit(jax.value_and_grad(loss_of(modules, settings), has_aux=True))


def perturbed(params, scale: float = 0.003):
  rng = np.random.default_rng(7)
  return jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype(x.dtype), params)


# --------------------------------------------------------------- importance ratio at equal policies
@pytest.fixture
def full_optimisation(quick_compilation):
  """Compiles as a run does: without optimisations the rollout and the update round differently."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_update_has_ratio_one_and_no_clipping(full_optimisation, dtype):
  settings = make_settings(clip_range=1e-5)
  modules, params, _, frozen = world(dtype)
  prompts, trajectory, _ = one_rollout.__wrapped__(dtype)  # the cached one is not optimised
  evaluate = jax.jit(jax.grad(loss_of(modules, settings), has_aux=True))
  scores = made_up_scores()
  for index in range(STEPS):
    gradients, metrics = evaluate(params, frozen, prompts, trajectory, scores, jnp.array([index]))
    assert metrics["ppo/clip_fraction"] == 0.0  # each ratio is within 1e-5 of 1
    assert metrics["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert 0 < optax.tree.norm(gradients) < 1e4


@pytest.mark.slow
def test_rounding_the_parameters_in_advance_changes_no_bit():
  settings = make_settings()
  modules, params, _, frozen = world("bfloat16")
  prompts, trajectory, _ = one_rollout("bfloat16")
  arguments = frozen, prompts, trajectory, made_up_scores(), jnp.array([1])

  @jax.jit
  def evaluate(params):
    compute = jax.value_and_grad(loss_of(modules, settings), has_aux=True)
    loss, gradients = compute(params, *arguments)
    return loss, jax.tree.map(lambda x: x.astype(jnp.float32), gradients)

  rounded = modules.round_params(params)
  kinds = [x.dtype for x in jax.tree.leaves(rounded)]
  assert 0 < kinds.count(jnp.float32) < kinds.count(jnp.bfloat16)  # norms stay float32
  jax.tree.map(np.testing.assert_array_equal, evaluate(rounded), evaluate(params))


# ------------------------------------------------------------------------------ against torch
def torch_loss(settings: Settings, params, prompts, trajectory, scores, indices, frozen):
  """Computes the loss in torch through diffusers' UNet; returns (loss, metrics, UNet)."""
  import torch
  from diffusers import UNet2DConditionModel

  torch.set_num_threads(1)
  modules = world()[0]
  tensor = lambda x: torch.tensor(np.asarray(x))
  nchw = lambda x: tensor(x).permute(0, 3, 1, 2)

  def make_unet(tree):
    unet = UNet2DConditionModel.from_config(architectures.tiny_configs()["unet"])
    unet.load_state_dict({name: tensor(x) for name, x in names.to_torch(tree).items()})
    return unet.eval()

  unet, base = make_unet(params), make_unet(frozen.base)
  alphas = torch.tensor(modules.schedule.alphas_cumprod, dtype=torch.float64)
  context = tensor(prompts.context.tokens).expand(B, -1, -1)
  # A latent is in the hole if any of its pixels is missing.
  factor = modules.vae.config.factor
  hole = torch.nn.functional.max_pool2d(nchw(prompts.mask), factor)
  weight = hole if settings.log_prob_region == "hole" else torch.ones_like(hole)
  weight = weight.expand(-1, 4, -1, -1)
  average = lambda x: (x * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))

  total, clipped, divergence = 0.0, 0.0, 0.0
  stride = 1000 // settings.num_steps
  for index in indices:
    t = int(trajectory.timesteps[index])
    assert t == stride * (settings.num_steps - 1 - index) + 1
    alpha, alpha_prev = alphas[t], alphas[max(t - stride, 0)]
    variance = settings.eta**2 * (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    x, x_prev = nchw(trajectory.latents[index]), nchw(trajectory.latents[index + 1])
    sample = torch.cat([x, nchw(prompts.mask_latents), nchw(prompts.masked_latents)], dim=1)

    def mean_by(network, t=t, alpha=alpha, alpha_prev=alpha_prev, variance=variance, x=x, s=sample):
      noise = network(s, t, context).sample
      original = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
      return alpha_prev.sqrt() * original + (1 - alpha_prev - variance).sqrt() * noise

    mean = mean_by(unet)
    log_prob = average(
      -((x_prev - mean) ** 2) / (2 * variance) - 0.5 * variance.log() - 0.5 * math.log(2 * math.pi)
    )
    ratio = (log_prob - tensor(trajectory.log_probs[index])).exp()
    advantages = tensor(scores.advantages)
    inside = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
    loss = tensor(scores.trust) * torch.maximum(-advantages * ratio, -advantages * inside)
    with torch.no_grad():
      base_mean = mean_by(base)
    kl = average((mean - base_mean) ** 2 / (2 * variance))
    total = total + (loss + settings.kl_weight * kl).sum()
    clipped += float((ratio != inside).float().sum())
    divergence += float(kl.detach().sum())
  count = B * len(indices)
  metrics = {"clip_fraction": clipped / count, "kl_to_base": divergence / count}
  return total / count, metrics, unet


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["default", "hole_and_kl"])
def test_loss_and_gradient_equal_torch_through_the_unet_of_diffusers(variant):
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  pytest.importorskip("diffusers")
  settings = make_settings(updates_per_iteration=1)
  if variant == "hole_and_kl":
    settings = dataclasses.replace(settings, log_prob_region="hole", kl_weight=0.7)
  _, base, _, frozen = world()
  prompts, trajectory, _ = one_rollout()
  if settings.log_prob_region == "hole":
    # The log-probabilities of the rollout are over all latents; compute them again over the hole.
    trajectory = trajectory._replace(log_probs=hole_log_probs(settings, base, prompts, trajectory))
  params, scores, indices = perturbed(base), made_up_scores(), np.array([1, 3])
  arguments = params, frozen, prompts, trajectory, scores
  (loss, metrics), gradients = loss_and_gradient(settings)(*arguments, jnp.asarray(indices))
  expected, counts, unet = torch_loss(
    settings, params, prompts, trajectory, scores, indices, frozen
  )
  expected.backward()
  assert 0 < counts["clip_fraction"] < 1  # some ratios are clipped and some are not
  assert metrics["ppo/clip_fraction"] == pytest.approx(counts["clip_fraction"])
  assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
  if settings.kl_weight:
    assert metrics["ppo/kl_to_base"] == pytest.approx(counts["kl_to_base"], rel=1e-3)
  ours = names.to_torch(gradients)
  theirs = {name: parameter.grad.numpy() for name, parameter in unet.named_parameters()}
  assert_trees_close(dict(sorted(ours.items())), dict(sorted(theirs.items())), 1e-4)


def hole_log_probs(settings, params, prompts, trajectory):
  modules, steps = world()[0], steps_of(settings)
  weight = log_prob_weight(settings, prompts)

  @quick_jit
  def score(params, prompts, latents, x_prev, step):
    output = modules.predict(params, prompts, latents, step.timestep)
    return ddim.step(modules.schedule, step, latents, output, x_prev=x_prev, weight=weight)[1]

  pairs = zip(trajectory.latents[:-1], trajectory.latents[1:], strict=True)
  return jnp.stack([score(params, prompts, *pair, steps.at(i)) for i, pair in enumerate(pairs)])


# ------------------------------------------------------------------------------ KL divergence
def test_kl_to_base_is_zero_at_the_base_and_equals_the_closed_form_elsewhere():
  settings = make_settings(kl_weight=2.0, updates_per_iteration=1)
  prompts = toy_prompts()
  trajectory = toy_rollout(settings, TOY, prompts, 0)
  scores, indices = made_up_scores(), np.array([0, 2])
  measure = lambda params: toy_loss(settings, params, prompts, trajectory, scores, indices)[0]
  loss, metrics = measure(TOY)
  assert metrics["ppo/kl_to_base"] == pytest.approx(0.0, abs=1e-12)
  assert loss == pytest.approx(float(metrics["ppo/policy_loss"]), rel=1e-6)

  moved = TOY | {"a": TOY["a"] + 0.02}
  loss, metrics = measure(moved)
  expected = []
  for index in indices:
    step = steps_of(settings).at(index)
    alpha, alpha_prev, variance = (
      np.float64(x) for x in (step.alpha, step.alpha_prev, step.sigma**2)
    )
    # The predicted noise changes by 0.02·x, the mean by 0.02·x times its derivative by the noise.
    factor = np.sqrt(1 - alpha_prev - variance) - np.sqrt(alpha_prev * (1 - alpha) / alpha)
    change = factor * 0.02 * np.asarray(trajectory.latents[index], np.float64)
    expected.append((change**2 / (2 * variance)).mean())
  assert metrics["ppo/kl_to_base"] == pytest.approx(np.mean(expected), rel=1e-4)
  total = float(metrics["ppo/policy_loss"]) + 2.0 * np.mean(expected)
  assert loss == pytest.approx(total, rel=1e-4)


# -------------------------------------------------------------------------------- trust weights
def test_trust_weights_equal_their_formulas():
  rng = np.random.default_rng(0)
  z = rng.normal(size=(5, 3))
  root = rng.normal(size=(3, 3))
  matrix = root @ root.T + 0.1 * np.eye(3)
  inverse, whitening = np.linalg.inv(matrix), np.linalg.inv(np.linalg.cholesky(matrix))
  z32, whitening = z.astype(np.float32), whitening.astype(np.float32)
  weights = lambda **kwargs: trust_weights(Trust(**kwargs), whitening, z32)

  mahalanobis = np.sqrt(np.einsum("bi,ij,bj->b", z, inverse, z))
  released = np.linalg.norm(z @ inverse, axis=1)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
  close(weights(norm="mahalanobis"), np.exp(0.7 - 0.05 * mahalanobis))
  close(weights(norm="mahalanobis", k=2.0, b=0.1), np.exp(0.1 - 2.0 * mahalanobis))
  clamped = np.clip(np.exp(0.7 - 0.5 * released), 1.0, 1.5)
  close(weights(norm="released", k=0.5, minimum=1.0, maximum=1.5), clamped)
  assert len({*clamped.round(3)}) > 2 and clamped.min() == 1.0  # clamped and unclamped weights
  close(weights(norm="constant", constant=1.3), np.full(5, 1.3))
  close(weights(norm="none"), np.ones(5))
  close(weights(norm="novelty"), np.exp(0.7 - 0.05 * mahalanobis))
  with pytest.raises(ValueError, match="'ensemble', which reads scores"):
    weights(norm="ensemble")


def test_only_weights_with_a_norm_need_a_bound():
  needs = {norm: Trust(norm).needs_bound for norm in TRUST_NORMS}
  assert {norm for norm, needed in needs.items() if needed} == {"mahalanobis", "released"}
  with pytest.raises(ValueError, match=r"trust\.norm is 'euclid'; expected one of mahalanobis"):
    Trust("euclid")


# ------------------------------------------------------------- passes and rematerialisation
@pytest.mark.slow
def test_passes_and_rematerialisation_do_not_change_the_gradient():
  modules, params, _, frozen = world()
  prompts, trajectory, _ = one_rollout()
  settings = make_settings(updates_per_iteration=1, timesteps_per_pass=1)
  optimizer = optax.sgd(1.0)  # an update subtracts the gradient
  sampler = sampler_of(modules, settings)
  update = functools.partial(update_lib.update, sampler, optimizer)
  state = init_state(sampler, optimizer, jax.tree.map(jnp.asarray, params))
  arguments = frozen, prompts, trajectory, made_up_scores(), jnp.array([0, 3])

  (_, expected), whole = loss_and_gradient(settings)(params, *arguments)
  experience, indices = Experience(*arguments[1:4]), arguments[4]
  after, metrics = quick_jit(update)(state, frozen, experience, indices)
  assert_trees_close(jax.tree.map(jnp.subtract, params, after.params), whole, 1e-4)
  for name, value in expected.items():
    assert metrics[name] == pytest.approx(float(value), rel=1e-3, abs=1e-6), name
  _, recomputed = loss_and_gradient(settings, remat=True)(params, *arguments)
  assert_trees_close(recomputed, whole, 1e-4)
