"""Names of weights files: network, variant and shards; which of several copies to read."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

# Names of weights files: model.safetensors and model.fp16.safetensors, their shards with the parts
# of the name in the old and the new order, the indices of the shards, and all of these with .bin.
_WEIGHTS = re.compile(
  r"(?P<stem>[^./]+?)(?P<shard>-\d+-of-\d+)?(\.(?P<variant>\w+)(?P<variant_shard>-\d+-of-\d+)?)?"
  r"\.(?P<kind>safetensors|bin)(?P<index>\.index(\.(?P<index_variant>\w+))?\.json)?"
)


class WeightsFile(NamedTuple):
  """The parts of a weights file's name."""

  stem: str
  # (.bin, a variant, not fp16, the variant); of several copies the smallest is preferred.
  generation: tuple[bool, bool, bool, str]
  is_shard: bool
  is_index: bool

  @classmethod
  def parse(cls, file_name: str) -> "WeightsFile | None":
    """Returns None if the file is not a weights file."""
    match = _WEIGHTS.fullmatch(file_name)
    if match is None:
      return None
    variant = match["variant"] or match["index_variant"] or ""
    generation = (match["kind"] == "bin", variant != "", variant != "fp16", variant)
    is_shard = bool(match["shard"] or match["variant_shard"])
    return cls(match["stem"], generation, is_shard, bool(match["index"]))


def without_copies(files: Sequence[str]) -> list[str]:
  """Removes, in each folder, weights files that are not of the preferred format and precision."""
  parsed = {file: WeightsFile.parse(PurePosixPath(file).name) for file in files}
  best: dict[PurePosixPath, tuple] = {}
  for file, weights in parsed.items():
    if weights:
      parent = PurePosixPath(file).parent
      best[parent] = min(weights.generation, best.get(parent, weights.generation))
  return [
    file
    for file, weights in parsed.items()
    if weights is None or weights.generation == best[PurePosixPath(file).parent]
  ]
