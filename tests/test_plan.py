"""Plans of runs: for this machine, for given peak rates, and for absent TPUs and GPUs."""

import collections
import importlib.util
import json
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from prefpaint_jax import plan, testing
from prefpaint_jax.align.run import outline
from prefpaint_jax.align.settings import check_batch
from prefpaint_jax.kernels.attention import has_cudnn
from prefpaint_jax.models import architectures, assembly
from prefpaint_jax.planning import cost, stages
from prefpaint_jax.planning.chips import GIB, GPUS, Chip, topology_devices
from prefpaint_jax.rewards import prefpaint
from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.compilation import fast_jit

get_config = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "rl.py"))["get_config"]
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="compilation for a TPU needs its compiler: pip install libtpu",
)
needs_cuda = pytest.mark.skipif(
  not has_cudnn(), reason="compilation for a GPU needs JAX's plugin: pip install jax[cuda13]"
)


def tiny_config(tmp_path, **fields):
  config = get_config()
  world = testing.write_tiny_world(tmp_path, train=1, test=1)
  config.update_from_flattened_dict(testing.tiny_training(world) | fields)
  return config


@pytest.fixture(scope="module")
def planned(quick_compilation, tmp_path_factory):
  seen = []
  after_stage = lambda report: seen.append(json.loads(json.dumps(report)))
  config = tiny_config(tmp_path_factory.mktemp("world"))
  return stages.plan(config, jax.devices(), after_stage), seen


@pytest.fixture
def report(planned):
  return planned[0]


@pytest.mark.slow
def test_after_stage_is_called_after_every_stage(planned):
  report, seen = planned
  assert [list(one["stages"]) for one in seen] == [
    ["rollout"],
    ["rollout", "score"],
    ["rollout", "score", "update"],
  ]
  assert seen[-1] == json.loads(json.dumps(report))


@pytest.mark.slow
def test_report_of_this_machine_is_json_and_a_table(report):
  assert json.loads(json.dumps(report))["chips"] == 8
  assert list(report["stages"]) == ["rollout", "score", "update"]
  table = plan.describe(report)
  assert "rollout x1" in table and "update x2" in table and "ESTIMATE" not in table


@pytest.mark.slow
def test_update_holds_parameters_and_moments_and_reduces_each_gradient_once(report):
  update, parameters = report["stages"]["update"], report["parameters"]["unet"]
  assert update["memory"]["arguments"] > 3 * 4 * parameters
  assert update["memory"]["total"] == sum(
    size for name, size in update["memory"].items() if name != "total"
  )
  _, sent = update["collectives"]["all-reduce"]
  assert sent == pytest.approx(2 * 7 / 8 * 4 * parameters, rel=0.02)


@pytest.mark.slow
def test_memory_of_an_update_grows_with_the_samples_of_a_pass_and_not_with_the_batch(
  quick_compilation, tmp_path
):
  def temporaries(batch):
    config = tiny_config(tmp_path, batch_size=batch, samples_per_pass=4)
    report = stages.plan(config, jax.devices()[:1])
    return report["stages"]["update"]["memory"]["temporaries"]

  few, many = temporaries(4), temporaries(32)
  assert few <= many < 1.05 * few


@pytest.mark.slow
def test_nft_keeps_one_latent_for_each_sample_and_a_copy_of_the_policy(quick_compilation, tmp_path):
  def planned(**fields):
    config = tiny_config(tmp_path, num_steps=6, **fields)
    return config, stages.plan(config, jax.devices()[:1])

  config, ppo = planned(window=3, train_timesteps=2)
  _, nft = planned(algorithm="nft", train_timesteps=2)
  outputs = [one["stages"]["rollout"]["memory"]["outputs"] for one in (ppo, nft)]
  shape = assembly.make_modules(architectures.tiny_configs(), "float32").latent_shape(
    config.batch_size * config.samples_per_prompt, config.size, config.size
  )
  chain = 4 * 6 * (np.prod(shape) + shape[0])  # float32: states but the last, log-probabilities
  assert outputs[0] - outputs[1] == pytest.approx(chain, abs=200)  # timesteps, a key, padding
  arguments = [one["stages"]["update"]["memory"]["arguments"] for one in (ppo, nft)]
  copy = 4 * nft["parameters"]["unet"]
  assert arguments[1] - arguments[0] == pytest.approx(copy - chain, rel=0.01, abs=2000)


