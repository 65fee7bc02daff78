"""A state or a metric that is not finite is an error of one line."""

import jax.numpy as jnp
import pytest

from prefpaint_jax.runtime.finite import check_metrics, check_state
from prefpaint_jax.runtime.metrics import IterationLog, MetricsWriter


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_state_that_is_not_finite_is_an_error_that_names_its_first_array(bad):
  state = {"a": jnp.ones(3), "b": {"c": jnp.array([0.0, bad]), "n": jnp.arange(2)}}
  with pytest.raises(ValueError, match=r"\Aiteration 7: b/c has numbers [^\n]* 1 of 2 arrays"):
    check_state(7, state)
  check_state(7, state | {"b": {"c": jnp.array([0.0, -1e17], jnp.bfloat16)}})


def test_metric_that_is_not_finite_is_an_error_that_names_it():
  check_metrics(3, {"loss": 1.0, "other": float("nan")}, ["loss", "absent"])
  with pytest.raises(ValueError, match=r"\Aiteration 3: loss is nan; [^\n]*\Z"):
    check_metrics(3, {"loss": float("nan")}, ["loss"])


@pytest.mark.parametrize("name", ["ppo/policy_loss", "ppo/grad_norm"])
def test_line_of_a_diverged_update_is_written_and_then_an_error(name, tmp_path):
  writer = MetricsWriter(tmp_path)
  log = IterationLog(writer, 3, 0, 1, lambda _: {"ppo/learning_rate": 1.0})
  log.scored({"reward/mean": jnp.zeros(())})
  updates = [
    {"ppo/policy_loss": 0.0, "ppo/grad_norm": 1.0, name: value} for value in (1.0, jnp.inf)
  ]
  log.updated(1, updates)
  with pytest.raises(ValueError, match=f"iteration 1: {name} is inf"):
    log.flush(lambda: pytest.fail("a diverged policy is not measured"))
  assert f'"{name}": null' in (tmp_path / "metrics.jsonl").read_text()
