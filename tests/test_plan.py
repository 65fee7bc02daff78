"""A plan counts what programs do: against closed forms, and against XLA where it counts right."""

import importlib.util
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefpaint_jax import diffusion, plan, sharding, testing

get_config = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "rl.py"))["get_config"]

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="compiling for a TPU needs its compiler: pip install libtpu",
)

# A loop of five trips with a permutation and an asynchronous pair inside, as TPU programs write it.
HLO = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%gathering (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %inner = bf16[16,8]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

%body (state: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %state = (s32[], f32[1000]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %v = f32[1000]{0} get-tuple-element(%state), index=1
  %moved = f32[1000]{0} collective-permute(%v), source_target_pairs={{0,1},{1,0}}
  %start = f32[1000]{0} all-reduce-start(%moved), replica_groups=mesh['a'=4,'b'=2] {'a'}
  %done = f32[1000]{0} all-reduce-done(%start)
  ROOT %out = (s32[], f32[1000]{0}) tuple(%next, %done)
}

%condition (state.1: (s32[], f32[1000])) -> pred[] {
  %limit = s32[] constant(5)
  %state.1 = (s32[], f32[1000]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[1000], b: bf16[4,8], c: (f32[3], f32[5])) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %b = bf16[4,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], /*index=1*/f32[1000]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[1000]{0}) while(%init), condition=%condition, body=%body
  %result = f32[1000]{0} get-tuple-element(%loop), index=1
  %gather-start = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%b), dimensions={0}
  %gather-done = bf16[32,8]{1,0} all-gather-done(%gather-start)
  %async = ((bf16[4,8]{1,0}), bf16[16,8]{1,0}, u32[]) async-start(%b), calls=%gathering
  %awaited = bf16[16,8]{1,0} async-done(%async)
  %p0 = f32[3]{0} slice(%a), slice={[0:3]}
  %p1 = f32[5]{0} slice(%a), slice={[0:5]}
  %pair = (f32[3]{0}, f32[5]{0}) all-reduce(%p0, %p1), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %whole = f32[4,4]{1,0} broadcast(%zero), dimensions={}
  %part = f32[1,4]{1,0} reduce-scatter(%whole), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %swapped = f32[4,4]{1,0} all-to-all(%whole), replica_groups={}, dimensions={0}
  ROOT %copied = f32[1000]{0} copy(%result)
}
"""


def tiny_config(tmp_path, **fields):
  config = get_config()
  world = testing.write_tiny_world(tmp_path, train=1, test=1)
  config.update_from_flattened_dict(testing.tiny_training(world) | fields)
  return config


def test_collectives_of_hand_written_hlo_are_counted_by_hand():
  assert plan.collectives(HLO) == {
    "collective-permute": (5, 5 * 4000),
    "all-reduce": (5 + 1, 5 * 4000 * 2 * 3 // 4 + (12 + 20) * 2 * 1 // 2),
    "all-gather": (2, 64 * 7 + 64 * 3),
    "reduce-scatter": (1, 64 * 3 // 4),
    "all-to-all": (1, 64 * 7 // 8),
  }


def test_memory_traffic_counts_whole_tiles_and_main_memory_only():
  text = """\
HloModule jit_g

