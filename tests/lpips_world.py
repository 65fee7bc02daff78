"""LPIPS by functions of torch, and random weights in the published files."""

import numpy as np
import pytest

# index: (squeeze or features, expand or kernel, ...) of torchvision's SqueezeNet 1.1 and AlexNet.
FIRES = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128)}
FIRES |= {9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256)}
ALEX = {0: (3, 64, 11), 3: (64, 192, 5), 6: (192, 384, 3), 8: (384, 256, 3), 10: (256, 256, 3)}
CHANNELS = {"squeeze": (64, 128, 256, 384, 384, 512, 512), "alex": (64, 192, 384, 256, 256)}
FILES = {"squeeze": "squeezenet1_1-b8a52dc0.pth", "alex": "alexnet-owt-7be5be79.pth"}


def random_files(kind: str, seed: int = 0) -> tuple[dict, dict]:
  """Returns random tensors of torchvision's file and of lpips' file."""
  shapes, rng = {}, np.random.default_rng(seed)

  def add(name, outputs, inputs, kernel):
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, kernel, kernel), (outputs,)

  if kind == "squeeze":
    add("features.0", 64, 3, 3)
    for i, (inputs, squeeze, expand) in FIRES.items():
      add(f"features.{i}.squeeze", squeeze, inputs, 1)
      add(f"features.{i}.expand1x1", expand, squeeze, 1)
      add(f"features.{i}.expand3x3", expand, squeeze, 3)
    add("classifier.1", 1000, 512, 1)
  else:
    for i, (inputs, outputs, kernel) in ALEX.items():
      add(f"features.{i}", outputs, inputs, kernel)
    shapes |= {"classifier.6.weight": (10, 40), "classifier.6.bias": (10,)}
  draw = lambda shape: (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
  linear = {
    f"lin{i}.model.1.weight": np.abs(draw((1, c, 1, 1))) for i, c in enumerate(CHANNELS[kind])
  }
  return {name: draw(shape) for name, shape in shapes.items()}, linear


def write_files(folder, kind: str = "squeeze") -> None:
  """Writes both files of a network as torch does."""
  torch = pytest.importorskip("torch", reason="writes torch files: pip install torch")
  for file, tensors in zip((FILES[kind], f"{kind}.pth"), random_files(kind), strict=True):
    torch.save({name: torch.tensor(x) for name, x in tensors.items()}, folder / file)


def by_definition(kind: str, images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Computes LPIPS [B] by functions of torch, on the weights of `random_files`."""
  import torch
  from torch.nn import functional as F

  trunk, linear = ({k: torch.tensor(x) for k, x in d.items()} for d in random_files(kind))
  convolve = lambda x, name, **options: F.relu(
    F.conv2d(x, trunk[f"{name}.weight"], trunk[f"{name}.bias"], **options)
  )

  def features(x):
    shift, scale = ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
    shift, scale = (torch.tensor(c).reshape(1, 3, 1, 1) for c in (shift, scale))
    x, found = (torch.tensor(x).permute(0, 3, 1, 2) - shift) / scale, []
    for i in range(13 if kind == "squeeze" else 12):
      name = f"features.{i}"
      if kind == "squeeze" and i in (2, 5, 8):
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
      elif kind == "alex" and i in (2, 5):
        x = F.max_pool2d(x, 3, 2)
      elif i in FIRES and kind == "squeeze":
        x = convolve(x, f"{name}.squeeze")
        wide = convolve(x, f"{name}.expand3x3", padding=1)
        x = torch.cat([convolve(x, f"{name}.expand1x1"), wide], 1)
      elif i == 0:
        x = convolve(
          x, name, **({"stride": 2} if kind == "squeeze" else {"stride": 4, "padding": 2})
        )
      elif i in ALEX and kind == "alex":
        x = convolve(x, name, padding=ALEX[i][2] // 2)
      if i in {"squeeze": (1, 4, 7, 9, 10, 11, 12), "alex": (1, 4, 7, 9, 11)}[kind]:
        found.append(x)
    return found

  total = 0
  for i, pair in enumerate(zip(features(images), features(others), strict=True)):
    ours, theirs = (x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-10) for x in pair)
    total += F.conv2d((ours - theirs) ** 2, linear[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
  return total.numpy()
