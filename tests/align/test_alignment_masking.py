"""Samples without a finite reward, batches in chunks, and batches split over eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alignment_world import (
  PROMPTS,
  SAMPLES,
  TOY,
  TOY_FROZEN,
  B,
  ToyModules,
  assert_trees_close,
  made_up_scores,
  make_settings,
  one_rollout,
  quick_jit,
  sampler_of,
  toy_loss,
  toy_prompts,
  toy_rollout,
  world,
)

from prefpaint_jax import testing
from prefpaint_jax.align import rollout as rollout_lib
from prefpaint_jax.align import score as score_lib
from prefpaint_jax.align import update as update_lib
from prefpaint_jax.align.rollout import in_chunks
from prefpaint_jax.align.settings import Trust
from prefpaint_jax.align.state import Experience, Frozen, Scores, init_state
from prefpaint_jax.diffusion.ddim import Trajectory
from prefpaint_jax.models.reward import apply
from prefpaint_jax.rewards.objective import Objective
from prefpaint_jax.rewards.reward import Reward
from prefpaint_jax.runtime import sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")


# ------------------------------------------------------------------------------- invalid samples
def test_the_reward_that_is_not_finite_is_named_and_no_reward_needs_features():
  counts = lambda images: images.sum((1, 2, 3)) - 100.0 * images[:, 0, 0, 0]
  broken = lambda images: jnp.where(images[:, 0, 0, 0] > 0.5, jnp.nan, 1.0)
  rewards = [
    Reward(name, lambda params, images, *_, function=function: (function(images), None))
    for name, function in (("whole", counts), ("mine", broken))
  ]
  settings = make_settings(Trust("none"))
  samples = jnp.arange(B)[:, None, None, None] / B * jnp.ones((B, 4, 4, 3))
  frozen = Frozen(None, ({}, {}), None, None, None)
  objective = Objective(tuple(rewards), (1.0, 1.0))
  score = jax.jit(functools.partial(score_lib.score, objective, settings))
  _, metrics = score(frozen, toy_prompts(), samples)
  share = np.mean(np.arange(B) / B > 0.5)
  assert float(metrics["reward/nan_fraction"]) == pytest.approx(share)
  assert float(metrics["reward/mine/nan_fraction"]) == pytest.approx(share)
  assert float(metrics["reward/whole/nan_fraction"]) == 0.0
  percent = f"{share:.0%}"
  line = score_lib.describe_unusable({name: float(x) for name, x in metrics.items()})
  assert line == f"{percent} of the rewards are not finite, mine the most with {percent}"
  alone = {"reward/nan_fraction": 0.5, "reward/mean": 1.0}
  assert score_lib.describe_unusable(alone) == "50% of the rewards are not finite"


def test_invalid_sample_of_nan_changes_neither_loss_nor_gradient():
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

  # The batch without the invalid sample.
  without = lambda x: np.delete(np.asarray(x), lost, axis=0)
  kept = prompts.map_samples(without)
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


@pytest.mark.slow
def test_invalid_sample_is_left_out_of_every_statistic():
  settings = make_settings(Trust("mahalanobis", k=0.3))
  _, _, objective, frozen = world()
  prompts, _, samples = one_rollout()
  lost = 5
  samples = samples.at[lost, 0, 0, 0].set(jnp.nan)
  score = jax.jit(functools.partial(score_lib.score, objective, settings))
  scores, metrics = score(frozen, prompts, samples)

  kept = np.arange(B) != lost
  reward = testing.tiny_reward()
  found = apply(reward.network, reward.params, samples, prompts.masked_image)
  rewards, features = map(np.asarray, found)
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
  freedom = sum(len(group) - 1 for group in groups)
  advantages = centred / np.sqrt((centred**2).sum() / freedom)
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
    "trust/norm": norm[kept].mean(),
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    assert float(metrics[name]) == pytest.approx(value, rel=1e-3, abs=1e-5), name


# ------------------------------------------------------------------------------------ chunks
@pytest.mark.parametrize("size", [0, 1, 2, 4, 5, 8, 100])
def test_chunks_equal_the_whole_batch(size):
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.normal(size=(2, 8, 3)), jnp.float32)
  seen = []

  def function(scale, x, y):
    seen.append(x.shape[0])
    return {"sum": jnp.tanh(scale * x) + y, "square": (x**2).sum(-1)}

  whole, chunked = function(2.0, x, y), in_chunks(function, size, None, 2.0, x, y)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), chunked, whole)
  assert max(seen[1:]) <= (size or 8)


def test_updates_with_few_samples_per_pass_equal_updates_with_the_whole_batch():
  """Two accumulating updates with a KL term on one device and on 4 x 2; one sample is invalid."""
  whole = make_settings(kl_weight=0.5, gradient_accumulation=2, updates_per_iteration=1)
  join = lambda *trees: jax.tree.map(lambda *x: np.concatenate(x), *trees)
  prompts = toy_prompts(0)
  prompts = join(prompts, toy_prompts(1))._replace(context=prompts.context)
  valid = np.arange(2 * B) != B + 3
  scores = join(made_up_scores(), made_up_scores(valid[B:]))
  trajectory = jax.jit(functools.partial(toy_rollout, whole, TOY, prompts))(0)
  lost = ~valid[:, None, None, None]
  trajectory = trajectory._replace(latents=jnp.where(lost, jnp.nan, trajectory.latents))
  experience, indices = Experience(prompts, trajectory, scores), jnp.array([0, 2])
  moved = TOY | {"a": TOY["a"] + np.float32(0.001)}

  def updated(size, mesh=None):
    settings = dataclasses.replace(whole, samples_per_pass=size)
    sampler, optimizer = sampler_of(ToyModules, settings), optax.sgd(0.01)

    @quick_jit
    def iterate(state):
      state, line = update_lib.update(
        sampler, optimizer, state, TOY_FROZEN, experience, indices, mesh
      )
      return update_lib.end_iteration(settings, state), line

    # On the host in between, so that the second call needs no other program.
    state, first = jax.device_get(iterate(jax.device_get(init_state(sampler, optimizer, moved))))
    state, second = iterate(state)
    return jax.tree.map(float, (state.params, first, second))

  params, *lines = updated(0)
  for size, mesh in ((4, None), (1, sharding.make_mesh(4, 2))):
    ours, *our_lines = updated(size, mesh)
    for name, start in moved.items():
      assert abs(params[name] - float(start)) > 1e-3
      assert ours[name] == pytest.approx(params[name], abs=1e-6)
    for line, our_line in zip(lines, our_lines, strict=True):
      assert our_line == pytest.approx(line, rel=1e-4, abs=1e-7)


def test_scores_and_samples_do_not_depend_on_the_chunk():
  modules, _, objective, frozen = world()
  prompts, trajectory, samples = one_rollout()
  score = lambda chunk: jax.jit(
    functools.partial(score_lib.score, objective, make_settings(decode_batch=chunk))
  )(frozen, prompts, samples)[0]
  for ours, expected in zip(score(4), score(0), strict=True):
    np.testing.assert_allclose(ours, expected, atol=1e-4)
  decode = jax.jit(functools.partial(rollout_lib.decode, modules), static_argnames="chunk")
  ours = decode(frozen.vae, trajectory.latents[-1], prompts, chunk=2)
  np.testing.assert_allclose(ours, samples, atol=1e-5)
  known = np.broadcast_to(prompts.mask == 0, samples.shape)
  np.testing.assert_array_equal(np.asarray(samples)[known], np.asarray(prompts.masked_image)[known])


@pytest.mark.slow
# ----------------------------------------------------------------------------- posterior of the VAE
def test_prompts_have_the_mean_or_a_sample_of_the_posterior_in_any_chunks():
  modules, _, _, frozen = world()
  images, masks = map(jnp.asarray, testing.tiny_prompts(PROMPTS))
  key, shape = jax.random.key(3), modules.latent_shape(*images.shape[:3])

  def encode(chunk, key=None):
    settings = make_settings(decode_batch=chunk)
    return rollout_lib.encode_prompts(
      modules, settings, frozen, images, masks, key=key
    ).masked_latents

  mean, log_variance = modules.vae.apply(
    {"params": frozen.vae}, (2.0 * images - 1.0) * (1.0 - masks), method="encode"
  )
  noise = jax.random.normal(key, shape)
  scale = modules.vae.config.scaling_factor
  repeat = lambda x: np.repeat(np.asarray(x), SAMPLES, axis=0)
  np.testing.assert_allclose(encode(0), repeat(mean * scale), atol=1e-5)
  sample = np.asarray(mean) + np.exp(np.asarray(log_variance) / 2) * np.asarray(noise)
  for chunk in (0, 2):
    np.testing.assert_allclose(encode(chunk, key), repeat(sample * scale), atol=1e-5)


# ------------------------------------------------------------------------------------- devices
@pytest.mark.slow
def test_eight_devices_equal_one():
  modules, params, objective, frozen = world()
  settings = make_settings(updates_per_iteration=1, timesteps_per_pass=0, decode_batch=8)
  sampler, optimizer = sampler_of(modules, settings), optax.sgd(1.0)
  host_images, host_masks = testing.tiny_prompts(8)

  def iterate(devices):
    mesh = sharding.make_mesh(data=len(devices), devices=devices)
    images, masks = sharding.to_global(mesh, (host_images, host_masks))
    everywhere = functools.partial(jax.device_put, device=sharding.replicated(mesh))
    policy, rest = everywhere(params), everywhere(frozen)
    rollout = quick_jit(functools.partial(rollout_lib.rollout, sampler))
    prompts, trajectory, samples = rollout(policy, rest, images, masks, jax.random.key(0))
    score = quick_jit(functools.partial(score_lib.score, objective, settings))
    scores, score_metrics = score(rest, prompts, samples)
    assert len(scores.reward.sharding.device_set) == len(devices)
    state = init_state(sampler, optimizer, policy)
    update = quick_jit(functools.partial(update_lib.update, sampler, optimizer))
    after, metrics = update(state, rest, Experience(prompts, trajectory, scores), jnp.array([1, 2]))
    gradients = jax.tree.map(jnp.subtract, policy, after.params)
    return jax.device_get((samples, scores, score_metrics | metrics, gradients))

  samples, scores, metrics, gradients = iterate(jax.devices())
  one_samples, one_scores, one_metrics, one_gradients = iterate(jax.devices()[:1])
  np.testing.assert_allclose(samples, one_samples, atol=1e-4)
  for name, ours in scores._asdict().items():
    np.testing.assert_allclose(ours, one_scores._asdict()[name], atol=1e-3, err_msg=name)
  for name, value in metrics.items():
    assert value == pytest.approx(one_metrics[name], rel=1e-3, abs=1e-4), name
  assert_trees_close(gradients, one_gradients, 2e-3)
