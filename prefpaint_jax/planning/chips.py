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

  flops: float  # per second, dense bfloat16
  memory: float  # bytes that a program can use
  bandwidth: float  # bytes per second from and to this memory
  links: float  # bytes per second sent to other chips


# The key is a prefix of `device_kind`; `find_chip` takes the longest that matches. Figures are from
# the manufacturers' data sheets, except the memory of TPUs: their compiler reports that figure.
CHIPS = {
  "TPU v4": Chip(275e12, 31.25 * GIB, 1228e9, 300e9),
  "TPU v5 lite": Chip(197e12, 15.75 * GIB, 819e9, 200e9),
  "TPU v5": Chip(459e12, 95.73 * GIB, 2765e9, 600e9),
  "TPU v6 lite": Chip(918e12, 31.24 * GIB, 1638e9, 400e9),
  "NVIDIA A100": Chip(312e12, 80e9, 2039e9, 300e9),
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 300e9),
  "NVIDIA H100": Chip(989e12, 80e9, 3350e9, 450e9),
  "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
  "NVIDIA B200": Chip(2250e12, 180e9, 7700e9, 900e9),
}


def find_chip(kind: str) -> Chip | None:
  """Returns the chip of a JAX `device_kind`, or None if `CHIPS` has no prefix of it."""
  matching = [name for name in CHIPS if kind.startswith(name)]
  return CHIPS[max(matching, key=len)] if matching else None


def topology_devices(name: str) -> list[jax.Device]:
  """Returns the devices of a topology. Programs can be compiled for them, but not run on them.

  Args:
    name: for TPUs a slice, such as "v5e:4x4"; for GPUs "h100:8", one machine with eight GPUs, or
      "h100:2x8", two such machines.

  Raises:
    ValueError: for an unknown topology, or if the compiler for its devices is not installed.
  """
  kind, _, shape = name.partition(":")
  return _gpus(name, kind, shape) if kind in _GPUS else _tpus(name)


def _tpus(name: str) -> list[jax.Device]:
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
      reason = f"{message}; expected a name such as v5e:4x4, v5p:2x2x2, v6e:8x8 or h100:8"
    raise ValueError(f"--topology={name}: {reason}") from error


class _Gpu(NamedTuple):
  """The properties of a GPU that XLA's compiler reads; values from openxla/xla."""

  kind: str
  capability: tuple[int, bool]  # major version; whether it has accelerated features ("sm_90a")
  multiprocessors: int
  units: int  # float32 units of a multiprocessor
  shared_memory: tuple[int, int]  # bytes of a multiprocessor; largest opt-in size of a block
  cache: int  # bytes of the L2 cache
  clock: float  # GHz
  memory: int  # bytes
  bandwidth: int  # bytes per second


_AMPERE = (8, False), 108, 64, (167936, 166912), 41943040, 1.41
_HOPPER = (9, True), 132, 128, (233472, 232448), 52428800, 1.98
_BLACKWELL = (10, True), 148, 128, (233472, 232448), 132644864, 1.965
_GPUS = {
  "a100": _Gpu("NVIDIA A100-SXM4-80GB", *_AMPERE, 85100068864, 2039040000000),
  "h100": _Gpu("NVIDIA H100 80GB HBM3", *_HOPPER, 84942979072, 3352320000000),
  "h200": _Gpu("NVIDIA H200", *_HOPPER, 151397597184, 4800000000000),
  "b200": _Gpu("NVIDIA B200", *_BLACKWELL, 191514411008, 7672320000000),
}
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {capability[0]} feature_extension: {features} }}
  core_count: {multiprocessors} fpus_per_core: {units} clock_rate_ghz: {clock}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_memory[0]}
  shared_memory_per_block_optin: {shared_memory[1]} l2_cache_size: {cache}
  device_memory_size: {memory} memory_bandwidth: {bandwidth}
}}
platform_name: "CUDA"
device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 10 }}
"""


def _gpus(name: str, kind: str, shape: str) -> list[jax.Device]:
  if not re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", shape):
    raise ValueError(
      f"--topology={name}: unknown shape {shape!r}; give {kind}:8 for one machine with 8 GPUs, or "
      f"{kind}:2x8 for two such machines"
    )
  gpu = _GPUS[kind]
  target = _TARGET.format(
    **gpu._asdict(), features="ACCELERATED_FEATURES" if gpu.capability[1] else "NONE"
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
