"""The settings and the update of the released code, compared with a loop in torch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alignment_world import (
  TOY,
  TOY_FROZEN,
  B,
  ToyModules,
  get_config,
  made_up_scores,
  make_settings,
  sampler_of,
  toy_prompts,
  toy_rollout,
)

from prefpaint_jax.align import ppo, score
from prefpaint_jax.align import update as update_lib
from prefpaint_jax.align.optimizer import make_optimizer
from prefpaint_jax.align.settings import settings_from
from prefpaint_jax.align.state import Experience, Scores, init_state
from prefpaint_jax.align.update import end_iteration

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_released_preset_has_the_settings_of_the_released_code():
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
    "vae_posterior": "sample",
    "skip_steps": (0, 0),
  }
  assert {name: config[name] for name in expected} == expected
  trust = {"norm": "released", "k": 0.05, "b": 0.7, "minimum": 1.0, "maximum": 2.21}
  assert {name: config.trust[name] for name in trust} == trust


def test_released_updates_equal_a_torch_loop():
  """Six iterations of five timesteps each.

  Of every three iterations, two accumulate gradients and the third steps after each timestep. The
  loop copies the policy at the top of the iterations 2, 4 and 6, counted from 1 as in the released
  code.
  """
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  config = get_config("released")
  settings = dataclasses.replace(settings_from(config), behaviour_refresh=2)
  learning_rate = 1e-3  # 2e-6, the released rate, would be below the rounding error of float32
  optimizer = make_optimizer(
    "adamw", learning_rate, config.adam_b1, config.adam_b2, config.adam_eps, config.weight_decay
  )
  sampler = sampler_of(ToyModules, settings)
  state = init_state(sampler, optimizer, TOY)
  update = jax.jit(functools.partial(update_lib.update, sampler, optimizer))
  rng = np.random.default_rng(0)
  root = rng.normal(size=(6, 6))
  inverse = np.linalg.inv(0.01 * np.eye(6) + root @ root.T)
  frozen = TOY_FROZEN._replace(whitening=np.linalg.cholesky(inverse).T)

  policy = {name: torch.nn.Parameter(torch.tensor(float(x))) for name, x in TOY.items()}
  behaviour = {name: parameter.detach().clone() for name, parameter in policy.items()}
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
    if (iteration + 1) % 2 == 0:
      behaviour = {name: parameter.detach().clone() for name, parameter in policy.items()}
    for name in policy:
      assert float(state.behaviour[name]) == pytest.approx(behaviour[name].item(), abs=1e-5)
    prompts = toy_prompts(iteration)
    trajectory = toy_rollout(settings, state.behaviour, prompts, iteration)
    rewards = rng.normal(size=B).astype(np.float32)
    features = rng.normal(size=(B, 6)).astype(np.float32)
    indices = rng.permutation(50)[:5]
    scores = Scores(
      rewards,
      np.ones(B, bool),
      score.trust_weights(settings.trust, frozen.whitening, features),
      ppo.standardise(rewards, np.ones(B, bool), 1, "batch", 10.0),
    )
    for index in indices:
      one = jnp.array([index])
      state, metrics = update(state, frozen, Experience(prompts, trajectory, scores), one)
      clip_fractions.append(float(metrics["ppo/clip_fraction"]))
    state = end_iteration(settings, state)

    rewards, features = torch.tensor(rewards), torch.tensor(features)
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-7)).clamp(-10, 10)
    norm = (features.double() @ torch.tensor(inverse)).norm(dim=-1)
    trust = torch.exp(-0.05 * norm + 0.7).clamp(1.0, 2.21)
    for index in indices:
      t = 20 * (49 - int(index)) + 1
      x, x_prev = (torch.tensor(np.asarray(trajectory.latents[i])) for i in (index, index + 1))
      old = torch_log_prob(behaviour, prompts, x, x_prev, t)
      ratio = torch.exp(torch_log_prob(policy, prompts, x, x_prev, t) - old)
      inside = ratio.clamp(1 - 1e-4, 1 + 1e-4)
      (trust * torch.maximum(-advantages * ratio, -advantages * inside)).sum().backward()
      if iteration % 3 == 2:
        adam.step()
        adam.zero_grad()
    for name, parameter in policy.items():
      moved = parameter.item() - float(TOY[name])
      assert float(state.params[name] - TOY[name]) == pytest.approx(moved, abs=1e-5), iteration
      assert (moved != 0) == (iteration >= 2)
  # Both policies are equal until the first optimiser step; then the behaviour policy is older.
  assert max(clip_fractions[:11]) == 0.0
  assert max(clip_fractions) > 0.5


def test_behaviour_policy_is_as_many_updates_old_as_in_the_released_code():
  """The released code counts iterations from 1 and copies at the top of 15, 30, ..."""
  settings = settings_from(get_config("released"))
  updates = {"a": jnp.zeros(())}  # a policy that counts its updates
  state = init_state(sampler_of(ToyModules, settings), optax.sgd(1.0), updates)
  step = jax.jit(functools.partial(end_iteration, settings))
  ages, done = [], 0
  for _ in range(45):
    ages.append(done - int(state.behaviour["a"]))
    done += 5 * (int(state.iteration) % settings.gradient_accumulation == 2)
    state = step(state._replace(params={"a": jnp.float32(done)}))

  expected, done, copied = [], 0, 0
  for iteration in range(1, 46):
    copied = done if iteration % 15 == 0 else copied
    expected.append(done - copied)
    done += 5 if iteration % 3 == 0 else 0
  assert ages == expected
  assert ages[14:29] == [0, 5, 5, 5, 10, 10, 10, 15, 15, 15, 20, 20, 20, 25, 25]


def test_state_has_no_behaviour_policy_if_refreshed_every_iteration():
  settings = make_settings(behaviour_refresh=1)
  state = init_state(sampler_of(ToyModules, settings), optax.sgd(1.0), TOY)
  assert state.behaviour is None and state.ema is None and state.gradients is None
  assert int(end_iteration(settings, state).iteration) == 1


def test_moving_average_moves_by_one_minus_its_decay():
  settings = make_settings(ema_decay=0.75, updates_per_iteration=1)
  optimizer = optax.sgd(0.1)
  sampler = sampler_of(ToyModules, settings)
  state = init_state(sampler, optimizer, TOY)
  prompts = toy_prompts()
  trajectory = toy_rollout(settings, TOY, prompts, 0)
  indices = jnp.array([0, 2])
  update = jax.jit(functools.partial(update_lib.update, sampler, optimizer))
  experience = Experience(prompts, trajectory, made_up_scores())
  after, _ = update(state, TOY_FROZEN, experience, indices)
  for name, before in TOY.items():
    assert float(after.params[name]) != float(before)
    expected = 0.75 * before + 0.25 * after.params[name]
    assert float(after.ema[name]) == pytest.approx(float(expected), rel=1e-6)
