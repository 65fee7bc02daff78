"""The released reward checkpoint loads and scores as a torch network does.

The reference consists of transformers' CLIP and torch's TransformerEncoder and Linear layers under
the released attribute names. Its CLIP tensors are renamed to OpenAI's names.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from parity import randomise
from PIL import Image

from prefpaint_jax.mini import locate
from prefpaint_jax.models import reward
from prefpaint_jax.models.config import RewardConfig
from prefpaint_jax.preference.bound import mahalanobis_norm
from prefpaint_jax.reward import RewardModel

torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
pytestmark = pytest.mark.usefixtures("kernels")
transformers = pytest.importorskip("transformers")
SMALL = {
  "vision": {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "projection_dim": 10,
  },
  "num_heads": 4,
  "feedforward_dim": 18,
  "hidden_dim": 12,
  "feature_dim": 6,
}
FILE = "prefpaintReward.pt"
Tensors = dict[str, torch.Tensor]


class ReleasedReward(torch.nn.Module):
  """The released network in torch, with `clip` for its `clip_model`."""

  def __init__(self, config: RewardConfig):
    super().__init__()
    vision = transformers.CLIPVisionConfig(**config.to_dict()["vision"])
    self.clip = transformers.CLIPVisionModelWithProjection(vision)
    width = 2 * config.vision.projection_dim
    self.vit_block = torch.nn.Module()
    self.vit_block.encoder_layer = torch.nn.TransformerEncoderLayer(
      width, config.num_heads, config.feedforward_dim
    )
    self.vit_block.transformer_encoder = torch.nn.TransformerEncoder(
      self.vit_block.encoder_layer, num_layers=1, enable_nested_tensor=False
    )
    self.mlp = torch.nn.Module()
    self.mlp.layers = torch.nn.Sequential(
      torch.nn.Linear(width, config.hidden_dim),
      torch.nn.Dropout(0.2),
      torch.nn.Linear(config.hidden_dim, config.feature_dim),
    )
    self.mlp.last_layer = torch.nn.Linear(config.feature_dim, 1, bias=False)
    self.mlp.last_layer_weight = self.mlp.last_layer.weight

  def forward(self, images, masked_images):
    pair = [self.clip(pixels).image_embeds for pixels in (images, masked_images)]
    token = torch.cat(pair, dim=-1)[None]  # [L=1, B, 2P]: torch's default order
    z = self.mlp.layers(self.vit_block.transformer_encoder(token)[0])
    return self.mlp.last_layer(z)[:, 0], z

  def released_tensors(self) -> Tensors:
    """Returns the state dict with the names of the released file, including CLIP's text tower."""
    with torch.device("meta"):
      text = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig())
    rest = {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}
    unused = hollow(openai_layout(text.state_dict())) | {"clip_model.logit_scale": torch.ones(())}
    return openai_layout(self.clip.state_dict()) | unused | rest


def hollow(tensors: Mapping[str, torch.Tensor]) -> Tensors:
  """Returns tensors of the same shapes that store one number, in memory and in a file."""
  return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in tensors.items()}


def openai_layout(tensors: Mapping[str, torch.Tensor]) -> Tensors:
  """Converts a tower of transformers' CLIP to the tensors of OpenAI's implementation."""
  layout = {}
  for name, tensor in tensors.items():
    if match := re.fullmatch(r"(.*)\.q_proj\.(\w+)", name):
      fused = [tensors[f"{match[1]}.{part}_proj.{match[2]}"] for part in "qkv"]
      layout[openai_name(f"{match[1]}.in_proj_{match[2]}")] = torch.cat(fused)
    elif not re.search(r"\.[kv]_proj\.", name):
      name = openai_name(name)
      layout[name] = tensor.T if name.endswith(("visual.proj", "text_projection")) else tensor
  return layout


def openai_name(name: str) -> str:
  parts = {
    "visual_projection.weight": "clip_model.visual.proj",
    "text_projection.weight": "clip_model.text_projection",
    "vision_model.": "clip_model.visual.",
    "text_model.": "clip_model.",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.": "token_embedding.",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn": "attn",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
  }
  for hugging_face, openai in parts.items():
    name = name.replace(hugging_face, openai)
  return name


@pytest.fixture
def small(monkeypatch) -> ReleasedReward:
  """The reference at a small size. A `.pt` has no config, so the fixture patches the default."""
  read = RewardConfig.from_dict
  monkeypatch.setattr(RewardConfig, "from_dict", lambda config: read(SMALL | config))
  return randomise(ReleasedReward(read(SMALL)))


