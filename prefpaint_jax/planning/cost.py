"""Counts the operations, the memory traffic and the collectives of a program.

Operations are counted in the jaxpr; memory traffic and collectives in the HLO text of the compiled
program.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.interpreters import partial_eval


class Instruction(NamedTuple):
  """An instruction of a compiled program, with the number of times that it runs."""

  opcode: str
  result: str  # its type, as the text has it
  operands: tuple[str, ...]  # their types
  rest: str  # attributes; of a constant its value
  times: int  # how often it runs
  fused: bool  # inside a fusion, which reads and writes memory as one instruction


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*):?([^{}]*)\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


def _bytes(text: str) -> int:
  """Returns the bytes of all arrays in a type, without padding."""
  arrays = _ARRAY.findall(text)
  return sum(_size(dtype, _shape(dimensions)) for dtype, dimensions, _, _ in arrays)


def _memory_bytes(text: str) -> int:
  """Returns the bytes of all arrays in a type in main memory, where TPUs pad them to whole tiles.

  Arrays in a TPU's fast on-chip memories, with S(1) or higher in their layout, count as 0.
  """
  total = 0
  for dtype, dimensions, order, layout in _ARRAY.findall(text):
    if re.search(r"S\([1-9]", layout):
      continue
    shape = _shape(dimensions)
    if shape and (tile := re.search(r"T\(([\d,]+)\)", layout)):
      for axis, side in zip(order.split(","), reversed(tile[1].split(",")), strict=False):
        shape[int(axis)] = -(-shape[int(axis)] // int(side)) * int(side)
    total += _size(dtype, shape)
  return total


def _shape(dimensions: str) -> list[int]:
  return [int(size) for size in dimensions.split(",") if size]


def _size(dtype: str, shape: Sequence[int]) -> int:
  bits = _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype)[0])
  return math.prod(shape) * bits // 8


def _closing(text: str, opening: int) -> int:
  """Returns the index of the parenthesis that closes the one at `opening`."""
  depth = 0
  for i in range(opening, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  raise ValueError(f"HLO text has a parenthesis that does not close: {text[:80]}")


def _parse(hlo_text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns {name of a computation: its instructions}, and the name of the entry computation."""
  computations, entry = {}, ""
  for line in hlo_text.splitlines():
    line = re.sub(r"/\*.*?\*/", "", line)  # /*index=5*/ in long tuples
    if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
      types, body = {}, computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif equation := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line):
      name, right = equation.groups()
      end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
      types[name], call = right[:end], right[end + 1 :]
      opening = call.index("(")
      closing = _closing(call, opening)
      opcode, inside, rest = call[:opening], call[opening + 1 : closing], call[closing + 1 :]
      names = re.findall(r"[\w.-]+", inside)
      operands = tuple(types[name] for name in names if name in types)
      rest = inside if opcode == "constant" else rest
      body.append(Instruction(opcode, types[name], operands, rest, 1, False))
  return computations, entry


def _trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int:
  """Returns the trip count of a `while`; 1 if the text does not tell."""
  if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest):
    return int(known[1])
  # Without that attribute, read the condition of JAX's scans: a counter from 0 to a constant.
  condition = computations[re.search(r"condition=%?([\w.-]+)", loop.rest)[1]]
  limits = [one.rest for one in condition if one.opcode == "constant"]
  counts = any("direction=LT" in one.rest for one in condition if one.opcode == "compare")
  return int(limits[0]) if counts and len(limits) == 1 else 1


_CALLERS = ("while", "conditional", "fusion", "call", "async-start")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|\w+_computation|branch_computations)=(\{.*?\}|\S+)")


def instructions(hlo_text: str) -> Iterator[Instruction]:
  """Yields every instruction that runs, with its number of runs; of a conditional all branches."""
  computations, entry = _parse(hlo_text)

  def walk(name: str, times: int, fused: bool) -> Iterator[Instruction]:
    for one in computations[name]:
      yield one._replace(times=times, fused=fused)
      if one.opcode in _CALLERS:
        inner = times * (_trip_count(one, computations) if one.opcode == "while" else 1)
        for group in _CALLED.findall(one.rest):
          for called in re.findall(r"[\w.-]+", group):
            yield from walk(called, inner, fused or one.opcode == "fusion")

  return walk(entry, 1, False)


# Bytes that each of n chips in a ring sends per byte of its operand.
SENT: dict[str, Callable[[int], float]] = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-gather": lambda n: n - 1,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}


def collectives(hlo_text: str) -> dict[str, tuple[int, int]]:
  """Counts the collectives of a compiled program and the bytes that each chip sends for them.

  A collective in a loop counts once per trip. The text of a TPU program repeats an asynchronous
  collective, with the same channel, in several fusions: its start, its end and the fusions that
  overlap with it. It counts once.

  Bytes are those of a ring algorithm over n chips. Relative to the array that every chip holds
  whole before or after the collective, an all-reduce sends 2 (n-1)/n, an all-gather, a
  reduce-scatter and an all-to-all (n-1)/n, and a permutation all of it.

  Returns:
    {kind: (number of runs, bytes)}.
  """
  everyone = re.search(r"num_partitions=(\d+)", hlo_text)
  totals: dict[str, tuple[int, int]] = {}
  channels = set()
  for one in instructions(hlo_text):
    kind = one.opcode.removesuffix("-start")
    if kind in SENT:
      channel = re.search(r"channel_id=(\d+)", one.rest)
      if one.fused and channel:
        if channel[1] in channels:
          continue
        channels.add(channel[1])
      n = _group_size(one.rest) or (int(everyone[1]) if everyone else 1)
      sent = round(sum(map(_bytes, one.operands)) * SENT[kind](n))
      count, before = totals.get(kind, (0, 0))
      totals[kind] = count + one.times, before + sent * one.times
  return totals


