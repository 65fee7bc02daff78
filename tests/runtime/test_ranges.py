"""Every field of every config has a range; a value just outside of it is refused in one line."""

import math
import runpy
from pathlib import Path

import pytest

from prefpaint_jax.data import drawn_prompts, masks
from prefpaint_jax.preference import fit
from prefpaint_jax.runtime import config_fields
from prefpaint_jax.runtime.config_check import check_fields
from prefpaint_jax.runtime.config_fields import CONFIGS
from prefpaint_jax.runtime.ranges import (
  Boolean,
  Choice,
  Integer,
  Number,
  Optional,
  Several,
  Step,
  Text,
  check,
)

ROOT = Path(__file__).parents[2]
PRESETS = {"rl": ("", "mini", "released", "sd2"), "preferences": ("",)}
FILES = [(name, x) for name in CONFIGS for x in PRESETS.get(name, ("", "mini"))]
FIELDS = [(name, field) for name, (table, _) in CONFIGS.items() for field in table]


def load(name: str, preset: str = ""):
  return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](preset)


def outside(allowed) -> list:
  """Values that are just outside of a range, or of another type."""
  if isinstance(allowed, Optional):
    return [value for value in outside(allowed.item) if value is not None]
  if isinstance(allowed, Several):
    bad = [(x,) * (allowed.count or 1) for x in outside(allowed.item)]
    wrong = [(1,) * (allowed.count + 1), ()] if allowed.count else []
    return [*bad, *wrong, 3] + ([(2, 1)] if allowed.rising else [])
  if isinstance(allowed, Number):
    bad = [math.nan, math.inf, -math.inf, 10**400, True, "1", None]
    whole = isinstance(allowed, Integer)
    for bound, away in ((allowed.low, -1), (allowed.high, 1)):
      bad.append(bound if bound in allowed.excluded else bound + (away if whole else away * 1e-3))
    return [*bad, 1.5] if whole else bad
  others = {
    Choice: ["nothing", 1, None],
    Boolean: [1, "true", None],
    Text: [3, None, "a\0b"],
    Step: ["latest", "-1", 0, 1.5],
  }
  bad = list(others[type(allowed)])
  if isinstance(allowed, Text):
    bad += [] if allowed.empty else ["", " "]
    bad += ["(", "*"] if allowed.pattern else []
  return bad


@pytest.mark.parametrize("name, preset", FILES)
def test_every_field_of_every_preset_has_a_range_that_contains_it(name, preset):
  check_fields(load(name, preset), name)


def test_every_config_file_is_checked():
  assert {path.stem for path in (ROOT / "configs").glob("*.py")} == set(CONFIGS)


@pytest.mark.parametrize("name, field", FIELDS)
def test_values_just_outside_of_a_range_are_refused_by_name(name, field):
  allowed = CONFIGS[name][0][field]
  values = outside(allowed)
  assert values
  for value in values:
    with pytest.raises(ValueError) as error:
      check(f"config.{field}", value, allowed)
    message = str(error.value)
    assert message.startswith(f"config.{field} is ") and f"; expected {allowed}" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", CONFIGS)
def test_bounds_of_a_range_are_accepted(name):
  for allowed in CONFIGS[name][0].values():
    if isinstance(allowed, Number):
      for bound in (allowed.low, allowed.high):
        whole = isinstance(allowed, Integer)
        assert allowed.contains(int(bound) if whole else bound) != (bound in allowed.excluded)


@pytest.mark.parametrize("command", CONFIGS)
@pytest.mark.parametrize("given", CONFIGS)
def test_config_of_another_command_is_refused_with_both_names(command, given):
  config = load(given)
  if command == given:
    return check_fields(config, command)
  with pytest.raises(ValueError) as error:
    check_fields(config, command)
  message = str(error.value)
  assert f"prefpaint_jax.{CONFIGS[given][1][0]}, such as configs/{given}.py" in message
  assert f"give --config=configs/{command}.py" in message and "\n" not in message
  return None


def test_missing_and_unknown_fields_are_named():
  config = load("rl")
  del config.trust.k
  with pytest.raises(ValueError, match=r"config\.trust\.k is missing; expected .*configs/rl\.py"):
    check_fields(config, "rl")
  config = load("rl")
  config.clip_rang = 1.0
  with pytest.raises(ValueError, match=r"config\.clip_rang is unknown .* config\.clip_range"):
    check_fields(config, "rl")


def test_choices_of_the_tables_are_those_of_the_code():
  assert config_fields.KINDS == masks.KINDS
  assert config_fields.FITS == drawn_prompts.FITS
  assert config_fields.AUGMENTATIONS == fit.AUGMENTATIONS
