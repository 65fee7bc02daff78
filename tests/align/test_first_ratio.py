"""The importance ratio is 1 at equal policies, with each option of the behaviour policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alignment_world import contexts, get_config, make_settings, sampler_of, world

from prefpaint_jax import testing
from prefpaint_jax.align.settings import settings_from
from prefpaint_jax.align.stages import make_stages
from prefpaint_jax.align.state import Experience, behaviour_params, init_state
from prefpaint_jax.align.update import end_iteration
from prefpaint_jax.models import lora
from prefpaint_jax.runtime import sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")


def first_ratio(
  monkeypatch, dtype: str, data=1, fsdp=1, rank=0, remat=False, texts=False, **changes
) -> dict:
  """Returns the metrics of the first update after a refresh of the behaviour policy.

  The policy is perturbed before the refresh, so that its parameters are no bfloat16 numbers.
  """
  monkeypatch.setattr(sharding, "SMALL", 64)  # the tiny models then have split arrays
  options = {"train_timesteps": 1, "updates_per_iteration": 1, "clip_range": 1e-5}
  settings = make_settings(lora=rank > 0, **options | {"behaviour_refresh": 2} | changes)
  modules, base, objective, frozen = world(dtype)
  modules = dataclasses.replace(modules, unet=modules.unet.clone(remat=remat))
  mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
  if texts:
    frozen = frozen._replace(negative=frozen.context)
  frozen = sharding.place(sharding.replicated(mesh), frozen)
  trained = lora.init(jax.random.key(1), base, rank, "attn") if rank else base
  rng = np.random.default_rng(0)
  trained = jax.tree.map(lambda x: x + 0.01 * rng.normal(size=x.shape).astype(x.dtype), trained)
  stages = make_stages(
    sampler_of(modules, settings), objective, optax.sgd(1.0), mesh, trained, texts
  )
  place = lambda tree: sharding.place(sharding.specs(tree, sharding.DEFAULT_RULES, mesh), tree)
  state = stages.end_iteration(stages.init(place(trained)))
  images, masks = sharding.to_global(mesh, testing.tiny_prompts(max(4, data * fsdp)))
  key = jax.random.key(0)
  context = contexts(mesh, dtype, len(images)) if texts else None
  prompts, trajectory, samples = stages.rollout(
    behaviour_params(state), frozen, images, masks, key, context
  )
  scores, _ = stages.score(frozen, prompts, samples)
  (indices,) = stages.draw_timesteps(key)
  experience = Experience(prompts, trajectory, scores)
  _, metrics = stages.update(state, frozen, experience, indices)
  return {name: float(value) for name, value in metrics.items()}


OPTIONS = {
  "bfloat16": {"dtype": "bfloat16"},
  "bfloat16_behaviour": {"dtype": "bfloat16", "behaviour_dtype": "bfloat16"},
  "bfloat16_behaviour_split": {
    "dtype": "bfloat16",
    "behaviour_dtype": "bfloat16",
    "data": 2,
    "fsdp": 4,
  },
  "lora": {"dtype": "float32", "rank": 2},
  "lora_bfloat16_split": {"dtype": "bfloat16", "rank": 2, "data": 2, "fsdp": 4},
  "average_accumulation": {"dtype": "float32", "ema_decay": 0.5, "gradient_accumulation": 2},
  "remat": {"dtype": "bfloat16", "behaviour_dtype": "bfloat16", "remat": True},
  "hole_kl": {"dtype": "float32", "log_prob_region": "hole", "kl_weight": 0.1},
  "few_samples": {"dtype": "bfloat16", "behaviour_dtype": "bfloat16", "samples_per_pass": 2},
  "guided": {
    "dtype": "float32",
    "texts": True,
    "text_dropout": 0.5,
    "guidance_scale": 3.0,
    "kl_weight": 0.1,
  },
  "guided_split": {
    "dtype": "bfloat16",
    "texts": True,
    "guidance_scale": 3.0,
    "rank": 2,
    "data": 2,
    "fsdp": 4,
  },
  "own_policy": {"dtype": "bfloat16", "behaviour_refresh": 1},
  "normalised_ratio": {"dtype": "bfloat16", "ratio_normalisation": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_first_ratio_is_one_and_nothing_is_clipped(name, monkeypatch):
  metrics = first_ratio(monkeypatch, **OPTIONS[name])
  assert metrics["ppo/clip_fraction"] == 0.0
  assert metrics["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
  assert metrics["ppo/grad_norm"] > 0


def test_bfloat16_behaviour_policy_is_rounded_as_the_update_rounds_from_start_and_refresh():
  settings = make_settings(behaviour_refresh=2, behaviour_dtype="bfloat16")
  modules, base, _, _ = world("bfloat16")
  params = jax.tree.map(lambda x: jnp.asarray(x + np.float32(1 / 3)), base)
  sampler = sampler_of(modules, settings)
  state = init_state(sampler, optax.sgd(1.0), params)
  moved = state._replace(params=jax.tree.map(lambda x: 1.1 * x, params))
  for policy in (state, end_iteration(settings, moved)):
    expected = modules.round_params(policy.params)
    assert len({x.dtype for x in jax.tree.leaves(expected)}) == 2  # norms stay float32
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), policy.behaviour, expected)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype, policy.behaviour, expected))


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"lora.rank": 4}])
def test_bfloat16_behaviour_policy_is_refused_where_the_update_is_not_rounded(changes):
  config = get_config()
  config.update_from_flattened_dict({"behaviour_dtype": "bfloat16"} | changes)
  with pytest.raises(ValueError, match=r"\Abehaviour_dtype is 'bfloat16' with dtype=[^\n]*\Z"):
    settings_from(config)
