"""Contexts of the texts of prompts, computed on the device; those of recent texts are kept."""
# Shapes: B prompts of all processes.

import collections
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from prefpaint_jax.models.conditioning import Context
from prefpaint_jax.models.pipeline import Modules, Tokens
from prefpaint_jax.runtime import sharding
from prefpaint_jax.weights.names import Params

AT_A_TIME = 16  # texts per call of the encoder: one program serves every number of texts
KEPT_BYTES = 2**27  # of contexts that are kept


class Texts:
  """Encodes texts: `texts(["a door", ...])` returns their context, sharded as a batch.

  Each process encodes its own texts on its first device and copies rows from there to its others,
  so neither the host nor another process waits. Without a text that is not empty, the text encoder
  is neither copied to the device nor compiled.
  """

  def __init__(
    self,
    modules: Modules,
    params: dict[str, Params],
    tokenize: Callable[[Sequence[str]], Tokens],
    empty: Context,
    mesh: Mesh,
    batch_size: int,
  ):
    """Prepares the encoder.

    Args:
      params: trees of the text encoders by name; rounded to the compute dtype.
      tokenize: texts -> tokens.
      empty: context of the empty text.
      batch_size: most texts of a process at a time.
    """
    self._modules, self._host_params, self._tokenize = modules, params, tokenize
    self._mesh, self._layout = mesh, sharding.batch_sharding(mesh)
    self._device = sharding.local_shards(mesh, mesh.size)[0][0]
    row_bytes = sum(x.nbytes for x in jax.tree.leaves(empty))
    rows = max(batch_size, KEPT_BYTES // row_bytes) + 1
    table = jax.tree.map(lambda x: np.zeros((rows, *x.shape[1:]), x.dtype), empty)
    table = jax.tree.map(
      lambda x, row: x.at[0].set(row[0]), jax.device_put(table, self._device), empty
    )
    self._table: Context = table
    self._rows = collections.OrderedDict({"": 0})  # text -> row, the least recently used first
    self._free = list(range(1, rows))

  @functools.cached_property
  def _params(self) -> dict[str, Params]:
    params = jax.device_put(self._host_params, self._device)
    return jax.jit(self._modules.round_params)(params)

  def __call__(self, texts: Sequence[str]) -> Context:
    """Returns the context of the B texts of all processes.

    Args:
      texts: those of this process, in the order of its devices.
    """
    new = [text for text in dict.fromkeys(texts) if text not in self._rows]
    for text in texts:
      if text in self._rows:
        self._rows.move_to_end(text)
    for first in range(0, len(new), AT_A_TIME):
      self._encode(new[first : first + AT_A_TIME])
    rows = np.array([self._rows[text] for text in texts], np.int32)
    B = len(texts) * jax.process_count()
    shards = sharding.local_shards(self._mesh, B)
    local = [_take(self._table, part) for part in np.split(rows, len(shards))]
    placed = [jax.device_put(part, device) for part, (device, _) in zip(local, shards, strict=True)]

    def join(*parts: jax.Array) -> jax.Array:
      shape = (B, *parts[0].shape[1:])
      return jax.make_array_from_single_device_arrays(shape, self._layout, parts)

    context = jax.tree.map(join, *placed)
    return jax.block_until_ready(context) if self._device.platform == "cpu" else context

  def _encode(self, texts: list[str]) -> None:
    """Writes the contexts of new texts over rows that are free or least recently used."""
    while len(self._free) < len(texts):
      oldest = next(text for text in self._rows if text)
      self._free.append(self._rows.pop(oldest))
    slots = [self._free.pop() for _ in texts]
    padding = AT_A_TIME - len(texts)
    tokens = self._tokenize([*texts, *[""] * padding])
    # The row of padding is outside the table, where a scatter writes nothing.
    indices = np.array(slots + [np.iinfo(np.int32).max] * padding, np.int32)
    self._table = _fill(self._modules, self._params, self._table, tokens, indices)
    self._rows.update(zip(texts, slots, strict=True))


@functools.partial(jax.jit, static_argnames="modules", donate_argnames="table")
def _fill(
  modules: Modules, params: dict[str, Params], table: Context, tokens: Tokens, rows: jax.Array
) -> Context:
  found = modules.encode_text(params, tokens)
  return jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), table, found)


@jax.jit
def _take(table: Context, rows: jax.Array) -> Context:
  return jax.tree.map(lambda x: x[rows], table)
