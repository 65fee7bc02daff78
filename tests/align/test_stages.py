"""The programs of an iteration on several meshes: equal results, and only necessary collectives."""

import collections
import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from alignment_world import contexts, make_settings, sampler_of, world

from prefpaint_jax import testing
from prefpaint_jax.align.stages import make_stages
from prefpaint_jax.align.state import Experience
from prefpaint_jax.models import lora
from prefpaint_jax.runtime import sharding

pytestmark = pytest.mark.usefixtures("quick_compilation", "small_arrays_are_split")
PROMPTS = 8
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@pytest.fixture(scope="module")
def small_arrays_are_split():
  """Lowers the size from which arrays are split, so that the tiny models have such arrays."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "SMALL", 64)
    yield


def collectives(compiled) -> dict[str, collections.Counter]:
  """Counts collectives: {kind: {elements of the result: number}}."""
  found = collections.defaultdict(collections.Counter)
  for shapes, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", compiled.as_text()):
    for dimensions in re.findall(r"\w+\[([\d,]*)\]", shapes):
      found[kind][math.prod(int(size) for size in dimensions.split(",") if size)] += 1
  return found


def elements(counter: collections.Counter) -> int:
  return sum(size * times for size, times in counter.items())


class Iteration:
  """An iteration on a mesh: its results, and the collectives of its programs."""

  def __init__(
    self,
    data: int,
    fsdp: int,
    rank: int = 0,
    dtype: str = "float32",
    moved: float = 0.0,
    texts: bool = False,
    **changes,
  ):
    # One update of four timesteps in four passes. A step of SGD with rate 1 is the gradient.
    settings = make_settings(
      train_timesteps=4, updates_per_iteration=1, timesteps_per_pass=1, lora=rank > 0, **changes
    )
    modules, base, objective, frozen = world(dtype)
    self.mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    trained = lora.init(jax.random.key(1), base, rank, "attn") if rank else base
    rng = np.random.default_rng(0)
    move = lambda x: x + moved * rng.normal(size=x.shape).astype(x.dtype)
    trained = jax.tree.map(move, trained) if moved else trained
    self.stages = stages = make_stages(
      sampler_of(modules, settings), objective, optax.sgd(1.0), self.mesh, trained, texts
    )
    if texts:
      frozen = frozen._replace(negative=frozen.context)
    context = contexts(self.mesh, dtype, PROMPTS) if texts else None
    frozen = sharding.place(sharding.replicated(self.mesh), frozen)
    place = lambda tree: sharding.place(
      sharding.specs(tree, sharding.DEFAULT_RULES, self.mesh), tree
    )
    state = stages.init(place(trained))
    if settings.reads_behaviour:  # the old policy differs from the policy
      moved_on = jax.tree.map(lambda x: 1.02 * x, state.behaviour)
      state = state._replace(behaviour=moved_on)
    images, masks = sharding.to_global(self.mesh, testing.tiny_prompts(PROMPTS))
    key = jax.random.key(0)
    self.sent = {}

    def run(name: str, *arguments):
      compiled = getattr(stages, name).trace(*arguments).lower().compile()
      self.sent[name] = collectives(compiled)
      return compiled(*arguments)

    before = jax.device_get(state.params)
    prompts, trajectory, samples = run("rollout", state.params, frozen, images, masks, key, context)
    scores, metrics = run("score", frozen, prompts, samples)
    (indices,) = stages.draw_timesteps(key)
    state, update_metrics = run(
      "update", state, frozen, Experience(prompts, trajectory, scores), indices
    )
    after = jax.device_get(state.params)
    self.gradients = jax.tree.map(np.subtract, before, after)
    if settings.gradient_accumulation > 1:  # the first iteration only accumulates
      self.gradients = jax.device_get(state.gradients)
    self.scores, self.samples = jax.device_get((scores, samples))
    self.metrics = {k: float(v) for k, v in (metrics | update_metrics).items()}
    self.layout = stages.layout.params


make = functools.cache(Iteration)
MESHES = [(8, 1), (1, 8), (4, 2)]
on_every_mesh = pytest.mark.parametrize(
  "sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes))
)


def split_elements(iteration: Iteration) -> int:
  """Returns the number of elements of the parameters that are split over "fsdp"."""
  leaves = zip(jax.tree.leaves(iteration.gradients), jax.tree.leaves(iteration.layout), strict=True)
  return sum(leaf.size for leaf, place in leaves if "fsdp" in place.spec)


def assert_same_results(ours: Iteration, expected: Iteration, tolerance: float) -> None:
  """Asserts equal samples, scores, metrics and gradients, up to the order of sums."""
  np.testing.assert_allclose(ours.samples, expected.samples, atol=2 * tolerance)
  np.testing.assert_allclose(ours.scores.reward, expected.scores.reward, atol=2 * tolerance)
  np.testing.assert_allclose(ours.scores.trust, expected.scores.trust, atol=2 * tolerance)
  assert ours.metrics.keys() == expected.metrics.keys()
  for name, value in expected.metrics.items():
    assert ours.metrics[name] == pytest.approx(value, rel=10 * tolerance, abs=0.2 * tolerance), name
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected.gradients))
  assert largest > 1e-3
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=tolerance * max(1, largest)),
    ours.gradients,
    expected.gradients,
  )


@pytest.mark.slow
@on_every_mesh
def test_losses_gradients_and_rewards_of_every_mesh_equal_one_device(sizes):
  assert_same_results(make(*sizes), make(1, 1), 1e-5)


# Changes of the settings; each with the samples of a pass on one device and on 4 x 2, where a
# device has 16 and 2 samples.
MICRO = {
  "groups": {},
  "nft": {"algorithm": "nft", "kl_weight": 0.5, "log_prob_region": "hole"},
  "awm_adapters_and_accumulation": {
    "algorithm": "awm",
    "behaviour_refresh": 2,
    "moved": 0.01,
    "rank": 2,
    "gradient_accumulation": 2,
  },
  "normalised_ratio": {"ratio_normalisation": True},
  "adapters_and_kl": {"moved": 0.01, "kl_weight": 0.5, "rank": 2},
  "guided_texts_and_kl_and_accumulation": {
    "moved": 0.003,
    "kl_weight": 0.5,
    "gradient_accumulation": 2,
    "texts": True,
    "guidance_scale": 2.0,
    "text_dropout": 0.3,
  },
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", MICRO.values(), ids=MICRO)
def test_few_samples_per_pass_equal_the_whole_batch_on_one_and_eight_devices(changes):
  whole = make(1, 1, **changes)
  assert_same_results(make(1, 1, samples_per_pass=4, **changes), whole, 1e-5)
  many = make(4, 2, samples_per_pass=1, **changes)
  assert_same_results(many, whole, 1e-5)
  if not changes:  # passes over samples gather and reduce nothing either
    assert many.sent == make(4, 2).sent


@pytest.mark.slow
def test_few_samples_per_pass_in_bfloat16_equal_the_whole_batch_to_its_rounding():
  whole, parts = make(1, 1, dtype="bfloat16"), make(1, 1, dtype="bfloat16", samples_per_pass=4)
  np.testing.assert_allclose(parts.samples, whole.samples, atol=2e-2)
  norm = lambda tree: math.sqrt(sum((np.float64(x) ** 2).sum() for x in jax.tree.leaves(tree)))
  difference = norm(jax.tree.map(np.subtract, parts.gradients, whole.gradients))
  assert difference < 2e-2 * norm(whole.gradients)


@pytest.mark.slow
def test_one_device_sends_nothing():
  assert not any(make(1, 1).sent.values())


@pytest.mark.slow
@on_every_mesh
def test_rollout_gathers_the_policy_once_and_sends_nothing_else(sizes):
  many = make(*sizes)
  sent = many.sent["rollout"]
  assert set(sent) <= {"all-gather"}
  assert elements(sent["all-gather"]) == split_elements(many)


@pytest.mark.slow
@on_every_mesh
def test_score_sends_only_scalars(sizes):
  sent = make(*sizes).sent["score"]
  assert set(sent) == {"all-reduce"}
  assert elements(sent["all-reduce"]) < 40


@pytest.mark.slow
@on_every_mesh
def test_update_gathers_parameters_and_reduces_gradients_once_for_all_passes(sizes):
  many = make(*sizes)
  data, fsdp = sizes
  sent, split = many.sent["update"], split_elements(many)
  total = sum(leaf.size for leaf in jax.tree.leaves(many.gradients))
  assert set(sent) <= {"all-gather", "all-reduce", "reduce-scatter"}
  assert elements(sent["all-gather"]) == split
  assert elements(sent["reduce-scatter"]) == split // fsdp if fsdp > 1 else not split
  # Gradients of whole parameters, and shares of the gradients of split parameters. The scalars are
  # metrics, and at most one per gradient for the gradient norm.
  shares = split // fsdp if data > 1 else 0
  scalars = sent["all-reduce"][1]
  assert elements(sent["all-reduce"]) - scalars <= total - split + shares
  assert scalars <= 40 + len(jax.tree.leaves(many.gradients))


@pytest.mark.slow
def test_with_adapters_only_their_gradients_are_reduced_and_equal_one_device():
  one, many = make(1, 1, 2), make(8, 1, 2)
  total = sum(leaf.size for leaf in jax.tree.leaves(one.gradients))
  assert 0 < elements(many.sent["update"]["all-reduce"]) <= total + 40
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5),
    many.gradients,
    one.gradients,
  )


@pytest.mark.slow
def test_samples_with_untrained_adapters_equal_the_base():
  np.testing.assert_allclose(make(1, 1, 2).samples, make(1, 1).samples, atol=1e-6)
