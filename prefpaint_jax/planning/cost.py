"""What a program costs: work, traffic with memory, collectives.

Operations are counted in its jaxpr, the rest in the text of the compiled program.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.interpreters import partial_eval


class Instruction(NamedTuple):
  opcode: str
  result: str  # type, as written
  operands: tuple[str, ...]  # types
  rest: str  # attributes; the value of a constant
  times: int  # that it runs
  fused: bool  # part of a fusion, which is one instruction to the memory


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*):?([^{}]*)\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


def _bytes(text: str) -> int:
  """Bytes of the elements of a type's arrays."""
  arrays = _ARRAY.findall(text)
  return sum(_size(dtype, _shape(dimensions)) for dtype, dimensions, _, _ in arrays)


def _memory_bytes(text: str) -> int:
  """Bytes that they take in the main memory, where a TPU's layouts pad them to whole tiles.

  Arrays in its small, fast memories, which layouts give as S(1) and so on, take none.
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
  """Where the parenthesis at `opening` closes."""
  depth = 0
  for i in range(opening, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  raise ValueError(f"a parenthesis does not close: {text[:80]}")


def _parse(hlo_text: str) -> tuple[dict[str, list[Instruction]], str]:
  """{name of a computation: its instructions}, and the name of the entry."""
  computations, entry = {}, ""
  for line in hlo_text.splitlines():
    line = re.sub(r"/\*.*?\*/", "", line)  # numbers of the elements of long tuples
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
  """How often a `while` runs; 1 where the program does not tell."""
  if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest):
    return int(known[1])
  # Otherwise in the form that JAX's scans have: a counter from zero to a constant.
  condition = computations[re.search(r"condition=%?([\w.-]+)", loop.rest)[1]]
  limits = [one.rest for one in condition if one.opcode == "constant"]
  counts = any("direction=LT" in one.rest for one in condition if one.opcode == "compare")
  return int(limits[0]) if counts and len(limits) == 1 else 1


_CALLERS = ("while", "conditional", "fusion", "call", "async-start")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|\w+_computation|branch_computations)=(\{.*?\}|\S+)")


def instructions(hlo_text: str) -> Iterator[Instruction]:
  """Every instruction that runs, once, with how often; of a conditional, those of all branches."""
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


# Bytes that each of n chips in a ring sends for one byte of its operand.
SENT: dict[str, Callable[[int], float]] = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-gather": lambda n: n - 1,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}


def collectives(hlo_text: str) -> dict[str, tuple[int, int]]:
  """{kind: (how many run, bytes that a chip sends for them)} of a compiled program.

  One inside a loop counts each time; an asynchronous one counts once, though a TPU's programs write
  it into the start, the end and all that runs meanwhile, as one channel. Bytes are those of a ring
  over a group of n chips: of a buffer that is whole on every chip before or after, an all-reduce
  sends 2 (n-1)/n, an all-gather, a reduce-scatter and an all-to-all (n-1)/n, a permutation all.
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
  """Chips of a collective's group, in the three ways to write replica_groups; None: all."""
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
  """Bytes that a compiled program moves from and to a chip's main memory.

  Every instruction reads its operands and writes its result: too much where a fusion reads a part
  of an operand, or where a cache keeps it. What a GPU's library works in does not count.
  """
  total = 0
  for one in instructions(hlo_text):
    if one.fused or one.opcode in _UNMOVED or one.opcode.endswith(("-done", "-update")):
      continue
    moved = (one.result, *one.operands)
    if one.opcode == "custom-call":
      moved = (re.sub(r", [su]8\[\d+\]\{0\}\)$", ")", one.result), *one.operands)
    elif one.opcode in ("slice", "slice-start", "dynamic-slice"):  # reads what it gives
      piece = one.result.replace(one.operands[0], "") if "start" in one.opcode else one.result
      moved = (piece, re.sub(r"S\(\d+\)", "", piece))
    elif one.opcode.endswith("-start"):  # what it returns names its operands too
      moved = (one.result,)
    total += one.times * sum(map(_memory_bytes, moved))
  return total


def flops(jaxpr: Any) -> float:
  """Floating point operations of a jaxpr's products and convolutions, on all devices together.

  A scan counts as often as it runs (XLA's own analysis has a loop's body once), a conditional as
  its costliest branch; a loop that ends by itself counts once. What nothing needs does not count.
  """
  return _total(_needed(jaxpr), _product_operations)


def other_operations(jaxpr: Any) -> float:
  """What else it computes: one for each element of a result, or that a reduction takes in."""
  return _total(_needed(jaxpr), _elementwise_operations)


def _needed(jaxpr: Any) -> Any:
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _total(jaxpr: Any, count: Callable[[Any], float]) -> float:
  """The sum of `count` over all equations, each as often as it runs."""
  total = 0.0
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name, params = equation.primitive.name, equation.params
    if name == "cond":
      total += max(_total(branch, count) for branch in params["branches"])
      continue
    times = params["length"] if name == "scan" else 1
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
      # Where the gradient of a strided one puts zeros between pixels there is nothing to do.
      terms /= math.prod(params["lhs_dilation"])
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
