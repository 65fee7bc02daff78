"""A small preference dataset, made by the commands collect, annotate and preferences."""

import importlib.util
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from prefpaint_jax import testing
from prefpaint_jax.annotate import annotate
from prefpaint_jax.collect import collect
from prefpaint_jax.data.images import save_png, to_bytes
from prefpaint_jax.data.preference_records import build_preferences
from prefpaint_jax.models import architectures

CONFIGS = Path(__file__).parent.parent / "configs"

# Changes to configs/reward.py:mini, for a tiny reward network and a short run.
SMALL = {
  "iterations": 4,
  "warmup_iterations": 1,
  "batch_size": 8,
  "log_every": 1,
  "judge_every": 2,
  "checkpoint_every": 2,
  "network.vision.hidden_size": 16,
  "network.vision.intermediate_size": 32,
  "network.vision.num_hidden_layers": 1,
  "network.vision.image_size": architectures.SIZE,
  "network.vision.patch_size": 4,
  "network.vision.projection_dim": 16,
}


def load_config(name: str, preset: str = "", **fields) -> ConfigDict:
  """Loads configs/NAME.py with a preset and updates its fields."""
  spec = importlib.util.spec_from_file_location(f"{name}_config", CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(preset)
  config.update_from_flattened_dict(fields)
  return config


def collect_config(folder: Path, **fields) -> ConfigDict:
  """Returns a config of `collect`: a tiny policy, three random images, and 20 + 6 prompts."""
  if not (folder / "policy").exists():
    testing.tiny_inpainter().save_pretrained(folder / "policy")
    for i, image in enumerate(testing.tiny_prompts(3, size=40)[0]):
      save_png(folder / "photos" / f"{i}.png", np.round(255 * image).astype(np.uint8))
  small = {
    "pictures": str(folder / "photos"),
    "policies": (str(folder / "policy"),),
    "size": architectures.SIZE,
    "crop": (8, 20),
    "num_prompts": 20,
    "num_test_prompts": 6,
    "num_steps": 2,
    "batch_size": 8,
  }
  return load_config("collect", "mini", **(small | fields))


def make_preferences(folder: Path) -> Path:
  """Builds a preference dataset in a folder and returns the dataset's folder."""
  collect(collect_config(folder), folder / "candidates")
  annotate(folder / "candidates", annotators=2, noise=0.5, seed=0)
  return build_preferences(folder / "candidates", folder / "preferences")


def write_scored(
  folder: Path, scores: np.ndarray, test: int = 2, texts: tuple[str, ...] = ("",)
) -> Path:
  """Writes a preference dataset of random candidates, without a network; returns its folder.

  Args:
    scores: [N, C] of the candidates of N prompts, the last `test` of them in the test split.
    texts: which the prompts have in turn.
  """
  source, rng = folder / "candidates", np.random.default_rng(0)
  images, masks = testing.tiny_prompts(len(scores))
  ids = [f"p{n}" for n in range(len(scores))]
  rows: dict[str, list[dict]] = {"prompts": [], "candidates": [], "scores": []}
  for n, (name, image, mask) in enumerate(zip(ids, images, masks, strict=True)):
    save_png(source / "images" / f"{name}.png", to_bytes(image))
    save_png(source / "masks" / f"{name}_mask.png", to_bytes(mask[..., 0]))
    prompt = {"image_id": name, "kind": "box", "source": "x", "text": texts[n % len(texts)]}
    rows["prompts"].append(prompt)
    for k, score in enumerate(scores[n].tolist()):
      own = {"image_id": name, "candidate": f"{name}_{k}"}
      filled = np.where(mask > 0, rng.uniform(size=image.shape), image)
      save_png(source / "inpaint" / f"{name}_{k}.png", to_bytes(filled))
      rows["candidates"].append(own | {"policy": "x"})
      rows["scores"].append(own | {"scores": {"x": score}})
  for name, own in rows.items():
    (source / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in own))
  (source / "train.txt").write_text("\n".join(ids[:-test]) + "\n")
  (source / "test.txt").write_text("\n".join(ids[-test:]) + "\n")
  return build_preferences(source, folder / "preferences", rewards="x")
