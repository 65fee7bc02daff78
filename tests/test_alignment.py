"""One iteration of alignment: against torch, diffusers' UNet, closed forms, and more devices."""

import dataclasses
import functools
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prefpaint_jax import alignment, diffusion, rl, sharding, testing
from prefpaint_jax.alignment import Frozen, Scores, Settings, Trust
from prefpaint_jax.diffusion import Trajectory
from prefpaint_jax.inpainter import Prompts
from prefpaint_jax.train import settings_from
from prefpaint_jax.weights import names

get_config = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "rl.py"))["get_config"]
WORLD = dict.fromkeys(("policy", "reward", "prompts"), "")  # nothing here is read from disk
PROMPTS, SAMPLES, STEPS = 4, 2, 4
B = PROMPTS * SAMPLES


def make_settings(trust: Trust | None = None, **changes) -> Settings:
  config = get_config()
  config.update_from_flattened_dict(testing.tiny_training(WORLD) | {"num_steps": STEPS})
  return dataclasses.replace(settings_from(config), trust=trust or Trust(), **changes)


# For what does not depend on how far the compiler fuses: it takes most of the time here.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


@functools.cache
def world(dtype: str = "float32"):
  """(modules, UNet parameters, reward network, frozen trees) of the tiny models."""
  inpainter, judge = testing.tiny_inpainter(dtype=dtype), testing.tiny_reward(dtype=dtype)
  base = inpainter.params["unet"]
  chol = judge.bound.chol.astype(np.float32)
  frozen = Frozen(inpainter.params["vae"], judge.params, chol, inpainter.empty_context, base)
  return inpainter.modules, base, judge.network, frozen


def steps_of(settings: Settings) -> diffusion.Steps:
  return diffusion.ddim_steps(world()[0].schedule, settings.num_steps, settings.eta)


@functools.cache
def painted(dtype: str = "float32"):
  """(prompts, trajectory, images) of one rollout."""
  settings = make_settings()
  modules, params, _, frozen = world(dtype)
  rollout = jax.jit(functools.partial(alignment.rollout, modules, settings, steps_of(settings)))
  return rollout(params, frozen, *testing.tiny_prompts(PROMPTS), jax.random.key(0))


def made_up_scores(valid: np.ndarray | None = None) -> Scores:
  rng = np.random.default_rng(0)
  valid = np.ones(B, bool) if valid is None else valid
  return Scores(
    rng.normal(size=B).astype(np.float32),
    valid,
    rng.uniform(1.0, 2.0, size=B).astype(np.float32),
    rng.normal(size=B).astype(np.float32) * valid,
  )


@functools.cache
def loss_and_gradient(settings: Settings, remat: bool = False):
  """(params, frozen, prompts, trajectory, scores, indices) -> ((loss, metrics), gradients)."""
  modules = world()[0]
  modules = dataclasses.replace(modules, unet=modules.unet.clone(remat=remat))
  loss = functools.partial(alignment.policy_loss, modules, settings, steps_of(settings))
  return quick_jit(jax.value_and_grad(loss, has_aux=True))


def perturbed(params, scale: float = 0.003):
  rng = np.random.default_rng(7)
  return jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype(x.dtype), params)


def assert_trees_close(ours, expected, tolerance: float) -> None:
  """Largest error of any leaf at most `tolerance` of the largest value of all leaves."""
  assert jax.tree.structure(ours) == jax.tree.structure(expected)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
  errors = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), ours, expected)
  assert largest > 0
  assert max(jax.tree.leaves(errors)) <= tolerance * largest


