"""Guards of speed: an iteration must not do more work, nor wait for the host."""

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from alignment_world import make_settings, sampler_of, world
from ml_collections import ConfigDict

from prefpaint_jax import testing
from prefpaint_jax.align.optimizer import make_optimizer
from prefpaint_jax.align.run import outline
from prefpaint_jax.align.stages import make_stages
from prefpaint_jax.align.state import Experience, behaviour_params
from prefpaint_jax.models.architectures import read_architecture
from prefpaint_jax.models.assembly import make_modules
from prefpaint_jax.models.conditioning import Context, Prompts
from prefpaint_jax.planning import cost
from prefpaint_jax.runtime import sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")
get_config = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "rl.py"))["get_config"]
STAGES = ("rollout", "score", "update")


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


# ------------------------------------------------------------------------------------------- work

# Floating-point operations of a stage, as `plan` counts them. Update a figure if a change is
# intended.
WORK = {
  "tiny": {"rollout": 41_956_864, "score": 189_760, "update": 31_106_560},
  "mini": {"rollout": 70_276_956_160, "score": 3_290_775_552, "update": 84_672_741_376},
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, ConfigDict]:
  tiny = get_config()
  paths = testing.write_tiny_world(tmp_path_factory.mktemp("world"), 1, 1)
  tiny.update_from_flattened_dict(testing.tiny_training(paths))
  return {"tiny": tiny, "mini": get_config("mini")}


def trace(config: ConfigDict) -> dict[str, jax.stages.Traced]:
  """Traces the stages of an iteration on one device with shapes."""
  run, _, _ = outline(config, one_device())
  side = config.size, config.size
  images, masks = (
    jax.ShapeDtypeStruct((config.batch_size, *side, channels), jnp.float32) for channels in (3, 1)
  )
  key = jax.eval_shape(jax.random.key, 0)
  stages, state = run.stages, run.state_shapes
  rollout = stages.rollout.trace(behaviour_params(state), run.frozen, images, masks, key)
  prompts, trajectory, samples = rollout.out_info
  score = stages.score.trace(run.frozen, prompts, samples)
  scores, _ = score.out_info
  indices = jax.eval_shape(stages.draw_timesteps, key)[0]
  experience = Experience(prompts, trajectory, scores)
  update = stages.update.trace(state, run.frozen, experience, indices)
  return dict(zip(STAGES, (rollout, score, update), strict=True))


@pytest.mark.parametrize("preset", ["tiny", pytest.param("mini", marks=pytest.mark.slow)])
def test_work_of_an_iteration_does_not_grow(preset, configs):
  traced = trace(configs[preset])
  for name in STAGES:
    work, known = cost.flops(traced[name].jaxpr), WORK[preset][name]
    assert work <= 1.02 * known, f"{name}: {work:,.0f} operations, expected {known:,.0f}"


@pytest.mark.slow
def test_products_are_99_percent_of_the_operations_of_stable_diffusion():
  configs, _ = read_architecture("stable-diffusion-v1-5/stable-diffusion-inpainting")
  modules = make_modules(configs, "bfloat16", remat=True)
  params = modules.shapes()["unet"]
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  latents = array(4, 64, 64, 4)
  known = array(4, 512, 512, 1), array(4, 512, 512, 3), array(4, 64, 64, 1), latents
  prompts = Prompts(*known, context=Context(array(1, 77, 768)))

  def loss(params, prompts, latents):
    return modules.predict(params, prompts, latents, jnp.int32(1)).sum()

  for function in (loss, jax.grad(loss)):
    jaxpr = jax.make_jaxpr(function)(params, prompts, latents)
    products, others = cost.flops(jaxpr), cost.other_operations(jaxpr)
    assert products / (products + others) > 0.99


def test_parameters_are_rounded_before_the_loop_over_steps(configs):
  config = configs["tiny"].copy_and_resolve_references()
  config.dtype = "bfloat16"
  traced = trace(config)
  kernels = {
    leaf.shape for leaf in jax.tree.leaves(traced["update"].in_avals[0][0].params) if leaf.ndim > 1
  }

  def loops(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name in ("scan", "while"):
        yield equation
      else:
        for inner in jax.tree.leaves(
          list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
          if hasattr(inner, "eqns"):
            yield from loops(inner)

  found = list(loops(traced["rollout"].jaxpr))
  given = [{(x.aval.shape, x.aval.dtype) for x in one.invars} for one in found]
  kinds = [{dtype for shape, dtype in some if shape in kernels} for some in given]
  assert {jnp.dtype(jnp.bfloat16)} in kinds
  assert all(some <= {jnp.dtype(jnp.bfloat16)} for some in kinds)


def test_programs_call_nothing_on_the_host(configs):
  # On a CPU JAX computes a solve with SciPy's BLAS, whose threads keep spinning after each call.
  for name, traced in trace(configs["tiny"]).items():
    text = str(traced.jaxpr)
    assert "dot_general" in text
    assert not re.search(r"callback|infeed|outfeed|solve|cholesky", text), name


# -------------------------------------------------------------------------------------- transfers
@pytest.mark.slow
def test_iteration_copies_nothing_from_the_host_after_its_prompts():
  settings, mesh = make_settings(updates_per_iteration=2), one_device()
  modules, base, objective, frozen = world()
  optimizer = make_optimizer("adamw", 1e-3)
  base, frozen, prompt_arrays, key = jax.device_put(
    (base, frozen, testing.tiny_prompts(4), jax.random.key(0)), sharding.replicated(mesh)
  )
  stages = make_stages(sampler_of(modules, settings), objective, optimizer, mesh, base)
  state = stages.init(base)

  def iterate(state):
    prompts, trajectory, samples = stages.rollout(state.params, frozen, *prompt_arrays, key)
    scores, _ = stages.score(frozen, prompts, samples)
    for indices in stages.draw_timesteps(key):
      state, _ = stages.update(state, frozen, Experience(prompts, trajectory, scores), indices)
    return stages.end_iteration(state)

  state = iterate(state)  # compilation may place constants
  with jax.transfer_guard("disallow"):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
      jnp.ones(3) + 1.0  # the guard works
    state = iterate(state)
  assert int(state.iteration) == 2
