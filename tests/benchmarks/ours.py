"""The stages of a benchmark as prefpaint_jax computes them."""

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
from prefpaint_jax.reward import RewardModel
from prefpaint_jax.runtime import sharding
from prefpaint_jax.runtime.compilation import fast_jit
from prefpaint_jax.weights import names

Outputs = dict[str, jax.Array]


class Ours:
  """`work(stage)` gives what the stage computes, ready; `read` makes host arrays of it.

  One device. Programs are compiled when they first run.
  """

  checks = True  # the noise is that of the same keys every time

  def __init__(self, world: World):
    config = world.config
    self.world, self.settings = world, settings_from(config)
    self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
    policy = Inpainter.from_pretrained(config.policy, config.dtype, config.remat)
    judge = RewardModel.from_pretrained(config.reward, dtype=config.dtype)
    modules = policy.modules
    optimizer = optimizer_from(config)
    place = functools.partial(sharding.place, sharding.replicated(self.mesh))
    begin = place(policy.params["unet"])
    self.frozen = place(
      Frozen(
        vae=policy.params["vae"],
        reward=judge.params,
        whitening=judge.bound.whitening.astype(np.float32),
        context=world.context,
        base=None,
      )
    )
    steps = ddim.ddim_steps(modules.schedule, config.num_steps, config.eta)
    self.stages = make_stages(
      Sampler(modules, self.settings, steps), judge.network, optimizer, self.mesh, begin
    )
    self.before = small_params(policy.params["unet"])
    self.state = self.stages.init(begin)
    self.latents, self.cotangent = place((world.latents, world.cotangent))
    self.painted = place(world.painted)

    def weighed(params, prompts, latents, cotangent):
      return jnp.sum(modules.predict(params, prompts, latents, worlds.TIMESTEP) * cotangent)

    jit = fast_jit(self.mesh)
    self.is_compiled = False
    self._encode = jit(functools.partial(encode_prompts, modules, self.settings))
    self._decode = jit(modules.decode)
    self._predict = jit(modules.predict)
    self._gradient = jit(jax.grad(weighed))

  def work(self, stage: str) -> Outputs:
    return jax.block_until_ready(getattr(self, stage)())

  @staticmethod
  def read(outputs: Outputs) -> dict[str, np.ndarray]:
    as_vector = lambda x: small_params(x) if isinstance(x, dict) else np.asarray(x, np.float32)
    return {name: as_vector(value) for name, value in outputs.items()}

  def prepare(self, stage: str) -> None:
    """Makes what the stage takes from stages before it."""
    if stage in ("unet_forward", "unet_gradient", "score", "update"):
      self.prompts = self._encode(self.frozen, *self._images())
    if stage == "update":
      _, self.trajectory, painted = self._rollout()
      self.scores, _ = self.stages.score(self.frozen, self.prompts, painted)
    jax.block_until_ready(self.frozen)

  def _images(self) -> tuple[jax.Array, jax.Array]:
    return sharding.to_global(self.mesh, (self.world.images, self.world.masks))

  def _rollout(self):
    key = worlds.rollout_key()
    return self.stages.rollout(self.state.params, self.frozen, *self._images(), key)

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
    _, trajectory, painted = self._rollout()
    return {"images": painted, "log_probs": trajectory.log_probs}

  def score(self) -> Outputs:
    scores, _ = self.stages.score(self.frozen, self.prompts, self.painted)
    return {"reward": scores.reward, "trust": scores.trust, "advantages": scores.advantages}

  def update(self) -> Outputs:
    self._update(self.prompts, self.trajectory, self.scores)
    return {"params": self.state.params}

  def iteration(self) -> Outputs:
    if not self.is_compiled:
      compile_iteration(self.stages, self.state, self.frozen, *self._images())
      self.is_compiled = True
    prompts, trajectory, painted = self._rollout()
    scores, _ = self.stages.score(self.frozen, prompts, painted)
    self._update(prompts, trajectory, scores)
    return {"images": painted, "reward": scores.reward, "params": self.state.params}


def small_params(params) -> np.ndarray:
  small = {path: x for path, x in flatten_dict(params).items() if x.size <= worlds.SMALL}
  return worlds.in_a_row(names.to_torch(unflatten_dict(small)))
