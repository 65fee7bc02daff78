"""Checkpoints: exact round trips, selection, killed saves, damaged files, several processes."""

import gc
import json
import logging
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.logging import get_absl_logger
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from two_processes import run_two_processes

from prefpaint_jax.runtime import checkpoint
from prefpaint_jax.runtime.checkpoint import Checkpoints
from prefpaint_jax.runtime.sharding import make_mesh

EXTRA = {"reward": {"mean": 0.1, "count": 3}}


def bits(leaf):
  leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
  return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_identical(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  assert jax.tree.map(bits, tree) == jax.tree.map(bits, expected)


def place(tree, mesh):
  """Shards matrices over both axes of the mesh and replicates the other arrays."""
  spec = lambda leaf: P("data", "fsdp") if leaf.ndim == 2 else P()
  return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), tree)


def abstract(tree, sharding=None):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding),
    tree,
  )


def make_state(seed=0, width=512):
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    "dense": {"kernel": jax.random.normal(keys[0], (8, width)), "bias": jnp.full(width, jnp.nan)},
    "half": jax.random.normal(keys[1], (8, 8), jnp.bfloat16),
  }
  state = {
    "params": params,
    "opt_state": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
    "behaviour": jax.tree.map(lambda leaf: leaf + 1, params),
    "iteration": jnp.int32(7),
    "key": keys[2],
    "keys": jax.random.split(jax.random.key(1, impl="rbg"), 4),
  }
  return place(state, make_mesh(data=4, fsdp=2))


@pytest.mark.parametrize("data_state", [{"next": 5}, b'{"next": 5}\x00\xff', '"text"', None])
def test_round_trip_over_eight_devices_is_bit_identical(tmp_path, data_state):
  state = make_state()
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(7, state, data_state, EXTRA)
  checkpoints.close()
  restored, restored_data_state, extra = Checkpoints(tmp_path).restore(abstract(state))
  assert_identical(restored, state)
  assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(
    lambda leaf: leaf.sharding, state
  )
  assert restored_data_state == data_state and type(restored_data_state) is type(data_state)
  assert extra == EXTRA


def test_arrays_that_devices_write_in_parts_are_bit_identical(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, "SPLIT_FROM", 1024)  # bytes
  state = {"in_parts": jnp.arange(4096.0), "small": jnp.arange(8.0), "odd": jnp.arange(4099.0)}
  state = jax.device_put(state, NamedSharding(make_mesh(), P()))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state, None, {})
  checkpoints.close()
  restored, _, _ = checkpoints.restore(abstract(state))
  assert_identical(restored, state)


def test_state_of_eight_devices_restores_on_one_bit_identically(tmp_path):
  state = make_state()
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(7, state, None, {})
  checkpoints.wait()
  one = SingleDeviceSharding(jax.devices()[3])
  restored, _, _ = checkpoints.restore(abstract(state, one))
  assert_identical(restored, state)
  assert all(leaf.devices() == {jax.devices()[3]} for leaf in jax.tree.leaves(restored))


def test_restored_keys_draw_the_same_numbers(tmp_path):
  state = make_state()
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state, None, {})
  checkpoints.wait()
  restored, _, _ = checkpoints.restore(abstract(state))
  for name in ("key", "keys"):
    assert restored[name].dtype == state[name].dtype
  draw = lambda tree: jax.random.normal(jax.random.fold_in(tree["key"], 3), 5)
  np.testing.assert_array_equal(draw(restored), draw(state))


@pytest.mark.parametrize("spec", [P("data", "fsdp"), P(None, "fsdp"), P()])
def test_state_donated_right_after_save_is_saved_as_it_was(tmp_path, spec):
  sharding = NamedSharding(make_mesh(data=4, fsdp=2), spec)
  make = jax.jit(
    lambda key: {"params": jax.random.normal(key, (2048, 512))}, out_shardings={"params": sharding}
  )
  overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
  jax.block_until_ready(
    overwrite(make(jax.random.key(0)))
  )  # compile first, so that the overwrite races with the save
  state, expected = make(jax.random.key(1)), np.array(make(jax.random.key(1))["params"])
  checkpoints = Checkpoints(tmp_path)
  extra = {"count": 1}
  checkpoints.save(1, state, None, extra)
  extra["count"] = 2
  overwritten = jax.block_until_ready(overwrite(state))
  assert (np.asarray(overwritten["params"]) == -1).all()
  checkpoints.wait()
  restored, _, saved_extra = checkpoints.restore(abstract(overwritten))
  np.testing.assert_array_equal(restored["params"], expected)
  assert saved_extra == {"count": 1}


