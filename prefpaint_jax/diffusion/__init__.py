"""Noise schedules and the DDIM sampler; no network here."""
