"""Rewards that are functions in a user's Python file: `FILE.py:FUNCTION`.

The function names what it wants of `images`, `masked_images`, `masks` and `texts`, with one row per
sample, and returns scores [B]:

  def brightness(images, masks):
    return (images * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))

It is a JAX function, compiled into the program and sharded with it. A function that reads texts has
an attribute `tokenize`, which makes arrays of them on the host. A function with an attribute `host`
that is true is any Python function: it gets NumPy arrays and a list of texts, once per iteration
with the whole batch.
"""
# Shapes: B samples.

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prefpaint_jax.rewards.reward import Reward, check_shape, failed
from prefpaint_jax.runtime.suggestions import suggest
from prefpaint_jax.runtime.text import first_line

INPUTS = ("images", "masked_images", "masks", "texts")


def load_function(name: str) -> Reward:
  """Loads the reward `FILE.py:FUNCTION`.

  Raises:
    ValueError: the file cannot be run, or has no such function with inputs of a reward.
  """
  file, _, function_name = name.rpartition(":")
  content = vars(_run(file))
  function = content.get(function_name)
  if not callable(function):
    nearest = suggest(function_name, [x for x, value in content.items() if callable(value)])
    advice = f"did you mean {nearest}?" if nearest else "name one as FILE.py:FUNCTION"
    raise ValueError(f"{file}: has no function {function_name!r}; {advice}")
  wanted = list(inspect.signature(function).parameters)
  if not wanted or not set(wanted) <= set(INPUTS):
    raise ValueError(
      f"{name}: the parameters are {', '.join(wanted) or 'none'}; expected some of "
      f"{', '.join(INPUTS)}"
    )
  tokenize, on_host = getattr(function, "tokenize", None), bool(getattr(function, "host", False))
  if "texts" in wanted and not (tokenize or on_host):
    raise ValueError(
      f"{name}: reads texts without an attribute `tokenize`; set {function_name}.tokenize to a "
      f"function of a list of texts that returns arrays, or {function_name}.host = True"
    )
  call = functools.partial(_call, function, wanted, np if on_host else jnp)
  if tokenize and not on_host:
    like = _tokenize(function_name, tokenize, None, [""])
    tokenize = functools.partial(_tokenize, function_name, tokenize, like)
  return Reward(function_name, call, tokenize=tokenize, on_host=on_host, source=file)


def _tokenize(name: str, tokenize: Callable[..., Any], like: Any, texts: Sequence[str]) -> Any:
  """Calls a user's function of P texts and checks that it makes P rows like those of `like`.

  Raises:
    ValueError: the function fails, or rows differ in shape or dtype, with which one compiled
      program could not read all texts.
  """
  try:
    found = jax.tree.map(np.asarray, tokenize(list(texts)))
  except Exception as error:  # whatever the user's code raises
    raise failed(name, error) from error
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape[1:], str(x.dtype)), tree)
  rows = {x.shape[:1] for x in jax.tree.leaves(found)}
  if rows != {(len(texts),)} or (like is not None and kinds(found) != kinds(like)):
    shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(found))
    raise ValueError(
      f"reward {name}: tokenize makes {shapes} of {len(texts)} texts; expected a row for each "
      "text, of a shape and dtype that do not depend on the texts; pad or cut them"
    )
  return found


def _call(
  function: Callable[..., Any],
  wanted: list[str],
  numpy: Any,
  params: dict,
  images: Any,
  masked_images: Any,
  masks: Any,
  texts: Any,
) -> tuple[Any, None]:
  """Calls a user's function with one row per sample of what it wants."""
  S = images.shape[0] // masked_images.shape[0]
  rows = lambda x: numpy.repeat(x, S, axis=0)
  repeated = [one for text in texts for one in [text] * S] if numpy is np else None
  inputs = {
    "images": images,
    "masked_images": rows(masked_images),
    "masks": rows(masks),
    "texts": jax.tree.map(rows, texts) if repeated is None else repeated,
  }
  wanted_inputs = {name: inputs[name] for name in wanted}
  if numpy is np:  # `Reward.on_arrays` checks the scores
    return function(**wanted_inputs), None
  try:
    scores = function(**wanted_inputs)
  except Exception as error:  # whatever the user's code raises while JAX traces it
    raise failed(function.__name__, error) from error
  check_shape(function.__name__, jnp.shape(scores), images.shape[0])
  return scores, None


def _run(file: str) -> Any:
  """Runs a Python file and returns it as a module."""
  path = Path(file)
  if not path.is_file():
    raise ValueError(f"reward {file}: no such file; give FILE.py:FUNCTION")
  folder = str(path.parent.resolve())
  spec = importlib.util.spec_from_file_location(f"reward of {path.resolve()}", path)
  module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  sys.path.insert(0, folder)  # so that it can import its neighbours
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise ValueError(
      f"reward {file}: cannot be run ({type(error).__name__}: {first_line(error)}); correct it"
    ) from error
  finally:
    sys.path.remove(folder)
  return module
