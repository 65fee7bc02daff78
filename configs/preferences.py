"""Preference dataset: `python -m prefpaint_jax.data.preferences --config=configs/preferences.py
--workdir=DIR --config.source=FOLDER`.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
  if preset:
    raise ValueError(f"configs/preferences.py has no preset {preset!r}; give none")
  config = ConfigDict()
  config.source = ""  # folder of images and human scores; required
  # Empty: the scores of people. Else the scores of rewards, NAME*WEIGHT,NAME, that collect wrote.
  config.rewards = ""  # each is standardised over all candidates, weighted and summed
  config.test_share = 0.1  # held-out share of the images, without train.txt and test.txt
  # Weights of the criteria in the combined score, relative to their sum.
  config.weights = ConfigDict({"structure": 0.3, "texture": 0.3, "overall": 0.4})
  return config
