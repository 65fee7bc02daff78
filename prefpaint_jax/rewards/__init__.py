"""Rewards: one file each, and the objective that combines them."""

from prefpaint_jax.rewards.objective import load_reward as load_reward
