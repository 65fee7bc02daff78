"""Noise schedules and the DDIM sampler."""

from prefpaint_jax.diffusion.ddim import timesteps
from prefpaint_jax.diffusion.schedule import Schedule

__all__ = ["Schedule", "timesteps"]
