"""The gated unit against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from prefpaint_jax.models.blocks import GEGLU, GroupNorm


def test_gated_unit_is_hidden_times_gelu_of_the_gate_and_so_are_its_gradients():
  gate = np.linspace(-6, 6, 25)[:, None]
  # Hidden and gate are the input, four times each.
  params = {"proj": {"kernel": jnp.ones((1, 8)), "bias": jnp.zeros(8)}}
  y, back = jax.vjp(lambda x: GEGLU().apply({"params": params}, x), jnp.float32(gate[None]))
  gelu, slope = gate * stats.norm.cdf(gate), stats.norm.cdf(gate) + gate * stats.norm.pdf(gate)
  np.testing.assert_allclose(y[0], np.repeat(gate * gelu, 4, axis=1), rtol=2e-6, atol=2e-6)
  (dx,) = back(jnp.ones_like(y))
  np.testing.assert_allclose(dx[0], 4 * (gelu + gate * slope), rtol=2e-6, atol=1e-5)
  low = GEGLU(jnp.bfloat16).apply({"params": params}, jnp.bfloat16(gate[None]))
  assert low.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    low[0, :, 0].astype(jnp.float32), (gate * gelu)[:, 0], rtol=0.01, atol=1e-3
  )


def test_channels_that_do_not_divide_into_groups_are_refused():
  with pytest.raises(ValueError, match="6 channels do not divide into 4 groups"):
    GroupNorm(4, 1e-5).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))
