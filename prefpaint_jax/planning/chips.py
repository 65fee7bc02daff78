"""Accelerators: their peak rates, and devices to compile for that need not be present."""

import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from prefpaint_jax.runtime.text import first_line

GIB = 2**30


class Chip(NamedTuple):
  """The memory and the peak rates of a chip."""

  flops: float  # per second, dense bfloat16 with float32 sums; of a T4 float32
  memory: float  # bytes that a program can use
  bandwidth: float  # bytes per second from and to this memory
  links: float  # bytes per second sent to other chips


class _Generation(NamedTuple):
  """The properties that all GPUs of a compute capability share, from the CUDA programming guide."""

  major: int
  minor: int
  features: str  # instructions of this capability alone ("sm_90a")
  units: int  # float32 units of a multiprocessor
  threads: int  # of a multiprocessor
  shared_memory: tuple[int, int]  # KiB of a multiprocessor; largest opt-in size of a block


class _Gpu(NamedTuple):
  """A GPU: its name in CUDA, its rates, and the properties that XLA's compiler reads."""

  kind: str
  chip: Chip
  generation: _Generation
  multiprocessors: int
  cache: float  # MiB of the L2 cache
  clock: float  # GHz, boost
  note: str = ""  # what a reader of a plan should know


_TURING = _Generation(7, 5, "NONE", 64, 1024, (64, 64))
_AMPERE = _Generation(8, 0, "NONE", 64, 2048, (164, 163))
_AMPERE_GDDR = _Generation(8, 6, "NONE", 128, 1536, (100, 99))
_ADA = _Generation(8, 9, "NONE", 128, 1536, (100, 99))
_HOPPER = _Generation(9, 0, "ACCELERATED_FEATURES", 128, 2048, (228, 227))
_BLACKWELL = _Generation(10, 0, "ACCELERATED_FEATURES", 128, 2048, (228, 227))
_BLACKWELL_GDDR = _Generation(12, 0, "NONE", 128, 1536, (100, 99))

# Rates are the published ones, without sparsity. They come from secondary sources, not from
# NVIDIA's own data sheets; a test compares them with units x clock. GeForce GPUs halve the rate of
# products with float32 sums. Memory is what CUDA reports, 1 to 8 % below the nominal size: the
# driver and ECC take the rest. Links are one direction of NVLink, or of PCIe where a GPU has no
# NVLink to all others.
_DESCRIBED = "XLA has no description of this GPU; the plan compiles for one from published figures"
GPUS = {
  "t4": _Gpu(
    "Tesla T4",
    Chip(8.1e12, 14.75 * GIB, 320e9, 16e9),
    *(_TURING, 40, 4, 1.59),
    f"a T4 has no bfloat16: the estimate is of float32, at 8.1 TFLOP/s; {_DESCRIBED}",
  ),
  "l4": _Gpu("NVIDIA L4", Chip(121e12, 22.03 * GIB, 300e9, 32e9), _ADA, 58, 48, 2.04, _DESCRIBED),
  "a10": _Gpu(
    "NVIDIA A10", Chip(125e12, 21.98 * GIB, 600e9, 32e9), _AMPERE_GDDR, 72, 6, 1.695, _DESCRIBED
  ),
  "4090": _Gpu(
    "NVIDIA GeForce RTX 4090",
    Chip(165.2e12, 23.52 * GIB, 1008e9, 32e9),
    *(_ADA, 128, 72, 2.52, _DESCRIBED),
  ),
  "5090": _Gpu(
    "NVIDIA GeForce RTX 5090",
    Chip(209.5e12, 31.36 * GIB, 1792e9, 64e9),
    *(_BLACKWELL_GDDR, 170, 96, 2.407, _DESCRIBED),
  ),
  "a6000": _Gpu(
    "NVIDIA RTX A6000", Chip(154.8e12, 47.53 * GIB, 768e9, 32e9), _AMPERE_GDDR, 84, 6, 1.8
  ),
  "l40s": _Gpu(
    "NVIDIA L40S", Chip(362e12, 44.4 * GIB, 864e9, 32e9), _ADA, 142, 96, 2.52, _DESCRIBED
  ),
  "a100-40": _Gpu(
    "NVIDIA A100-SXM4-40GB", Chip(312e12, 39.42 * GIB, 1555e9, 300e9), _AMPERE, 108, 40, 1.41
  ),
  "a100": _Gpu(
    "NVIDIA A100-SXM4-80GB", Chip(312e12, 79.25 * GIB, 2039e9, 300e9), _AMPERE, 108, 40, 1.41
  ),
  "h100": _Gpu(
    "NVIDIA H100 80GB HBM3", Chip(989e12, 79.11 * GIB, 3352e9, 450e9), _HOPPER, 132, 50, 1.98
  ),
  "h200": _Gpu("NVIDIA H200", Chip(989e12, 139.8 * GIB, 4800e9, 450e9), _HOPPER, 132, 50, 1.98),
  "b200": _Gpu(
    "NVIDIA B200", Chip(2250e12, 178.36 * GIB, 7672e9, 900e9), _BLACKWELL, 148, 126.5, 1.965
  ),
}
# The memory of TPUs is what their compiler reports.
_TPUS = {
  "TPU v4": Chip(275e12, 31.25 * GIB, 1228e9, 300e9),
  "TPU v5 lite": Chip(197e12, 15.75 * GIB, 819e9, 200e9),
  "TPU v5": Chip(459e12, 95.73 * GIB, 2765e9, 600e9),
  "TPU v6 lite": Chip(918e12, 31.24 * GIB, 1638e9, 400e9),
}
# GPUs that a plan or a benchmark of this machine may find.
_VARIANTS = {
  "TPU v5p": _TPUS["TPU v5"],
  "TPU v5e": _TPUS["TPU v5 lite"],
  "TPU v6e": _TPUS["TPU v6 lite"],
  "NVIDIA A10G": Chip(70e12, 21.98 * GIB, 600e9, 32e9),
  "NVIDIA A100-PCIE-40GB": Chip(312e12, 39.42 * GIB, 1555e9, 32e9),
  "NVIDIA A100 80GB PCIe": Chip(312e12, 79.25 * GIB, 1935e9, 32e9),
  "NVIDIA H100 PCIe": Chip(756e12, 79.11 * GIB, 2000e9, 64e9),
}
CHIPS = _TPUS | {gpu.kind: gpu.chip for gpu in GPUS.values()} | _VARIANTS