@pytest.mark.slow
def test_estimate_is_the_longer_of_work_and_memory_plus_the_links(report):
  chip = Chip(flops=1e9, memory=1e12, bandwidth=1e15, links=1e9)
  fitted = report | stages.fit_to_chip(report, chip)
  assert "does_not_fit" not in fitted and "fits" in plan.describe(fitted)
  seconds = 0.0
  for stage in report["stages"].values():
    sent = sum(sent for _, sent in stage["collectives"].values())
    seconds += stage["times"] * (stage["flops"] / 1e9 + sent / 1e9)
  assert fitted["seconds"] == pytest.approx(seconds)
  assert fitted["images_per_s"] == pytest.approx(16 / seconds)
  slow = report | stages.fit_to_chip(report, chip._replace(bandwidth=1.0))
  traffic = sum(stage["times"] * stage["traffic"] for stage in report["stages"].values())
  assert slow["seconds"] == pytest.approx(traffic, rel=1e-3)


@pytest.mark.slow
def test_plan_names_the_stage_that_does_not_fit(report):
  sizes = {name: stage["memory"]["total"] for name, stage in report["stages"].items()}
  largest = max(sizes, key=sizes.get)
  chip = Chip(1e12, sizes[largest] - 1, 1e12, 1e12)
  table = plan.describe(report | stages.fit_to_chip(report, chip))
  assert f"DOES NOT FIT: {largest}" in table


@pytest.mark.parametrize(("batch", "most"), [(48, 3), (48, 0), (48, 100), (8, 1), (56, 6)])
def test_search_finds_the_most_samples_per_pass_that_fit(batch, most, monkeypatch):
  tried = collections.defaultdict(list)

  def plan_without_compiling(config, devices):
    assert config.batch_size == batch
    fits = config.samples_per_pass <= most * (1 + config.remat)
    tried[config.mesh.fsdp, config.remat].append((config.samples_per_pass, fits))
    return {} if fits else {"does_not_fit": "update: 20G of 10G"}

  monkeypatch.setattr(plan, "plan", plan_without_compiling)
  config = get_config()
  config.update(batch_size=batch, samples_per_prompt=2)
  reports = list(plan.search(config, jax.devices()))
  assert len(reports) == sum(map(len, tried.values()))
  samples = batch // 8 * 2
  divisors = [n for n in range(1, samples + 1) if samples % n == 0]
  assert set(tried) == {(fsdp, remat) for fsdp in (1, 4, 8) for remat in (False, True)}
  for (_, remat), found in tried.items():
    assert len(found) <= 3  # of up to six divisors
    best = max((n for n, fits in found if fits), default=0)
    assert best == max((n for n in divisors if n <= most * (1 + remat)), default=0)


def test_search_refuses_a_batch_that_the_chips_cannot_share():
  config = get_config()
  config.batch_size = 4
  with pytest.raises(ValueError, match="batch_size 4 does not divide over 8 devices"):
    next(plan.search(config, jax.devices()))


@pytest.mark.parametrize(
  "policy, parameters",
  [
    ("stable-diffusion-v1-5/stable-diffusion-inpainting", 859_535_364),
    ("stabilityai/stable-diffusion-2-inpainting", 865_925_124),
    pytest.param(
      "diffusers/stable-diffusion-xl-1.0-inpainting-0.1", 2_567_478_084, marks=pytest.mark.slow
    ),
  ],
)
def test_known_architectures_have_as_many_parameters_as_the_checkpoints(policy, parameters):
  configs, _ = architectures.read_architecture(policy)
  modules = assembly.make_modules(configs)
  unet = modules.shapes()["unet"]
  assert sum(x.size for x in jax.tree.leaves(unet)) == parameters


def test_architecture_of_mini_is_read_from_its_folder():
  configs, source = architectures.read_architecture("mini")
  assert configs["unet"]["in_channels"] == 9 and "folder" in source
  shapes = [prefpaint.outline(name).params for name in ("mini", "kd5678/prefpaintReward")]
  assert shapes[0].keys() == shapes[1].keys() and shapes[0] != shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("preset", "topology", "held"), [("sd15_24gb", "4090", 5), ("sd15_80gb", "a100", 15)]
)
def test_presets_of_cards_are_runs_of_one_device(preset, topology, held):
  """Parameters, moments and frozen networks leave most of three quarters of the memory free."""
  config = get_config(preset)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  check_batch(config, mesh)
  run, _, _ = outline(config, mesh)
  trees = [run.state_shapes, run.frozen, run.begin]
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees)) / GIB
  assert size < held < 0.75 * GPUS[topology].chip.memory / GIB / 3


