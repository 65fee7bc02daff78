"""Lists the commands, or runs one: `prefpaint-jax NAME` is `python -m prefpaint_jax.NAME`."""

import ast
import runpy
import sys
from pathlib import Path

from prefpaint_jax import __version__
from prefpaint_jax.runtime import interrupts
from prefpaint_jax.runtime.suggestions import suggest
from prefpaint_jax.runtime.text import explain

USAGE = """Aligns Stable Diffusion inpainting models with human preference.

  prefpaint-jax COMMAND --help
  prefpaint-jax COMMAND --OPTION=VALUE ...

`python -m prefpaint_jax.COMMAND` is the same. Commands:
"""


def commands() -> dict[str, str]:
  """Returns the first line of the docstring of every command, by name.

  A command is a module that does something when Python runs it. No module is imported.
  """
  package, found = Path(__file__).parent, {}
  for file in sorted(package.rglob("*.py")):
    source = file.read_text(encoding="utf-8")
    if file.stem != "__main__" and '\nif __name__ == "__main__":' in source:
      name = ".".join(file.relative_to(package).with_suffix("").parts)
      found[name] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
  return found


def main() -> None:
  """Runs the command that the first argument names."""
  interrupts.exit_at_once()
  found, arguments = commands(), sys.argv[1:]
  if arguments[:1] == ["help"] and arguments[1:]:
    arguments = [arguments[1], "--help"]
  if not arguments or arguments[0] in ("-h", "--help", "help"):
    print(USAGE)
    for name, line in found.items():
      print(*explain(name, line, column=20), sep="\n")
    return
  if arguments == ["--version"]:
    print(__version__)
    return
  name, *arguments = arguments
  if name not in found:
    meant = suggest(name, found)
    hint = f"; did you mean {meant}?" if meant else "; --help lists the commands"
    sys.exit(f"error: {name}: no such command{hint}")
  sys.argv = [f"prefpaint-jax {name}", *arguments]
  runpy.run_module(f"prefpaint_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