def _group_size(rest: str) -> int | None:
  """Returns the number of chips in a collective's group; None: all chips.

  HLO has three notations for replica_groups: a mesh with axes, an iota, and lists.
  """
  if axes := re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", rest):
    sizes = dict(re.findall(r"'(.+?)'=(\d+)", axes[1]))
    parts = re.findall(r"'(.+?)'(?::\(\d+\)(\d+))?", axes[2])
    return math.prod(int(part or sizes[name]) for name, part in parts)
  if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
    return int(iota[1])
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
  return len(listed[1].split(",")) if listed else None


_UNMOVED = (
  *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while"),
  *("conditional", "call", "async-start", "after-all", "opt-barrier", "partition-id", "replica-id"),
)


def memory_traffic(hlo_text: str) -> int:
  """Returns the bytes that a compiled program moves from and to a chip's main memory.

  The count assumes that every instruction reads its whole operands and writes its result. It is too
  high if a fusion reads a part of an operand or if a cache holds the operand. The workspace of a
  GPU library call does not count.
  """
  total = 0
  for one in instructions(hlo_text):
    if one.fused or one.opcode in _UNMOVED or one.opcode.endswith(("-done", "-update")):
      continue
    moved = (one.result, *one.operands)
    if one.opcode == "custom-call":
      moved = (re.sub(r", [su]8\[\d+\]\{0\}\)$", ")", one.result), *one.operands)
    elif one.opcode in ("slice", "slice-start", "dynamic-slice"):  # reads as much as it writes
      piece = one.result.replace(one.operands[0], "") if "start" in one.opcode else one.result
      moved = (piece, re.sub(r"S\(\d+\)", "", piece))
    elif one.opcode.endswith("-start"):  # its result type lists its operands too
      moved = (one.result,)
    total += one.times * sum(map(_memory_bytes, moved))
  return total


def flops(jaxpr: Any) -> float:
  """Counts the floating-point operations of matrix products and convolutions, on all devices.

  The body of a scan counts once per iteration (XLA's cost analysis counts it once); a conditional
  counts as its costliest branch; the body of a `while` with an unknown trip count counts once.
  Equations whose results are not used do not count.
  """
  return _total(_needed(jaxpr), _product_operations)


def other_operations(jaxpr: Any) -> float:
  """Counts the other operations: one per element of a result, or per element that is reduced."""
  return _total(_needed(jaxpr), _elementwise_operations)


def _needed(jaxpr: Any) -> Any:
  """Removes equations whose results are not used."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _total(jaxpr: Any, count: Callable[[Any], float]) -> float:
  """Sums `count` over all equations, each times the number of its runs."""
  total = 0.0
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name, params = equation.primitive.name, equation.params
    if name == "cond":
      total += max(_total(branch, count) for branch in params["branches"])
      continue
    times = params["length"] if name == "scan" else 1
    if name == "pallas_call":
      times = math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
      manual = next(value for key, value in params.items() if key.endswith("manual_axes"))
      times = math.prod(params["mesh"].shape[axis] for axis in manual)
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    inner = [x for x in leaves if hasattr(x, "eqns")]
    total += times * sum(_total(x, count) for x in inner) if inner else count(equation)
  return total


def _product_operations(equation: Any) -> float:
  params = equation.params
  match equation.primitive.name:
    case "dot_general":
      contracted = params["dimension_numbers"][0][0]
      terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    case "conv_general_dilated":
      kernel = equation.invars[1].aval
      terms = kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
      # The gradient of a strided convolution puts zeros between pixels; they cost nothing.
      terms /= math.prod(params["lhs_dilation"])
    case name if name.startswith("dot_product_attention_"):
      # cuDNN's kernel: scores and values; backwards it computes the scores again for four more.
      query, key = (equation.invars[i].aval.shape for i in (0, 1))
      return (10 if "_bwd" in name else 4) * math.prod(query) * key[1]
    case _:
      return 0.0
  return 2 * equation.outvars[0].aval.size * terms


_MOVES = (
  *("reshape", "broadcast_in_dim", "transpose", "rev", "squeeze", "pad", "concatenate", "split"),
  *("slice", "dynamic_slice", "dynamic_update_slice", "gather", "scatter", "iota", "copy"),
  *("convert_element_type", "select_n", "stop_gradient", "optimization_barrier"),
)


def _elementwise_operations(equation: Any) -> float:
  name = equation.primitive.name
  if name in ("dot_general", "conv_general_dilated", *_MOVES):
    return 0.0
  arrays = equation.invars if name.startswith("reduce_") else equation.outvars
  return float(sum(array.aval.size for array in arrays))
