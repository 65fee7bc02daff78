"""Noise schedules and the DDIM sampler."""
