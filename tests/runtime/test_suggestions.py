"""Suggestions for names that are not known."""

import pytest

from prefpaint_jax.runtime.config_fields import CONFIGS
from prefpaint_jax.runtime.suggestions import ALIASES, suggest

FLAGS = ("image", "mask", "output", "num_steps", "num_samples", "guidance_scale", "text", "model")
MEANT = [
  ("lr", "rl", "learning_rate"),
  ("LR", "rl", "learning_rate"),
  ("lr", "pretrain", "vae.learning_rate"),
  ("lora_rank", "rl", "lora.rank"),
  ("rank", "rl", "lora.rank"),
  ("optim.learning_rate", "rl", "learning_rate"),
  ("learning-rate", "rl", "learning_rate"),
  ("learning_rte", "rl", "learning_rate"),
  ("batchsize", "rl", "batch_size"),
  ("iterations", "rl", "num_iterations"),
  ("steps", "rl", "num_steps"),
  ("checkpoint", "rl", "checkpoint_every"),
  ("model", "rl", "policy"),
  ("dataset", "rl", "prompts"),
  ("dataset", "reward", "preferences"),
  ("judge", "eval", "judges"),
  ("bananas", "rl", None),
  ("foo", "rl", None),
  ("x", "rl", None),
  ("verbose", "rl", None),
]


@pytest.mark.parametrize(("name", "config", "meant"), MEANT)
def test_a_wrong_field_gets_a_good_suggestion_or_none(name, config, meant):
  assert suggest(name, CONFIGS[config][0]) == meant


@pytest.mark.parametrize(
  ("name", "meant"),
  [
    ("num_inference_steps", "num_steps"),
    ("cfg", "guidance_scale"),
    ("prompt", "text"),
    ("out", "output"),
    ("imgae", "image"),
    ("masks", "mask"),
    ("fps", None),
  ],
)
def test_a_wrong_flag_gets_a_good_suggestion_or_none(name, meant):
  assert suggest(name, FLAGS) == meant


def test_every_alias_means_a_name_that_exists():
  fields = {name for table, _ in CONFIGS.values() for name in table}
  flags = {*FLAGS, "workdir", "step"}
  assert {meant for names in ALIASES.values() for meant in names} <= fields | flags
