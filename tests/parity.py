"""What the parity tests share: random torch weights, our parameters from them, one tolerance."""

import jax
import numpy as np

from prefpaint_jax.weights import names


def randomise(module, seed: int = 0):
  """Fills every parameter, also those that start at zero or one, so that none can hide."""
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
  return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def template_of(module, *args, **kwargs):
  """Shapes of a Linen module's parameters; nothing is computed."""
  init = lambda: module.init(jax.random.key(0), *args, **kwargs)
  return jax.eval_shape(init)["params"]


def params_of(torch_module, template):
  """Our parameters, from a torch module."""
  return names.to_tree(tensors_of(torch_module), template, what=type(torch_module).__name__)


def channels_last(tensor) -> np.ndarray:
  """Torch [B, C, H, W] -> numpy [B, H, W, C]."""
  return tensor.detach().permute(0, 2, 3, 1).numpy()


def assert_parity(ours, theirs, tolerance: float = 1e-4) -> None:
  """Largest error at most `tolerance` of the largest value."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  error, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
  assert error <= tolerance * scale, f"error {error:.2e} at scale {scale:.2e}"
