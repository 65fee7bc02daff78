"""All algorithms reach the optimum of a Gaussian policy in two dimensions, which is known.

The policy's samples are N(m, s² I): its network is the exact ε of that distribution, and m is its
one parameter. The reward −‖x − g‖² is highest, over all m, at m = g. Pairs are preferred with the
log-odds a·(w − l), for which Diffusion-DPO's margin at timestep t is (β k²/2) m·(w − l) with
k = √(ᾱ (1−ᾱ)) / (ᾱ s² + 1 − ᾱ), so that its optimum is m = 2a / (β k²).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alignment_world import ToyModules, make_settings, quick_jit

from prefpaint_jax.align import dpo, ppo, update
from prefpaint_jax.align.pair_update import prediction_errors
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
from prefpaint_jax.models.pipeline import Modules

pytestmark = pytest.mark.slow
SAMPLES, SPREAD = 256, 0.5
GOAL = np.array([0.8, -0.6], np.float32)


class GaussianModules(Modules):
  """Predicts ε̂ = √(1−ᾱ) (x_t − √ᾱ m) / (ᾱ s² + 1 − ᾱ), the mean of ε given x_t."""

  schedule = ToyModules.schedule

  def __init__(self):
    """Makes no networks."""

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
  sampler, optimizer = Sampler(GaussianModules(), settings, steps), optax.adam(0.03)
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


def test_dpo_reaches_the_optimum_of_pairs_and_capo_the_gap_of_their_scores():
  B, beta, timestep, liking = 8192, 50.0, 501, np.array([1.5, -1.0])
  rng = np.random.default_rng(0)
  pairs = SPREAD * rng.normal(size=(B, 2, 2))
  odds = (pairs[:, 0] - pairs[:, 1]) @ liking
  swapped = rng.random(B) > 1 / (1 + np.exp(-odds))
  pairs[swapped] = pairs[swapped][:, ::-1]
  clean = jnp.asarray(pairs.reshape(2 * B, 1, 1, 2), jnp.float32)
  one = jnp.ones((2 * B, 1, 1, 1))
  prompts = Prompts(one, one, one, jnp.zeros_like(clean), Context(jnp.zeros((1, 1, 1))))
  noise = jnp.repeat(jax.random.normal(jax.random.key(0), clean[::2].shape), 2, axis=0)
  t = jnp.full(2 * B, timestep)
  errors = lambda m: prediction_errors(
    GaussianModules(), "hole", {"m": m}, prompts, clean, noise, t
  ).reshape(B, 2)
  reference = errors(jnp.zeros(2))
  margin = lambda m: dpo.preference_margin(errors(m), reference, beta)

  alpha = float(GaussianModules.schedule.alphas_cumprod[timestep])
  slope = beta * alpha * (1 - alpha) / (alpha * SPREAD**2 + 1 - alpha) ** 2 / 2
  gap = jnp.asarray((pairs[:, 0] - pairs[:, 1]) @ liking, jnp.float32)
  for loss in (lambda m: dpo.dpo_loss(margin(m)), lambda m: dpo.capo_loss(margin(m), gap)):
    optimizer, m = optax.adam(0.02), jnp.zeros(2)
    state = optimizer.init(m)

    @quick_jit
    def step(m, state, loss=loss, optimizer=optimizer):
      changes, state = optimizer.update(jax.grad(lambda m: loss(m).mean())(m), state)
      return m + changes, state

    for _ in range(200):
      m, state = step(m, state)
    np.testing.assert_allclose(m, liking / slope, rtol=0.08)
