"""LPIPS equals its definition in torch, with random weights in the published files."""

import numpy as np
import pytest

from prefpaint_jax.models import lpips

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


@pytest.mark.parametrize(("kind", "size"), [("squeeze", (40, 37)), ("alex", (67, 63))])
def test_lpips_equals_torch(tmp_path, kind, size):
  write_files(tmp_path, kind)
  rng = np.random.default_rng(1)
  images, others = rng.uniform(-1, 1, (2, 3, *size, 3)).astype(np.float32)
  distance = lpips.load(f"{kind}@{tmp_path}", min(size))
  expected = by_definition(kind, images, others)
  np.testing.assert_allclose(distance(images, others), expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(distance(images, images), np.zeros(3), atol=1e-12)


@pytest.mark.parametrize("kind", lpips.NETWORKS)
@pytest.mark.parametrize("more", [0, 1, 2, 3])
def test_the_smallest_image_of_torch_is_the_smallest(kind, more):
  import jax

  torch = pytest.importorskip("torch", reason="the oracle: pip install torch")
  side = lpips.NETWORKS[kind].minimum - 1 + more
  image = np.zeros((1, side, side, 3), np.float32)
  if not more:
    with pytest.raises(RuntimeError, match="too small"):
      by_definition(kind, image, image)
    return
  assert torch.isfinite(torch.tensor(by_definition(kind, image, image))).all()
  result = jax.eval_shape(
    lambda params: lpips.LPIPS(kind).apply({"params": params}, image, image), lpips.shapes(kind)
  )
  assert result.shape == (1,)


@pytest.mark.parametrize(
  ("given", "files", "size", "line"),
  [
    ("squeeze", (), 64, "is 'squeeze'; expected a folder with squeezenet1_1"),
    ("squeze@{}", (), 64, "expected one of squeeze, alex; did you mean squeeze"),
    ("vgg@{}", (), 64, "expected one of squeeze, alex; give squeeze@FOLDER or a folder"),
    ("{}", (), 64, r"has 0 files squeezenet1_1-\*.pth; expected a folder with"),
    ("{}", (FILES["squeeze"],), 64, r"has no squeeze.pth; expected a folder with"),
    ("{}", (FILES["squeeze"], "squeeze.pth"), 64, "cannot be read at 7 bytes"),
    ("{}", (FILES["squeeze"], "squeeze.pth"), 16, "size is 16; expected at least 17 for LPIPS"),
  ],
)
def test_wrong_files_end_in_one_line(tmp_path, given, files, size, line):
  for file in files:
    (tmp_path / file).write_text("no file")
  with pytest.raises(ValueError, match=line) as error:
    lpips.load(given.format(tmp_path), size)
  assert "\n" not in str(error.value)


def test_files_of_two_networks_end_in_one_line(tmp_path):
  torch = pytest.importorskip("torch", reason="writes torch files: pip install torch")
  write_files(tmp_path)
  linear = {name: torch.tensor(x) for name, x in random_files("alex")[1].items()}
  torch.save(linear, tmp_path / "squeeze.pth")
  with pytest.raises(ValueError, match=r"2 missing: lin5\.model\.1\.weight") as error:
    lpips.load(str(tmp_path), 64)
  torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "squeeze.pth")
  with pytest.raises(ValueError, match=r"has features\.0\.weight; expected lin0") as other:
    lpips.load(str(tmp_path), 64)
  assert "\n" not in str(error.value) + str(other.value)
