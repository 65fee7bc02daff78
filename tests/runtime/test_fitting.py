"""Fitting: which parameters come out of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prefpaint_jax.runtime import fitting, sharding


class Batches:
  """Endless batches of eight ones."""

  def __next__(self):
    return {"x": np.ones((8, 1), np.float32), "id": np.array(["a"] * 8)}

  def get_state(self):
    return {}

  def set_state(self, state):
    del state


def fit(workdir, scores, judge_every):
  """w falls by 1 in each of four iterations, from 0; the judge gives these scores in turn."""
  scores = iter(scores)
  return fitting.fit(
    lambda params, batch, key: (jnp.mean(batch["x"]) * params["w"], {}),
    (),
    {"w": jnp.zeros(())},
    optax.sgd(1.0),
    Batches(),
    workdir,
    sharding.make_mesh(),
    jax.random.key(0),
    iterations=4,
    ema_decay=0.0,
    checkpoint_every=0,
    log_every=0,
    judge=None if judge_every is None else lambda params: (next(scores), {}),
    judge_every=judge_every or 0,
  )["w"]


@pytest.mark.parametrize(
  ("scores", "judge_every", "expected"),
  [
    ((0.1, 0.3, 0.2, 0.3), 1, -2.0),  # the best, of equals the first
    ((0.1,), 0, -4.0),  # judged at the end alone
    ((float("nan"),) * 2, 2, -4.0),  # nothing to choose by: the last
    ((), None, -4.0),
  ],
)
def test_the_best_parameters_are_returned(tmp_path, scores, judge_every, expected):
  assert fit(tmp_path, scores, judge_every) == expected
