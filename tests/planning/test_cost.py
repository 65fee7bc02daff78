"""Counts of operations, traffic and collectives, compared with closed forms and with XLA."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prefpaint_jax.diffusion import ddim
from prefpaint_jax.diffusion.schedule import Schedule
from prefpaint_jax.kernels import attention
from prefpaint_jax.planning import cost
from prefpaint_jax.runtime import sharding

needs_cuda = pytest.mark.skipif(
  not attention.has_cudnn(), reason="needs JAX's plugin: pip install jax[cuda13]"
)

# A loop of five trips with a permutation and an asynchronous all-reduce, as in TPU programs.
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


def test_collectives_of_hand_written_hlo_equal_a_count_by_hand():
  assert cost.collectives(HLO) == {
    "collective-permute": (5, 5 * 4000),
    "all-reduce": (5 + 1, 5 * 4000 * 2 * 3 // 4 + (12 + 20) * 2 * 1 // 2),
    "all-gather": (2, 64 * 7 + 64 * 3),
    "reduce-scatter": (1, 64 * 3 // 4),
    "all-to-all": (1, 64 * 7 // 8),
  }


def test_asynchronous_collective_in_several_fusions_counts_once():
  """A TPU program repeats it in its start, in fusions that overlap with it, and in its end."""
  part = """\
%NAME (p: bf16[64,64]) -> bf16[256,64] {
  %p = bf16[64,64]{1,0} parameter(0)
  ROOT %g = bf16[256,64]{1,0} all-gather(%p), channel_id=12, dimensions={0}
}

"""
  text = f"""\
HloModule jit_f, num_partitions=4

{part.replace("NAME", "first")}{part.replace("NAME", "second")}\
ENTRY %main (a: bf16[64,64]) -> bf16[256,64] {{
  %a = bf16[64,64]{{1,0}} parameter(0)
  %start = bf16[256,64]{{1,0}} fusion(%a), kind=kCustom, calls=%first
  ROOT %end = bf16[256,64]{{1,0}} fusion(%a), kind=kCustom, calls=%second
}}
"""
  assert cost.collectives(text) == {"all-gather": (1, 3 * 64 * 64 * 2)}


def test_memory_traffic_counts_whole_tiles_and_main_memory_only():
  text = """\
HloModule jit_g

ENTRY %main (a: bf16[4,200]) -> f32[200,4] {
  %a = bf16[4,200]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[4,200]{1,0:T(8,128)(2,1)S(1)} copy(%a)
  ROOT %converted = f32[200,4]{0,1:T(8,128)} convert(%near)
}
"""
  assert cost.memory_traffic(text) == 8 * 256 * 2 + 8 * 256 * 4


def test_memory_traffic_of_a_slice_does_not_count_the_whole_operand():
  text = """\
HloModule jit_g

