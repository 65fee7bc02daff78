"""Accelerators: what they do at best, and compilers' stand-ins for those that are not there."""

import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from prefpaint_jax.runtime.text import first_line

GIB = 2**30


class Chip(NamedTuple):
  """What a chip does at best."""

  flops: float  # per second, dense bfloat16
  memory: float  # bytes that a program may use
  bandwidth: float  # bytes per second from and to it
  links: float  # bytes per second sent to other chips


# By the beginning of a device's kind; the longest that fits counts. The makers' data sheets, but
# for the memory of TPUs: what their compiler says is available.
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
  """The chip of a `device_kind`, if it is one of `CHIPS`."""
  fitting = [name for name in CHIPS if kind.startswith(name)]
  return CHIPS[max(fitting, key=len)] if fitting else None


def topology_devices(name: str) -> list[jax.Device]:
  """Devices of a topology, to compile for and not to run on.

  Of TPUs its name is that of a slice, as "v5e:4x4"; of GPUs "h100:8" is one machine with eight,
  "h100:2x8" are two.
  """
  kind, _, shape = name.partition(":")
  return _gpus(name, kind, shape) if kind in _GPUS else _tpus(name)


def _tpus(name: str) -> list[jax.Device]:
  answers = {  # to what libtpu would ask the machine about itself
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is taken, so several processes may plan
  }
  for variable, value in answers.items():
    os.environ.setdefault(variable, value)
  # On v4 and v5p the two cores of a chip are one device, as they are where there is a chip.
  options = {"chip_config_name": "megacore"} if name.startswith(("v4", "v5p")) else {}
  try:
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)
  except RuntimeError as error:
    if "not installed" in str(error):
      reason = "libtpu, the compiler for TPUs, is missing; pip install 'prefpaint_jax[plan]'"
    else:
      found = first_line(error).removeprefix("INVALID_ARGUMENT: ")
      found = found.split(" and does not match")[0]
      reason = f"{found}; give one such as v5e:4x4, v5p:2x2x2, v6e:8x8, h100:8"
    raise ValueError(f"--topology={name}: {reason}") from error


class _Gpu(NamedTuple):
  """What the compiler asks of a GPU, from the specifications in openxla/xla."""

  kind: str
  capability: tuple[int, bool]  # major; with instructions of this one generation alone
  multiprocessors: int
  units: int  # for float32, of a multiprocessor
  shared_memory: tuple[int, int]  # bytes of a multiprocessor; of a block, where it asks for them
  cache: int  # bytes
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
    raise ValueError(f"--topology={name}: give GPUs as {kind}:8, or machines x GPUs as {kind}:2x8")
  gpu = _GPUS[kind]
  target = _TARGET.format(
    **gpu._asdict(), features="ACCELERATED_FEATURES" if gpu.capability[1] else "NONE"
  )
  grid = "x".join(["1"] * (2 - shape.count("x")) + [shape])
  try:
    found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=grid)
  except NotImplementedError as error:  # what JAX says of a platform that it has no plugin for
    reason = "JAX's plugin for CUDA, whose compiler it takes, is missing"
    raise ValueError(f"--topology={name}: {reason}; pip install 'prefpaint_jax[cuda]'") from error
  return list(found.devices)