def test_errors_in_a_config_are_one_line(tmp_path):
  config = tiny_config(tmp_path)
  cases = [
    ({"policy": "someone/else"}, "config.policy someone/else: .* give a folder"),
    ({"batch_size": 12}, "batch_size 12 does not divide over 8 devices"),
    ({"batch_size": 24, "samples_per_pass": 4}, "samples_per_pass is 4; .* divisor of 6, the sam"),
    ({"mesh": {"data": 3, "fsdp": 1}}, "the sizes multiply to 3, not 8"),
  ]
  for change, message in cases:
    changed = config.copy_and_resolve_references()
    changed.update(change)
    with pytest.raises(ValueError, match=message) as error:
      stages.plan(changed, jax.devices())
    assert "\n" not in str(error.value)


@needs_libtpu
def test_program_that_does_not_fit_says_how_much_memory_it_needs():
  device = topology_devices("v5e:1x1")[0]
  place = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((8 * 2**30,), jnp.float32, sharding=place)
  with pytest.raises(stages.DoesNotFitError, match=r"[\d.]+G of 15.75G"):
    stages._measure(jax.jit(lambda x: x + 1), (x,), x, Mesh([device], "chips"))


@needs_libtpu
def test_text_of_a_v6e_program_with_overlapping_loops_is_found():
  device = topology_devices("v6e:1x1")[0]
  place = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((4, 1024, 8, 80), jnp.bfloat16, sharding=place)
  lowered = jax.jit(jax.nn.dot_product_attention).lower(x, x, x)
  compiled, text = stages.compile_and_print(lowered, device)
  with pytest.raises(jax.errors.JaxRuntimeError, match="Async done"):
    compiled.as_text()
  assert cost.memory_traffic(text) > 4 * 2 * x.size  # at least query, key, value and result


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_small_batches_are_not_split_into_spatial_pieces(topology):
  device = topology_devices(topology)[0]
  place = jax.sharding.SingleDeviceSharding(device)
  x, kernel = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    for shape in ((4, 64, 64, 320), (3, 3, 320, 320))
  )
  layout = ("NHWC", "HWIO", "NHWC")
  conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=layout)
  twice = lambda x, kernel: conv(jax.nn.silu(conv(x, kernel)), kernel)

  def batches(jit) -> set[str]:
    _, text = stages.compile_and_print(jit(twice).lower(x, kernel), device)
    return set(re.findall(r"\[(\d+),[\d,]+,320\]", text))

  pieces = {"16", "32", "64"}
  assert batches(jax.jit) & pieces
  assert not batches(fast_jit(Mesh([device], "chips"))) & pieces


@pytest.mark.slow
@pytest.mark.parametrize(
  "topology, fsdp",
  [
    pytest.param("v5e:1x1", 1, marks=needs_libtpu),
    pytest.param("v5e:2x2", 2, marks=needs_libtpu),
    pytest.param("h100:1", 1, marks=needs_cuda),
    pytest.param("a100:2x2", 2, marks=needs_cuda),
  ],
)
def test_plan_of_a_tiny_run_for_absent_devices(topology, fsdp, tmp_path):
  config = tiny_config(tmp_path, **{"mesh.fsdp": fsdp})
  report = stages.plan(config, topology_devices(topology))
  assert "does_not_fit" not in report and report["images_per_s"] > 0
  update, parameters = report["stages"]["update"], report["parameters"]["unet"]
  sent = sum(sent for _, sent in update["collectives"].values())
  n = report["chips"]
  # The parameters are too small to be split, so their gradients are reduced as without fsdp.
  assert sent == pytest.approx(2 * (n - 1) / n * 4 * parameters, rel=0.1, abs=1)
  assert np.isclose(
    update["flops"] * n, stages.plan(config, jax.devices()[:n])["stages"]["update"]["flops"] * n
  )
