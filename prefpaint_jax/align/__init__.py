"""Alignment: policy gradient over the DDIM chain, as pure functions and jitted stages."""
