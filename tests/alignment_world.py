"""Shared by the alignment tests: tiny models, one rollout, and a policy with three parameters.

The models and the rollout are made once per process.
"""

import dataclasses
import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax import testing
from prefpaint_jax.align import rollout as rollout_lib
from prefpaint_jax.align import update
from prefpaint_jax.align.settings import Settings, Trust, settings_from
from prefpaint_jax.align.state import Experience, Frozen, Sampler, Scores
from prefpaint_jax.align.texts import Texts
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.diffusion.ddim import Trajectory
from prefpaint_jax.diffusion.schedule import Schedule
from prefpaint_jax.models import architectures
from prefpaint_jax.models.conditioning import Context, Prompts
from prefpaint_jax.rewards.objective import Objective
from prefpaint_jax.rewards.prefpaint import as_reward

get_config = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "rl.py"))["get_config"]
WORLD = dict.fromkeys(("policy", "reward", "prompts"), "")  # no path is read
PROMPTS, SAMPLES, STEPS = 4, 2, 4
B = PROMPTS * SAMPLES


def make_settings(trust: Trust | None = None, **changes) -> Settings:
  config = get_config()
  config.update_from_flattened_dict(testing.tiny_training(WORLD) | {"num_steps": STEPS})
  return dataclasses.replace(settings_from(config), trust=trust or Trust(), **changes)


# Less optimisation, for tests that do not depend on it: most of their time is compilation.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


@functools.cache
def world(dtype: str = "float32"):
  """Returns (modules, UNet parameters, objective, frozen trees) of the tiny models."""
  inpainter, reward_model = testing.tiny_inpainter(dtype=dtype), testing.tiny_reward(dtype=dtype)
  base = inpainter.params["unet"]
  objective = Objective((as_reward("tiny", reward_model.network, reward_model.params),))
  frozen = Frozen(
    vae=inpainter.params["vae"],
    reward=objective.params,
    whitening=reward_model.bound.whitening.astype(np.float32),
    context=inpainter.empty_context,
    base=base,
  )
  return inpainter.modules, base, objective, frozen


TEXTS = ["a warm sky", "", "cold water", "a warm sky"]


def contexts(mesh, dtype: str, number: int) -> Context:
  """Encodes TEXTS, repeated to `number`, as a run does."""
  inpainter = testing.tiny_inpainter(dtype=dtype)
  empty, encoders = inpainter.empty_context, inpainter.text_params
  texts = Texts(inpainter.modules, encoders, inpainter.tokenize, empty, mesh, number)
  return texts(TEXTS * (number // len(TEXTS)))


def steps_of(settings: Settings) -> ddim.Steps:
  return ddim.ddim_steps(world()[0].schedule, settings.num_steps, settings.eta)


def sampler_of(modules, settings: Settings) -> Sampler:
  return Sampler(modules, settings, steps_of(settings))


@functools.cache
def one_rollout(dtype: str = "float32"):
  """Returns (prompts, trajectory, samples) of one rollout of the tiny models."""
  settings = make_settings()
  modules, params, _, frozen = world(dtype)
  rollout = jax.jit(functools.partial(rollout_lib.rollout, sampler_of(modules, settings)))
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


def assert_trees_close(ours, expected, tolerance: float) -> None:
  """Asserts that no error is above `tolerance` times the largest absolute value of all leaves."""
  assert jax.tree.structure(ours) == jax.tree.structure(expected)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
  errors = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), ours, expected)
  assert largest > 0
  assert max(jax.tree.leaves(errors)) <= tolerance * largest


# ----------------------------------------------------------------- a policy with three parameters
class ToyModules:
  """Predicts a·latents + b·masked latents + c·sin t, which a test can compute by hand."""

  schedule = Schedule.from_config(architectures.tiny_configs()["scheduler"])

  @staticmethod
  def predict(params, prompts: Prompts, latents, timestep):
    time = jnp.broadcast_to(jnp.sin(timestep / 100.0), latents.shape[:1])[:, None, None, None]
    return params["a"] * latents + params["b"] * prompts.masked_latents + params["c"] * time

  @staticmethod
  def round_params(params):
    return params


TOY = {name: jnp.float32(value) for name, value in (("a", 0.9), ("b", 0.3), ("c", -0.2))}


def toy_prompts(seed: int = 0) -> Prompts:
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  mask = np.ones((B, 4, 4, 1), np.float32)
  return Prompts(
    mask, draw(B, 4, 4, 3), mask[:, ::2, ::2], draw(B, 2, 2, 4), Context(draw(1, 1, 3))
  )


def toy_rollout(settings: Settings, params, prompts: Prompts, seed: int) -> Trajectory:
  predict = lambda latents, t: ToyModules.predict(params, prompts, latents, t)
  noise = jax.random.normal(jax.random.key(seed), prompts.masked_latents.shape)
  key, steps = jax.random.key(seed + 100), steps_of(settings)
  return ddim.rollout(predict, ToyModules.schedule, steps, noise, key)


TOY_FROZEN = Frozen(
  vae={}, reward=({},), whitening=None, context=Context(jnp.zeros((1, 1, 3))), base=TOY
)


def loss_of(modules, settings: Settings):
  """Returns `policy_loss` of a whole update as a function.

  Its arguments are (params, frozen, prompts, trajectory, scores, indices).
  """
  sampler = sampler_of(modules, settings)

  def loss(params, frozen, prompts, trajectory, scores, indices):
    count = jnp.maximum(scores.valid.sum(), 1) * indices.shape[0]
    experience = Experience(prompts, trajectory, scores)
    batch = update.batch_of(sampler, experience, indices)
    return update.policy_loss(sampler, params, frozen.base, batch, count)

  return loss


def toy_loss(settings: Settings, params, *arguments):
  measure = jax.jit(jax.value_and_grad(loss_of(ToyModules, settings), has_aux=True))
  return measure(params, TOY_FROZEN, *arguments)
