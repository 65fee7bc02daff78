"""A run whose trust weights hardly differ, or almost vanish, says so in one line."""

import pytest
from ml_collections import ConfigDict

from prefpaint_jax.align import results


@pytest.mark.parametrize(
  ("norm", "spread", "warns"),
  [
    ("mahalanobis", 0.019, True),
    ("mahalanobis", 0.021, False),
    ("released", 0.0, True),
    ("novelty", 0.0, True),
    ("constant", 0.0, False),
    ("none", 0.0, False),
  ],
)
def test_weights_that_spread_by_less_than_two_percent_are_named(norm, spread, warns, monkeypatch):
  lines = []
  monkeypatch.setattr(results.logging, "warning", lambda text, *values: lines.append(text % values))
  line = {"trust/mean": 2.0, "trust/std": 2.0 * spread}
  results.warn_of_trust(ConfigDict({"norm": norm, "k": 0.05, "b": 0.7}), line)
  assert len(lines) == warns
  if warns:
    expected = (
      f"trust weights spread by {100 * spread:.2g} % around 2, so trust.norm={norm} acts as"
    )
    assert lines[0].startswith(expected) and "trust.k=0.05" in lines[0] and "\n" not in lines[0]


def test_weights_that_almost_vanish_are_named_with_a_better_k(monkeypatch):
  lines = []
  monkeypatch.setattr(results.logging, "warning", lambda text, *values: lines.append(text % values))
  trust = ConfigDict({"norm": "novelty", "k": 33.9, "b": 1.09})
  results.warn_of_trust(trust, {"trust/mean": 6.6e-10, "trust/std": 1e-9, "trust/norm": 1.25})
  assert lines == [
    "trust weights average 6.6e-10, so updates almost vanish: the norm, novelty, averages 1.25; "
    "lower trust.k=33.9, to 0.4 for example, or raise trust.b=1.09"
  ]


def test_a_batch_without_a_sample_that_counts_is_no_case_of_vanishing_weights(monkeypatch):
  lines = []
  monkeypatch.setattr(results.logging, "warning", lambda text, *values: lines.append(text % values))
  trust = ConfigDict({"norm": "mahalanobis", "k": 0.5, "b": 0.7})
  results.warn_of_trust(trust, {"trust/mean": 0.0, "trust/std": 0.0, "trust/norm": 0.0})
  assert not any("vanish" in line for line in lines)
