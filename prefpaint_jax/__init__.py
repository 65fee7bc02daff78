"""PrefPaint in JAX: align a Stable Diffusion inpainting model with human preference."""

__version__ = "0.1.0"