ENTRY %main (a: bf16[4,200]) -> f32[200,4] {
  %a = bf16[4,200]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[4,200]{1,0:T(8,128)(2,1)S(1)} copy(%a)
  ROOT %turned = f32[200,4]{0,1:T(8,128)} convert(%near)
}
"""
  assert plan.memory_traffic(text) == 8 * 256 * 2 + 8 * 256 * 4


def test_known_trip_counts_and_nested_loops_multiply():
  nested = HLO.replace(
    "  %loop = (s32[], f32[1000]{0}) while(%init), condition=%condition, body=%body",
    "  %loop = (s32[], f32[1000]{0}) while(%init), condition=%condition, body=%outer, "
    'backend_config={"known_trip_count":{"n":"3"}}',
  ).replace(
    "ENTRY",
    "%outer (s: (s32[], f32[1000])) -> (s32[], f32[1000]) {\n"
    "  %s = (s32[], f32[1000]{0}) parameter(0)\n"
    "  ROOT %w = (s32[], f32[1000]{0}) while(%s), condition=%condition, body=%body\n}\n\nENTRY",
  )
  assert plan.collectives(nested)["collective-permute"] == (15, 15 * 4000)


def test_collectives_of_a_compiled_loop_are_those_of_a_ring():
  mesh = sharding.make_mesh()

  def average(x):
    return jax.lax.scan(lambda x, _: (jax.lax.pmean(jnp.sin(x), "data"), None), x, length=3)[0]

  spread = jax.shard_map(
    average, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
  )
  x = jax.ShapeDtypeStruct((8, 1000), jnp.float32, sharding=NamedSharding(mesh, P("data")))
  text = jax.jit(spread).lower(x).compile().as_text()
  assert plan.collectives(text) == {"all-reduce": (3, 3 * 4000 * 2 * 7 // 8)}


def test_memory_traffic_is_xlas_without_a_loop_and_its_multiple_with_one():
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  once = jax.jit(lambda x: x @ x).lower(x).compile()
  assert plan.memory_traffic(once.as_text()) == once.cost_analysis()["bytes accessed"]
  traffic = {}
  for length in (10, 20):
    loop = lambda x, length=length: jax.lax.scan(lambda c, _: (c @ x, None), x, length=length)[0]
    traffic[length] = plan.memory_traffic(jax.jit(loop).lower(x).compile().as_text())
  # Each trip reads two matrices and writes one; copies that XLA adds come on top.
  assert 10 * 3 * 4 * 64**2 <= traffic[20] - traffic[10] <= 10 * 5.1 * 4 * 64**2


def test_flops_of_a_scan_of_products_are_counted_every_time():
  x = jnp.ones((5, 8))
  w = jnp.ones((8, 8))
  loop = lambda x, w: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0].sum()
  assert plan.flops(jax.make_jaxpr(loop)(x, w)) == 7 * 2 * 5 * 8 * 8
  # Both gradients of a product cost what it does.
  both = jax.make_jaxpr(jax.grad(loop, (0, 1)))(x, w)
  assert plan.flops(both) == 3 * 7 * 2 * 5 * 8 * 8


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_of_convolutions_and_their_gradients_are_xlas(stride):
  """But for the picture's border, which XLA leaves out."""

  def loss(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
      x, kernel, (stride,) * 2, "VALID", dimension_numbers=dimensions
    )
    return (y**2).sum()

  shapes = (
    jax.ShapeDtypeStruct((2, 33, 33, 8), jnp.float32),
    jax.ShapeDtypeStruct((3, 3, 8, 16), jnp.float32),
  )
  program = jax.jit(jax.grad(loss, (0, 1)))
  xla = program.lower(*shapes).cost_analysis()["flops"]
  assert plan.flops(program.trace(*shapes).jaxpr) == pytest.approx(xla, rel=0.15)


