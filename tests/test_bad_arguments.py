"""Bad arguments of the Python API and inputs that ask for too much memory: one line for each."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prefpaint_jax import Inpainter, RewardModel
from prefpaint_jax.data.depth import load_depth
from prefpaint_jax.data.warping import Intrinsics
from prefpaint_jax.editing.extension import Borders, plan_windows
from prefpaint_jax.inpainter import open_policy
from prefpaint_jax.models.architectures import tiny_configs
from prefpaint_jax.models.assembly import make_modules
from prefpaint_jax.runtime.compilation import Program
from prefpaint_jax.runtime.memory import check_memory
from prefpaint_jax.runtime.metrics import MetricsWriter

NAN = math.nan

# -------------------------------------------------------------------------------------- Python API
GREY = np.full((8, 8, 3), 0.5, np.float32)
HOLE = np.zeros((8, 8, 1), np.float32)
HOLE[2:5] = 1.0


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"num_samples": 0}, "num_samples is 0; expected an integer from 1"),
    ({"num_samples": 10**6}, "needs about .* GiB of memory"),
    ({"num_steps": 0}, "num_steps is 0"),
    ({"num_steps": 2.0}, r"num_steps is 2\.0; expected an integer"),
    ({"eta": NAN}, "eta is nan"),
    ({"eta": 2.0}, r"eta is 2\.0"),
    ({"guidance_scale": NAN}, "guidance_scale is nan"),
    ({"guidance_scale": 1e30}, r"guidance_scale is 1e\+30"),
    ({"text": None}, "text is None; expected a text"),
    ({"text": [None]}, r"text is \[None\]; expected a text"),
    ({"paste_back": "no"}, "paste_back is 'no'; expected True or False"),
    ({"key": 0}, r"key is 0; expected one PRNG key; give jax\.random\.key"),
    ({"key": np.zeros(3, np.uint32)}, r"key is an array of uint32\[3\]"),
    ({"key": jax.random.split(jax.random.key(0))}, r"key is an array of key<fry>\[2\]"),
  ],
  ids=str,
)
def test_bad_argument_of_the_inpainter_is_named(inpainter, arguments, message, monkeypatch):
  monkeypatch.setattr("prefpaint_jax.runtime.memory.machine_memory", lambda: 2**30)
  with pytest.raises(ValueError, match=message) as error:
    inpainter(GREY, HOLE, **arguments)
  assert "\n" not in str(error.value)


def test_mask_of_nan_is_named_a_mask(inpainter):
  for mask in (HOLE * NAN, HOLE.astype(int)):
    with pytest.raises(ValueError, match=r"^mask: "):
      inpainter(GREY, mask)


@pytest.mark.parametrize("name", [None, 3, "", " ", b"mini", ["mini"], "~nobody/x"])
@pytest.mark.parametrize(
  "load", [Inpainter.from_pretrained, RewardModel.from_pretrained, open_policy]
)
def test_what_is_no_name_of_a_model_is_one_line(load, name):
  message = "no such folder" if name == "~nobody/x" else f"model is {re.escape(repr(name))}; expec"
  with pytest.raises(ValueError, match=message):
    load(name)


@pytest.mark.parametrize(
  ("bound", "message"),
  [(3, "bound is 3; expected"), (True, "bound is True; expected"), ("ok.png", "that is no bound")],
)
def test_what_is_no_bound_is_one_line(tmp_path, monkeypatch, bound, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "ok.png").write_bytes(b"")
  with pytest.raises(ValueError, match=message):
    RewardModel.from_pretrained("mini", bound)


def test_file_that_is_no_reward_model_and_a_long_folder_are_short_lines(tmp_path):
  for i in range(100):
    (tmp_path / f"{i:02d}.png").write_bytes(b"")
  with pytest.raises(
    ValueError, match=r"00\.png: a file that is no reward model; expected a folder"
  ):
    RewardModel.from_pretrained(tmp_path / "00.png")
  with pytest.raises(ValueError, match=r"contains 00\.png, .*, 04\.png, 95 more; expected config"):
    RewardModel.from_pretrained(tmp_path)


def test_rematerialisation_and_stored_types_are_checked(inpainter, tmp_path):
  with pytest.raises(ValueError, match="remat is 'yes'; expected True or False"):
    Inpainter.from_pretrained("mini", remat="yes")
  for dtype in ("int8", "int4"):  # int8 would round all weights to 0
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'; expected one of float32, float16"):
      inpainter.save_pretrained(tmp_path / "out", dtype)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float64", "float16", "int8", "nonsense"])
def test_dtype_in_which_nothing_computes_is_refused(dtype):
  for load in (
    lambda: make_modules(tiny_configs(), dtype),
    lambda: RewardModel.from_pretrained("mini", dtype=dtype),
  ):
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'; expected one of float32, bfloat16"):
      load()


# ------------------------------------------------------------------------------------------ memory
def test_estimate_above_the_memory_is_refused_in_one_line():
  check_memory(5, "x", limit=5)
  with pytest.raises(ValueError, match=r"x needs about 2\.0 GiB .* at most 1\.0 GiB"):
    check_memory(2 * 2**30, "x", limit=2**30)
  with pytest.raises(ValueError, match="GiB"):
    check_memory(2.0**60, "x")


@pytest.mark.parametrize("borders", [{"left": 10**9}, {"right": 10**12}, {"top": 10**9}])
def test_extension_beyond_the_memory_is_refused(inpainter, borders):
  with pytest.raises(ValueError, match=r"extend: an image of .* needs about .* GiB"):
    plan_windows(inpainter, (64, 64), Borders(**borders))


def test_header_of_an_array_that_asks_for_a_tebibyte_is_refused(tmp_path):
  for shape in (2**20, 2**18), (10**9, 10**9):
    with (tmp_path / "d.npy").open("wb") as file:
      header = {"descr": "<f4", "fortran_order": False, "shape": shape}
      np.lib.format.write_array_header_1_0(file, header)
      file.write(b"\0" * 64)
    with pytest.raises(ValueError, match=r"d\.npy: the depth cannot be read"):
      load_depth(tmp_path / "d.npy", (8, 8))
    with pytest.raises(ValueError, match=r"d\.npy: not a 3x3 matrix"):
      Intrinsics.parse(tmp_path / "d.npy")


def test_empty_and_foreign_arrays_are_refused(tmp_path):
  (tmp_path / "empty.npy").write_bytes(b"")
  with (tmp_path / "zip.npy").open("wb") as file:
    np.savez(file, x=np.ones((3, 3)))
  for name in ("empty.npy", "zip.npy"):
    with pytest.raises(ValueError, match=f"{name}: the depth cannot be read"):
      load_depth(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: not a 3x3 matrix"):
      Intrinsics.parse(tmp_path / name)


def test_step_that_needs_more_memory_than_there_is_is_refused_after_compilation():
  if jax.default_backend() != "cpu":
    pytest.skip("other devices refuse by themselves")
  program = Program(jax.jit(lambda x: jnp.sum(jnp.sort(x) @ x)))
  with pytest.raises(ValueError, match=r"needs about .* GiB of memory"):
    program.compile(jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32))


# ------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize(
  ("line", "message"),
  [("nonsense", "is not JSON"), ("[1]", "type list"), ('{"iteration": "x"}', "iteration is 'x'")],
)
def test_damaged_line_of_metrics_is_named(tmp_path, line, message):
  (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n' + line + "\n")
  with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2.* {message}|line 2: {message}"):
    MetricsWriter(tmp_path).truncate(1)