# ----------------------------------------------------------------------- ratio one at equal weights


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_update_has_ratio_one_and_no_clipping(dtype):
  settings = make_settings(clip_range=1e-5)
  modules, params, _, frozen = world(dtype)
  prompts, trajectory, _ = painted(dtype)
  loss = functools.partial(alignment.policy_loss, modules, settings, steps_of(settings))
  evaluate = jax.jit(jax.grad(loss, has_aux=True))
  scores = made_up_scores()
  for index in range(STEPS):
    gradients, metrics = evaluate(params, frozen, prompts, trajectory, scores, jnp.array([index]))
    assert metrics["ppo/clip_fraction"] == 0.0  # every single ratio is within 1e-5 of 1
    assert metrics["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert 0 < optax.tree.norm(gradients) < 1e4


# ------------------------------------------------------------------------------ against torch


def torch_loss(settings: Settings, params, prompts, trajectory, scores, indices, frozen):
  """The loss by the formulas alone, through diffusers' UNet; returns (loss, metrics, UNet)."""
  import torch
  from diffusers import UNet2DConditionModel

  torch.set_num_threads(1)
  modules = world()[0]
  tensor = lambda x: torch.tensor(np.asarray(x))
  nchw = lambda x: tensor(x).permute(0, 3, 1, 2)

  def make_unet(tree):
    unet = UNet2DConditionModel.from_config(testing.tiny_configs()["unet"])
    unet.load_state_dict({name: tensor(x) for name, x in names.to_torch(tree).items()})
    return unet.eval()

  unet, base = make_unet(params), make_unet(frozen.base)
  alphas = torch.tensor(modules.schedule.alphas_cumprod, dtype=torch.float64)
  context = tensor(prompts.context).expand(B, -1, -1)
  # The part of the latents that counts: those of which any pixel is missing.
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
  prompts, trajectory, _ = painted()
  if settings.log_prob_region == "hole":
    # Any old log-probabilities near enough will do; those of the rollout are of all latents.
    trajectory = trajectory._replace(log_probs=hole_log_probs(settings, base, prompts, trajectory))
  params, scores, indices = perturbed(base), made_up_scores(), np.array([1, 3])
  arguments = params, frozen, prompts, trajectory, scores
  (loss, metrics), gradients = loss_and_gradient(settings)(*arguments, jnp.asarray(indices))
  expected, counts, unet = torch_loss(
    settings, params, prompts, trajectory, scores, indices, frozen
  )
  expected.backward()
  assert 0 < counts["clip_fraction"] < 1  # both branches are at work
  assert metrics["ppo/clip_fraction"] == pytest.approx(counts["clip_fraction"])
  assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
  if settings.kl_weight:
    assert metrics["ppo/kl_to_base"] == pytest.approx(counts["kl_to_base"], rel=1e-3)
  ours = names.to_torch(gradients)
  theirs = {name: parameter.grad.numpy() for name, parameter in unet.named_parameters()}
  assert_trees_close(dict(sorted(ours.items())), dict(sorted(theirs.items())), 1e-4)


def hole_log_probs(settings, params, prompts, trajectory):
  modules, steps = world()[0], steps_of(settings)
  weight = alignment.region(settings, prompts)

  @quick_jit
  def score(params, prompts, latents, x_prev, step):
    output = modules.predict(params, prompts, latents, step.timestep)
    return diffusion.step(modules.schedule, step, latents, output, x_prev=x_prev, weight=weight)[1]

  pairs = zip(trajectory.latents[:-1], trajectory.latents[1:], strict=True)
  return jnp.stack([score(params, prompts, *pair, steps.at(i)) for i, pair in enumerate(pairs)])


# ------------------------------------------------------- a policy of three numbers, for the rules


class ToyModules:
  """Predicts a·latents + b·masked latents + c·sin t: what an update does shows plainly."""

  schedule = diffusion.Schedule.from_config(testing.tiny_configs()["scheduler"])

  @staticmethod
  def predict(params, prompts: Prompts, latents, timestep):
    time = jnp.broadcast_to(jnp.sin(timestep / 100.0), latents.shape[:1])[:, None, None, None]
    return params["a"] * latents + params["b"] * prompts.masked_latents + params["c"] * time


TOY = {name: jnp.float32(value) for name, value in (("a", 0.9), ("b", 0.3), ("c", -0.2))}


def toy_prompts(seed: int = 0) -> Prompts:
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  mask = np.ones((B, 4, 4, 1), np.float32)
  return Prompts(mask, draw(B, 4, 4, 3), mask[:, ::2, ::2], draw(B, 2, 2, 4), draw(1, 1, 3))


def toy_rollout(settings: Settings, params, prompts: Prompts, seed: int) -> Trajectory:
  predict = lambda latents, t: ToyModules.predict(params, prompts, latents, t)
  noise = jax.random.normal(jax.random.key(seed), prompts.masked_latents.shape)
  key, steps = jax.random.key(seed + 100), steps_of(settings)
  return diffusion.rollout(predict, ToyModules.schedule, steps, noise, key)


TOY_FROZEN = Frozen(vae={}, reward={}, chol=None, context=jnp.zeros((1, 1, 3)), base=TOY)


def toy_loss(settings: Settings, params, prompts, trajectory, scores, indices):
  evaluate = functools.partial(
    alignment.policy_loss, ToyModules, settings, steps_of(settings), frozen=TOY_FROZEN
  )
  return jax.jit(jax.value_and_grad(evaluate, has_aux=True))(
    params, prompts=prompts, trajectory=trajectory, scores=scores, indices=indices
  )


def test_released_preset_has_the_numbers_of_the_released_code():
  config = get_config("released")
  adam = {"learning_rate": 2e-6, "adam_b1": 0.9, "adam_b2": 0.999, "adam_eps": 1e-8}
  expected = adam | {
    "weight_decay": 0.01,
    "clip_norm": None,
    "warmup_updates": 0,
    "gradient_accumulation": 3,
    "behaviour_refresh": 15,
    "batch_size": 16,
    "samples_per_prompt": 1,
    "num_steps": 50,
    "eta": 1.0,
    "train_timesteps": 5,
    "updates_per_iteration": 5,
    "clip_range": 1e-4,
    "advantage_clip": 10.0,
    "loss_reduction": "sum",
    "log_prob_region": "all",
    "kl_weight": 0.0,
    "skip_steps": (0, 0),
  }
  assert {name: config[name] for name in expected} == expected
  trust = {"norm": "released", "k": 0.05, "b": 0.7, "minimum": 1.0, "maximum": 2.21}
  assert {name: config.trust[name] for name in trust} == trust


def test_released_rhythm_equals_a_torch_loop():
  """Six iterations of five timesteps: two only accumulate, the third steps after each timestep."""
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  config = get_config("released")
  settings = dataclasses.replace(settings_from(config), behaviour_refresh=2)
  learning_rate = 1e-3  # the released 2e-6 would drown in the rounding of six iterations
  optimizer = alignment.make_optimizer(
    learning_rate, config.adam_b1, config.adam_b2, config.adam_eps, config.weight_decay
  )
  steps = steps_of(settings)
  state = alignment.init_state(settings, optimizer, TOY)
  update = jax.jit(functools.partial(alignment.update, ToyModules, settings, steps, optimizer))
  rng = np.random.default_rng(0)
  root = rng.normal(size=(6, 6))
  inverse = np.linalg.inv(0.01 * np.eye(6) + root @ root.T)
  frozen = TOY_FROZEN._replace(chol=np.linalg.cholesky(np.linalg.inv(inverse)))

  policy = {name: torch.nn.Parameter(torch.tensor(float(x))) for name, x in TOY.items()}
  stale = {name: parameter.detach().clone() for name, parameter in policy.items()}
  adam = torch.optim.AdamW(
    policy.values(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
  )
  alphas = torch.tensor(ToyModules.schedule.alphas_cumprod, dtype=torch.float64)

  def torch_log_prob(params, prompts, x, x_prev, t):
    noise = params["a"] * x + params["b"] * torch.tensor(prompts.masked_latents)
    noise = noise + params["c"] * math.sin(t / 100.0)
    alpha, alpha_prev = alphas[t], alphas[max(t - 20, 0)]
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    original = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    mean = alpha_prev.sqrt() * original + (1 - alpha_prev - variance).sqrt() * noise
    density = -((x_prev - mean) ** 2) / (2 * variance) - 0.5 * variance.log()
    return (density - 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))

  clip_fractions = []
  for iteration in range(6):
    assert int(state.iteration) == iteration
    prompts = toy_prompts(iteration)
    trajectory = toy_rollout(settings, state.behaviour, prompts, iteration)
    rewards = rng.normal(size=B).astype(np.float32)
    features = rng.normal(size=(B, 6)).astype(np.float32)
    indices = rng.permutation(50)[:5]
    scores = Scores(
      rewards,
      np.ones(B, bool),
      alignment.trust_weights(settings.trust, frozen.chol, features),
      rl.standardise(rewards, np.ones(B, bool), 1, "batch", 10.0),
    )
    for index in indices:
      one = jnp.array([index])
      state, metrics = update(state, frozen, prompts, trajectory, scores, one)
      clip_fractions.append(float(metrics["ppo/clip_fraction"]))
    state = alignment.end_iteration(settings, state)

    rewards, features = torch.tensor(rewards), torch.tensor(features)
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-7)).clamp(-10, 10)
    norm = (features.double() @ torch.tensor(inverse)).norm(dim=-1)
    trust = torch.exp(-0.05 * norm + 0.7).clamp(1.0, 2.21)
    for index in indices:
      t = 20 * (49 - int(index)) + 1
      x, x_prev = (torch.tensor(np.asarray(trajectory.latents[i])) for i in (index, index + 1))
      old = torch_log_prob(stale, prompts, x, x_prev, t)
      ratio = torch.exp(torch_log_prob(policy, prompts, x, x_prev, t) - old)
      inside = ratio.clamp(1 - 1e-4, 1 + 1e-4)
      (trust * torch.maximum(-advantages * ratio, -advantages * inside)).sum().backward()
      if iteration % 3 == 2:
        adam.step()
        adam.zero_grad()
    if iteration % 2 == 1:
      stale = {name: parameter.detach().clone() for name, parameter in policy.items()}
    for name, parameter in policy.items():
      moved = parameter.item() - float(TOY[name])
      assert float(state.params[name] - TOY[name]) == pytest.approx(moved, abs=1e-5), iteration
      assert float(state.behaviour[name]) == pytest.approx(stale[name].item(), abs=1e-5)
      assert (moved != 0) == (iteration >= 2)
  assert max(clip_fractions[:11]) == 0.0  # fresh until the first step,
  assert max(clip_fractions) > 0.5  # stale after it


