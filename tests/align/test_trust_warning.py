"""A run whose trust weights hardly differ says so in one line."""

import pytest
from ml_collections import ConfigDict

from prefpaint_jax.align import results


@pytest.mark.parametrize(
  ("norm", "spread", "warns"),
  [
    ("mahalanobis", 0.019, True),
    ("mahalanobis", 0.021, False),
    ("released", 0.0, True),
    ("constant", 0.0, False),
    ("none", 0.0, False),
  ],
)
def test_weights_that_spread_by_less_than_two_percent_are_named(norm, spread, warns, monkeypatch):
  lines = []
  monkeypatch.setattr(results.logging, "warning", lambda text, *values: lines.append(text % values))
  line = {"trust/mean": 2.0, "trust/std": 2.0 * spread}
  results.warn_of_equal_weights(ConfigDict({"norm": norm, "k": 0.05}), line)
  assert len(lines) == warns
  if warns:
    expected = (
      f"trust weights spread by {100 * spread:.2g} % around 2, so trust.norm={norm} acts as"
    )
    assert lines[0].startswith(expected) and "trust.k=0.05" in lines[0] and "\n" not in lines[0]
