"""The pages of `--help`: usage, presets with their run time, options, and fields of a config."""

import ast
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from prefpaint_jax.runtime.config_fields import CONFIGS
from prefpaint_jax.runtime.text import explain

WIDTH = 100
CHOICES = re.compile(r"^<([^>]*)>: ")  # absl's list of an enum's values
REPEATED = ";\n    repeat this option to specify a list of values"  # absl's words
ASKS = ("-h", "-help", "--help", "--helpshort", "--helpfull")
ROOT = Path(__file__).parents[2]  # of the repository, which has configs/


class Comments(NamedTuple):
  """The comments of a config file."""

  fields: dict[str, str]  # by dotted name, in the file's order; "" without a comment
  headings: dict[str, str]  # by the field below the heading
  presets: dict[str, str]  # the literal PRESETS of the file


def is_asked(argv: Sequence[str]) -> bool:
  """Returns whether a command line asks for help."""
  return any(argument in ASKS for argument in argv[1:])


def command_name() -> str:
  """Returns the name of the command that this process runs: "train", "data.masks"."""
  main = sys.modules["__main__"]
  spec = getattr(main, "__spec__", None)
  return spec.name.partition(".")[2] if spec else Path(sys.argv[0]).stem


def config_file() -> Path | None:
  """Returns the config file that goes with the command: here, or in the repository."""
  names = [name for name, (_, commands) in CONFIGS.items() if command_name() in commands]
  files = [folder / "configs" / f"{name}.py" for name in names for folder in (Path(), ROOT)]
  return next((file for file in files if file.is_file()), None)


def field_names() -> list[str]:
  """Returns the names of the config fields of the command."""
  tables = (table for table, commands in CONFIGS.values() if command_name() in commands)
  return [name for table in tables for name in table]


def own_flags() -> dict[str, flags.Flag]:
  """Returns the flags of the command by name, without those of absl and JAX."""
  by_module = flags.FLAGS.flags_by_module_dict()  # in the order of their definitions
  modules = [module for module in by_module if not module.startswith(("absl", "jax"))]
  found = {flag.name: flag for module in modules for flag in by_module[module]}
  return dict(sorted(found.items(), key=lambda item: item[0] == "traceback"))  # the last one


def missing_flags() -> list[str]:
  """Returns the names of the required flags that have no value."""
  return [name for name, flag in own_flags().items() if _is_required(flag) and flag.value is None]


def usage() -> str:
  """Returns the first line and the examples of the command's docstring."""
  first, *others = _document().splitlines()
  examples = [line for line in others if line.startswith("  ")]
  needed = ", ".join(f"--{name}" for name in missing_flags())
  return "\n".join([first, "", *examples, "", f"Required: {needed}. --help explains every option."])


def page(source: str = "", fields: Mapping[str, Any] | None = None) -> str:
  """Returns the page of the command.

  Args:
    source: FILE[:PRESET] of its config; "" for a command without one.
    fields: values of the config by dotted name.
  """
  parts = [_document(), "Options:\n" + "\n".join(_options())]
  if fields is not None:
    file = source.partition(":")[0]
    known = config_file()
    comments = read_comments(Path(file))
    if known and known.resolve() != Path(file).resolve():  # a file that changes another one
      others = read_comments(known)
      comments = Comments(*(other | own for other, own in zip(others, comments, strict=True)))
    if comments.presets:
      parts.append("\n".join([f"Presets of {file}:", *_presets(file, comments.presets)]))
    parts.append("\n".join([f"Fields of {source}:", *_fields(fields, comments)]))
  return "\n\n".join(parts)


def read_comments(file: Path) -> Comments:
  """Reads the comments of a config file: those of its fields, and those above groups of fields.

  A comment after `config.NAME = ...` is the field's. Lines of comments above the field are a
  heading after an empty line, and otherwise the field's too.
  """
  source = file.read_text(encoding="utf-8")
  lines, comments = source.splitlines(), {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      comments[token.start[0]] = token.string.lstrip("# ").strip()
  fields: dict[str, str] = {}
  headings: dict[str, str] = {}
  presets: dict[str, str] = {}
  tree = ast.parse(source)
  assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
  for node in sorted(assignments, key=lambda node: node.lineno):
    target = ast.unparse(node.targets[0])
    if target == "PRESETS":
      presets = ast.literal_eval(node.value)
    if not target.startswith("config.") or target[7:] in fields:
      continue
    name, first = target[7:], node.lineno - 1
    while first in comments and lines[first - 1].lstrip().startswith("#"):
      first -= 1
    above = " ".join(comments[number] for number in range(first + 1, node.lineno))
    numbers = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    beside = next((comments[number] for number in numbers if number in comments), "")
    if above and not lines[first - 1].strip():
      headings[name], above = above, ""
    fields[name] = ", ".join(filter(None, [above, beside]))
  return Comments(fields, headings, presets)


def _document() -> str:
  """Returns the docstring of the command's module."""
  return inspect.cleandoc(sys.modules["__main__"].__doc__ or command_name())


def _options() -> Iterator[str]:
  """Yields lines about the options that the command defines."""
  for name, flag in own_flags().items():
    shown = f"--{name}" if flag.boolean else f"--{name}=..."
    needed = " Required." if _is_required(flag) else ""
    is_told = flag.default in (None, "", []) or flag.boolean
    default = "" if is_told else f" Default: {flag.default}."
    about = (flag.help or "").replace(REPEATED, " May be repeated.")
    if choices := CHOICES.match(about):
      about = f"{about[choices.end() :].rstrip('.')}: {' or '.join(choices[1].split('|'))}."
    yield from explain(shown, f"{about}{needed}{default}")
    if name == "config":
      yield from explain("--config.FIELD=...", "Changes a field of the config, see below.")


def _is_required(flag: flags.Flag) -> bool:
  """Returns whether absl refuses a command line without the flag."""
  return any("other than None" in check.message for check in flag.validators)


def _presets(file: str, presets: Mapping[str, str]) -> Iterator[str]:
  for name, about in presets.items():
    yield from explain(f"--config={file}{':' * bool(name)}{name}", about)


def _fields(values: Mapping[str, Any], comments: Comments) -> Iterator[str]:
  """Yields lines of the fields with their values, comments, or else their ranges."""
  table = {name: str(allowed) for ranges, _ in CONFIGS.values() for name, allowed in ranges.items()}
  order = list(comments.fields)

  def section(name: str) -> str:  # the longest part that the file assigns
    while name and name not in comments.fields:
      name = name.rpartition(".")[0]
    return name

  position = lambda name: order.index(section(name)) if section(name) else len(order)
  told: set[str] = set()
  for name in sorted(values, key=position):
    parts = name.split(".")
    for group in (".".join(parts[:count]) for count in range(1, len(parts) + 1)):
      titles = [comments.headings.get(group, "")]
      titles += [comments.fields.get(group, "")] if group != name else []
      if group not in told and any(titles):
        yield ""
        title = " ".join(filter(None, titles))
        title = f"{title[0].upper()}{title[1:].removesuffix('.')}."
        yield from textwrap.wrap(title, WIDTH, initial_indent="  ", subsequent_indent="  ")
      told.add(group)
    shown = f"--config.{name}={_shown(values[name])}"
    yield from explain(shown, comments.fields.get(name) or table.get(name, ""))


def _shown(value: Any) -> str:
  """Returns a value as a command line has it."""
  text = str(tuple(value) if isinstance(value, list) else value)
  mark = '"' if "'" in text else "'"
  return f"{mark}{text}{mark}" if not text or set(text) & set(" ()|[]") else text