def write(tensors: Tensors, folder: Path, prefix: str = "") -> Path:
  torch.save({prefix + name: tensor for name, tensor in tensors.items()}, folder / FILE)
  return folder / FILE


def example_images(side: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns photographs [3, side, side, 3] in [0, 1], and copies with the right third black."""
  files = [
    Path(locate("mini", "photos")) / name for name in ("cat.jpg", "coffee.jpg", "rocket.jpg")
  ]
  photos = [Image.open(file).convert("RGB").resize((side, side)) for file in files]
  images = np.stack([np.asarray(photo, np.float32) / 255 for photo in photos])
  masked = images.copy()
  masked[:, :, -side // 3 :] = 0
  return images, masked


def assert_scores_equal(
  model: RewardModel, theirs: ReleasedReward, shift: float = 0.0, scale: float = 1.0
) -> None:
  """Compares rewards and features of photographs to 1e-4."""
  images = example_images(model.network.config.vision.image_size)
  normalised = [(x - reward.CLIP_MEAN) / reward.CLIP_STD for x in images]
  with torch.no_grad():
    scores, z = theirs(*(torch.tensor(x).permute(0, 3, 1, 2) for x in normalised))
  for ours, expected in zip(model.score(*images), ((scores - shift) / scale, z), strict=True):
    assert np.ptp(expected.numpy(), axis=0).max() > 0.03  # the images have different scores
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("prefix", ["", "module."])
def test_reward_and_features_equal_torch(small, prefix, tmp_path):
  file = write(small.released_tensors(), tmp_path, prefix)
  assert_scores_equal(RewardModel.from_pretrained(file), small)


def test_file_with_clip_in_half_precision_scores_as_its_float32_value(small, tmp_path):
  small.clip.half().float()  # rounds
  tensors = small.released_tensors()
  half = {name: t.half() if name.startswith("clip_model.") else t for name, t in tensors.items()}
  assert_scores_equal(RewardModel.from_pretrained(write(half, tmp_path)), small)


def test_model_saved_in_our_format_scores_the_same(small, tmp_path):
  ours = RewardModel.from_pretrained(write(small.released_tensors(), tmp_path))
  ours.save_pretrained(tmp_path / "ours")
  assert_scores_equal(RewardModel.from_pretrained(tmp_path / "ours"), small)


def test_shift_and_scale_of_the_config_change_only_the_reward(small, tmp_path):
  file, folder = write(small.released_tensors(), tmp_path), tmp_path / "ours"
  RewardModel.from_pretrained(file, shift=0.4064, scale=2.3021).save_pretrained(folder)
  config = json.loads((folder / "config.json").read_text())
  assert (config["shift"], config["scale"]) == (0.4064, 2.3021)
  assert_scores_equal(RewardModel.from_pretrained(folder), small, 0.4064, 2.3021)


@pytest.mark.slow
def test_released_checkpoint_and_bound_load_and_score_as_torch(tmp_path):
  theirs = randomise(ReleasedReward(RewardConfig()))
  root = np.random.default_rng(0).normal(size=(256, 300))
  inverse = np.linalg.inv(root @ root.T).astype(np.float32)
  torch.save(torch.tensor(inverse), tmp_path / "V_inverse.pt")
  file = write(theirs.released_tensors(), tmp_path, "module.")
  model = RewardModel.from_pretrained(file, bound=tmp_path / "V_inverse.pt")
  assert_scores_equal(model, theirs)
  _, z = model.score(*example_images(224))
  expected = np.sqrt(np.einsum("bi,ij,bj->b", z, inverse, z, dtype=np.float64))
  np.testing.assert_allclose(mahalanobis_norm(model.bound.whitening, z), expected, rtol=1e-3)


# -------------------------------------------------------------------------------------- names
def test_every_tensor_of_the_released_checkpoint_is_used_once_or_listed_as_unused(tmp_path):
  with torch.device("meta"):
    theirs = ReleasedReward(RewardConfig())
  tensors = hollow(theirs.released_tensors())
  count = lambda pattern: sum(t.numel() for k, t in tensors.items() if re.match(pattern, k))
  assert count(r"clip_model\.") == 151_277_313  # parameters of ViT-B/32
  assert sum(name.startswith("clip_model.") for name in tensors) == 302
  params = RewardModel.from_pretrained(write(tensors, tmp_path, "module.")).params
  unused = count(r"clip_model\.(?!visual)") + count(r"vit_block\.encoder_layer\.") + 256
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count("") - unused


def test_hub_name_loads_the_released_file(small, tmp_path, monkeypatch):
  import huggingface_hub.constants

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  repository, commit = tmp_path / "models--kd5678--prefpaintReward", "a" * 40
  snapshot = repository / "snapshots" / commit
  for folder in (snapshot, repository / "refs"):
    folder.mkdir(parents=True)
  (repository / "refs" / "main").write_text(commit)
  write(small.released_tensors(), snapshot)
  by_name = RewardModel.from_pretrained("kd5678/prefpaintReward").params
  by_file = RewardModel.from_pretrained(snapshot / FILE).params
  assert jax.tree.all(jax.tree.map(np.array_equal, by_name, by_file))


FUSION = "vit_block.transformer_encoder.layers"
BLOCKS = "clip_model.visual.transformer.resblocks"


def lose(pattern: str) -> Callable[[Tensors], Tensors]:
  return lambda tensors: {k: t for k, t in tensors.items() if not re.match(pattern, k)}


def put(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
  return lambda tensors: tensors | {name: torch.full(shape, 0.5)}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lose("mlp.layers.0.bias"), r"1 missing: mlp\.layers\.0\.bias"),
    (lose(f"{FUSION}.0.self_attn.in_proj_bias"), r"3 missing: encoder_layer\.self_attn\.\w"),
    (lose(FUSION), r"16 missing: encoder_layer\."),  # the copy encoder_layer is not used
    (lose("mlp.last_layer.weight"), r"1 missing: mlp\.last_layer\.weight"),  # nor is the alias
    (lose(f"{BLOCKS}.1"), r"16 missing: clip\.vision_model\.encoder\.layers_?\.1\."),
    (put(f"{BLOCKS}.2.ln_1.bias", 24), r"1 unexpected: \S*layers\.2\.layer_norm1\.bias"),
    (put(f"{FUSION}.1.norm1.bias", 20), rf"1 unknown tensors: {FUSION}\.1\.norm1\.bias"),
    (put("mlp.layers.4.weight", 6, 6), r"1 unknown tensors: mlp\.layers\.4\.weight"),
    (put("clip_model.visual.ln_mid.bias", 24), r"1 unknown tensors: clip_model\.visual\.ln_mid"),
    (put("head.bias", 1), r"1 unknown tensors: head\.bias"),
    (put("mlp.layers.2.weight", 5, 12), r"mlp\.layers\.2\.weight is \[5, 12\], not \[6, 12\]"),
    (
      put("clip_model.visual.conv1.weight", 24, 3, 4, 4),
      r"is \[24, 3, 4, 4\], not \[24, 3, 8, 8\]",
    ),
    (
      put(f"{BLOCKS}.0.attn.in_proj_bias", 73),
      r"1 of another shape: \S*0\.self_attn\.q_proj\.bias",
    ),
    (put("mlp.last_layer_weight", 1, 6), r"mlp\.last_layer_weight differs from"),
    (put("module.mlp.layers.0.bias", 12), r"with and without the prefix .*: mlp\.layers\.0\.bias"),
  ],
)
def test_checkpoint_of_another_network_raises_an_error_that_names_the_tensors(
  small, change, message, tmp_path
):
  file = write(change(small.released_tensors()), tmp_path)
  with pytest.raises(ValueError, match=rf"\A{re.escape(str(file))}: [^\n]*{message}[^\n]*\Z"):
    RewardModel.from_pretrained(file)


@pytest.mark.parametrize("keep", [0, 10, 20_000, -5])
def test_truncated_checkpoint_raises_one_line_that_names_the_file(small, keep, tmp_path):
  file = write(small.released_tensors(), tmp_path)
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match=rf"\A[^\n]*{FILE}: cannot be read at \d+ bytes[^\n]*\Z"):
    RewardModel.from_pretrained(file)


@pytest.mark.parametrize("wrap", [lambda t: {"state_dict": t}, lambda t: list(t.values())])
def test_file_without_a_state_dict_raises_one_line_that_names_the_file(small, wrap, tmp_path):
  torch.save(wrap(small.released_tensors()), tmp_path / FILE)
  with pytest.raises(ValueError, match=rf"\A[^\n]*{FILE}: not a dict of tensors[^\n]*\Z"):
    RewardModel.from_pretrained(tmp_path / FILE)
