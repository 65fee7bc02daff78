"""Names of rewards with weights, as text: NAME*WEIGHT,NAME."""

from prefpaint_jax.runtime.ranges import Number, check

WEIGHT = Number(-1e6, 1e6, excluded=(0,))


def split_names(names: str) -> list[tuple[str, float]]:
  """Splits "NAME*WEIGHT,NAME" into names and weights.

  Raises:
    ValueError: a name is empty or occurs twice, or a weight is no number.
  """
  found = []
  for part in names.split(","):
    name, star, weight = part.strip().rpartition("*")
    if not star:
      name, weight = weight, "1"
    try:
      value = float(weight)
    except ValueError:
      raise ValueError(
        f"reward {part.strip()!r}: the weight {weight!r} is no number; give NAME*WEIGHT"
      ) from None
    check(f"reward {name}: weight", value, WEIGHT)
    if not name or name in dict(found):
      error = f"{name!r} twice" if name else "an empty name"
      raise ValueError(f"reward {names!r} has {error}; give NAME*WEIGHT, separated by commas")
    found.append((name, value))
  return found
