"""Which implementation of an op a program gets."""

import jax
import pytest

from prefpaint_jax.kernels.dispatch import dispatch, implementation, platform_of, traced_for
from prefpaint_jax.runtime.compilation import fast_jit

OP = {"reference": lambda x: 2.0 * x, "tpu": lambda x: 3.0 * x, "cpu": lambda x: 5.0 * x}
apply = lambda x: dispatch(OP, x)


def test_a_program_gets_the_implementation_of_its_platform():
  assert apply(1.0) == jax.jit(lambda x: apply(x))(1.0) == fast_jit()(apply)(1.0) == 5.0
  assert traced_for("tpu", apply)(1.0) == 3.0
  assert jax.grad(traced_for("tpu", apply))(1.0) == 3.0
  assert platform_of(jax.devices()[0]) == "cpu"


def test_a_platform_without_an_implementation_gets_the_reference():
  assert traced_for("rocm", apply)(1.0) == 2.0


@pytest.mark.parametrize("name, factor", [("reference", 2.0), ("tpu", 3.0), ("cuda", 2.0)])
def test_tests_choose_the_implementation_of_all_ops(name, factor):
  program = jax.jit(lambda x: apply(x))
  assert program(1.0) == 5.0
  with implementation(name):
    assert program(1.0) == fast_jit()(apply)(1.0) == factor
  assert program(1.0) == 5.0