def test_latest_checkpoints_are_kept_and_each_can_be_restored(tmp_path):
  states = {step: {"params": jnp.full(4, step, jnp.float32)} for step in (1, 2, 10)}
  checkpoints = Checkpoints(tmp_path / "new", keep=2)
  assert checkpoints.latest() is None and not (tmp_path / "new").exists()
  for step, state in states.items():
    checkpoints.save(step, state, None, {"step": step})
  checkpoints.wait()
  assert checkpoints.latest() == 10
  for step in (2, 10):
    restored, _, extra = checkpoints.restore(abstract(states[step]), step)
    assert_identical(restored, states[step])
    assert extra == {"step": step}
  with pytest.raises(ValueError, match=r"no checkpoint of step 1; complete ones: \[2, 10\]"):
    checkpoints.restore(abstract(states[1]), 1)


BY_REWARD = {1: 0.5, 2: 0.1, 3: 0.7, 4: None, 5: float("nan"), 6: 0.7, 7: 0.2, 8: 0.3}


@pytest.mark.parametrize("reopened", [False, True])
def test_best_checkpoint_is_kept_in_addition_to_the_latest(tmp_path, reopened):
  checkpoints = Checkpoints(tmp_path, keep=2, best="reward")
  bests = []
  for step, reward in BY_REWARD.items():
    metrics = None if reward is None else {"reward": reward, "another": -reward}
    checkpoints.save(step, {"params": {"bias": jnp.full(4, step)}}, None, {}, metrics)
    checkpoints.wait()
    bests.append(checkpoints.best())
    kept = {str(bests[-1]), str(step), str(max(1, step - 1))}
    assert {path.name for path in tmp_path.iterdir()} == kept
    if reopened:
      checkpoints.close()
      checkpoints = Checkpoints(tmp_path, keep=2, best="reward")
  checkpoints.close()
  assert bests == [1, 1, 3, 3, 3, 6, 6, 6]  # the latest of equally good ones
  reader = Checkpoints(tmp_path, best="reward")
  np.testing.assert_array_equal(reader.load("params", "best")["bias"], np.full(4, 6))
  restored, _, _ = reader.restore({"params": {"bias": jnp.zeros(4, jnp.int32)}}, "best")
  np.testing.assert_array_equal(restored["params"]["bias"], np.full(4, 6))
  with pytest.raises(ValueError, match=r"no checkpoint with other; complete ones: \[6, 7, 8\]"):
    Checkpoints(tmp_path, best="other").load("params", "best")
  with pytest.raises(ValueError, match="no checkpoint with any metric: keep_best is empty"):
    Checkpoints(tmp_path).load("params", "best")


def test_best_is_found_beside_a_checkpoint_whose_deletion_was_killed(tmp_path):
  checkpoints = Checkpoints(tmp_path, best="reward")
  for step, reward in ((1, 0.1), (2, 0.3), (3, 0.2)):
    checkpoints.save(step, {"params": {"bias": jnp.full(4, step)}}, None, {}, {"reward": reward})
  checkpoints.close()
  (tmp_path / "1" / "metrics" / "metrics").unlink()
  reader = Checkpoints(tmp_path, best="reward")
  assert (reader.best(), reader.latest()) == (2, 3)
  np.testing.assert_array_equal(reader.load("params", "best")["bias"], np.full(4, 2))


def test_killed_while_saving_resumes_from_the_previous_checkpoint(tmp_path):
  state = {"params": jnp.arange(4.0)}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, state, None, {})
  checkpoints.close()
  script = f"""
    import os, threading, jax.numpy as jnp
    from prefpaint_jax.runtime.checkpoint import Checkpoints
    checkpoints = Checkpoints({str(tmp_path)!r})
    os.rename = os.replace = lambda *_: os._exit(9)  # killed when it completes the save
    import pathlib; pathlib.Path.rename = pathlib.Path.replace = lambda *_: os._exit(9)
    checkpoints.save(4, {{"params": jnp.zeros(4)}}, None, {{}})
    checkpoints.wait()
  """
  killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
  assert killed.returncode == 9, killed.stderr.decode()[-2000:]
  left_behind = [path.name for path in tmp_path.iterdir() if path.name != "3"]
  assert left_behind, "the killed save left no incomplete checkpoint"
  resumed = Checkpoints(tmp_path)
  assert resumed.latest() == 3
  assert_identical(resumed.restore(abstract(state))[0], state)
  resumed.save(4, state, None, {})
  resumed.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


