"""The trees of an alignment run: train state, frozen networks, experience; and how they combine."""
# Shapes: B samples, h w latents, D features.

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from prefpaint_jax.align.settings import Settings
from prefpaint_jax.diffusion.ddim import Steps, Trajectory
from prefpaint_jax.models import lora
from prefpaint_jax.models.conditioning import Context, Prompts
from prefpaint_jax.models.pipeline import Modules
from prefpaint_jax.runtime import sharding
from prefpaint_jax.weights.names import Params


class Sampler(NamedTuple):
  """The static part of a rollout and of its update: networks, settings and DDIM steps."""

  modules: Modules
  settings: Settings
  steps: Steps


class Frozen(NamedTuple):
  """Trees that never change. Every program takes them as arguments, never as constants."""

  vae: Params
  reward: tuple[Params, ...]  # of each reward of the objective
  whitening: Float[Array, "D D"] | None  # of the trusted reward's bound
  context: Context  # of the empty text
  base: Params | None  # the UNet before alignment, for the KL term and for LoRA
  negative: Context | None = None  # that guidance leads away from; None: no guidance


class TrainState(NamedTuple):
  """The trees that an iteration changes; a checkpoint holds all of them."""

  iteration: Int[Array, ""]
  params: Params  # the UNet's, or the LoRA adapters
  opt_state: optax.OptState
  behaviour: Params | None  # None: the policy itself, as it was when the iteration began
  ema: Params | None
  gradients: Params | None  # accumulated between updates


class Scores(NamedTuple):
  """Rewards, trust weights and advantages of a batch of samples."""

  reward: Float[Array, " B"]
  valid: Bool[Array, " B"]  # reward and features are finite, the reward is `usable`
  trust: Float[Array, " B"]  # γ
  advantages: Float[Array, " B"]


class Endpoint(NamedTuple):
  """The result of a rollout without its chain, for algorithms that noise it."""

  latents: Float[Array, "B h w c"]  # final
  key: Key[Array, ""]  # of the noise of the forward process


class Experience(NamedTuple):
  """A scored rollout: the training data of an iteration's updates."""

  prompts: Prompts
  record: Trajectory | Endpoint
  scores: Scores


class Examples(NamedTuple):
  """A training example for each sample and step: [k, B, ...] in an update, [n, ...] in a loss."""

  latents: Float[Array, "*n h w c"]  # x_t, the network's input
  target: Float[Array, "*n h w c"]  # x_t' of the transition, or x0
  noise: Float[Array, "*n h w c"] | None  # of the transition or of x_t; None where unused
  old_log_prob: Float[Array, "*n"] | None  # of the transition, under the behaviour policy


class Batch(NamedTuple):
  """The training data of one update, or of one pass of it."""

  prompts: Prompts
  indices: Int[Array, " k"]
  examples: Examples
  scores: Scores


def init_state(
  sampler: Sampler, optimizer: optax.GradientTransformation, params: Params
) -> TrainState:
  """Makes the state before the first iteration.

  Args:
    params: the parameters to train: the UNet's, or LoRA adapters.
  """
  settings = sampler.settings
  # A donated buffer may appear only once in a state, so every tree gets a copy.
  copy = lambda tree=params: jax.tree.map(jnp.array, tree)
  # Rounded as `gather` rounds, so that both policies compute with the same numbers.
  in_bfloat16 = settings.behaviour_dtype == "bfloat16"
  behaviour = sampler.modules.round_params(params) if in_bfloat16 else params
  return TrainState(
    iteration=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    behaviour=copy(behaviour) if settings.keeps_behaviour else None,
    ema=copy() if settings.ema_decay else None,
    gradients=jax.tree.map(jnp.zeros_like, params) if settings.gradient_accumulation > 1 else None,
  )


def behaviour_params(state: TrainState) -> Params:
  """Returns the parameters of the behaviour policy, which samples the rollout."""
  return state.params if state.behaviour is None else state.behaviour


def current_params(state: TrainState) -> Params:
  """Returns the parameters that `export` writes: the moving average where the run keeps one."""
  return state.params if state.ema is None else state.ema


def merged_params(settings: Settings, base: Params | None, params: Params) -> Params:
  """Returns the UNet's parameters: `params`, or the base with the LoRA adapters `params` added."""
  return lora.merge(base, params) if settings.lora else params


def gather(sampler: Sampler, params: Params, mesh: Mesh | None) -> Params:
  """Rounds parameters to the UNet's compute dtype and gathers all shards on every device.

  A program calls this once, not once per forward pass of the UNet. Norms and LoRA parameters are
  not rounded.
  """
  if not sampler.settings.lora:
    params = sampler.modules.round_params(params)
  if mesh is None or mesh.shape["fsdp"] == 1:
    return params
  # With this constraint XLA rounds before it gathers, which halves the bytes sent in bfloat16.
  split = sharding.specs(params, sharding.DEFAULT_RULES, mesh)
  params = jax.lax.with_sharding_constraint(params, split)
  return jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))


def log_prob_weight(settings: Settings, prompts: Prompts) -> Float[Array, "B h w 1"] | None:
  """Returns the weight of each latent in the log-probability, or None for equal weights.

  With `log_prob_region="hole"` a latent that the UNet is told is missing has weight 1, others 0.
  """
  return None if settings.log_prob_region == "all" else prompts.mask_latents
