"""Scores of rewards in scores.jsonl as preferences: the combined score, and errors by line."""

import json

import numpy as np
import pytest

from prefpaint_jax.data.annotations import read_annotations
from prefpaint_jax.data.reward_scores import read_scores, write_scores


def row(k, **scores):
  return {"image_id": "a", "candidate": f"a_{k}", "scores": scores}


def write(folder, rows):
  lines = (one if isinstance(one, str) else json.dumps(one) for one in rows)
  (folder / "scores.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_each_reward_is_standardised_weighted_and_summed(tmp_path):
  values = np.random.default_rng(0).normal(size=(6, 2)) * [1, 1000]
  with (tmp_path / "scores.jsonl").open("w") as output:
    for k, (small, large) in enumerate(values):
      write_scores(output, "a", f"a_{k}", {"x.py:f": small, "large": large, "other": np.nan})
    write_scores(output, "a", "a_6", {"x.py:f": np.inf, "large": 0.0, "other": 1.0})
  errors = []
  found = list(read_scores(tmp_path, "large*0.5,x.py:f*-2", errors))
  z = (values - values.mean(0)) / values.std(0)
  assert not errors and [one[:3] for one in found] == [
    (f"scores.jsonl:{k + 1}", "a", f"a_{k}")
    for k in range(6)  # without the score of infinity
  ]
  np.testing.assert_allclose([one[4][0] for one in found], 0.5 * z[:, 1] - 2 * z[:, 0], atol=1e-12)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("nonsense", r"scores\.jsonl:2 is not JSON"),
    ("[1]", r"scores\.jsonl:2 .*list"),
    (row(1, f="high"), "score of f is 'high'; expected None or a number"),
    (row(1, f=True), "score of f is True; expected"),
    (row(1) | {"scores": 3.0}, "scores is 3.0; expected an object of numbers"),
    (row(1) | {"image_id": 7}, "image_id is 7; expected a name"),
    (row(1, f=0.0) | {"image_id": "b"}, "unknown image id 'b'"),
    (row(7, f=0.0), "unknown candidate 'a_7'"),
    (row(0, f=0.0), "already scored 'a_0' in scores.jsonl:1"),
  ],
)
def test_every_wrong_line_is_named(tmp_path, line, message):
  (tmp_path / "prompts.jsonl").write_text('{"image_id": "a", "source": "x", "kind": "box"}\n')
  candidates = ({"image_id": "a", "candidate": f"a_{k}", "policy": "x"} for k in range(3))
  (tmp_path / "candidates.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in candidates))
  write(tmp_path, [row(0, f=1.0), line, row(2, f=0.5)])
  with pytest.raises(ValueError, match=message):
    read_annotations(tmp_path, rewards="f")


@pytest.mark.parametrize(
  ("rows", "rewards", "message"),
  [
    (None, "f", r"scores\.jsonl: no such file; write it by collect with --config\.rewards"),
    ([row(0, f=1.0, g=2.0)], "f,h,i", r"scores\.jsonl:1: no score of h, i; name some of f, g"),
    ([row(0, f=1.0), row(1, f=1.0)], "f", "all 2 scores of f are 1, so they express no"),
    ([row(0, f=1.0)], "f*", r"reward 'f\*': the weight '' is no number"),
  ],
)
def test_errors_of_the_file_are_one_line(tmp_path, rows, rewards, message):
  if rows:
    write(tmp_path, rows)
  with pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
    list(read_scores(tmp_path, rewards, []))
