"""The model card of an export says what the run was, and the export reaches the hub or stays."""

import re

import numpy as np
import pytest
from alignment_world import get_config
from huggingface_hub import ModelCard

from prefpaint_jax.data.images import save_png
from prefpaint_jax.evaluation import model_card
from prefpaint_jax.runtime.files import write_json

ESTIMATE = {"value": 0.75, "low": 0.5, "high": 1.0}
EVALUATION = {
  "about": {
    "policy": "/home/me/runs/a",
    "policy_iteration": 40,
    "baseline": "/home/me/base",
    "prompts": "7 of /home/me/prompts, test",
    "samples_per_prompt": 3,
    "sampler": "DDIM, 10 steps, eta 1",
  },
  "judges": {"/home/me/judge": {"all": {"prompts": 7, "winrate/s1": ESTIMATE}}},
}


@pytest.fixture
def source(tmp_path) -> model_card.Source:
  config = get_config("mini")
  for iteration in (0, 20, 40):
    file = tmp_path / "run" / "samples" / f"{iteration:06d}.png"
    save_png(file, np.full((4, 4, 3), iteration, np.uint8))
  (tmp_path / "out").mkdir()
  return model_card.Source(tmp_path / "run", config, 30)


def card_of(source, tmp_path, evaluation=None) -> ModelCard:
  model_card.write_card(tmp_path / "out", source, "me/aligned", evaluation)
  return ModelCard.load(tmp_path / "out" / "README.md")


def test_card_has_the_settings_of_the_run_and_what_the_hub_reads(source, tmp_path):
  source.config.policy = "stable-diffusion-v1-5/stable-diffusion-inpainting"
  card = card_of(source, tmp_path)
  assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "image-to-image"
  assert card.data.base_model == "stable-diffusion-v1-5/stable-diffusion-inpainting"
  assert "inpainting" in card.data.tags and card.data.license == "other"
  assert f"| learning_rate | {source.config.learning_rate} |" in card.text
  assert f"| trust.norm | {source.config.trust.norm} |" in card.text
  assert "| iteration | 30 |" in card.text and "Not evaluated." in card.text
  assert "fill it in" in card.text and 'from_pretrained("me/aligned")' in card.text
  program = re.search(r"```python\n(.*?)```", card.text, re.S)
  compile(program[1], "card", "exec")
  assert f"num_inference_steps={source.config.num_steps}," in program[1]


def test_card_shows_the_latest_samples_that_the_checkpoint_had(source, tmp_path):
  card = card_of(source, tmp_path)
  expected = source.workdir / "samples" / "000020.png"
  assert (tmp_path / "out" / "samples.png").read_bytes() == expected.read_bytes()
  assert "![samples](samples.png)" in card.text and "at iteration 20" in card.text


def test_card_names_no_path_of_the_machine(source, tmp_path):
  (tmp_path / "base").mkdir()
  source.config.policy = str(tmp_path / "base")
  source.config.reward = f"{tmp_path}/first*0.5,owner/second*2,{tmp_path}/own.py:score"
  source.config.prompts = str(tmp_path / "prompts")
  card = card_of(source, tmp_path, EVALUATION)
  assert str(tmp_path) not in card.content and "/home/me" not in card.content
  assert "`first*0.5, owner/second*2, own.py:score`" in card.text
  assert card.data.base_model is None


def test_card_has_the_licence_of_the_base(source, tmp_path):
  (tmp_path / "base").mkdir()
  (tmp_path / "base" / "README.md").write_text("---\nlicense: openrail++\n---\n# Base\n")
  source.config.policy = str(tmp_path / "base")
  card = card_of(source, tmp_path)
  assert card.data.license == "openrail++" and "`openrail++`, that of the base" in card.text


@pytest.mark.parametrize("content", ["# Base\n", "---\nlicense: [\n---\n"])
def test_base_without_a_licence_leaves_it_to_fill_in(source, tmp_path, content):
  (tmp_path / "base").mkdir()
  (tmp_path / "base" / "README.md").write_text(content)
  source.config.policy = str(tmp_path / "base")
  card = card_of(source, tmp_path)
  assert card.data.license == "other" and "fill it in" in card.text


def test_card_has_the_figures_of_an_evaluation_and_its_checkpoint(source, tmp_path):
  write_json(source.workdir / "eval.json", EVALUATION)
  for path in (None, str(source.workdir), str(source.workdir / "eval.json")):
    assert model_card.read_evaluation(path, source.workdir) == EVALUATION
  card = card_of(source, tmp_path, EVALUATION)
  assert re.search(r"WinRate, one sample each +0\.750 \[0\.500, 1\.000\]", card.text)
  assert "of the checkpoint of iteration 40 against `base`, 7 prompts (prompts, test)" in card.text


def test_run_without_an_evaluation_has_none(tmp_path):
  assert model_card.read_evaluation(None, tmp_path) is None


@pytest.mark.parametrize(
  "content, message",
  [
    (None, "no such file; give the --workdir of evaluate"),
    ({}, "not an evaluation"),
    ({"about": {}, "judges": {"a": 3}}, "not an evaluation"),
    (EVALUATION | {"judges": {"a": {"all": {}}}}, "not an evaluation"),
  ],
)
def test_bad_evaluation_is_refused_in_one_line(tmp_path, content, message):
  if content is not None:
    write_json(tmp_path / "eval.json", content)
  with pytest.raises(ValueError, match=message) as error:
    model_card.read_evaluation(str(tmp_path), tmp_path)
  assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


class Hub:
  """Stands for the hub: keeps what is uploaded, or raises an error."""

  def __init__(self, error: Exception | None = None):
    self.error, self.repos, self.uploads = error, [], []

  def create_repo(self, name, exist_ok):
    if self.error:
      raise self.error
    self.repos.append((name, exist_ok))
    return f"https://huggingface.co/{name}"

  def upload_folder(self, repo_id, folder_path, commit_message):
    self.uploads.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_push_uploads_the_whole_folder_to_a_new_or_existing_model(tmp_path, monkeypatch):
  hub = Hub()
  monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
  (tmp_path / "README.md").touch()
  (tmp_path / "unet").mkdir()
  assert model_card.push(tmp_path, "me/aligned") == "https://huggingface.co/me/aligned"
  assert hub.repos == [("me/aligned", True)]
  assert hub.uploads == [("me/aligned", ["README.md", "unet"])]


@pytest.mark.parametrize("message", ["no token\nhint", "no network", "403: no such owner"])
def test_failed_push_is_one_line_and_keeps_the_folder(tmp_path, monkeypatch, message):
  monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(OSError(message)))
  (tmp_path / "README.md").touch()
  with pytest.raises(
    ValueError, match=r"me/aligned: not uploaded \(OSError: .* is written"
  ) as error:
    model_card.push(tmp_path, "me/aligned")
  assert "\n" not in str(error.value) and (tmp_path / "README.md").exists()


@pytest.mark.parametrize("name", ["", "aligned", "a/b/c", "/aligned", "../aligned", "a b/c"])
def test_push_to_another_name_than_owner_and_model_is_refused(name):
  with pytest.raises(ValueError, match="expected a hub name owner/name"):
    model_card.check_hub_name(name)
