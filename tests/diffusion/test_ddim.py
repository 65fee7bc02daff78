"""Noise schedules, DDIM steps, log-probabilities and rollouts equal diffusers and scipy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from prefpaint_jax.diffusion import ddim
from prefpaint_jax.diffusion.schedule import Schedule

SD = {  # scheduler_config.json of Stable Diffusion
  "_class_name": "PNDMScheduler",
  "_diffusers_version": "0.6.0",
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "num_train_timesteps": 1000,
  "set_alpha_to_one": False,
  "skip_prk_steps": True,
  "steps_offset": 1,
  "trained_betas": None,
  "clip_sample": False,
}
CONFIGS = {
  "stable_diffusion": SD,
  "v_prediction": SD | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
  "sample_linspace": SD | {"prediction_type": "sample", "timestep_spacing": "linspace"},
  "cosine_clipped": {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.7},
  "ddim_defaults": {"_class_name": "DDIMScheduler"},
  "linspace_alpha_one": SD | {"timestep_spacing": "linspace", "set_alpha_to_one": True},
  "zero_snr": SD
  | {
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
  },
  "trained_betas": {
    "num_train_timesteps": 60,
    "trained_betas": np.linspace(0.001, 0.2, 60).tolist(),
    "timestep_spacing": "trailing",
  },
}


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch", reason="parity needs torch: pip install torch")


@pytest.fixture(params=CONFIGS)
def pair(request, torch):
  """Returns (our schedule, diffusers' scheduler) of the same config."""
  from diffusers import DDIMScheduler

  config = CONFIGS[request.param]
  # diffusers' steps, which do not meet with all spacings.
  schedule = Schedule.from_config(config | {"steps_meet": False})
  return schedule, DDIMScheduler.from_config(config)


def one_sample(shape=(3, 4, 5, 2), seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same_alphas(schedule, theirs):
  ours, theirs = schedule.alphas_cumprod, theirs.alphas_cumprod.numpy()
  assert ours.dtype == np.float32
  if schedule.rescale_betas_zero_snr:  # diffusers rounds to float32 seven times
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert ours[-1] == theirs[-1] == 0
  else:
    np.testing.assert_array_equal(ours, theirs)


def test_alphas_equal_diffusers_bit_for_bit(pair):
  assert_same_alphas(*pair)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 50])
def test_timesteps_equal_diffusers(pair, num_steps):
  schedule, theirs = pair
  theirs.set_timesteps(num_steps)
  ours = ddim.timesteps(schedule, num_steps)
  np.testing.assert_array_equal(ours, theirs.timesteps.numpy())
  assert ours.dtype == np.int32


