"""A bound on memory: refuses what this machine cannot hold before anything is allocated.

Linux grants more memory than there is, and ends a process that uses it, without an error.
"""

import os
from pathlib import Path

GIB = 2**30


def machine_memory() -> int:
  """Returns the bytes of memory that this process can use: physical, or less by its cgroup."""
  sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
  limit = Path("/sys/fs/cgroup/memory.max")
  if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
    sizes.append(int(text))
  return min(sizes)


def check_memory(needed: float, what: str, limit: int | None = None) -> None:
  """Checks an estimate of memory.

  Args:
    needed: bytes.
    what: the setting that asks for them, for the error.
    limit: bytes that there are; default: those of this machine.

  Raises:
    ValueError: it is more than `limit`.
  """
  limit = machine_memory() if limit is None else limit
  if needed > limit:
    raise ValueError(
      f"{what} needs about {needed / GIB:,.1f} GiB of memory; expected at most "
      f"{limit / GIB:,.1f} GiB, which there are; give a smaller number or size"
    )
