"""Preference data: `python -m prefpaint_jax.data.preferences --config=configs/preferences.py
--workdir=DIR --config.source=FOLDER`.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
  if preset:
    raise ValueError(f"configs/preferences.py has no preset {preset!r}")
  config = ConfigDict()
  config.source = ""  # folder of pictures and human scores
  # What the criteria count for in the combined score, relative to their sum.
  config.weights = ConfigDict({"structure": 0.3, "texture": 0.3, "overall": 0.4})
  config.test_share = 0.1  # of the pictures, held out where neither train.txt nor test.txt is there
  return config