def find_chip(kind: str) -> Chip | None:
  """Returns the chip of a JAX `device_kind`; None if it is unknown or a part of a GPU (MIG)."""
  return CHIPS.get(kind)


def note(kind: str) -> str:
  """Returns what a reader of a plan for a JAX `device_kind` should know; "" for nothing."""
  return next((gpu.note for gpu in GPUS.values() if gpu.kind == kind), "")


_ONE_CHIP = {"v4": "1x1x1", "v5e": "1x1", "v5p": "1x1x1", "v6e": "1x1"}


def topology_devices(name: str) -> list[jax.Device]:
  """Returns the devices of a topology. Programs can be compiled for them, but not run on them.

  Args:
    name: for TPUs a slice, such as "v5e:4x4"; for GPUs "h100:8", one machine with eight GPUs, or
      "h100:2x8", two such machines. Without a shape, one chip.

  Raises:
    ValueError: for an unknown topology, or if the compiler for its devices is not installed.
  """
  kind, _, shape = name.partition(":")
  if kind in GPUS:
    return _gpu_devices(name, GPUS[kind], shape or "1")
  if kind not in _ONE_CHIP:
    raise ValueError(
      f"--topology={name}: unknown; expected a name such as h100:8 or v5e:4x4, of the GPUs "
      f"{', '.join(GPUS)} or the TPUs {', '.join(_ONE_CHIP)}"
    )
  return _tpu_devices(f"{kind}:{shape or _ONE_CHIP[kind]}")


def _tpu_devices(name: str) -> list[jax.Device]:
  variables = {  # without them libtpu asks the metadata server of a TPU machine
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # planning opens no chip, so several processes may plan
  }
  for variable, value in variables.items():
    os.environ.setdefault(variable, value)
  # Make the two cores of a v4 or v5p chip one device, as JAX does on a machine with such chips.
  options = {"chip_config_name": "megacore"} if name.startswith(("v4", "v5p")) else {}
  try:
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)
  except RuntimeError as error:
    if "not installed" in str(error):
      reason = "libtpu, the compiler for TPUs, is missing; run pip install 'prefpaint_jax[plan]'"
    else:
      message = first_line(error).removeprefix("INVALID_ARGUMENT: ")
      message = message.split(" and does not match")[0]
      reason = f"{message}; expected a shape such as v5e:4x4, v5p:2x2x2 or v6e:8x8"
    raise ValueError(f"--topology={name}: {reason}") from error


# openxla/xla has such descriptions of the A100, A6000, H100, H200 and B200.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {generation.threads}
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{
    major: {generation.major} minor: {generation.minor} feature_extension: {generation.features}
  }}
  core_count: {gpu.multiprocessors} fpus_per_core: {generation.units} clock_rate_ghz: {gpu.clock}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared[0]}
  shared_memory_per_block_optin: {shared[1]} l2_cache_size: {cache}
  device_memory_size: {gpu.chip.memory:.0f} memory_bandwidth: {gpu.chip.bandwidth:.0f}
}}
platform_name: "CUDA"
device_description_str: "{gpu.kind}"
dnn_version_info {{ major: 9 minor: 10 }}
"""


def _gpu_devices(name: str, gpu: _Gpu, shape: str) -> list[jax.Device]:
  if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape):
    kind = name.partition(":")[0]
    raise ValueError(
      f"--topology={name}: unknown shape {shape!r}; give {kind}:8 for one machine with 8 GPUs, or "
      f"{kind}:2x8 for two such machines"
    )
  target = _TARGET.format(
    gpu=gpu,
    generation=gpu.generation,
    shared=[1024 * size for size in gpu.generation.shared_memory],
    cache=round(gpu.cache * 2**20),
  )
  grid = "x".join(["1"] * (2 - shape.count("x")) + [shape])
  try:
    found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=grid)
  except NotImplementedError as error:  # JAX raises it for a platform without a plugin
    reason = "JAX's CUDA plugin, which holds the compiler for GPUs, is missing"
    raise ValueError(
      f"--topology={name}: {reason}; run pip install 'prefpaint_jax[cuda]'"
    ) from error
  return list(found.devices)
