"""The stages of a benchmark, computed by prefpaint_jax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import worlds
from flax.traverse_util import flatten_dict, unflatten_dict
from worlds import World

from prefpaint_jax.align.optimizer import optimizer_from
from prefpaint_jax.align.rollout import encode_prompts
from prefpaint_jax.align.settings import settings_from
from prefpaint_jax.align.stages import compile_iteration, make_stages
from prefpaint_jax.align.state import Experience, Frozen, Sampler
from prefpaint_jax.diffusion import ddim
from prefpaint_jax.inpainter import Inpainter
from prefpaint_jax.models.conditioning import Context
from prefpaint_jax.reward import RewardModel
from prefpaint_jax.rewards.objective import Objective
from prefpaint_jax.rewards.prefpaint import as_reward
from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.compilation import fast_jit
from prefpaint_jax.weights import names

Outputs = dict[str, jax.Array]


class Ours:
  """Computes the stages on one device. A program is compiled when it first runs.

  `work(stage)` waits for the outputs of the stage; `read` copies them to the host.
  """

  checks = True  # ignored: the keys, and so the noise, are always the same

  def __init__(self, world: World):
    config = world.config
    self.world, self.settings = world, settings_from(config)
    self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
    policy = Inpainter.from_pretrained(config.policy, config.dtype, config.remat)
    reward_model = RewardModel.from_pretrained(config.reward, dtype=config.dtype)
    objective = Objective((as_reward("", reward_model.network, reward_model.params),))
    modules = policy.modules
    optimizer = optimizer_from(config)
    place = functools.partial(sharding.place, sharding.replicated(self.mesh))
    begin = place(policy.params["unet"])
    self.frozen = place(
      Frozen(
        vae=policy.params["vae"],
        reward=objective.params,
        whitening=reward_model.bound.whitening.astype(np.float32),
        context=Context(world.context),
        base=None,
      )
    )
    steps = ddim.ddim_steps(modules.schedule, config.num_steps, config.eta)
    sampler = Sampler(modules, self.settings, steps)
    self.stages = make_stages(sampler, objective, optimizer, self.mesh, begin)
    self.before = small_params(policy.params["unet"])
    self.state = self.stages.init(begin)
    self.latents, self.cotangent = place((world.latents, world.cotangent))
    self.samples = place(world.samples)

    def weighted_sum(params, prompts, latents, cotangent):
      return jnp.sum(modules.predict(params, prompts, latents, worlds.TIMESTEP) * cotangent)

    jit = fast_jit(self.mesh)
    self.is_compiled = False
    self._encode = jit(functools.partial(encode_prompts, modules, self.settings))
    self._decode = jit(modules.decode)
    self._predict = jit(modules.predict)
    self._gradient = jit(jax.grad(weighted_sum))

  def work(self, stage: str) -> Outputs:
    return jax.block_until_ready(getattr(self, stage)())

  @staticmethod
  def read(outputs: Outputs) -> dict[str, np.ndarray]:
    as_vector = lambda x: small_params(x) if isinstance(x, dict) else np.asarray(x, np.float32)
    return {name: as_vector(value) for name, value in outputs.items()}

  def prepare(self, stage: str) -> None:
    """Computes the inputs that the stage takes from earlier stages."""
    if stage in ("unet_forward", "unet_gradient", "score", "update"):
      self.prompts = self._encode(self.frozen, *self._images())
    if stage == "update":
      _, self.trajectory, samples = self._rollout()
      self.scores, _ = self.stages.score(self.frozen, self.prompts, samples, None, None)
    jax.block_until_ready(self.frozen)

  def _images(self) -> tuple[jax.Array, jax.Array]:
    return sharding.to_global(self.mesh, (self.world.images, self.world.masks))

  def _rollout(self):
    key = worlds.rollout_key()
    return self.stages.rollout(self.state.params, self.frozen, *self._images(), key, None, None)

  def _update(self, prompts, trajectory, scores) -> None:
    for indices in self.stages.draw_timesteps(worlds.timestep_key()):
      self.state, _ = self.stages.update(
        self.state, self.frozen, Experience(prompts, trajectory, scores), indices
      )
    self.state = self.stages.end_iteration(self.state)

  def unet_forward(self) -> Outputs:
    arguments = self.prompts, self.latents, jnp.int32(worlds.TIMESTEP)
    return {"output": self._predict(self.state.params, *arguments)}

  def unet_gradient(self) -> Outputs:
    arguments = self.prompts, self.latents, self.cotangent
    return {"gradient": self._gradient(self.state.params, *arguments)}

  def encode(self) -> Outputs:
    return {"latents": self._encode(self.frozen, *self._images()).masked_latents}

  def decode(self) -> Outputs:
    return {"images": self._decode(self.frozen.vae, self.latents)}

  def rollout(self) -> Outputs:
    _, trajectory, samples = self._rollout()
    return {"images": samples, "log_probs": trajectory.log_probs}

  def score(self) -> Outputs:
    scores, _ = self.stages.score(self.frozen, self.prompts, self.samples, None, None)
    return {"reward": scores.reward, "trust": scores.trust, "advantages": scores.advantages}

  def update(self) -> Outputs:
    self._update(self.prompts, self.trajectory, self.scores)
    return {"params": self.state.params}

  def iteration(self) -> Outputs:
    if not self.is_compiled:
      compile_iteration(self.stages, self.state, self.frozen, *self._images())
      self.is_compiled = True
    prompts, trajectory, samples = self._rollout()
    scores, _ = self.stages.score(self.frozen, prompts, samples, None, None)
    self._update(prompts, trajectory, scores)
    return {"images": samples, "reward": scores.reward, "params": self.state.params}


def small_params(params) -> np.ndarray:
  """Joins the small parameters to one vector, in the order of their PyTorch names."""
  small = {path: x for path, x in flatten_dict(params).items() if x.size <= worlds.SMALL}
  return worlds.join_small(names.to_torch(unflatten_dict(small)))
