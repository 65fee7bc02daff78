"""The order of prompts by the norm of their candidates' features, against numpy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from prefpaint_jax import testing
from prefpaint_jax.data.images import load_image, load_mask
from prefpaint_jax.labelling import order
from prefpaint_jax.preference.bound import Bound

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def folder(tmp_path):
  """Five prompts of 1 to 3 candidates, of which every second has whole images."""
  rng = np.random.default_rng(0)
  for kind in ("masks", "images", "masks_color", "inpaint"):
    (tmp_path / kind).mkdir()
  rows = []
  for p in range(5):
    image = (rng.integers(0, 256, (32, 32, 3)) * rng.random()).astype(np.uint8)
    hole = np.zeros((32, 32), np.uint8)
    hole[8 : 20 + p, 4:24] = 255
    Image.fromarray(hole).save(tmp_path / f"masks/p{p}_mask.png")
    known = image * (hole == 0)[..., None]
    kind = f"images/p{p}.png" if p % 2 else f"masks_color/p{p}_mask_color.png"
    Image.fromarray(image if p % 2 else known).save(tmp_path / kind)
    for k in range(1 + p % 3):
      sample = np.where(hole[..., None] > 0, rng.integers(0, 256, image.shape, np.uint8), image)
      Image.fromarray(sample).save(tmp_path / f"inpaint/p{p}_{k}.png")
      rows.append({"image_id": f"p{p}", "candidate": f"p{p}_{k}", "policy": "base"})
  (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return tmp_path


@pytest.mark.slow
def test_prompts_come_by_the_mean_norm_of_their_candidates(folder, monkeypatch):
  monkeypatch.setattr(order, "_BATCH", 4)  # so that a batch is filled
  model = testing.tiny_reward()
  model.save_pretrained(folder / "reward")
  owners, samples, known = [], [], []
  for p, k in ((i, j) for i in range(5) for j in range(1 + i % 3)):
    mask = load_mask(folder / f"masks/p{p}_mask.png")
    kind = f"images/p{p}.png" if p % 2 else f"masks_color/p{p}_mask_color.png"
    owners.append(f"p{p}")
    samples.append(load_image(folder / f"inpaint/p{p}_{k}.png"))
    known.append(load_image(folder / kind) * (1 - mask))
  _, features = model.score(samples, known)
  norms = np.sqrt([z @ np.linalg.solve(model.bound.matrix, z) for z in features])
  means = {name: norms[np.array(owners) == name].mean() for name in owners}
  found = order.uncertain(folder, str(folder / "reward"))
  assert found == sorted(means, key=means.get, reverse=True)
  assert found != sorted(means)


def test_features_of_masked_images_decide_and_the_reward_sees_no_pixel_of_the_hole(
  folder, monkeypatch
):
  def score(images, masked_images):
    seen.extend(masked_images)
    return None, np.stack([image.mean((0, 1)) for image in images])

  seen, scale = [], np.array([1.0, 4.0, 9.0])
  model = SimpleNamespace(bound=Bound.from_gram(np.diag(scale), 1, 1e-6), score=score)
  monkeypatch.setattr(order, "load_reward", lambda name: model)
  found = order.uncertain(folder, "any")
  owners = [p for p in range(5) for _ in range(1 + p % 3)]
  for p, image in zip(owners, seen, strict=False):  # the last batch has more images
    hole = load_mask(folder / f"masks/p{p}_mask.png")[..., 0] == 1
    assert image[~hole].any() and not image[hole].any()
  means = {}
  for p in range(5):
    samples = [load_image(folder / f"inpaint/p{p}_{k}.png") for k in range(1 + p % 3)]
    means[f"p{p}"] = np.mean([np.sqrt((x.mean((0, 1)) ** 2 / scale).sum()) for x in samples])
  assert found == sorted(means, key=means.get, reverse=True) != sorted(means)


def test_a_reward_without_a_bound_is_an_error_of_one_line(folder):
  with pytest.raises(ValueError, match="seam: has no bound on its error; expected") as error:
    order.uncertain(folder, "seam")
  assert "\n" not in str(error.value)
