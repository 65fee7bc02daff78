"""Supervised training returns the parameters with the highest score."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prefpaint_jax.runtime import fitting, interrupts, sharding
from prefpaint_jax.runtime.checkpoint import Checkpoints


class Batches:
  """An endless loader of batches of eight ones."""

  def __next__(self):
    return {"x": np.ones((8, 1), np.float32), "id": np.array(["a"] * 8)}

  def get_state(self):
    return {}

  def set_state(self, state):
    del state


def fit(workdir, scores, judge_every, batches=None, **changes):
  """Returns {"w": w} after four iterations. w starts at 0; each update subtracts 1.

  `scores` are the results of the judge, in order.
  """
  scores = iter(scores)
  settings = {
    "params": {"w": jnp.zeros(())},
    "iterations": 4,
    "ema_decay": 0.0,
    "checkpoint_every": 0,
    "log_every": 0,
    "judge": None if judge_every is None else lambda params: (next(scores), {}),
    "judge_every": judge_every or 0,
  }
  return fitting.fit(
    lambda params, batch, key: (jnp.mean(batch["x"]) * params["w"], {}),
    (),
    optimizer=optax.sgd(1.0),
    loader=batches or Batches(),
    workdir=workdir,
    mesh=sharding.make_mesh(),
    key=jax.random.key(0),
    **settings | changes,
  )


@pytest.mark.parametrize(
  ("scores", "judge_every", "expected"),
  [
    ((0.1, 0.3, 0.2, 0.3), 1, -2.0),  # the first of two equal best scores
    ((0.1,), 0, -4.0),  # the judge runs only after the last update
    ((float("nan"),) * 2, 2, -4.0),  # NaN selects none: the last parameters
    ((), None, -4.0),
  ],
)
def test_parameters_with_the_highest_score_are_returned(tmp_path, scores, judge_every, expected):
  assert fit(tmp_path, scores, judge_every)["w"] == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_fit_and_the_same_call_goes_on(tmp_path, number, capsys, monkeypatch):
  monkeypatch.setattr(interrupts, "status", 0)

  class Interrupted(Batches):
    drawn = 0

    def __next__(self):
      self.drawn += 1
      if self.drawn == 2:
        signal.raise_signal(number)
      return super().__next__()

  assert fit(tmp_path, (), None, Interrupted()) is None
  assert interrupts.status == 128 + number  # of a command, as a shell expects
  assert "stopped after iteration 3 and saved; the same command goes on" in capsys.readouterr().out
  assert Checkpoints(tmp_path / "checkpoints").latest() == 3
  resumed = Batches()
  assert fit(tmp_path, (), None, resumed)["w"] == -4.0


def test_restored_is_called_once_and_never_for_a_checkpoint_that_does_not_match(tmp_path):
  calls = []
  restored = lambda: calls.append(1)
  fit(tmp_path, (), None, checkpoint_every=4, restored=restored)
  assert calls == [1]
  with pytest.raises(ValueError, match=r"1 of .* arrays differ"):
    fit(tmp_path, (), None, params={"w": jnp.zeros(2)}, restored=restored)
  assert calls == [1]


@pytest.mark.parametrize("log_every", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_fit_that_diverges_stops_before_it_saves(tmp_path, bad, log_every):
  def loss(params, batch, key):
    value = jnp.mean(batch["x"]) * params["w"]
    return value, {"loss": value}

  mesh, key = sharding.make_mesh(), jax.random.key(0)
  run = lambda rate, iterations: fitting.fit(
    loss,
    (),
    {"w": jnp.ones(())},
    optax.sgd(rate),
    Batches(),
    tmp_path,
    mesh,
    key,
    iterations=iterations,
    ema_decay=0.0,
    checkpoint_every=1,
    log_every=log_every,
  )
  run(1.0, 1)
  for _ in range(2):  # a second start finds the good checkpoint, and stops again
    with pytest.raises(ValueError, match=r"\Aiteration 2: [^\n]* not finite or beyond [^\n]*\Z"):
      run(bad, 3)
    assert Checkpoints(tmp_path / "checkpoints").latest() == 1
