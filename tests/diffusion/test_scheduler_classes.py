"""Configs of every scheduler class of diffusers: fields, defaults, and chains whose steps meet."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax.diffusion import ddim
from prefpaint_jax.diffusion.schedule import CLASSES, READ, TABLE, Schedule, class_defaults

# Some of its classes call NumPy on torch tensors, which NumPy 2 will refuse one day.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FIELDS = {field.name for field in dataclasses.fields(Schedule)}


@pytest.fixture(scope="module")
def diffusers():
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  return pytest.importorskip("diffusers")


def test_every_field_of_every_class_is_read_refused_or_harmless():
  known = FIELDS | READ, set(TABLE.fixed), TABLE.harmless
  for name in CLASSES:
    for field in class_defaults(name):
      assert sum(field in table for table in known) == 1, f"{name}: {field} is in no or two tables"


def test_classes_are_those_of_stable_diffusion_in_diffusers(diffusers):
  from diffusers.schedulers import KarrasDiffusionSchedulers

  stock = {kind.name for kind in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}  # no betas
  assert stock <= set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_of_a_class_are_those_of_its_signature(name, diffusers):
  signature = inspect.signature(getattr(diffusers, name).__init__).parameters
  if "args" in signature:
    pytest.skip(f"{name} needs another package")
  stock = {key: value.default for key, value in list(signature.items())[1:]}
  ours = class_defaults(name)
  assert {k: v for k, v in stock.items() if v != -np.inf} == {
    k: ours[k] for k in ours if k in stock and stock[k] != -np.inf
  }
  schedule = Schedule.from_config({"_class_name": name})
  for field in FIELDS & stock.keys():
    assert getattr(schedule, field) == stock[field], field
  theirs = getattr(diffusers, name)()
  np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6)


def test_class_that_only_flax_had_is_read_as_the_class_of_torch():
  for name in ("DDIMScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"):
    flax = Schedule.from_config({"_class_name": f"Flax{name}"})
    assert flax == Schedule.from_config({"_class_name": name})


def test_solver_that_ends_at_the_first_noise_level_ends_there():
  for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
    for final, at_one in (("zero", True), ("sigma_min", False)):
      schedule = Schedule.from_config({"_class_name": name, "final_sigmas_type": final})
      assert schedule.set_alpha_to_one == at_one


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 13, 50, 61, 300, 499])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_step_ends_at_the_timestep_where_the_next_one_begins(spacing, num_steps):
  schedule = Schedule.from_config(SD | {"timestep_spacing": spacing, "steps_offset": 1})
  steps = ddim.ddim_steps(schedule, num_steps, 1.0)
  np.testing.assert_array_equal(steps.alpha_prev[:-1], steps.alpha[1:])
  assert steps.alpha_prev[-1] == 1


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("num_steps", [5, 10, 20, 50, 100])
def test_chains_whose_length_divides_the_schedule_are_those_of_diffusers(spacing, num_steps):
  config = SD | {"timestep_spacing": spacing, "set_alpha_to_one": False}
  ours, stock = (
    ddim.ddim_steps(Schedule.from_config(config | {"steps_meet": meets}), num_steps, 1.0)
    for meets in (True, False)
  )
  for a, b in zip(ours, stock, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_steps", [3, 7, 13])
def test_chain_that_meets_equals_the_first_order_solver_of_diffusers(diffusers, num_steps):
  """DPM-Solver++ of first order is DDIM with η = 0, and its steps meet (Lu et al. 2022, sec. 4)."""
  import torch

  config = SD | {"timestep_spacing": "trailing"}
  schedule = Schedule.from_config(config | {"clip_sample": False})
  theirs = diffusers.DPMSolverMultistepScheduler(
    **config, algorithm_type="dpmsolver++", solver_order=1
  )
  theirs.set_timesteps(num_steps)
  steps = ddim.ddim_steps(schedule, num_steps, 0.0)
  timesteps = theirs.timesteps.tolist()
  np.testing.assert_array_equal(steps.timestep, timesteps)
  ours = jnp.array(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
  x = torch.tensor(np.asarray(ours))
  network = lambda latents, t: jnp.tanh(jnp.roll(latents, 1, axis=1) * 0.7 + t / 1000)
  for i, t in enumerate(timesteps):
    output = torch.tensor(np.asarray(network(jnp.array(x.numpy()), t)))
    x = theirs.step(output, t, x).prev_sample
    at = steps.at(i)
    ours, _ = ddim.step(schedule, at, ours, network(ours, t), noise=jnp.zeros_like(ours))
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  "config, message",
  [
    ({"_class_name": "LCMScheduler"}, "_class_name is LCMScheduler"),
    ({"_class_name": "EDMEulerScheduler"}, "_class_name is EDMEulerScheduler"),
    ({"_class_name": "CogVideoXDDIMScheduler"}, "_class_name is CogVideoXDDIMScheduler"),
    ({"_class_name": ["DDIMScheduler"]}, "_class_name is ['DDIMScheduler']"),
    ({"thresholding": True}, "thresholding is True"),
    ({"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
    ({"variance_type": "learned"}, "variance_type is 'learned'"),
    ({"use_flow_sigmas": True}, "use_flow_sigmas is True"),
    ({"final_sigmas_type": "none"}, "final_sigmas_type is 'none'"),
    ({"beta_start": "0.1"}, "beta_start is '0.1'; expected a finite number"),
    ({"beta_end": float("nan")}, "beta_end is nan; expected a finite number"),
    ({"num_train_timesteps": 1000.5}, "num_train_timesteps is 1000.5; expected an integer"),
    ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000; expected 1 to"),
    ({"trained_betas": 3}, "trained_betas is 3; expected a list"),
    ({"clip_sample": 1}, "clip_sample is 1; expected true or false"),
    ({"clip_sample_range": 0}, "clip_sample_range is 0.0; expected"),
    ({"steps_meet": "no"}, "steps_meet is 'no'; expected true or false"),
  ],
)
def test_config_that_is_not_computed_raises_one_line_that_names_the_field(config, message):
  with pytest.raises(ValueError) as error:
    Schedule.from_config(SD | config)
  assert message in str(error.value) and "\n" not in str(error.value)
