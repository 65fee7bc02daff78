"""Held-out evaluation during a run: base and policy sample the same prompts from the same seeds."""
# Shapes: N prompts of a chunk, S samples of each, H W pixels.

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from prefpaint_jax.align.referee import JUDGE, SAME_PROMPT, Referee, is_score
from prefpaint_jax.align.run import Run
from prefpaint_jax.align.score import feature_norm, reward_inputs, reward_scores
from prefpaint_jax.align.settings import measures_novelty
from prefpaint_jax.data.examples import Prompt, concatenate, stack
from prefpaint_jax.data.grids import image_grid
from prefpaint_jax.evaluation import drift, winrate
from prefpaint_jax.models.conditioning import Context
from prefpaint_jax.preference import simulation
from prefpaint_jax.runtime import sharding
from prefpaint_jax.weights.names import Params

# Suffixes of the metrics of a score, and their statistics (see `winrate`).
STATISTICS = {
  "": "reward/mean",
  "_winrate": "winrate/s1",
  "_gain": "gain",
  "_gain_in_sd": "gain_in_sd",
}
SAMPLES = 2  # S; WinRate compares the samples of different seeds


class HeldOut:
  """Samples held-out prompts in chunks of N with a policy and with the base, and scores both.

  The base's results are kept. In a run of several processes all of them call every method, in the
  same order.
  """

  def __init__(
    self,
    run: Run,
    mesh: Mesh,
    prompts: Sequence[Prompt],
    chunk: int,
    sample_key: jax.Array,
    comparison_key: jax.Array,
    simulated_preference: bool = False,
    referee: Referee | None = None,
  ):
    """Prepares the evaluation.

    Args:
      prompts: held-out prompts; a grid of more than there are repeats them.
      chunk: N, prompts that are sampled at a time.
      sample_key: noise of the samples that are shown.
      comparison_key: noise of the samples that are compared.
      simulated_preference: also score with the simulated annotators' preference.
      referee: judges the metrics; None: no referee.
    """
    self.referee = referee
    self._run, self._mesh, self._prompts, self._chunk = run, mesh, prompts, chunk
    self._sample_key, self._comparison_key = sample_key, comparison_key
    self._simulated = simulated_preference
    self._base_scores = functools.cache(lambda chunk: self._scores(run.begin, chunk))

  @functools.cached_property
  def _shown(self) -> dict[str, np.ndarray]:
    return self._batch(0)

  @functools.cached_property
  def _base_sample(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return self._inpaint(self._run.begin, self._shown, self._sample_key)

  def _batch(self, chunk: int) -> dict[str, np.ndarray]:
    first, number = chunk * self._chunk, len(self._prompts)
    return stack([self._prompts[(first + i) % number] for i in range(self._chunk)])

  def _inpaint(
    self, params: Params, batch, key: jax.Array
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns samples [N, H, W, 3] and their scores [N] of a batch, on every process."""
    frozen = self._run.frozen
    images, masks, context, local = self._placed(batch)
    samples = self._run.stages.inpaint(params, frozen, images, masks, key, context)
    scores = self._scored(frozen.reward, self._run.judge_params, samples, images, masks, local)
    return multihost_utils.process_allgather((samples, scores), tiled=True)

  def _placed(self, batch) -> tuple[jax.Array, jax.Array, Context | None, dict[str, np.ndarray]]:
    """Returns images, masks and context of a batch on the mesh, and this process's share of it."""
    layout, texts = sharding.batch_sharding(self._mesh), self._run.texts
    images, masks = sharding.place(layout, (batch["image"], batch["mask"]))
    own = sharding.local_rows(self._mesh, len(masks))
    local = {name: values[own] for name, values in batch.items()}
    return images, masks, texts and texts([str(text) for text in local["text"]]), local

  def _kl_to_base(self, params: Params, chunk: int) -> np.ndarray:
    """Returns the KL divergence [N] from the base policy of the first samples of a chunk."""
    key = jax.random.fold_in(jax.random.fold_in(self._comparison_key, chunk), 0)
    images, masks, context, _ = self._placed(self._batch(chunk))
    run = self._run
    found = run.stages.kl_to_base(params, run.begin, run.frozen, images, masks, key, context)
    return multihost_utils.process_allgather(found, tiled=True)

  def _scored(self, params, judge_params, samples, images, masks, local) -> dict[str, jax.Array]:
    """Returns the weighted reward, the judges' scores, and the features with their norm."""
    objective, judges = self._run.objective, self._run.judges
    arrays = samples, images * (1.0 - masks), masks
    read = reward_inputs(objective, self._mesh, local, samples)
    scores, features = self._programs[0](params, *arrays, *read)
    found = {"reward": objective.weighted(scores)}
    if self._run.frozen.whitening is not None:
      norm = self._programs[2](self._run.frozen.whitening, features)
      is_novelty = measures_novelty(self._run.settings.trust, objective)
      found |= {"features": features, "novelty" if is_novelty else "feature_norm": norm}
    if judges.rewards:
      read = reward_inputs(judges, self._mesh, local, samples)
      scores, _ = self._programs[1](judge_params, *arrays, *read)
      names = (f"{JUDGE}{judge.name}" for judge in judges.rewards)
      found |= zip(names, scores, strict=True)
    return found

  @functools.cached_property
  def _programs(self) -> tuple[Callable[..., Any], ...]:
    """`reward_scores` of objective and judges, and `feature_norm`; compiled when first called."""
    run, mesh = self._run, self._mesh
    chunk = run.settings.decode_batch
    scored = (
      jax.jit(functools.partial(reward_scores, one, chunk, mesh=mesh))
      for one in (run.objective, run.judges)
    )
    return *scored, jax.jit(functools.partial(feature_norm, run.settings.trust))

  def features(self, params: Params, count: int) -> np.ndarray:
    """Returns the features [count or more, D] of one sample of each of the first prompts."""
    keys = (jax.random.fold_in(self._comparison_key, i) for i in range(-(-count // self._chunk)))
    drawn = (self._inpaint(params, self._batch(i), key)[1] for i, key in enumerate(keys))
    return np.concatenate([scores["features"] for scores in drawn])

  def _scores(self, params: Params, chunk: int) -> dict[str, np.ndarray]:
    """Returns scores and drift measures [N, S] of a chunk."""
    batch, key = self._batch(chunk), jax.random.fold_in(self._comparison_key, chunk)
    found, drawn = [], []
    for s in range(SAMPLES):
      samples, scores = self._inpaint(params, batch, jax.random.fold_in(key, s))
      drawn.append(samples)
      scores.pop("features", None)
      if self._simulated:
        texts = [str(text) for text in batch["text"]]
        truth = simulation.true_preference(samples, batch["mask"], texts)
        scores["true_preference"] = truth["combined"]
      found.append(scores | drift.measure(samples, batch["mask"], batch["image"]))
    results = {name: np.stack([one[name] for one in found], axis=1) for name in found[0]}
    hole, between = batch["mask"], np.abs(drawn[0] - drawn[1]).mean(-1, keepdims=True)
    apart = (hole * between).sum((1, 2, 3)) / hole.sum((1, 2, 3))
    return results | {SAME_PROMPT: np.repeat(apart[:, None], SAMPLES, axis=1)}

  def sample(self, params: Params, iteration: int) -> np.ndarray:
    """Draws a grid, uint8: the first prompts, samples of the base policy and of `params`."""
    samples, scores = self._inpaint(params, self._shown, self._sample_key)
    base_samples, base_scores = self._base_sample
    rewards, base_rewards = scores["reward"], base_scores["reward"]
    # Grey tells the hole from black pixels.
    prompts = np.where(self._shown["mask"] > 0, 0.5, self._shown["image"])
    none = np.zeros(len(prompts), bool)
    return image_grid(
      np.concatenate([prompts, base_samples, samples]),
      columns=len(prompts),
      scale=max(1, 128 // prompts.shape[1]),
      padding=4,
      labels=[""] * len(prompts) + [f"{r:.2f}" for r in (*base_rewards, *rewards)],
      marked=np.concatenate([none, base_rewards > rewards, rewards > base_rewards]),
      rows=("incomplete", "base policy", f"policy after iteration {iteration}"),
      caption="Numbers are rewards; the higher one of each pair is framed.",
    )

  def compare(
    self, params: Params, count: int, gives_up: Callable[[], object] = bool
  ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
    """Returns scores and measures [count, S] of the policy `params` and of the base.

    Args:
      count: prompts, a multiple of N.
      gives_up: asked before each chunk; if it says true, the result is None.
    """
    policy, base = [], []
    for chunk in range(count // self._chunk):
      if gives_up():
        return None
      policy.append(self._scores(params, chunk))
      base.append(self._base_scores(chunk))
    return concatenate(policy), concatenate(base)

  def metrics(self, params: Params, count: int, iteration: int) -> dict[str, float]:
    """Returns `held_out/*`: scores, WinRates and gains against the base, changes of measures.

    NAME/low and NAME/high are the ends of the 95 % interval of a score, a WinRate or a gain, and
    SCORE/base is the base policy's score. The base policy has WinRate ½, gain 0 and change 0. With
    judges, `held_out/kl_to_base` is the KL divergence of the chain, in nats (`rollout.kl_to_base`).
    """
    policy, base = self.compare(params, count)
    line = {}
    for name, values in policy.items():
      if is_score(name):
        group = winrate.estimate(winrate.Scores(values, base[name]))
        missing = dict.fromkeys(("value", "low", "high"), np.nan)
        for suffix, statistic in STATISTICS.items():
          found = group.get(statistic, missing)
          line[f"held_out/{name}{suffix}"] = found["value"]
          line |= {f"held_out/{name}{suffix}/{end}": found[end] for end in ("low", "high")}
        base_score = group.get("baseline/reward/mean", missing)
        line[f"held_out/{name}/base"] = base_score["value"]
      else:
        line[f"held_out/drift/{name}"] = float(np.mean(values) - np.mean(base[name]))
    if self._run.judges.rewards and self._run.settings.eta > 0:  # else it is 0 for every policy
      divergences = [self._kl_to_base(params, chunk) for chunk in range(count // self._chunk)]
      line["held_out/kl_to_base"] = float(np.mean(divergences))
    if self.referee is not None:
      verdict, warnings = self.referee.look(iteration, line, policy, base)
      line |= verdict
      for warning in warnings if jax.process_index() == 0 else ():  # it has all earlier lines
        logging.warning("%s", warning)
    return line