def test_timesteps_equal_diffusers_for_every_length(torch):
  from diffusers import DDIMScheduler

  for spacing in ("leading", "trailing", "linspace"):
    config = SD | {"timestep_spacing": spacing}
    schedule, theirs = Schedule.from_config(config), DDIMScheduler.from_config(config)
    for num_steps in range(1, 1001, 3):
      theirs.set_timesteps(num_steps)
      ours = ddim.timesteps(schedule, num_steps)
      extra = theirs.timesteps[num_steps:].tolist()  # a rounding error of "trailing" in diffusers
      assert len(ours) == num_steps and extra in ([], [-1])
      np.testing.assert_array_equal(ours, theirs.timesteps[:num_steps].numpy())


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_every_step_equals_diffusers(pair, torch, num_steps, eta):
  schedule, theirs = pair
  theirs.set_timesteps(num_steps)
  # diffusers subtracts nearly equal numbers; in float64 the differences are accurate.
  theirs.alphas_cumprod = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
  theirs.final_alpha_cumprod = (
    torch.tensor(1.0).double() if schedule.set_alpha_to_one else theirs.alphas_cumprod[0]
  )
  steps = ddim.ddim_steps(schedule, num_steps, eta)
  latents, output, noise = (one_sample(seed=seed) for seed in range(3))
  as_torch = [torch.tensor(x, dtype=torch.float64) for x in (latents, output, noise)]
  step = jax.jit(ddim.step, static_argnums=0)
  for i, t in enumerate(theirs.timesteps.tolist()):
    variance = theirs._get_variance(t, t - theirs.config.num_train_timesteps // num_steps)
    np.testing.assert_allclose(steps.sigma[i], eta * variance.sqrt().item(), rtol=1e-6)
    at = steps.at(i)
    x_prev, score = step(schedule, at, latents, output, noise=noise)
    expected = theirs.step(as_torch[1], t, as_torch[0], eta=eta, variance_noise=as_torch[2])
    original = ddim.original_sample(schedule, at, jnp.array(latents), jnp.array(output))
    np.testing.assert_allclose(original, expected.pred_original_sample, rtol=1e-5, atol=1e-5)
    assert np.isfinite(score).all()
    if steps.alpha[i] == 0 and eta == 1:
      # diffusers gives NaN: the argument of a square root is exactly 0, but rounds below it.
      prev = np.sqrt(steps.alpha_prev[i]) * original + steps.sigma[i] * noise
      np.testing.assert_allclose(x_prev, prev, atol=2e-3)
    else:
      np.testing.assert_allclose(x_prev, expected.prev_sample, rtol=1e-4, atol=1e-5)


def test_sigmas_of_the_released_chain_equal_the_formula_in_float64():
  steps = ddim.ddim_steps(Schedule.from_config(SD), 50, eta=1.0)
  np.testing.assert_array_equal(steps.timestep, 20 * np.arange(49, -1, -1) + 1)
  betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
  alphas = np.cumprod(1 - betas)
  alpha = alphas[steps.timestep]
  alpha_prev = alphas[np.maximum(steps.timestep - 20, 0)]
  sigma = np.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
  np.testing.assert_allclose(steps.alpha, alpha, rtol=1e-5)
  np.testing.assert_allclose(steps.sigma, sigma, rtol=1e-4)
  assert np.argmin(steps.sigma) == 49
  assert steps.sigma[-1] == pytest.approx(0.0206, abs=5e-5)


def test_one_step_per_sample_equals_separate_calls():
  schedule = Schedule.from_config(SD)
  steps = ddim.ddim_steps(schedule, 10, 1.0)
  latents, output, noise = (jnp.array(one_sample(seed=seed)) for seed in range(3))
  index = jnp.array([7, 0, 9])
  together = ddim.step(schedule, steps.at(index), latents, output, noise=noise)
  for i in range(3):
    one = slice(i, i + 1)
    alone = ddim.step(schedule, steps.at(index[i]), latents[one], output[one], noise=noise[one])
    for a, b in zip(together, alone, strict=True):
      np.testing.assert_allclose(a[one], b, rtol=1e-6)


def test_numpy_steps_take_a_traced_index():
  steps = ddim.ddim_steps(Schedule.from_config(SD), 10, 1.0)
  assert jax.jit(lambda i: steps.at(i).timestep)(3) == steps.timestep[3]


def test_sampling_and_scoring_give_the_same_log_probability_bit_for_bit():
  schedule = Schedule.from_config(SD)
  at = ddim.ddim_steps(schedule, 10, 1.0).at(4)
  latents, output, noise = (jnp.array(one_sample(seed=seed)) for seed in range(3))
  x_prev, sampled = ddim.step(schedule, at, latents, output, noise=noise)
  same, scored = ddim.step(schedule, at, latents, output, x_prev=x_prev)
  np.testing.assert_array_equal(sampled, scored)
  np.testing.assert_array_equal(same, x_prev)
  with pytest.raises(ValueError, match="neither given; give exactly one"):
    ddim.step(schedule, at, latents, output)


def test_log_prob_equals_scipy():
  x, mean = one_sample(seed=1), one_sample(seed=2)
  sigma = np.array([0.0206, 0.3, 2.0], np.float32)
  density = scipy.stats.norm.logpdf(x, mean, sigma[:, None, None, None])
  ours = ddim.log_prob(jnp.array(x), jnp.array(mean), sigma)
  np.testing.assert_allclose(ours, density.mean((1, 2, 3)), rtol=1e-5)


def test_weighted_log_prob_averages_only_the_latents_of_the_hole():
  x, mean = one_sample(seed=1), one_sample(seed=2)
  weight = (one_sample((3, 4, 5, 1), seed=3) > 0).astype(np.float32)
  weight[2] = 0
  density = scipy.stats.norm.logpdf(x, mean, 0.5)
  inside = [density[b][weight[b, ..., 0] > 0].mean() for b in range(2)]
  ours = ddim.log_prob(jnp.array(x), jnp.array(mean), 0.5, jnp.array(weight))
  np.testing.assert_allclose(ours, [*inside, 0.0], rtol=1e-5)


def test_kl_equals_torch(torch):
  mean, base = one_sample(seed=1), one_sample(seed=2)
  sigma = np.array([0.05, 0.3, 2.0], np.float32)
  scale = torch.tensor(sigma)[:, None, None, None]
  normals = [torch.distributions.Normal(torch.tensor(m), scale) for m in (mean, base)]
  expected = torch.distributions.kl_divergence(*normals).mean((1, 2, 3)).numpy()
  ours = ddim.gaussian_kl(jnp.array(mean), jnp.array(base), sigma)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("measure", [ddim.log_prob, ddim.gaussian_kl])
def test_deterministic_step_has_value_zero_and_gradient_zero(measure):
  x, mean = jnp.array(one_sample(seed=1)), jnp.array(one_sample(seed=2))
  sigma = jnp.array([0.0, 0.5, 0.0])
  if measure is ddim.log_prob:
    value = lambda mean, sigma: measure(x, mean, sigma)
  else:
    value = lambda mean, sigma: measure(mean, x, sigma)
  values, back = jax.vjp(value, mean, sigma)
  to_mean, to_sigma = back(jnp.ones(3))
  for array in (values, to_mean, to_sigma):
    assert np.isfinite(array).all()
    assert not np.any(array[0]) and np.any(array[1]) and not np.any(array[2])


def network(latents, timestep):
  """A function of latents and timestep in place of a network."""
  return jnp.tanh(jnp.roll(latents, 1, axis=1) * 0.7 + timestep / 1000)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_rollout_equals_a_loop_over_diffusers_steps(torch, eta):
  from diffusers import DDIMScheduler

  schedule, theirs = Schedule.from_config(SD), DDIMScheduler.from_config(SD)
  steps = ddim.ddim_steps(schedule, 10, eta)
  key, latents = jax.random.key(3), jnp.array(one_sample(seed=4))
  weight = jnp.array(one_sample((3, 4, 5, 1), seed=5) > 0)
  run = jax.jit(lambda *args: ddim.rollout(network, schedule, steps, *args))
  trajectory = run(latents, key, weight)
  assert trajectory.latents.shape == (11, 3, 4, 5, 2) and trajectory.log_probs.shape == (10, 3)
  np.testing.assert_array_equal(trajectory.timesteps, steps.timestep)
  np.testing.assert_array_equal(trajectory.latents[0], latents)

  theirs.set_timesteps(10)
  x = torch.tensor(np.asarray(latents))
  for i, t in enumerate(theirs.timesteps.tolist()):
    noise = jax.random.normal(jax.random.fold_in(key, i), latents.shape)
    output = torch.tensor(np.asarray(network(jnp.array(x.numpy()), t)))
    noise = torch.tensor(np.asarray(noise))
    x = theirs.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
    np.testing.assert_allclose(trajectory.latents[i + 1], x.numpy(), rtol=1e-3, atol=1e-3)
    if eta:
      # x_t' − μ is σ times the noise, so the log-density follows from the noise alone.
      density = scipy.stats.norm.logpdf(noise) - np.log(steps.sigma[i])
      inside = [density[b][np.asarray(weight)[b, ..., 0]].mean() for b in range(3)]
      np.testing.assert_allclose(trajectory.log_probs[i], inside, rtol=1e-3, atol=1e-3)
    else:
      assert not np.any(trajectory.log_probs[i])


def test_sample_equals_the_last_state_of_rollout():
  schedule = Schedule.from_config(SD)
  steps = ddim.ddim_steps(schedule, 5, 1.0)
  key, latents = jax.random.key(3), jnp.array(one_sample(seed=4))
  trajectory = ddim.rollout(network, schedule, steps, latents, key)
  end = ddim.sample(network, schedule, steps, latents, key)
  np.testing.assert_allclose(end, trajectory.latents[-1], rtol=1e-6, atol=1e-6)


def test_scoring_a_rollout_gives_an_importance_ratio_of_one():
  schedule = Schedule.from_config(SD)
  steps = ddim.ddim_steps(schedule, 5, 1.0)
  trajectory = ddim.rollout(
    network, schedule, steps, jnp.array(one_sample(seed=4)), jax.random.key(3)
  )
  for i in range(5):
    at, x = steps.at(i), trajectory.latents[i]
    _, score = ddim.step(schedule, at, x, network(x, at.timestep), x_prev=trajectory.latents[i + 1])
    np.testing.assert_allclose(np.exp(score - trajectory.log_probs[i]), 1, atol=5e-6)


def test_results_are_float32_for_a_bfloat16_network():
  schedule = Schedule.from_config(SD)
  steps = ddim.ddim_steps(schedule, 2, 1.0)
  half = lambda latents, t: network(latents, t).astype(jnp.bfloat16)
  latents = jnp.array(one_sample()).astype(jnp.bfloat16)
  trajectory = ddim.rollout(half, schedule, steps, latents, jax.random.key(0))
  assert trajectory.latents.dtype == trajectory.log_probs.dtype == jnp.float32


def test_forward_process_and_targets_equal_diffusers(pair, torch):
  schedule, theirs = pair
  x0, noise = one_sample(seed=1), one_sample(seed=2)
  t = np.array([0, 31, 59])
  arguments = torch.tensor(x0), torch.tensor(noise), torch.tensor(t)
  noisy = ddim.add_noise(schedule, jnp.array(x0), jnp.array(noise), jnp.array(t))
  np.testing.assert_allclose(noisy, theirs.add_noise(*arguments).numpy(), rtol=1e-5, atol=1e-6)
  expected = {
    "epsilon": noise,
    "sample": x0,
    "v_prediction": theirs.get_velocity(*arguments).numpy(),
  }[schedule.prediction_type]
  target = ddim.training_target(schedule, jnp.array(x0), jnp.array(noise), jnp.array(t))
  np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_network_output_equal_to_its_target_gives_the_original(prediction_type):
  schedule = Schedule.from_config(SD | {"prediction_type": prediction_type})
  at = ddim.ddim_steps(schedule, 50, 1.0).at(jnp.array([0, 25, 49]))
  x0, noise = jnp.array(one_sample(seed=1)), jnp.array(one_sample(seed=2))
  noisy = ddim.add_noise(schedule, x0, noise, at.timestep)
  target = ddim.training_target(schedule, x0, noise, at.timestep)
  np.testing.assert_allclose(
    ddim.original_sample(schedule, at, noisy, target), x0, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_json_and_diffusers(name, tmp_path, torch):
  from diffusers import DDIMScheduler

  schedule = Schedule.from_config(CONFIGS[name])
  path = tmp_path / "scheduler_config.json"
  path.write_text(json.dumps(schedule.to_config()))
  assert Schedule.from_config(json.loads(path.read_text())) == schedule
  theirs = DDIMScheduler.from_pretrained(tmp_path)
  assert_same_alphas(schedule, theirs)
  assert Schedule.from_config(theirs.config) == schedule
  assert hash(Schedule.from_config(theirs.config)) == hash(schedule)


@pytest.mark.parametrize(
  "class_name",
  [
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
  ],
)
def test_configs_of_other_samplers_give_the_same_noise_schedule(class_name, torch):
  import diffusers

  betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
  theirs = getattr(diffusers, class_name)(**betas, prediction_type="v_prediction")
  schedule = Schedule.from_config(json.loads(theirs.to_json_string()))
  np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6)
  assert schedule.prediction_type == "v_prediction"
  assert schedule.set_alpha_to_one == (class_name != "PNDMScheduler")
  assert schedule.clip_sample == (class_name == "DDPMScheduler")


def test_missing_fields_get_the_defaults_of_the_class_that_wrote_the_file():
  assert Schedule.from_config({}) == Schedule()
  assert Schedule().clip_sample and Schedule().set_alpha_to_one and Schedule().steps_offset == 0
  pndm = Schedule.from_config({"_class_name": "FlaxPNDMScheduler", "trained_betas": None})
  assert not pndm.clip_sample and not pndm.set_alpha_to_one
  assert pndm.timestep_spacing == "leading"


@pytest.mark.parametrize(
  "field, value",
  [
    ("thresholding", True),
    ("beta_schedule", "sigmoid"),
    ("prediction_type", "flow_prediction"),
    ("timestep_spacing", "log"),
    ("variance_type", "learned_range"),
    ("use_flow_sigmas", True),
    ("beta_end", 1.5),
    ("num_train_timesteps", 0),
    ("steps_offset", -1),
    ("trained_betas", [0.1, 0.2]),
  ],
)
def test_unsupported_field_raises_an_error_that_names_it(field, value):
  with pytest.raises(ValueError, match=field):
    Schedule.from_config(SD | {field: value})


def test_scheduler_without_betas_raises_an_error_that_names_it():
  with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
    Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


def test_impossible_chains_raise_errors():
  schedule = Schedule.from_config(SD)
  for num_steps in (0, 1001):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}"):
      ddim.timesteps(schedule, num_steps)
  with pytest.raises(ValueError, match="timestep 1000"):
    ddim.ddim_steps(schedule, 1000, 1.0)
  with pytest.raises(ValueError, match="eta"):
    ddim.ddim_steps(schedule, 10, 1.5)
  zero = Schedule.from_config(SD | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
  with pytest.raises(ValueError, match="pure noise"):
    ddim.ddim_steps(zero, 10, 1.0)