def test_behaviour_is_the_policy_itself_when_refreshed_every_iteration():
  settings = make_settings(behaviour_refresh=1)
  state = alignment.init_state(settings, optax.sgd(1.0), TOY)
  assert state.behaviour is None and state.ema is None and state.gradients is None
  assert int(alignment.end_iteration(settings, state).iteration) == 1


def test_moving_average_follows_by_its_decay():
  settings = make_settings(ema_decay=0.75, updates_per_iteration=1)
  optimizer = optax.sgd(0.1)
  state = alignment.init_state(settings, optimizer, TOY)
  prompts = toy_prompts()
  trajectory = toy_rollout(settings, TOY, prompts, 0)
  steps, indices = steps_of(settings), jnp.array([0, 2])
  update = jax.jit(functools.partial(alignment.update, ToyModules, settings, steps, optimizer))
  after, _ = update(state, TOY_FROZEN, prompts, trajectory, made_up_scores(), indices)
  for name, before in TOY.items():
    assert float(after.params[name]) != float(before)
    expected = 0.75 * before + 0.25 * after.params[name]
    assert float(after.ema[name]) == pytest.approx(float(expected), rel=1e-6)


# --------------------------------------------------------------------------------------- KL


def test_kl_to_base_is_zero_at_the_base_and_the_closed_form_away_from_it():
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
    # The noise differs by 0.02·x, the mean by that times the derivative of the mean by the noise.
    factor = np.sqrt(1 - alpha_prev - variance) - np.sqrt(alpha_prev * (1 - alpha) / alpha)
    change = factor * 0.02 * np.asarray(trajectory.latents[index], np.float64)
    expected.append((change**2 / (2 * variance)).mean())
  assert metrics["ppo/kl_to_base"] == pytest.approx(np.mean(expected), rel=1e-4)
  total = float(metrics["ppo/policy_loss"]) + 2.0 * np.mean(expected)
  assert loss == pytest.approx(total, rel=1e-4)


