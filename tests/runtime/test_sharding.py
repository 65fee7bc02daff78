"""Meshes, sharding rules and batches over several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.sharding import DEFAULT_RULES, LARGEST, make_mesh, specs


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def test_tests_run_on_eight_cpu_devices():
  assert [device.platform for device in jax.devices()] == ["cpu"] * 8


@pytest.mark.parametrize(
  ("sizes", "expected"),
  [
    ({}, (8, 1)),
    ({"fsdp": 2}, (4, 2)),
    ({"data": 2, "fsdp": -1}, (2, 4)),
    ({"data": 1, "fsdp": 8}, (1, 8)),
  ],
)
def test_mesh_holds_every_device_once(sizes, expected):
  mesh = make_mesh(**sizes)
  assert mesh.axis_names == ("data", "fsdp") and mesh.devices.shape == expected
  assert set(mesh.devices.flat) == set(jax.devices())
  assert mesh.axis_types == (AxisType.Auto,) * 2


def test_mesh_of_given_devices_holds_only_these():
  chosen = jax.devices()[2:6]
  mesh = make_mesh(fsdp=2, devices=chosen)
  assert mesh.devices.shape == (2, 2) and set(mesh.devices.flat) == set(chosen)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"fsdp": 3}, "data=-1, fsdp=3 on 8 devices: the sizes multiply to 3, not 8"),
    ({"data": 2, "fsdp": 2}, "data=2, fsdp=2 on 8 devices: the sizes multiply to 4, not 8"),
    ({"data": 16}, "the sizes multiply to 16, not 8"),
    ({"data": -1, "fsdp": -1}, "at most one of them -1"),
    ({"data": 0}, "give positive sizes"),
    ({"fsdp": -2}, "give positive sizes"),
  ],
)
def test_mesh_that_does_not_fit_the_devices_raises_one_line(sizes, message):
  with pytest.raises(ValueError, match=message) as caught:
    make_mesh(**sizes)
  assert "\n" not in str(caught.value)


def test_first_matching_rule_decides():
  mesh = make_mesh(data=4, fsdp=2)
  rules = ((r"^a/", P("fsdp")), (r"kernel$", P(None, ("data", "fsdp"))), (r"", P()))
  tree = {"a": {"kernel": shape(2, 3)}, "b": {"kernel": shape(3, 8), "bias": shape(5)}}
  layout = jax.tree.map(lambda place: place.spec, specs(tree, rules, mesh))
  assert layout == {
    "a": {"kernel": P("fsdp")},
    "b": {"kernel": P(None, ("data", "fsdp")), "bias": P()},
  }


@pytest.mark.parametrize(
  ("tree", "rules", "message"),
  [
    ({"a": {"b": shape(2)}}, ((r"^c", P()),), r"no sharding rule matches 'a/b' of shape \(2,\)"),
    (
      {"a": [shape(4, 3)]},
      ((r"", P(None, "fsdp")),),
      r"'a/0' of shape \(4, 3\): dimension 1 does not divide over mesh axis fsdp of 2",
    ),
    (
      {"a": shape(4)},
      ((r"", P(("data", "fsdp"))),),
      r"dimension 0 does not divide over mesh axis dataxfsdp of 8",
    ),
    ({"a": shape()}, ((r"", P("fsdp")),), r"'a' of shape \(\) has fewer dimensions than its rule"),
  ],
)
def test_rule_that_does_not_fit_an_array_raises_one_line_with_its_path(tree, rules, message):
  with pytest.raises(ValueError, match=message) as caught:
    specs(tree, rules, make_mesh(data=4, fsdp=2))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("sizes", "spec"),
  [
    ((3, 3, 320, 640), P(None, None, None, "fsdp")),
    ((3, 3, 640, 320), P(None, None, "fsdp")),
    ((3, 3, 320, 320), P(None, None, None, "fsdp")),  # of equally large dimensions, the last
    ((49408, 767), P("fsdp")),
    ((3001, 1000), P(None, "fsdp")),  # the largest dimension does not divide
    ((1001, 1001), P()),  # no dimension divides
    ((16,), P()),  # small
    ((), P()),
  ],
)
def test_largest_rule_shards_the_largest_dimension_that_divides(sizes, spec):
  place = specs({"x": shape(*sizes)}, ((r"", LARGEST),), make_mesh(data=2, fsdp=4))["x"]
  assert place.spec == spec


def test_without_fsdp_everything_is_replicated():
  place = specs({"x": shape(512, 512)}, DEFAULT_RULES, make_mesh())["x"]
  assert place.is_fully_replicated


def test_optimizer_moments_are_sharded_as_their_parameters():
  mesh = make_mesh(data=2, fsdp=4)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  key = jax.random.key(0)
  init = lambda: {
    "params": (params := {"dense": {"kernel": jnp.ones((128, 256)), "bias": jnp.ones(256)}}),
    "opt_state": optimizer.init(params),
    "key": jax.random.split(key, 4),
  }
  layout = specs(jax.eval_shape(init), DEFAULT_RULES, mesh)
  adam = layout["opt_state"][1][0]
  assert adam.mu == adam.nu == layout["params"]
  assert layout["params"]["dense"]["kernel"].spec == P(None, "fsdp")
  assert adam.count.is_fully_replicated and layout["key"].is_fully_replicated

  state = jax.jit(init, out_shardings=layout)()
  kernel = state["opt_state"][1][0].mu["dense"]["kernel"]
  assert {shard.data.shape for shard in kernel.addressable_shards} == {(128, 64)}


def test_paths_of_optimizer_states_contain_field_names():
  state = {"opt_state": optax.adamw(1e-3).init({"dense": {"kernel": jnp.ones((4, 4))}})}
  rules = ((r"^opt_state/0/mu/dense/kernel$", P("fsdp")), (r"", P()))
  adam = specs(state, rules, make_mesh(fsdp=2))["opt_state"][0]
  assert adam.mu["dense"]["kernel"].spec == P("fsdp")
  assert adam.nu["dense"]["kernel"].spec == P()


def test_sharded_and_replicated_parameters_give_the_same_gradient():
  make = lambda: {"kernel": jnp.linspace(-1, 1, 128 * 256).reshape(128, 256), "bias": jnp.ones(256)}
  rows = np.linspace(-1, 1, 16 * 128, dtype=np.float32).reshape(16, 128)
  loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["kernel"] + params["bias"]) ** 2)
  gradients = []
  for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(), make_mesh(data=2, fsdp=4)):
    layout = specs(jax.eval_shape(make), DEFAULT_RULES, mesh)
    params = jax.jit(make, out_shardings=layout)()
    gradient = jax.jit(jax.grad(loss), out_shardings=layout)(params, sharding.to_global(mesh, rows))
    gradients.append(jax.device_get(gradient))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
  for gradient in gradients[1:]:
    jax.tree.map(close, gradient, gradients[0])


def test_batch_is_sharded_over_all_devices_in_order():
  mesh = make_mesh(data=4, fsdp=2)
  local = {"mask": np.arange(48.0).reshape(16, 3), "name": np.arange(8)}
  batch = sharding.to_global(mesh, local)
  jax.tree.map(np.testing.assert_array_equal, batch, local)
  for array in jax.tree.leaves(batch):
    assert array.sharding == sharding.batch_sharding(mesh)
    assert {len(shard.data) for shard in array.addressable_shards} == {len(array) // 8}


def test_replicated_puts_a_copy_on_every_device():
  array = jax.device_put(np.arange(3), sharding.replicated(make_mesh()))
  assert [shard.data.shape for shard in array.addressable_shards] == [(3,)] * 8


@pytest.mark.parametrize("batch", [0, 4, 12, -8])
def test_batch_that_does_not_divide_over_the_devices_raises(batch):
  with pytest.raises(ValueError, match=f"batch_size {batch} does not divide over 8 devices"):
    sharding.check_batch(batch, make_mesh(fsdp=2))


def test_batch_that_divides_over_the_devices_is_accepted():
  sharding.check_batch(24, make_mesh(fsdp=2))
