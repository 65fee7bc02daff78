"""LPIPS equals its definition in torch, with random weights in the published files."""

import numpy as np
import pytest
from lpips_world import FILES, by_definition, random_files, write_files

from prefpaint_jax.models import lpips


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
