"""The mini world, embedded in the package: a small pipeline, a reward model, prompts and photos."""

from pathlib import Path

KINDS = ("policy", "reward", "prompts", "photos", "photos_unseen")


def locate(name: str | Path, kind: str) -> str | Path:
  """Returns the embedded folder of a kind if `name` is "mini", and otherwise `name`.

  Args:
    name: a path or a hub name, or "mini".
    kind: one of KINDS.
  """
  if kind not in KINDS:
    raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}: correct the name")
  return Path(__file__).parent / kind if str(name) == "mini" else name