def test_flops_of_shard_map_are_those_of_all_devices():
  mesh = sharding.make_mesh()
  product = lambda x, w: x @ w
  spread = jax.shard_map(product, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
  x, w = jnp.ones((16, 4)), jnp.ones((4, 4))
  assert plan.flops(jax.make_jaxpr(spread)(x, w)) == plan.flops(jax.make_jaxpr(product)(x, w))


def test_a_step_more_of_a_chain_costs_one_forward_pass():
  network = lambda latents, t: jnp.tanh(latents @ jnp.ones((4, 4)))
  noise, schedule = jnp.zeros((2, 8, 8, 4)), diffusion.Schedule()

  def chain_flops(num_steps):
    steps = diffusion.ddim_steps(schedule, num_steps, 1.0)
    run = lambda noise: diffusion.rollout(network, schedule, steps, noise, jax.random.key(0))
    return plan.flops(jax.make_jaxpr(run)(noise))

  forward = 2 * 2 * 8 * 8 * 4 * 4
  assert [chain_flops(1), chain_flops(4)] == [forward, 4 * forward]


@pytest.fixture(scope="module")
def report(quick_compilation, tmp_path_factory):
  return plan.plan(tiny_config(tmp_path_factory.mktemp("world")), jax.devices())


def test_report_of_the_devices_at_hand_is_json_and_a_table(report):
  assert json.loads(json.dumps(report))["chips"] == 8
  assert list(report["stages"]) == ["rollout", "score", "update"]
  table = plan.describe(report)
  assert "rollout x1" in table and "update x2" in table and "ESTIMATE" not in table


def test_update_holds_parameters_and_moments_and_exchanges_each_gradient_once(report):
  update, parameters = report["stages"]["update"], report["parameters"]["unet"]
  assert update["memory"]["arguments"] > 3 * 4 * parameters
  assert update["memory"]["total"] == sum(
    size for name, size in update["memory"].items() if name != "total"
  )
  _, sent = update["collectives"]["all-reduce"]
  assert sent == pytest.approx(2 * 7 / 8 * 4 * parameters, rel=0.02)


def test_estimate_is_the_longer_of_work_and_memory_and_then_the_links(report):
  chip = plan.Chip(flops=1e9, memory=1e12, bandwidth=1e15, links=1e9)
  judged = report | plan.judge(report, chip)
  assert "does_not_fit" not in judged and "fits" in plan.describe(judged)
  seconds = 0.0
  for stage in report["stages"].values():
    sent = sum(sent for _, sent in stage["collectives"].values())
    seconds += stage["times"] * (stage["flops"] / 1e9 + sent / 1e9)
  assert judged["seconds"] == pytest.approx(seconds)
  assert judged["images_per_s"] == pytest.approx(16 / seconds)
  slow = report | plan.judge(report, chip._replace(bandwidth=1.0))
  traffic = sum(stage["times"] * stage["traffic"] for stage in report["stages"].values())
  assert slow["seconds"] == pytest.approx(traffic, rel=1e-3)


def test_a_chip_without_room_for_the_largest_stage_does_not_fit(report):
  sizes = {name: stage["memory"]["total"] for name, stage in report["stages"].items()}
  largest = max(sizes, key=sizes.get)
  chip = plan.Chip(1e12, sizes[largest] - 1, 1e12, 1e12)
  table = plan.describe(report | plan.judge(report, chip))
  assert f"DOES NOT FIT: {largest}" in table


def test_search_goes_on_past_what_does_not_fit(monkeypatch):
  tried = []

  def fake(config, devices):
    fits = config.batch_size < (32 if config.remat else 16)
    tried.append((config.mesh.fsdp, config.remat, config.batch_size))
    return {} if fits else {"does_not_fit": "rollout: 20G of 10G"}

  monkeypatch.setattr(plan, "plan", fake)
  reports = list(plan.search(get_config(), jax.devices()))
  assert tried == [
    (fsdp, remat, size)
    for fsdp in (1, 4, 8)
    for remat, sizes in ((False, (8, 16)), (True, (8, 16, 32)))
    for size in sizes
  ]
  assert len(reports) == len(tried)


@pytest.mark.parametrize(
  "policy, parameters",
  [
    ("stable-diffusion-v1-5/stable-diffusion-inpainting", 859_535_364),
    ("stabilityai/stable-diffusion-2-inpainting", 865_925_124),
  ],
)
def test_known_architectures_have_the_parameters_of_the_checkpoints(policy, parameters):
  configs, _ = plan.read_architecture(policy)
  modules = plan.make_modules(configs)
  unet = jax.eval_shape(modules.init, jax.random.key(0))["unet"]
  assert sum(x.size for x in jax.tree.leaves(unet)) == parameters


def test_mini_is_read_from_its_folder():
  configs, source = plan.read_architecture("mini")
  assert configs["unet"]["in_channels"] == 9 and "folder" in source
  assert plan.read_reward("mini") != plan.read_reward("kd5678/prefpaintReward")


def test_chips_are_found_by_the_longest_name():
  assert plan.find_chip("TPU v5 lite") is plan.CHIPS["TPU v5 lite"]
  assert plan.find_chip("TPU v5p") is plan.CHIPS["TPU v5"]
  assert plan.find_chip("NVIDIA H100 80GB HBM3") is plan.CHIPS["NVIDIA H100"]
  assert plan.find_chip("cpu") is None


def test_errors_say_what_to_do_in_one_line(tmp_path):
  config = tiny_config(tmp_path)
  cases = [
    ({"policy": "someone/else"}, "config.policy someone/else: .* give a folder"),
    ({"batch_size": 12}, "batch_size 12 does not divide over 8 devices"),
    ({"mesh": {"data": 3, "fsdp": 1}}, "3 does not fill 8"),
  ]
  for change, message in cases:
    changed = config.copy_and_resolve_references()
    changed.update(change)
    with pytest.raises(ValueError, match=message) as error:
      plan.plan(changed, jax.devices())
    assert "\n" not in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_libtpu_a_topology_says_what_to_install():
  with pytest.raises(ValueError, match=r"--topology=v5e:2x2: libtpu.*'prefpaint_jax\[plan\]'"):
    plan.topology_devices("v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize("name", ["banana", "v5e:3x5"])
def test_unknown_topologies_are_refused_in_one_line(name):
  with pytest.raises(ValueError, match=f"--topology={name}: .*give one such as v5e:4x4") as error:
    plan.topology_devices(name)
  assert "\n" not in str(error.value)


@needs_libtpu
def test_tpu_compiler_says_how_much_is_missing():
  device = plan.topology_devices("v5e:1x1")[0]
  place = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((8 * 2**30,), jnp.float32, sharding=place)
  with pytest.raises(plan.DoesNotFitError, match=r"[\d.]+G of 15.75G"):
    plan._measure(jax.jit(lambda x: x + 1), (x,), x, 1)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology, fsdp", [("v5e:1x1", 1), ("v5e:2x2", 2)])
def test_tpu_plan_of_a_tiny_run(topology, fsdp, tmp_path):
  config = tiny_config(tmp_path, **{"mesh.fsdp": fsdp})
  report = plan.plan(config, plan.topology_devices(topology))
  assert "does_not_fit" not in report and report["images_per_s"] > 0
  update, parameters = report["stages"]["update"], report["parameters"]["unet"]
  sent = sum(sent for _, sent in update["collectives"].values())
  n = report["chips"]
  # Parameters are small enough to stay whole, so gradients are reduced as they are without fsdp.
  assert sent == pytest.approx(2 * (n - 1) / n * 4 * parameters, rel=0.1, abs=1)
  assert np.isclose(
    update["flops"] * n, plan.plan(config, jax.devices()[:n])["stages"]["update"]["flops"] * n
  )
