"""The sliding window of steps with noise: its positions, its draws and its chain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alignment_world import make_settings, quick_jit, sampler_of, world

from prefpaint_jax import testing
from prefpaint_jax.align import rollout as rollout_lib
from prefpaint_jax.align.stages import make_stages
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.runtime import sharding


def test_window_slides_over_the_trained_steps_and_begins_again():
  settings = make_settings(
    num_steps=6, skip_steps=(1, 1), window=2, window_iterations=3, train_timesteps=2
  )
  modules, base, objective, _ = world()
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  stages = make_stages(sampler_of(modules, settings), objective, optax.sgd(1.0), mesh, base)
  assert [int(stages.window(i)) for i in range(0, 15, 3)] == [1, 2, 3, 1, 2]
  drawn = stages.draw_timesteps(jax.random.key(0), stages.window(5))
  assert sorted(np.concatenate(drawn)) == [2, 3]


@pytest.mark.slow
def test_chain_has_noise_in_its_window_only():
  settings = make_settings(window=2, train_timesteps=2)
  modules, params, _, frozen = world()
  sampler = sampler_of(modules, settings)
  rollout = quick_jit(functools.partial(rollout_lib.rollout, sampler))
  predict = quick_jit(modules.predict)
  prompts, record, _ = rollout(
    params, frozen, *testing.tiny_prompts(4), jax.random.key(0), None, np.int32(1)
  )
  for index in range(settings.num_steps):
    step = sampler.steps.at(index)._replace(sigma=jnp.float32(0))
    output = predict(params, prompts, record.latents[index], step.timestep)
    mean = ddim.predict_mean(modules.schedule, step, record.latents[index], output)
    is_deterministic = np.allclose(mean, record.latents[index + 1], atol=1e-4)
    assert is_deterministic == (index not in (1, 2))
    assert np.any(record.log_probs[index] != 0) == (index in (1, 2))