# -------------------------------------------------------------------------------- NaN rewards


def test_sample_without_a_reward_changes_no_gradient_even_if_it_is_nan_throughout():
  settings = make_settings(kl_weight=0.5, updates_per_iteration=1)
  prompts = toy_prompts()
  trajectory = toy_rollout(settings, TOY, prompts, 0)
  indices, lost = np.array([1, 3]), 5
  moved = TOY | {"a": TOY["a"] + 0.001}

  valid = np.arange(B) != lost
  poison = lambda x, axis: jnp.where(
    jnp.expand_dims(valid, [i for i in range(x.ndim) if i != axis]), x, jnp.nan
  )
  scores = made_up_scores(valid)
  scores = scores._replace(reward=poison(scores.reward, 0), trust=poison(scores.trust, 0))
  (loss, metrics), gradients = toy_loss(
    settings,
    moved,
    prompts._replace(
      masked_latents=poison(prompts.masked_latents, 0),
      masked_image=poison(prompts.masked_image, 0),
    ),
    Trajectory(
      poison(trajectory.latents, 1), poison(trajectory.log_probs, 1), trajectory.timesteps
    ),
    scores,
    indices,
  )

  # The same without that sample at all.
  without = lambda x: np.delete(np.asarray(x), lost, axis=0)
  kept = Prompts(*(without(x) for x in prompts[:-1]), prompts.context)
  shorter = Trajectory(
    np.delete(trajectory.latents, lost, axis=1),
    np.delete(trajectory.log_probs, lost, axis=1),
    trajectory.timesteps,
  )
  (expected, expected_metrics), expected_gradients = toy_loss(
    settings, moved, kept, shorter, Scores(*map(without, made_up_scores(valid))), indices
  )
  assert loss == pytest.approx(float(expected), rel=1e-6)
  for name in expected_metrics:
    assert metrics[name] == pytest.approx(float(expected_metrics[name]), rel=1e-5, abs=1e-9), name
  assert_trees_close(gradients, expected_gradients, 1e-6)


