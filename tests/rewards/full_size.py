"""Prints how far the public rewards are from torch and transformers at their full sizes.

  python tests/rewards/full_size.py

Parameters are random, in files of the published layouts. It needs 16 GB of memory and of disk.
"""
# Shapes: P prompts, S samples of each, B = P S samples.

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import clip_world as world
from parity import randomise
from test_clip_rewards import heads
from test_image_reward import StockImageReward

from prefpaint_jax.models.blip import IMAGE_REWARD
from prefpaint_jax.rewards import clip_files, load_reward

TEXTS = ["a red tree", "Two cats", "sky"]


def report(name: str, images: np.ndarray, texts, expected, features) -> None:
  """Scores the samples and prints the largest errors, relative to the largest value."""
  error = lambda a, b: float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
  reward = load_reward(name)
  tokens = reward.tokenize(texts) if reward.tokenize else None
  known = images[::2]
  scores, z = reward.function(reward.params, images, known, known[..., :1], tokens)
  size = sum(x.size for x in _leaves(reward.params)) / 1e6
  print(
    f"{name.split('@')[0]}: {size:.0f} million parameters; scores differ by "
    f"{error(scores, expected.numpy()):.1e}, features by {error(z, features.numpy()):.1e}",
    flush=True,
  )


def _leaves(tree):
  return [x for one in tree.values() for x in (_leaves(one) if isinstance(one, dict) else [one])]


def model_of(config: dict, activation: str):
  """Makes a random CLIPModel of a config of `clip_files`; `world` takes its width."""
  world.TEXT = config["text_config"] | {"vocab_size": 49408, "max_position_embeddings": 77}
  world.VISION = config["vision_config"] | {"image_size": 224}
  world.WIDTH = config["projection_dim"]
  return world.clip_model(activation)


def save(model, folder: Path) -> None:
  """Writes a CLIPModel in the layout of transformers, with a byte tokenizer of 77 positions."""
  model.save_pretrained(folder)
  world.write_tokenizer(folder)


@torch.no_grad()
def check_vit_l(folder: Path, images: np.ndarray) -> None:
  """Compares CLIPScore and both aesthetic predictors."""
  model = model_of(clip_files.VIT_L_14, "quick_gelu")
  save(model, folder)
  z = world.image_embeddings(model, world.normalised(torch.tensor(images).permute(0, 3, 1, 2)))
  cosines = (z * world.text_embeddings(model, TEXTS, 2)).sum(-1)
  report(f"clip-score@{folder}", images, TEXTS, (100 * cosines).clip(0), z)
  for name, head in heads().items():
    torch.save(head.state_dict(), folder / f"{name}.pth")
    report(f"{name}@{folder}", images, None, getattr(head, "layers", head)(z)[:, 0], z)


@torch.no_grad()
def check_vit_h(folder: Path, images: np.ndarray) -> None:
  """Compares PickScore, and HPS in the layout of open_clip."""
  model = model_of(clip_files.from_open_clip(clip_files.VIT_H_14), "gelu")
  save(model, folder)
  z = world.image_embeddings(model, world.normalised(torch.tensor(images).permute(0, 3, 1, 2)))
  cosines = (z * world.text_embeddings(model, TEXTS, 2)).sum(-1)
  report(f"pickscore@{folder}", images, TEXTS, model.logit_scale.exp() * cosines, z)
  for file in folder.glob("*.safetensors"):
    file.unlink()
  torch.save({"state_dict": world.open_clip_tensors(model)}, folder / "HPS_v2.1_compressed.pt")
  report(f"hps-v2.1@{folder}", images, TEXTS, cosines, z)


@torch.no_grad()
def check_image_reward(folder: Path, images: np.ndarray) -> None:
  """Compares ImageReward, with a vocabulary of numbers."""
  stock = randomise(StockImageReward(IMAGE_REWARD))
  torch.save(stock.original_tensors(), folder / "ImageReward.pt")
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  words += map(str, range(IMAGE_REWARD.text.vocab_size - 2 - len(words)))
  (folder / "vocab.txt").write_text("\n".join(words) + "\n")
  texts = ["12 7 20000", "5", "7 " * 50]
  tokenizer = transformers.BertTokenizer.from_pretrained(folder)
  options = {"padding": "max_length", "truncation": True, "max_length": 35}
  tokens = tokenizer(texts, **options, return_tensors="pt")
  pair = [tokens[name].repeat_interleave(2, 0) for name in ("input_ids", "attention_mask")]
  pixels = world.normalised(torch.tensor(images).permute(0, 3, 1, 2))
  report(f"image-reward@{folder}", images, texts, *stock(pixels, *pair))


if __name__ == "__main__":
  samples = np.random.default_rng(0).uniform(size=(6, 224, 224, 3)).astype(np.float32)
  for compare in (check_vit_l, check_vit_h, check_image_reward):
    with tempfile.TemporaryDirectory() as new:
      compare(Path(new), samples)
