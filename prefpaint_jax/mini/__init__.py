"""The embedded mini world: a small pipeline, a reward with its bound, prompts, photographs."""

from pathlib import Path

KINDS = ("policy", "reward", "prompts", "photos")


def locate(name: str | Path, kind: str) -> str | Path:
  """`name`, or the embedded folder of this kind if the name is "mini"."""
  if kind not in KINDS:
    raise ValueError(f"mini has no {kind!r}; it has {', '.join(KINDS)}")
  return Path(__file__).parent / kind if str(name) == "mini" else name
