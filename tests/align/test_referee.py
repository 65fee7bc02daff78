"""The referee warns of a rising reward with a falling judge, of drift, and of lost diversity."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from alignment_world import PROMPTS, make_settings, quick_jit, sampler_of, world

from prefpaint_jax import testing
from prefpaint_jax.align.referee import Referee
from prefpaint_jax.align.rollout import kl_to_base, rollout
from prefpaint_jax.diffusion import ddim


def line(reward: float, judge: float, width: float = 0.1) -> dict[str, float]:
  """Returns the metrics of a measurement, with intervals of `width` on each side."""
  metrics = {}
  for name, gain in (("reward", reward), ("judge/other", judge)):
    ends = {"": gain, "/low": gain - width, "/high": gain + width}
    metrics |= {f"held_out/{name}_gain{end}": value for end, value in ends.items()}
  return metrics


BASE = {
  "brightness": np.array([[0.4, 0.6], [0.5, 0.5]]),  # standard deviation 0.07
  "distance": np.full((2, 2), 0.2),
  "known_pixels": np.zeros((2, 2)),
  "reward": np.zeros((2, 2)),
}
BEGIN = dict.fromkeys(line(0, 0), 0.0)


def verdict(lines, policy=BASE):
  referee = Referee()
  for iteration, one in enumerate(lines):
    metrics, warnings = referee.look(iteration, one, policy, BASE)
  return metrics, warnings


@pytest.mark.parametrize(
  ("lines", "hacked"),
  [
    ([BEGIN, line(0.5, 0.3)], False),  # both rise
    ([BEGIN, line(0.5, -0.3)], True),  # the judge falls below the base
    ([BEGIN, line(0.5, -0.05)], False),  # within its interval
    ([BEGIN, line(-0.5, -0.3)], False),  # both fall
    ([BEGIN, line(0.5, 0.5), line(0.8, 0.1)], True),  # the judge falls from its best
    ([BEGIN, line(0.5, 0.5), line(0.8, 0.4)], False),
    ([line(0.5, -0.3)], False),  # there is nothing to compare with
  ],
)
def test_hacking_is_a_reward_that_rises_while_a_judge_falls(lines, hacked):
  metrics, warnings = verdict(lines)
  assert metrics == {"referee/hacking": hacked, "referee/drift": 0, "referee/diversity": 0}
  assert len(warnings) == hacked
  if hacked:
    assert "the judge other falls from" in warnings[0] and "\n" not in warnings[0]


def test_resumed_run_judges_as_an_uninterrupted_one():
  lines = [BEGIN, line(0.5, 0.5), line(0.8, 0.1)]
  written = [one | {"iteration": i} for i, one in enumerate(lines)]
  resumed = Referee([{"iteration": 1, "reward/mean": 0.1}, *written[:2]])
  assert resumed.look(2, lines[2], BASE, BASE) == verdict(lines)
  assert resumed.last_good == 1


def test_measure_that_leaves_the_spread_of_the_base_is_drift():
  inside, outside = (BASE | {"brightness": BASE["brightness"] + d} for d in (0.06, 0.08))
  assert verdict([BEGIN], inside)[0]["referee/drift"] == 0
  metrics, (warning,) = verdict([BEGIN], outside)
  assert metrics["referee/drift"] == 1 and warning.startswith("brightness of the samples changes")


def test_samples_of_a_prompt_that_become_equal_are_a_collapse_of_diversity():
  metrics, (warning,) = verdict([BEGIN], BASE | {"distance": np.full((2, 2), 0.09)})
  assert metrics["referee/diversity"] == 1 and "diversity collapses" in warning


@pytest.mark.slow
def test_kl_to_base_is_the_sum_over_the_steps_and_latents_of_a_chain():
  settings = dataclasses.replace(make_settings(), samples_per_prompt=1)
  modules, base, _, frozen = world()
  sampler = sampler_of(modules, settings)
  policy = jax.tree.map(lambda x: 1.02 * x, base)
  images, masks = testing.tiny_prompts(PROMPTS)
  key = jax.random.key(0)
  found = quick_jit(functools.partial(kl_to_base, sampler))(
    policy, base, frozen, images, masks, key
  )
  prompts, trajectory, _ = quick_jit(functools.partial(rollout, sampler))(
    policy, frozen, images, masks, key
  )
  predict = quick_jit(modules.predict)
  total, steps = np.zeros(PROMPTS), sampler.steps
  for i, t in enumerate(steps.timestep):
    latents = trajectory.latents[i]
    mean, base_mean = (
      ddim.predict_mean(modules.schedule, steps.at(i), latents, predict(one, prompts, latents, t))
      for one in (policy, base)
    )
    apart = np.asarray(mean - base_mean, np.float64) ** 2
    total += (apart / (2 * float(steps.sigma[i]) ** 2)).sum((1, 2, 3))
  assert total.min() > 0.01
  np.testing.assert_allclose(found, total, rtol=1e-4)