# When one read fails, Orbax abandons the other reads, and Python warns of their coroutines.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.slow
def test_truncated_file_raises_one_line_or_restores_bit_identically(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
  state = make_state()
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(7, state, {"next": 5}, EXTRA)
  checkpoints.close()
  refused = set()
  files = [path for path in (tmp_path / "7").rglob("*") if path.is_file()]
  for path in files:
    whole = path.read_bytes()
    for size in {0, len(whole) // 2, len(whole) - 1}:
      path.write_bytes(whole[:size])
      try:
        restored, data_state, extra = Checkpoints(tmp_path).restore(abstract(state))
      except ValueError as error:
        refused.add(path)
        message = str(error)
        assert str(tmp_path / "7") in message and "\n" not in message
      else:
        assert_identical(restored, state)
        assert (data_state, extra) == ({"next": 5}, EXTRA)
    path.write_bytes(whole)
  gc.collect()
  largest = max(files, key=lambda path: path.stat().st_size)
  assert {largest, tmp_path / "7" / "run" / "metadata"} <= refused


# When one read fails, Orbax abandons the other reads, and Python warns of their coroutines.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_flipped_bit_of_an_array_is_never_restored(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
  state = {"params": {"kernel": jax.random.normal(jax.random.key(0), (32, 32))}}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(7, state, None, {})
  checkpoints.close()
  file = max((tmp_path / "7" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
  whole = file.read_bytes()
  messages = []
  for position in range(0, len(whole), len(whole) // 10):
    file.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
    for read in (
      lambda: checkpoints.restore(abstract(state))[0]["params"],
      lambda: checkpoints.load("params"),
    ):
      try:
        assert_identical(jax.tree.map(jnp.asarray, read()), state["params"])
      except ValueError as error:
        messages.append(str(error))
  gc.collect()
  damaged = (
    f"checkpoint {tmp_path}/7: params/kernel is damaged (1 of 1 arrays differ from their "
    "checksums); there is no earlier one; give another --workdir to start again"
  )
  assert damaged in messages
  assert all(str(tmp_path / "7") in message and "\n" not in message for message in messages)


def test_checkpoint_without_checksums_is_restored(tmp_path):
  state = {"params": {"kernel": jnp.arange(4.0)}}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(7, state, {"next": 5}, EXTRA)
  checkpoints.close()
  file = tmp_path / "7" / "run" / "metadata"
  run = json.loads(file.read_text())
  assert run.pop("checksums").keys() == {"params/kernel"}
  file.write_text(json.dumps(run))
  restored, data_state, extra = checkpoints.restore(abstract(state))
  assert_identical(restored, state)
  assert (data_state, extra) == ({"next": 5}, EXTRA)
  np.testing.assert_array_equal(checkpoints.load("params")["kernel"], np.arange(4.0))


@pytest.mark.parametrize(
  ("steps", "advice"),
  [
    ((7,), "there is no earlier one; give another --workdir"),
    ((3, 5, 7), "remove this folder to resume from the earlier one, 5"),
  ],
)
def test_missing_file_raises_one_line_with_the_folder_and_the_way_on(tmp_path, steps, advice):
  state = {"params": jnp.arange(4.0)}
  checkpoints = Checkpoints(tmp_path)
  for step in steps:
    checkpoints.save(step, state, None, {})
  checkpoints.close()
  (tmp_path / "7" / "run" / "metadata").unlink()
  with pytest.raises(ValueError, match=rf"checkpoint {tmp_path}/7: cannot be read .*; {advice}"):
    Checkpoints(tmp_path).restore(abstract(state))


@pytest.mark.parametrize(
  ("foreign", "named"),
  [
    ({"params": {"dense": jnp.zeros((4, 4))}}, r"params/dense: saved float32\[4, 2\], expected"),
    ({"params": {"dense": jnp.zeros((4, 2), jnp.bfloat16)}}, r"expected bfloat16\[4, 2\]"),
    (
      {"params": {"other": jnp.zeros((4, 2))}},
      r"2 of 2 .*dense: saved .*, expected nothing; .*other",
    ),
    ({"params": {"dense": jnp.zeros((4, 2))}, "ema": jnp.zeros(3)}, r"ema: saved nothing"),
    ({"ema": jnp.zeros(3)}, r"differ \(ema: saved nothing, expected float32\[3\]"),
  ],
)
def test_checkpoint_of_another_tree_raises_one_line_with_the_paths(tmp_path, foreign, named):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, {"params": {"dense": jnp.zeros((4, 2))}}, None, {})
  checkpoints.wait()
  with pytest.raises(ValueError, match=named) as caught:
    checkpoints.restore(abstract(foreign))
  assert str(tmp_path / "1") in str(caught.value) and "\n" not in str(caught.value)


def test_load_reads_one_subtree_to_the_host(tmp_path):
  state = make_state()
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(7, state, None, {})
  checkpoints.wait()
  params = checkpoints.load("params")
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
  assert_identical(params, state["params"])
  with pytest.raises(
    ValueError, match="has no arrays under 'ema'; it has behaviour, iteration, key"
  ):
    checkpoints.load("ema")


def test_reading_does_not_change_a_save_in_progress(tmp_path):
  state = {"params": jnp.arange(4.0)}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state, None, {})
  checkpoints.close()
  in_progress = tmp_path / "2.orbax-checkpoint-tmp"
  in_progress.mkdir()
  reader = Checkpoints(tmp_path)
  assert reader.latest() == 1
  reader.restore(abstract(state))
  reader.close()
  assert in_progress.exists()


def test_saving_logs_nothing(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored at the end
  for logger in (get_absl_logger(), logging.getLogger("asyncio")):
    monkeypatch.setattr(logger, "filters", list(logger.filters))
  checkpoint.silence_orbax()
  caplog.set_level(logging.INFO)
  logging.getLogger("absl").setLevel(logging.INFO)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, {"params": jnp.arange(4.0)}, None, {})
  checkpoints.save(2, {"params": jnp.arange(4.0)}, None, {})  # while the first is being written
  checkpoints.close()
  assert not caplog.records


TWO_PROCESSES = """
  import sys
  import jax, jax.numpy as jnp, numpy as np
  folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
  jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
  from jax.sharding import NamedSharding, PartitionSpec as P
  from prefpaint_jax.runtime.checkpoint import Checkpoints
  from prefpaint_jax.runtime.sharding import check_batch, make_mesh, to_global

  mesh = make_mesh(data=2, fsdp=2)
  rows = np.arange(8.0, dtype=np.float32).reshape(4, 2)
  params = jax.device_put(rows, NamedSharding(mesh, P("data", "fsdp")))
  batch = to_global(mesh, rows[2 * index : 2 * index + 2])
  make_key = jax.jit(lambda: jax.random.key(3), out_shardings=NamedSharding(mesh, P()))
  state = {"params": params, "batch": batch, "key": make_key()}
  checkpoints = Checkpoints(folder)
  for step in (1, 2):
    checkpoints.save(step, state, {"next": 10 * step}, {"step": step})
  checkpoints.wait()
  assert checkpoints.latest() == 2
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
  for written in (checkpoints, Checkpoints(folder + "/of_one")):
    restored, data_state, extra = written.restore(abstract)
    assert data_state == {"next": 20} and extra == {"step": 2}
    for name in ("params", "batch"):
      for shard in restored[name].addressable_shards:
        np.testing.assert_array_equal(shard.data, rows[shard.index])
    assert restored["key"].sharding == state["key"].sharding
  checkpoints.close()
  print("restored", index)
"""


@pytest.mark.slow
def test_checkpoints_of_one_and_of_two_processes_restore_in_the_other(tmp_path):
  rows = jnp.arange(8.0).reshape(4, 2)
  state = {"params": rows, "batch": rows, "key": jax.random.key(3)}
  of_one = Checkpoints(tmp_path / "of_one")
  of_one.save(2, place(state, make_mesh(data=4, fsdp=2)), {"next": 20}, {"step": 2})
  of_one.close()
  outputs = run_two_processes(TWO_PROCESSES, tmp_path, devices=2)
  for index, output in enumerate(outputs):
    assert f"restored {index}" in output, output[-2000:]
  restored, data_state, extra = Checkpoints(tmp_path).restore(abstract(state))
  assert_identical(restored, state)
  assert data_state == {"next": 20} and extra == {"step": 2}
