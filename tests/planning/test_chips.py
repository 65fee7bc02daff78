"""Cards and topologies: their rates against closed forms, and one line for what is unknown."""

import importlib.util
import types

import jax
import jax.numpy as jnp
import pytest

from prefpaint_jax.align.run import check_dtype
from prefpaint_jax.kernels.attention import attention, has_cudnn
from prefpaint_jax.kernels.dispatch import traced_for
from prefpaint_jax.planning import stages
from prefpaint_jax.planning.chips import CHIPS, GIB, GPUS, find_chip, note, topology_devices

# Published multiply-adds of a multiprocessor's tensor cores per clock, with float32 sums; of a T4
# those of its float32 units.
PER_CLOCK = {
  "t4": 64,
  "a10": 512,
  "a6000": 512,
  "l4": 512,
  "l40s": 512,
  "4090": 256,
  "5090": 256,
  "a100-40": 1024,
  "a100": 1024,
  "h100": 2048,
  "h200": 2048,
  "b200": 4096,
}
NOMINAL = {  # GB on the box
  "t4": 16,
  "a10": 24,
  "a6000": 48,
  "l4": 24,
  "l40s": 48,
  "4090": 24,
  "5090": 32,
  "a100-40": 40,
  "a100": 80,
  "h100": 80,
  "h200": 141,
  "b200": 180,
}


@pytest.mark.parametrize("name", GPUS)
def test_peak_of_a_gpu_is_that_of_its_units_at_its_clock(name):
  gpu = GPUS[name]
  peak = 2 * gpu.multiprocessors * PER_CLOCK[name] * gpu.clock * 1e9
  assert gpu.chip.flops == pytest.approx(peak, rel=0.09)  # sheets of the H100 have a lower clock


@pytest.mark.parametrize("name", GPUS)
def test_memory_of_a_gpu_is_a_little_below_its_nominal_size(name):
  assert 0.9 * NOMINAL[name] <= GPUS[name].chip.memory / GIB <= 1.001 * NOMINAL[name]


def test_chip_is_found_by_its_whole_name():
  """Names share beginnings: A10, A10G and A100, and the parts of a GPU that MIG makes."""
  assert find_chip("TPU v5 lite") is CHIPS["TPU v5 lite"]
  assert find_chip("NVIDIA A10G").flops < find_chip("NVIDIA A10").flops
  assert find_chip("NVIDIA A100-PCIE-40GB").memory < find_chip("NVIDIA A100 80GB PCIe").memory
  for kind in ("cpu", "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA GeForce RTX 4090 Laptop GPU"):
    assert find_chip(kind) is None


def test_unknown_topology_lists_the_known_ones():
  with pytest.raises(ValueError) as error:
    topology_devices("banana")
  message = str(error.value)
  assert message.startswith("--topology=banana: unknown") and "\n" not in message
  for name in (*GPUS, "v4", "v5e", "v5p", "v6e"):
    assert f" {name}" in message


def test_plan_says_where_a_card_differs_from_what_xla_knows():
  assert "no bfloat16" in note("Tesla T4")
  assert "published figures" in note("NVIDIA L4")
  assert note("NVIDIA H100 80GB HBM3") == note("TPU v5 lite") == note("cpu") == ""


@pytest.mark.parametrize("capability", ["7.5", "8.6", "12.0", "gfx90a"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bfloat16_is_refused_on_gpus_without_it(capability, dtype):
  device = types.SimpleNamespace(device_kind="Tesla T4", compute_capability=capability)
  if (capability, dtype) != ("7.5", "bfloat16"):
    return check_dtype(dtype, device)
  message = r"\Adtype is bfloat16, which a Tesla T4 does not compute[^\n]*dtype=float32\Z"
  with pytest.raises(ValueError, match=message):
    check_dtype(dtype, device)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_error_says_what_to_install():
  with pytest.raises(ValueError, match=r"--topology=v5e:2x2: libtpu.*'prefpaint_jax\[plan\]'"):
    topology_devices("v5e:2x2")


@pytest.mark.skipif(has_cudnn(), reason="JAX's CUDA plugin is installed")
def test_without_the_cuda_plugin_the_error_says_what_to_install():
  with pytest.raises(ValueError, match=r"--topology=h100:8: .*'prefpaint_jax\[cuda\]'"):
    topology_devices("h100:8")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["v5e:banana", "v5e:3x5"])
def test_unknown_slices_are_errors_of_one_line(name):
  message = f"--topology={name}: .*expected a shape such as v5e:4x4"
  with pytest.raises(ValueError, match=message) as error:
    topology_devices(name)
  assert "\n" not in str(error.value)


@pytest.mark.skipif(not has_cudnn(), reason="needs JAX's plugin: pip install jax[cuda13]")
def test_unknown_numbers_of_gpus_are_errors_of_one_line():
  with pytest.raises(ValueError, match=r"\A--topology=4090:0: unknown shape[^\n]*\Z"):
    topology_devices("4090:0")


@pytest.mark.slow
@pytest.mark.skipif(not has_cudnn(), reason="needs JAX's plugin: pip install jax[cuda13]")
@pytest.mark.parametrize("name", GPUS)
def test_programs_compile_for_every_gpu(name):
  (device,) = topology_devices(name)
  place = jax.sharding.SingleDeviceSharding(device)
  dtype = jnp.float32 if name == "t4" else jnp.bfloat16
  x = jax.ShapeDtypeStruct((2, 64, 8, 40), dtype, sharding=place)
  kernel = jax.ShapeDtypeStruct((3, 3, 40, 40), dtype, sharding=place)

  def loss(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    return attention(y, y, y).astype(jnp.float32).sum()

  program = jax.jit(traced_for("cuda", jax.grad(loss, (0, 1))))
  compiled, text = stages.compile_and_print(program.lower(x, kernel), device)
  assert compiled.memory_analysis().temp_size_in_bytes > 0 and "cudnn" in text
