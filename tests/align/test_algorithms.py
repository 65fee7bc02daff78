"""The losses of the algorithms: the published formulas in torch, closed forms, and their scales."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alignment_world import (
  TOY,
  TOY_FROZEN,
  B,
  ToyModules,
  made_up_scores,
  make_settings,
  sampler_of,
  steps_of,
  toy_prompts,
  toy_rollout,
)

from prefpaint_jax.align import nft, update
from prefpaint_jax.align.settings import Nft
from prefpaint_jax.align.state import Endpoint, Experience, TrainState
from prefpaint_jax.diffusion import ddim

MOVED = TOY | {"a": TOY["a"] + np.float32(0.03), "b": TOY["b"] - np.float32(0.05)}
OLD = TOY | {"a": TOY["a"] + np.float32(0.01)}
INDICES = np.array([0, 2])
PREDICTIONS = "epsilon", "v_prediction"
AWM = {"clip_range": 0.02, "behaviour_refresh": 2}  # an old policy that differs from the policy


def modules_of(prediction: str = "epsilon"):
  modules = ToyModules()
  modules.schedule = dataclasses.replace(ToyModules.schedule, prediction_type=prediction)
  return modules


def prompts_with_holes(hole: np.ndarray | None = None):
  """Returns toy prompts whose holes have different areas."""
  if hole is None:
    hole = (np.arange(4).reshape(1, 2, 2, 1) <= np.arange(B).reshape(B, 1, 1, 1) % 4).astype("f4")
  return toy_prompts()._replace(mask_latents=np.broadcast_to(hole, (B, 2, 2, 1)))


def endpoint() -> Endpoint:
  latents = np.random.default_rng(1).normal(size=(B, 2, 2, 4)).astype(np.float32)
  return Endpoint(jnp.asarray(latents), jax.random.key(7))


def evaluate(settings, record, params=MOVED, prompts=None, scores=None, prediction="epsilon"):
  """Returns ((loss, metrics), gradient, batch) of an update."""
  sampler = sampler_of(modules_of(prediction), settings)
  prompts = prompts_with_holes() if prompts is None else prompts
  scores = made_up_scores() if scores is None else scores

  def loss(params):
    batch = update.batch_of(sampler, Experience(prompts, record, scores), jnp.asarray(INDICES))
    count = jnp.maximum(scores.valid.sum(), 1) * len(INDICES)
    value, metrics = update.policy_loss(sampler, params, TOY_FROZEN.base, batch, count, OLD)
    return value, (metrics, batch)

  (value, (metrics, batch)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
  return value, metrics, gradient, batch


class Torch:
  """The parts of a loss in torch, written from the papers: one step of B samples at a time."""

  def __init__(self, settings, batch, prompts, prediction):
    import torch

    self.torch, self.settings, self.prediction = torch, settings, prediction
    self.tensor = lambda x: torch.tensor(np.asarray(x), dtype=torch.float64)
    self.batch, self.prompts = batch, prompts
    make = lambda tree: {k: self.tensor(v).requires_grad_() for k, v in tree.items()}
    self.params, self.old, self.base = make(MOVED), make(OLD), make(TOY)
    hole = self.tensor(prompts.mask_latents).expand(-1, -1, -1, 4)
    self.weight = hole if settings.log_prob_region == "hole" else torch.ones_like(hole)
    self.scores = made_up_scores()

  def mean(self, x):
    return (x * self.weight).sum((1, 2, 3)) / self.weight.sum((1, 2, 3))

  def output(self, params, latents, t):
    sine = math.sin(t / 100.0)
    return (
      params["a"] * latents
      + params["b"] * self.tensor(self.prompts.masked_latents)
      + params["c"] * sine
    )

  def total(self, loss_of_step):
    """Returns the mean of `loss_of_step(number, t, ᾱ)` [B] over steps, times trust, plus KL."""
    steps, losses = steps_of(self.settings), []
    for number, index in enumerate(INDICES):
      t, alpha = (
        int(steps.timestep[index]),
        float(ToyModules.schedule.alphas_cumprod[steps.timestep[index]]),
      )
      losses.append(loss_of_step(number, index, t, alpha))
    return self.torch.stack(losses).mean()

  def gradients(self, loss):
    loss.backward()
    return {name: value.grad.numpy() for name, value in self.params.items()}


def forward_loss(theirs: Torch, kind: str):
  """Returns the loss of NFT or AWM as a function of a step."""
  torch, settings = theirs.torch, theirs.settings
  advantages, trust = theirs.tensor(theirs.scores.advantages), theirs.tensor(theirs.scores.trust)
  x0 = theirs.tensor(endpoint().latents)

  def of_step(number, index, t, alpha):
    noise = theirs.tensor(theirs.batch.examples.noise[number])
    signal, spread = math.sqrt(alpha), math.sqrt(1 - alpha)
    xt = signal * x0 + spread * noise
    new, old = theirs.output(theirs.params, xt, t), theirs.output(theirs.old, xt, t).detach()
    reference = theirs.output(theirs.base, xt, t).detach()
    kl = settings.kl_weight * theirs.mean((new - reference) ** 2)
    if kind == "awm":
      target = noise if theirs.prediction == "epsilon" else signal * noise - spread * x0
      log_ratio = theirs.mean((old - target) ** 2) - theirs.mean((new - target) ** 2)
      ratio = log_ratio.exp()
      inside = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
      return trust * torch.maximum(-advantages * ratio, -advantages * inside) + kl

    def clean(output):
      if theirs.prediction == "epsilon":
        return (xt - spread * output) / signal
      return signal * xt - spread * output

    beta, clip = settings.nft.beta, settings.advantage_clip
    r = (advantages.clamp(-clip, clip) / clip / 2 + 0.5).clamp(0, 1)
    terms = []
    for policy in (beta * new + (1 - beta) * old, (1 + beta) * old - beta * new):
      error = clean(policy) - x0
      size = theirs.mean(error.abs()).clamp(min=1e-5).detach()
      terms.append(theirs.mean(error**2) / size)
    loss = clip * (r * terms[0] / beta + (1 - r) * terms[1] / beta)
    # An ε-network's gradient gets the scale of a v-network's, which is the published one.
    return trust * (signal if theirs.prediction == "epsilon" else 1.0) * loss + kl

  return of_step


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
  ("kind", "changes"),
  [
    ("nft", {}),
    ("nft", {"nft": Nft(beta=0.1), "log_prob_region": "hole", "kl_weight": 0.3}),
    ("awm", AWM),
    ("awm", AWM | {"log_prob_region": "hole", "kl_weight": 0.3}),
  ],
)
def test_forward_losses_and_gradients_equal_the_published_formula_in_torch(
  kind, changes, prediction
):
  pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  settings = make_settings(algorithm=kind, advantage_clip=5.0, updates_per_iteration=1, **changes)
  prompts = prompts_with_holes()
  loss, metrics, gradient, batch = evaluate(settings, endpoint(), prediction=prediction)
  theirs = Torch(settings, batch, prompts, prediction)
  expected = theirs.total(forward_loss(theirs, kind))
  assert loss == pytest.approx(expected.item(), rel=1e-5)
  for name, value in theirs.gradients(expected).items():
    assert gradient[name] == pytest.approx(value, rel=1e-4), name
  if kind == "awm":
    assert 0 < metrics["awm/clip_fraction"] < 1


@pytest.mark.parametrize("region", ["all", "hole"])
def test_normalised_ratio_equals_the_published_formula_in_torch(region):
  """GRPO-Guard: ρ = exp(σ (log p − log p_old + mean(Δμ²) / 2σ²)), with the rollout's own means.

  The weight of a step is ours: 1 / |∂μ/∂output|, at most twice the median, of mean 1.
  """
  torch = pytest.importorskip("torch", reason="parity needs torch: pip install torch")
  settings = make_settings(
    ratio_normalisation=True, log_prob_region=region, clip_range=0.01, updates_per_iteration=1
  )
  prompts, seed = prompts_with_holes(), 3
  record = toy_rollout(settings, OLD, prompts, seed)._replace(key=jax.random.key(seed + 100))
  loss, metrics, gradient, batch = evaluate(settings, record, prompts=prompts)
  theirs = Torch(settings, batch, prompts, "epsilon")
  steps, tensor = steps_of(settings), theirs.tensor
  advantages, trust = tensor(theirs.scores.advantages), tensor(theirs.scores.trust)
  slopes = []
  for alpha, alpha_prev, sigma in zip(*map(np.float64, steps[1:]), strict=True):
    direction = math.sqrt(1 - alpha_prev - sigma**2)
    slopes.append(abs(direction - math.sqrt(alpha_prev * (1 - alpha) / alpha)))
  weights = np.minimum(1 / np.array(slopes), 2 * np.median(1 / np.array(slopes)))
  weights /= np.mean(weights)

  def of_step(number, index, t, alpha):
    alpha_prev, sigma = float(steps.alpha_prev[index]), float(steps.sigma[index])
    x, x_prev = tensor(record.latents[index]), tensor(record.latents[index + 1])

    def mean_of(params):
      output = theirs.output(params, x, t)
      original = (x - math.sqrt(1 - alpha) * output) / math.sqrt(alpha)
      return math.sqrt(alpha_prev) * original + math.sqrt(1 - alpha_prev - sigma**2) * output

    mean, old = mean_of(theirs.params), mean_of(theirs.old).detach()
    log_prob, old_log_prob = (theirs.mean(-((x_prev - m) ** 2) / 2 / sigma**2) for m in (mean, old))
    divergence = theirs.mean((mean - old) ** 2) / 2 / sigma**2
    ratio = ((log_prob - old_log_prob + divergence) * sigma).exp()
    inside = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
    return weights[index] * trust * torch.maximum(-advantages * ratio, -advantages * inside)

  expected = theirs.total(of_step)
  assert 0 < metrics["ppo/clip_fraction"] < 1
  assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
  for name, value in theirs.gradients(expected).items():
    assert gradient[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_awm_with_one_update_is_its_own_old_policy_and_takes_no_pass_of_another():
  """With the policy as the old policy both ways give one loss, and the ratio is 1."""
  settings = make_settings(algorithm="awm", updates_per_iteration=1)
  assert not settings.keeps_behaviour
  alone, metrics, gradient, _ = evaluate(settings, endpoint(), params=OLD)
  assert metrics["awm/ratio_mean"] == 1.0 and metrics["awm/clip_fraction"] == 0.0
  compared = dataclasses.replace(settings, behaviour_refresh=2)
  assert compared.passes_per_sample == settings.passes_per_sample + settings.train_timesteps
  twice, _, same_gradient, _ = evaluate(compared, endpoint(), params=OLD)
  assert alone == twice
  for name in gradient:
    assert gradient[name] == pytest.approx(float(same_gradient[name]), rel=1e-6), name


# ---------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_gradient_of_nft_at_the_old_policy_is_the_advantage_times_the_error(beta):
  rng = np.random.default_rng(0)
  old, x0 = (rng.normal(size=(3, 2, 2, 4)).astype(np.float32) for _ in range(2))
  advantages = np.array([-2.0, 0.0, 1.5], np.float32)
  total = lambda x: nft.nft_loss(x, old, x0, advantages, 5.0, beta).sum()
  gradient = jax.grad(total)(old)
  size = np.abs(old - x0).mean((1, 2, 3), keepdims=True)
  expected = 2 * advantages[:, None, None, None] * (old - x0) / size / old[0].size
  np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=1e-6)


def test_old_policy_moves_by_the_published_schedules():
  """`return_decay` of the released code: type 1 and type 2."""
  for start, rate, maximum, flat in ((0, 0.001, 0.5, 0), (75, 0.0075, 0.999, 75)):
    settings = Nft(decay_start=start, decay_rate=rate, decay_maximum=maximum)
    for step in (1, 50, 75, 76, 200, 499, 500, 501, 3000):
      expected = 0.0 if step < flat else min((step - flat) * rate, maximum)
      assert nft.old_policy_decay(settings, step) == pytest.approx(expected, rel=1e-6)


def test_old_policy_is_a_moving_average_and_that_of_awm_a_copy():
  def after(algorithm, done=9, **changes):
    settings = make_settings(algorithm=algorithm, updates_per_iteration=1, **changes)
    state = TrainState(jnp.int32(done), MOVED, (), OLD, None, None)
    return update.end_iteration(settings, state).behaviour

  moved = after("nft", nft=Nft(decay_rate=0.02))  # the tenth update: decay 0.2
  assert moved["a"] == pytest.approx(0.2 * float(OLD["a"]) + 0.8 * float(MOVED["a"]), rel=1e-6)
  # With accumulation over two iterations it moves with every second one, after five updates here.
  moved = after("nft", nft=Nft(decay_rate=0.02), gradient_accumulation=2)
  assert moved["a"] == pytest.approx(0.1 * float(OLD["a"]) + 0.9 * float(MOVED["a"]), rel=1e-6)
  assert after("nft", done=8, gradient_accumulation=2) == OLD
  assert after("awm") == MOVED


# ------------------------------------------------------------------------------ scales and masks
ALGORITHMS = {
  "ppo": {},
  "guard": {"ratio_normalisation": True},
  "nft": {"algorithm": "nft"},
  "awm": {"algorithm": "awm", "behaviour_refresh": 2},
}
of_all = pytest.mark.parametrize("changes", ALGORITHMS.values(), ids=ALGORITHMS)


def record_of(settings, prompts):
  if not settings.keeps_chain:
    return endpoint()
  # With the weights of the log-probabilities, as a rollout has them.
  predict = lambda latents, t: ToyModules.predict(OLD, prompts, latents, t)
  noise = jax.random.normal(jax.random.key(3), prompts.masked_latents.shape)
  key, steps = jax.random.key(103), steps_of(settings)
  weight = prompts.mask_latents if settings.log_prob_region == "hole" else None
  return ddim.rollout(predict, ToyModules.schedule, steps, noise, key, weight)._replace(key=key)


@of_all
def test_loss_is_proportional_to_the_trust_weight(changes):
  settings = make_settings(updates_per_iteration=1, **changes)
  record, scores = record_of(settings, prompts_with_holes()), made_up_scores()
  loss, _, gradient, _ = evaluate(settings, record, scores=scores)
  twice = scores._replace(trust=2 * scores.trust)
  double, _, double_gradient, _ = evaluate(settings, record, scores=twice)
  assert double == pytest.approx(2 * float(loss), rel=1e-5)
  for name in gradient:
    assert double_gradient[name] == pytest.approx(2 * float(gradient[name]), rel=1e-4), name


@of_all
def test_only_the_hole_counts_and_its_area_does_not_scale_the_loss(changes):
  """Latents that are equal in every cell: then a hole of any area gives the same loss."""
  settings = make_settings(updates_per_iteration=1, log_prob_region="hole", **changes)
  prompts = prompts_with_holes()
  alike = lambda x: np.broadcast_to(np.asarray(x)[:, :1, :1], np.shape(x))
  prompts = prompts._replace(masked_latents=alike(prompts.masked_latents))
  record = record_of(settings, prompts)
  if settings.keeps_chain:
    cells = lambda x: np.broadcast_to(np.asarray(x)[:, :, :1, :1], np.shape(x))
    record = record._replace(latents=jnp.asarray(cells(record.latents)))
  else:
    record = record._replace(latents=jnp.asarray(alike(record.latents)))
  sampler = sampler_of(modules_of(), settings)
  scores = made_up_scores()

  def loss(area):
    hole = (np.arange(4).reshape(1, 2, 2, 1) < area).astype(np.float32)
    own = prompts._replace(mask_latents=np.broadcast_to(hole, (B, 2, 2, 1)))
    batch = update.batch_of(sampler, Experience(own, record, scores), jnp.asarray(INDICES))
    if batch.examples.noise is not None:
      noise = np.asarray(batch.examples.noise)
      noise = jnp.asarray(np.broadcast_to(noise[:, :, :1, :1], noise.shape))
      examples = batch.examples._replace(noise=noise)
      if not settings.keeps_chain:
        steps = steps_of(settings).at(jnp.asarray(INDICES))
        x_t = [
          ddim.add_noise(ToyModules.schedule, record.latents, n, t)
          for n, t in zip(noise, steps.timestep, strict=True)
        ]
        examples = examples._replace(latents=jnp.stack(x_t))
      batch = batch._replace(examples=examples)
    count = jnp.int32(2 * B)
    total = lambda params: update.policy_loss(sampler, params, TOY, batch, count, OLD)[0]
    return jax.value_and_grad(total)(MOVED)

  whole, whole_gradient = loss(4)
  for area in (1, 2):
    part, gradient = loss(area)
    assert part == pytest.approx(float(whole), rel=1e-5)
    for name, value in whole_gradient.items():
      assert gradient[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


@of_all
def test_samples_that_are_not_valid_change_nothing_even_as_nan(changes):
  settings = make_settings(updates_per_iteration=1, **changes)
  prompts, valid = prompts_with_holes(), np.arange(B) != 2
  record, scores = record_of(settings, prompts), made_up_scores(valid)
  loss, _, gradient, _ = evaluate(settings, record, prompts=prompts, scores=scores)
  lost = ~valid[:, None, None, None]
  poisoned = record._replace(latents=jnp.where(lost, jnp.nan, record.latents))
  bad = scores._replace(advantages=np.where(valid, scores.advantages, np.nan))
  again, _, gradient_again, _ = evaluate(settings, poisoned, prompts=prompts, scores=bad)
  assert again == pytest.approx(float(loss), rel=1e-6)
  assert np.isfinite(list(gradient_again.values())).all()
  for name in gradient:
    assert gradient_again[name] == pytest.approx(float(gradient[name]), rel=1e-5), name


# ------------------------------------------------------------------------------------ settings
@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"eta": 0.0}, "eta is 0 with algorithm='ppo'; .* --config.algorithm=nft"),
    ({"algorithm": "nft", "window": 2}, "window is 2 with algorithm='nft'; only ppo has it"),
    (
      {"algorithm": "awm", "ratio_normalisation": True},
      "ratio_normalisation is True with algorithm",
    ),
    ({"window": 1, "train_timesteps": 2}, "window is 1; expected 0, or train_timesteps=2 to 4"),
    ({"window": 4, "skip_steps": (1, 0)}, "window is 4; expected 0, or train_timesteps=2 to 3"),
    ({"algorithm": "nft", "behaviour_refresh": 2}, "behaviour_refresh is 2 .* expected 1"),
    ({"algorithm": "nft", "behaviour_dtype": "bfloat16"}, "behaviour_dtype 'bfloat16' with"),
    ({"nft": Nft(beta=0.5)}, r"nft is Nft\(beta=0.5.* with algorithm='ppo'; only nft"),
  ],
)
def test_fields_of_another_algorithm_are_an_error_of_one_line(changes, expected):
  with pytest.raises(ValueError, match=rf"\A[^\n]*{expected}[^\n]*\Z"):
    make_settings(**{"train_timesteps": 2, "updates_per_iteration": 1} | changes)