def test_sample_without_a_reward_enters_no_statistic():
  settings = make_settings(Trust("mahalanobis", k=0.3))
  _, _, network, frozen = world()
  prompts, _, images = painted()
  lost = 5
  images = images.at[lost, 0, 0, 0].set(jnp.nan)
  score = jax.jit(functools.partial(alignment.score, network, settings))
  scores, metrics = score(frozen, prompts, images)

  kept = np.arange(B) != lost
  rewards, features = testing.tiny_reward().score(images, prompts.masked_image)
  np.testing.assert_array_equal(np.isfinite(rewards), kept)
  np.testing.assert_array_equal(scores.valid, kept)
  np.testing.assert_allclose(scores.reward[kept], rewards[kept], atol=1e-5)
  v_inverse = np.linalg.inv(testing.tiny_reward().bound.matrix)
  norm = np.sqrt(np.einsum("bi,ij,bj->b", features, v_inverse, features))
  trust = np.exp(0.7 - 0.3 * norm)
  np.testing.assert_allclose(scores.trust[kept], trust[kept], rtol=1e-4)
  assert np.isfinite(scores.trust).all()

  groups = [group[np.isfinite(group)] for group in rewards.reshape(PROMPTS, SAMPLES)]
  centred = np.concatenate([group - group.mean() for group in groups])
  advantages = centred / np.sqrt((centred**2).sum() / (len(centred) - 1))
  np.testing.assert_allclose(scores.advantages[kept], advantages, atol=1e-3)
  assert scores.advantages[lost] == 0.0

  finite = rewards[kept].astype(np.float64)
  within = np.mean([group.std(ddof=1) for group in groups if len(group) > 1])
  expected = {
    "reward/mean": finite.mean(),
    "reward/std": finite.std(),
    "reward/min": finite.min(),
    "reward/max": finite.max(),
    "reward/nan_fraction": 1 / B,
    "reward/within_prompt_std": within,
    "trust/mean": trust[kept].mean(),
    "trust/std": trust[kept].std(),
    "trust/min": trust[kept].min(),
    "trust/max": trust[kept].max(),
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    assert float(metrics[name]) == pytest.approx(value, rel=1e-3, abs=1e-5), name


# -------------------------------------------------------------------------------- trust weights


def test_trust_weights_equal_their_formulas():
  rng = np.random.default_rng(0)
  z = rng.normal(size=(5, 3))
  root = rng.normal(size=(3, 3))
  matrix = root @ root.T + 0.1 * np.eye(3)
  inverse, chol = np.linalg.inv(matrix), np.linalg.cholesky(matrix).astype(np.float32)
  weights = lambda **kwargs: alignment.trust_weights(Trust(**kwargs), chol, z.astype(np.float32))

  mahalanobis = np.sqrt(np.einsum("bi,ij,bj->b", z, inverse, z))
  released = np.linalg.norm(z @ inverse, axis=1)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
  close(weights(norm="mahalanobis"), np.exp(0.7 - 0.05 * mahalanobis))
  close(weights(norm="mahalanobis", k=2.0, b=0.1), np.exp(0.1 - 2.0 * mahalanobis))
  clamped = np.clip(np.exp(0.7 - 0.5 * released), 1.0, 1.5)
  close(weights(norm="released", k=0.5, minimum=1.0, maximum=1.5), clamped)
  assert len({*clamped.round(3)}) > 2 and clamped.min() == 1.0  # the clamp is at work
  close(weights(norm="constant", constant=1.3), np.full(5, 1.3))
  close(weights(norm="none"), np.ones(5))


def test_only_norms_need_a_bound():
  needs = {norm: Trust(norm).needs_bound for norm in alignment.TRUST_NORMS}
  assert needs == {"mahalanobis": True, "released": True, "constant": False, "none": False}
  with pytest.raises(ValueError, match=r"trust\.norm is 'euclid'; give one of mahalanobis"):
    Trust("euclid")


# --------------------------------------------------------------------------------- chunks, passes


@pytest.mark.parametrize("size", [0, 1, 2, 4, 5, 8, 100])
def test_chunks_give_what_the_whole_gives(size):
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 8, 3)).astype(np.float32)
  seen = []

  def function(x, y):
    seen.append(x.shape[0])
    return {"sum": jnp.tanh(x) + y, "square": (x**2).sum(-1)}

  whole, chunked = function(x, y), alignment.in_chunks(function, size, x, y)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), chunked, whole)
  assert max(seen[1:]) <= (size or 8)