ENTRY %main (a: f32[800,128], i: s32[]) -> f32[16,128] {
  %a = f32[800,128]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %go = ((f32[800,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a)
  %near = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%go)
  %there = f32[24,128]{1,0:T(8,128)} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={24,128}
  ROOT %far = f32[16,128]{1,0:T(8,128)} slice(%a), slice={[0:16], [0:128]}
}
"""
  # %near is read; %there and %far are read and written; the state of the copy is 4 bytes.
  assert cost.memory_traffic(text) == 4 * 128 * (8 + 2 * 24 + 2 * 16) + 4


def test_memory_traffic_leaves_out_the_workspace_of_a_library():
  text = """\
HloModule jit_g

ENTRY %main (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  %both = (f32[8,4]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="matmul"
  ROOT %product = f32[8,4]{1,0} get-tuple-element(%both), index=0
}
"""
  assert cost.memory_traffic(text) == 4 * (8 * 16 + 16 * 4 + 8 * 4)


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
  assert cost.collectives(nested)["collective-permute"] == (15, 15 * 4000)


def test_collectives_of_a_compiled_loop_equal_a_ring_in_every_trip():
  mesh = sharding.make_mesh()

  def average(x):
    return jax.lax.scan(lambda x, _: (jax.lax.pmean(jnp.sin(x), "data"), None), x, length=3)[0]

  spread = jax.shard_map(
    average, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
  )
  x = jax.ShapeDtypeStruct((8, 1000), jnp.float32, sharding=NamedSharding(mesh, P("data")))
  text = jax.jit(spread).lower(x).compile().as_text()
  assert cost.collectives(text) == {"all-reduce": (3, 3 * 4000 * 2 * 7 // 8)}


def test_memory_traffic_equals_xla_and_grows_with_the_trips_of_a_loop():
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  once = jax.jit(lambda x: x @ x).lower(x).compile()
  assert cost.memory_traffic(once.as_text()) == once.cost_analysis()["bytes accessed"]
  traffic = {}
  for length in (10, 20):
    loop = lambda x, length=length: jax.lax.scan(lambda c, _: (c @ x, None), x, length=length)[0]
    traffic[length] = cost.memory_traffic(jax.jit(loop).lower(x).compile().as_text())
  # Each trip reads two matrices and writes one; XLA may add copies.
  assert 10 * 3 * 4 * 64**2 <= traffic[20] - traffic[10] <= 10 * 5.1 * 4 * 64**2


def test_flops_of_a_scan_count_every_iteration():
  x = jnp.ones((5, 8))
  w = jnp.ones((8, 8))
  loop = lambda x, w: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0].sum()
  assert cost.flops(jax.make_jaxpr(loop)(x, w)) == 7 * 2 * 5 * 8 * 8
  # Each of the two gradients of a product costs as much as the product.
  both = jax.make_jaxpr(jax.grad(loop, (0, 1)))(x, w)
  assert cost.flops(both) == 3 * 7 * 2 * 5 * 8 * 8
  assert cost.other_operations(jax.make_jaxpr(loop)(x, w)) == 7 * 5 * 8 + 5 * 8  # tanh, sum


def test_unused_products_cost_nothing():
  x = jnp.ones((8, 8))
  gradient = lambda w, x, dy: jax.lax.cond(True, *[lambda: jax.vjp(jnp.dot, w, x)[1](dy)] * 2)
  assert cost.flops(jax.make_jaxpr(gradient)(x, x, x)) == 2 * 2 * 8 * 8 * 8


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_of_convolutions_and_their_gradients_are_close_to_xla(stride):
  """XLA leaves out products with the padding at the image's border."""

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
  assert cost.flops(program.trace(*shapes).jaxpr) == pytest.approx(xla, rel=0.15)


@pytest.mark.parametrize(
  ("name", "forward", "both"),
  [
    ("reference", 2, 6),
    pytest.param("cudnn", 2, 7, marks=needs_cuda),  # backwards the scores again
    ("flash", 2, 9),  # backwards the scores and a gradient of them again, in two kernels
  ],
)
def test_flops_of_attention_kernels_are_those_of_their_products(name, forward, both):
  function = getattr(attention, name)
  x = jax.ShapeDtypeStruct((1, 1024, 2, 40), jnp.bfloat16)
  weight = jax.ShapeDtypeStruct(x.shape, jnp.float32)
  loss = lambda q, k, v, w: (function(q, k, v).astype(jnp.float32) * w).sum()
  product = 2 * x.size * x.shape[1]
  assert cost.flops(jax.make_jaxpr(function)(x, x, x)) == forward * product
  gradients = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(x, x, x, weight)
  assert cost.flops(gradients) == both * product


def test_flops_of_shard_map_are_summed_over_devices():
  mesh = sharding.make_mesh()
  product = lambda x, w: x @ w
  spread = jax.shard_map(product, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
  x, w = jnp.ones((16, 4)), jnp.ones((4, 4))
  assert cost.flops(jax.make_jaxpr(spread)(x, w)) == cost.flops(jax.make_jaxpr(product)(x, w))


def test_each_step_of_a_chain_costs_one_forward_pass():
  network = lambda latents, t: jnp.tanh(latents @ jnp.ones((4, 4)))
  noise, schedule = jnp.zeros((2, 8, 8, 4)), Schedule()

  def chain_flops(num_steps):
    steps = ddim.ddim_steps(schedule, num_steps, 1.0)
    run = lambda noise: ddim.rollout(network, schedule, steps, noise, jax.random.key(0))
    return cost.flops(jax.make_jaxpr(run)(noise))

  forward = 2 * 2 * 8 * 8 * 4 * 4
  assert [chain_flops(1), chain_flops(4)] == [forward, 4 * forward]
