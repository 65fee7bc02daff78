"""Helpers of the parity tests: random torch weights, their conversion, and one tolerance."""
# Shapes: B batch, H W height and width, C channels.

import jax
import numpy as np

from prefpaint_jax.weights import names


def randomise(module, seed: int = 0):
  """Fills every parameter of a torch module with random numbers.

  Parameters that are initialised to zero or one are included, so that a test detects an unused one.
  """
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1:
        parameter.copy_(noise / parameter[0].numel() ** 0.5)
      else:
        parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
  return module.eval()


def tensors_of(module) -> dict[str, np.ndarray]:
  """Returns the state dict of a torch module as numpy arrays."""
  return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def template_of(module, *args, **kwargs):
  """Returns the shapes of a Linen module's parameters without computing them."""
  init = lambda: module.init(jax.random.key(0), *args, **kwargs)
  return jax.eval_shape(init)["params"]


def params_of(torch_module, template):
  """Converts the weights of a torch module to a Flax parameter tree."""
  return names.to_tree(tensors_of(torch_module), template, what=type(torch_module).__name__)


def channels_last(tensor) -> np.ndarray:
  """Transposes a torch tensor [B, C, H, W] to a numpy array [B, H, W, C]."""
  return tensor.detach().permute(0, 2, 3, 1).numpy()


def assert_parity(ours, theirs, tolerance: float = 1e-4) -> None:
  """Asserts that the largest error is at most `tolerance` times the largest expected value."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  error, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
  assert error <= tolerance * scale, f"error {error:.2e} at scale {scale:.2e}"
