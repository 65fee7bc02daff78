"""Names of a UNet's modules in files of LoRA adapters.

Diffusers joins the names with dots, kohya's scripts with underscores. For SDXL the scripts take the
names of the modules from CompVis (`input_blocks_4_1_proj_in`).
"""

import re
from collections.abc import Iterator, Mapping

from flax.traverse_util import flatten_dict

from prefpaint_jax.weights.names import Params, torch_name

LAYOUTS = ("diffusers", "kohya")  # that are written
COMPVIS = "compvis"  # kohya's for SDXL, which is read


def torch_module(kernel: tuple[str, ...]) -> str:
  """Converts ("mid_block", "resnets_0", "conv1", "kernel") to "mid_block.resnets.0.conv1"."""
  return torch_name(kernel).removesuffix(".weight")


def modules(base: Params, layout: str) -> dict[str, tuple[str, ...]]:
  """Returns the kernels of a UNet by the names of their modules in a layout."""
  kernels = {torch_module(path): path for path in flatten_dict(base) if path[-1] == "kernel"}
  if layout == "diffusers":
    return {f"unet.{module}": path for module, path in kernels.items()}
  if layout == COMPVIS:
    blocks = dict(_compvis_blocks(base))
    kernels = {_compvis_module(module, blocks): path for module, path in kernels.items()}
  return {f"lora_unet_{module.replace('.', '_')}": path for module, path in kernels.items()}


_COMPVIS_MODULES = (  # outside the blocks, and inside a residual block
  (r"^conv_in$", "input_blocks.0.0"),
  (r"^conv_out$", "out.2"),
  (r"^time_embedding\.linear_1$", "time_embed.0"),
  (r"^time_embedding\.linear_2$", "time_embed.2"),
  (r"^add_embedding\.linear_1$", "label_emb.0.0"),
  (r"^add_embedding\.linear_2$", "label_emb.0.2"),
  (r"\.conv1$", ".in_layers.2"),
  (r"\.conv2$", ".out_layers.3"),
  (r"\.time_emb_proj$", ".emb_layers.1"),
  (r"\.conv_shortcut$", ".skip_connection"),
)


def _compvis_blocks(base: Params) -> Iterator[tuple[str, str]]:
  """Yields (name of diffusers, name of CompVis) of every residual block, transformer and sampler.

  CompVis counts the residual blocks of all levels, each with its transformer, and the downsamplers.
  An upsampler belongs to the last residual block of its level.
  """
  for side, prefix, index in (
    ("down_blocks", "input_blocks", 1),
    ("up_blocks", "output_blocks", 0),
  ):
    for level in range(sum(name.startswith(side) for name in base)):
      block = base[f"{side}_{level}"]
      for i in range(sum(name.startswith("resnets") for name in block)):
        yield f"{side}.{level}.resnets.{i}", f"{prefix}.{index}.0"
        yield f"{side}.{level}.attentions.{i}", f"{prefix}.{index}.1"
        index += 1
      if "downsamplers_0" in block:
        yield f"{side}.{level}.downsamplers.0.conv", f"{prefix}.{index}.0.op"
        index += 1
      place = 2 if "attentions_0" in block else 1
      yield f"{side}.{level}.upsamplers.0.conv", f"{prefix}.{index - 1}.{place}.conv"
  yield from (
    (f"mid_block.{name}", f"middle_block.{place}")
    for place, name in enumerate(("resnets.0", "attentions.0", "resnets.1"))
  )


def _compvis_module(module: str, blocks: Mapping[str, str]) -> str:
  """Converts down_blocks.1.attentions.0.proj_in to input_blocks.4.1.proj_in."""
  for end in range(len(parts := module.split(".")), 0, -1):
    if block := blocks.get(".".join(parts[:end])):
      module = ".".join((block, *parts[end:]))
  for pattern, replacement in _COMPVIS_MODULES:
    module = re.sub(pattern, replacement, module)
  return module
