"""All algorithms reach the optimum of a Gaussian policy in two dimensions, which is known.

The policy's samples are N(m, s² I): its network is the exact ε of that distribution, and m is its
one parameter. The reward −‖x − g‖² is highest, over all m, at m = g.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alignment_world import ToyModules, make_settings, quick_jit

from prefpaint_jax.align import ppo, update
from prefpaint_jax.align.settings import Nft
from prefpaint_jax.align.state import (
  Endpoint,
  Experience,
  Frozen,
  Sampler,
  Scores,
  behaviour_params,
  init_state,
)
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.models.conditioning import Context, Prompts

SAMPLES, SPREAD = 256, 0.5
GOAL = np.array([0.8, -0.6], np.float32)


class GaussianModules:
  """Predicts ε̂ = √(1−ᾱ) (x_t − √ᾱ m) / (ᾱ s² + 1 − ᾱ), the mean of ε given x_t."""

  schedule = ToyModules.schedule
  round_params = staticmethod(lambda params: params)

  @classmethod
  def predict(cls, params, prompts, latents, timestep):
    alpha = jnp.asarray(cls.schedule.alphas_cumprod, jnp.float32)[timestep]
    alpha = jnp.broadcast_to(alpha, latents.shape[:1])[:, None, None, None]
    variance = alpha * SPREAD**2 + 1 - alpha
    return jnp.sqrt(1 - alpha) * (latents - jnp.sqrt(alpha) * params["m"]) / variance


@pytest.mark.parametrize(
  "changes",
  [
    {"clip_range": 0.01},
    {"clip_range": 0.01, "ratio_normalisation": True},
    {"clip_range": 0.01, "window": 4, "window_iterations": 2},
    {"algorithm": "nft", "advantage_clip": 5.0},
    {"algorithm": "nft", "advantage_clip": 5.0, "nft": Nft(beta=0.1), "eta": 0.0},
    {"algorithm": "awm", "clip_range": 0.1},
  ],
  ids=["ppo", "guard", "window", "nft", "nft_ode", "awm"],
)
def test_mean_of_the_policy_reaches_the_optimum(changes):
  settings = make_settings(
    num_steps=8, train_timesteps=4, updates_per_iteration=1, samples_per_prompt=1, **changes
  )
  schedule = GaussianModules.schedule
  steps = ddim.ddim_steps(schedule, settings.num_steps, settings.eta)
  sampler, optimizer = Sampler(GaussianModules, settings, steps), optax.adam(0.03)
  zeros = jnp.zeros((SAMPLES, 1, 1, 2))
  one = jnp.ones((SAMPLES, 1, 1, 1))
  prompts = Prompts(one, one, one, zeros, Context(jnp.zeros((1, 1, 1))))
  frozen = Frozen({}, ({},), None, prompts.context, None)

  @quick_jit
  def iterate(state, key):
    noise_key, chain_key, forward_key, step_key = jax.random.split(key, 4)
    predict = functools.partial(GaussianModules.predict, behaviour_params(state), prompts)
    noise, used = jax.random.normal(noise_key, zeros.shape), steps
    window = None
    if settings.window:
      window = state.iteration // settings.window_iterations % (8 - settings.window + 1)
      index = jnp.arange(8)
      inside = (index >= window) & (index < window + settings.window)
      used = steps._replace(sigma=jnp.where(inside, steps.sigma, 0.0))
    record = ddim.rollout(predict, schedule, used, noise, chain_key)._replace(key=chain_key)
    latents = record.latents[-1]
    if not settings.keeps_chain:
      record = Endpoint(latents, forward_key)
    reward = -jnp.sum((latents.reshape(SAMPLES, 2) - GOAL) ** 2, axis=1)
    valid = jnp.ones(SAMPLES, bool)
    advantages = ppo.standardise(reward, valid, clip=settings.advantage_clip)
    experience = Experience(prompts, record, Scores(reward, valid, jnp.ones(SAMPLES), advantages))
    indices = ppo.draw_timesteps(step_key, settings.window or 8, 4) + (
      0 if window is None else window
    )
    state, _ = update.update(sampler, optimizer, state, frozen, experience, indices)
    return update.end_iteration(settings, state), latents

  state = init_state(sampler, optimizer, {"m": jnp.zeros(2)})
  means = []
  for iteration in range(150):
    state, latents = iterate(state, jax.random.key(iteration))
    means.append(state.params["m"])
  np.testing.assert_allclose(np.mean(means[-50:], axis=0), GOAL, atol=0.1)
  # The samples are those of the policy.
  np.testing.assert_allclose(np.mean(latents, axis=0).reshape(2), GOAL, atol=0.25)