def test_scores_and_pictures_do_not_depend_on_the_chunk():
  modules, _, network, frozen = world()
  prompts, trajectory, images = painted()
  score = lambda chunk: jax.jit(
    functools.partial(alignment.score, network, make_settings(decode_batch=chunk))
  )(frozen, prompts, images)[0]
  for ours, expected in zip(score(4), score(0), strict=True):
    np.testing.assert_allclose(ours, expected, atol=1e-4)
  decode = jax.jit(functools.partial(alignment.decode, modules), static_argnames="chunk")
  ours = decode(frozen.vae, trajectory.latents[-1], prompts, chunk=2)
  np.testing.assert_allclose(ours, images, atol=1e-5)
  known = np.broadcast_to(prompts.mask == 0, images.shape)
  np.testing.assert_array_equal(np.asarray(images)[known], np.asarray(prompts.masked_image)[known])


@pytest.mark.slow
def test_passes_and_rematerialisation_leave_the_gradient_as_it_is():
  modules, params, _, frozen = world()
  prompts, trajectory, _ = painted()
  settings = make_settings(updates_per_iteration=1, timesteps_per_pass=1)
  optimizer = optax.sgd(1.0)  # so that an update is the gradient
  update = functools.partial(alignment.update, modules, settings, steps_of(settings), optimizer)
  state = alignment.init_state(settings, optimizer, jax.tree.map(jnp.asarray, params))
  arguments = frozen, prompts, trajectory, made_up_scores(), jnp.array([0, 3])

  (_, expected), whole = loss_and_gradient(settings)(params, *arguments)
  after, metrics = quick_jit(update)(state, *arguments)
  assert_trees_close(jax.tree.map(jnp.subtract, params, after.params), whole, 1e-4)
  for name, value in expected.items():
    assert metrics[name] == pytest.approx(float(value), rel=1e-3, abs=1e-6), name
  _, recomputed = loss_and_gradient(settings, remat=True)(params, *arguments)
  assert_trees_close(recomputed, whole, 1e-4)


# ------------------------------------------------------------------------------------- devices


@pytest.mark.slow
def test_eight_devices_equal_one():
  modules, params, network, frozen = world()
  settings = make_settings(updates_per_iteration=1, timesteps_per_pass=0, decode_batch=8)
  steps, optimizer = steps_of(settings), optax.sgd(1.0)
  pictures, masks = testing.tiny_prompts(8)

  def iterate(devices):
    mesh = sharding.make_mesh(data=len(devices), devices=devices)
    images, holes = sharding.to_global(mesh, (pictures, masks))
    everywhere = functools.partial(jax.device_put, device=sharding.replicated(mesh))
    policy, rest = everywhere(params), everywhere(frozen)
    rollout = quick_jit(functools.partial(alignment.rollout, modules, settings, steps))
    prompts, trajectory, painted = rollout(policy, rest, images, holes, jax.random.key(0))
    score = quick_jit(functools.partial(alignment.score, network, settings))
    scores, score_metrics = score(rest, prompts, painted)
    assert len(scores.reward.sharding.device_set) == len(devices)
    state = alignment.init_state(settings, optimizer, policy)
    update = quick_jit(functools.partial(alignment.update, modules, settings, steps, optimizer))
    after, metrics = update(state, rest, prompts, trajectory, scores, jnp.array([1, 2]))
    gradients = jax.tree.map(jnp.subtract, policy, after.params)
    return jax.device_get((painted, scores, score_metrics | metrics, gradients))

  images, scores, metrics, gradients = iterate(jax.devices())
  one_images, one_scores, one_metrics, one_gradients = iterate(jax.devices()[:1])
  np.testing.assert_allclose(images, one_images, atol=1e-4)
  for name, ours in scores._asdict().items():
    np.testing.assert_allclose(ours, one_scores._asdict()[name], atol=1e-3, err_msg=name)
  for name, value in metrics.items():
    assert value == pytest.approx(one_metrics[name], rel=1e-3, abs=1e-4), name
  assert_trees_close(gradients, one_gradients, 2e-3)
