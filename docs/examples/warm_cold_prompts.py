"""Writes the embedded prompts with the texts "warm light" and "cold light" in turn.

python docs/examples/warm_cold_prompts.py runs/warm_cold/prompts
"""

import json
import sys
from pathlib import Path

from prefpaint_jax.data.images import save_png, to_bytes
from prefpaint_jax.data.prompts import open_prompts


def main(folder: Path) -> None:
  """Writes a folder of prompts with train.txt, test.txt, unseen.txt and captions.jsonl."""
  captions = []
  for split in ("train", "test", "unseen"):
    ids = []
    for number, prompt in enumerate(open_prompts("mini", split)):
      ids.append(prompt["id"])
      text = ("warm light", "cold light")[number % 2]
      captions.append(json.dumps({"id": prompt["id"], "text": text}))
      image, mask = to_bytes(prompt["image"]), to_bytes(prompt["mask"].repeat(3, axis=-1))
      save_png(folder / "images" / f"{ids[-1]}.png", image)
      save_png(folder / "masks" / f"{ids[-1]}_mask.png", mask)
    (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
  (folder / "captions.jsonl").write_text("".join(f"{line}\n" for line in captions))


if __name__ == "__main__":
  main(Path(sys.argv[1]))
