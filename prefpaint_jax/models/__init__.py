"""Flax Linen modules: UNet, VAE, CLIP and the reward network."""
