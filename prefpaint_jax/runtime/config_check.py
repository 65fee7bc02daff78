"""Checks configs and arguments against the ranges of `config_fields`."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from prefpaint_jax.runtime.config_fields import CONFIGS
from prefpaint_jax.runtime.ranges import Range, Several, Text, check, shorten
from prefpaint_jax.runtime.suggestions import suggest


def check_fields(config: ConfigDict, name: str) -> None:
  """Checks that a config has the fields of a command, each in its range.

  Args:
    config: the config; a text "a,b" in a tuple of texts becomes the two texts "a" and "b".
    name: file in configs/ that the command takes, a name of CONFIGS.

  Raises:
    ValueError: a field is out of its range, missing or unknown, or the config is for another
      command.
  """
  fields = dict(_leaves(config.to_dict()))
  missing, unknown = _differences(fields, name)
  if missing or unknown:
    _refuse(missing, unknown, fields, name)
  table = CONFIGS[name][0]
  for field, value in fields.items():
    allowed = table.get(field) or table[_section(field)]
    check(f"config.{field}", value, allowed)
    if isinstance(allowed, Several) and isinstance(allowed.item, Text):
      value = tuple(part.strip() for text in value for part in text.split(","))
      check(f"config.{field}", value, allowed)
      config.update_from_flattened_dict({field: value})


def check_values(
  values: Mapping[str, Any], table: Mapping[str, Range], section: str = "", owner: str = "config."
) -> None:
  """Checks the values that have a range in a table.

  Args:
    values: by name.
    table: ranges by name.
    section: what the names of the table begin with, "trust." for example.
    owner: what the names of the error begin with.
  """
  for name, value in values.items():
    if section + name in table:
      check(f"{owner}{section}{name}", value, table[section + name])


def check_stored(stored: Mapping[str, Any], command: str, file: str | os.PathLike[str]) -> None:
  """Checks the fields of a run's config.json that have a range; earlier versions had fewer fields.

  Args:
    stored: content of the file.
    command: the command that made the run. A name that no config has is not checked.
    file: the file, for the error.

  Raises:
    ValueError: a field is out of its range, or a section is not an object.
  """
  table = next((table for table, names in CONFIGS.values() if names[0] == command), {})
  for name, allowed in table.items():
    *sections, field = name.split(".")
    found = stored
    for depth, section in enumerate(sections, 1):
      found = found.get(section, {})
      if not isinstance(found, dict):
        raise ValueError(
          f"{file}: {'.'.join(sections[:depth])} is {shorten(found)}; expected an object of "
          "fields; restore the file, or give another run"
        )
    for key in found if field == "*" else {field} & found.keys():
      try:
        check(f"{file}: {'.'.join([*sections, key])}", found[key], allowed)
      except ValueError as error:
        raise ValueError(f"{error}; restore the file, or give another run") from None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, value) of every field."""
  for name, value in tree.items():
    if prefix + name == "architecture":  # configs of networks, which the networks check
      continue
    if isinstance(value, dict):
      yield from _leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _section(field: str) -> str:
  """Returns the name that gives the range of all fields of a section: "kinds.*"."""
  return f"{field.rpartition('.')[0]}.*"


def _differences(fields: Mapping[str, Any], name: str) -> tuple[list[str], list[str]]:
  """Returns the fields of a table that a config lacks, and those that only the config has."""
  table = CONFIGS[name][0]
  # A config may leave out fields of `network`; they have the released values.
  missing = [x for x in table if x not in fields and not x.endswith(".*") and "network." not in x]
  unknown = [x for x in fields if x not in table and _section(x) not in table]
  return missing, unknown


def _refuse(missing: list[str], unknown: list[str], fields: Mapping[str, Any], name: str) -> None:
  """Raises ValueError for a config of another command, or with missing or unknown fields."""
  nearest = min(CONFIGS, key=lambda other: sum(map(len, _differences(fields, other))))
  command = f"prefpaint_jax.{CONFIGS[name][1][0]}"
  if nearest != name:
    theirs = f"prefpaint_jax.{CONFIGS[nearest][1][0]}"
    raise ValueError(
      f"--config is a config of {theirs}, such as configs/{nearest}.py; expected one of {command}; "
      f"give --config=configs/{name}.py"
    )
  if missing:
    raise ValueError(
      f"config.{missing[0]} is missing; expected {CONFIGS[name][0][missing[0]]}; copy the field "
      f"from configs/{name}.py"
    )
  meant = suggest(unknown[0], CONFIGS[name][0])
  hint = f"did you mean config.{meant}?" if meant else f"remove it, or see {command} --help"
  raise ValueError(
    f"config.{unknown[0]} is unknown to {command}; expected fields of configs/{name}.py; {hint}"
  )
