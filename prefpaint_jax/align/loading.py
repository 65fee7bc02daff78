"""Loads the rewards of a run and places its networks on the mesh."""

from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prefpaint_jax.align.run import Run, make_run
from prefpaint_jax.align.settings import measures_novelty, settings_from
from prefpaint_jax.align.state import Frozen
from prefpaint_jax.align.texts import Texts
from prefpaint_jax.data.captions import check_guidance
from prefpaint_jax.preference.bound import check_condition
from prefpaint_jax.rewards.objective import open_judges, open_objective, warn_without_texts


def load_run(config: ConfigDict, mesh: Mesh, policy: Any, has_texts: bool = False) -> Run:
  """Loads the rewards and the judges of a config, and makes the run of a policy.

  Args:
    policy: the `Inpainter` to align; it loses the UNet's parameters.
    has_texts: prompts have texts.
  """
  trust = settings_from(config).trust
  objective = open_objective(config.reward, config.combine, config.dtype, config.bound or None)
  bound = objective.trusted and objective.trusted.bound
  if trust.needs_bound and bound is None:
    raise ValueError(
      f"trust.norm={trust.norm!r} needs a bound, {config.reward} has none: give "
      "--config.bound=FILE for a learned reward, or --config.trust.norm=novelty or none"
    )
  guidance = policy.guidance(config.guidance_scale, None if has_texts else [""])
  check_guidance(config.guidance_scale, guidance is not None, config.prompts)
  if trust.norm == "novelty" and objective.trusted is None:
    raise ValueError(
      f"trust.norm='novelty' needs a reward with features, {config.reward} has none: give another "
      "reward, or --config.trust.norm=none"
    )
  if trust.needs_bound:
    check_condition(bound.whitening, trust.norm)
  whitening = None if bound is None else bound.whitening.astype(np.float32)
  if measures_novelty(trust, objective):
    whitening = np.eye(objective.trusted.feature_dim, dtype=np.float32)  # see align.novelty
  frozen = Frozen(
    vae=policy.params["vae"],
    reward=objective.params,
    whitening=whitening,
    context=policy.empty_context,
    base=None,
    negative=guidance and guidance.negative,
  )
  base = policy.params.pop("unet")
  judges = open_judges(config.judges, config.dtype)
  warn_without_texts((*objective.rewards, *judges.rewards), has_texts, config.prompts)
  run = make_run(
    config, mesh, policy.modules, objective, base, frozen, has_texts=has_texts, judges=judges
  )
  if not has_texts:
    return run
  most = max(config.batch_size, config.num_samples)
  modules, encoders = policy.modules, policy.text_params
  return run._replace(
    texts=Texts(modules, encoders, policy.tokenize, policy.empty_context, mesh, most)
  )
