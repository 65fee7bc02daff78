"""A folder of tiny candidates, as `prefpaint_jax.collect` writes it, and its server."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
SIDE = 8


def write_candidates(folder: Path, prompts: int, candidates: int = 3, text: str = "") -> Path:
  """Writes prompts image_0, image_1, ... with noise as candidates."""
  rng = np.random.default_rng(0)
  for name in ("images", "masks", "inpaint"):
    (folder / name).mkdir(parents=True)
  mask = np.zeros((SIDE, SIDE, 3), np.uint8)
  mask[2:6, 2:6] = 255
  noise = lambda: Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
  lines = {"prompts": [], "candidates": []}
  for i in range(prompts):
    image_id = f"image_{i}"
    about = {"text": text} if text else {}
    lines["prompts"].append({"image_id": image_id, "kind": 0, "source": "noise"} | about)
    noise().save(folder / "images" / f"{image_id}.png")
    Image.fromarray(mask).save(folder / "masks" / f"{image_id}_mask.png")
    for k in range(candidates):
      name = f"{image_id}_{k}"
      lines["candidates"].append({"image_id": image_id, "candidate": name, "policy": f"policy{k}"})
      noise().save(folder / "inpaint" / f"{name}.png")
  for name, rows in lines.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


def read_lines(file: Path) -> list[dict]:
  return [json.loads(line) for line in file.read_text().splitlines()]


@contextlib.contextmanager
def label_server(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, list[str]]]:
  """Runs the command; yields the process and the lines that it prints before it serves."""
  command = [sys.executable, "-m", "prefpaint_jax.label", f"--candidates={folder}", *flags]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  try:
    people = next((flag for flag in flags if flag.startswith("--annotators=")), "")
    number = len(Path(people[13:]).read_text().splitlines()) if people else 1
    yield process, [process.stdout.readline().strip() for _ in range(number)]
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
