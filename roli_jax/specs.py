"""From what a config says to objects: names with arguments, and numbers."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

_MOST_NAMES = 100  # that a message lists
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_EXPRESSION = re.compile(rf"(eps|{_NUMBER})(?:\s*([*/])\s*({_NUMBER}))?")


def lookup(registry: Mapping[str, T], name: str, what: str) -> T:
  """Returns the entry of that name, or raises a ValueError that lists all."""
  if name not in registry:
    raise ValueError(f"unknown {what} {name!r}{_hint(name, registry)}")
  return registry[name]


def _hint(name: str, known: Iterable[str]) -> str:
  names = sorted(known)
  near = difflib.get_close_matches(name, names, n=1)
  meant = f"; did you mean {near[0]!r}?" if near else ";"
  if len(names) > _MOST_NAMES:
    return f"{meant} there are {len(names)}"
  return f"{meant} there are {', '.join(names)}"


def build(
  registry: Mapping[str, Callable[..., T]],
  spec: Mapping[str, Any],
  what: str,
  **given: Any,
) -> T:
  """Calls what `spec["name"]` names with the rest of the spec as keywords.

  Args:
    registry: name -> class or function.
    spec: `{"name": ..., keyword: value, ...}`, as it stands in a config.
    what: a word for what is built, for messages.
    **given: further keywords that the config does not hold.

  Raises:
    ValueError: an unknown name, or a keyword that it does not take.
  """
  fields = dict(spec)
  make = lookup(registry, fields.pop("name"), what)
  takes = inspect.signature(make).parameters
  for field in fields:
    if field not in takes:
      raise ValueError(
        f"{what} {spec['name']!r} takes no"
        f" {field!r}{_hint(field, set(takes) - set(given))}"
      )
  return make(**given, **fields)


def accepted_fields(
  registry: Mapping[str, Callable[..., Any]],
  spec: Mapping[str, Any],
  what: str,
  blank: bool = False,
) -> dict[str, Any]:
  """Returns the spec without the fields that its name does not take.

  A section of a config has the fields of all names that it may be given
  (`--config.attack=fgsm`).

  Args:
    registry: name -> class or function.
    spec: `{"name": ..., keyword: value, ...}`.
    what: a word for what is built, for messages.
    blank: whether a field that nobody filled in is None, "" or 0.

  Raises:
    ValueError: an unknown name; where fields are blank, one that somebody
      filled in and that the name does not take.
  """
  takes = inspect.signature(lookup(registry, spec["name"], what)).parameters
  others = {k: v for k, v in spec.items() if k != "name" and k not in takes}
  for field, value in others.items():
    if blank and value:
      raise ValueError(f"{what} {spec['name']!r} takes no {field!r}: {value!r}")
  return {k: v for k, v in spec.items() if k not in others}


def number(text: str | float, eps: float | None = None) -> float:
  """Returns the number that a field such as `8/255`, `0.1` or `eps/4` means.

  Args:
    text: a number, or a product or quotient of two, of which `eps` may be the
      first.
    eps: the value of `eps`; None: the word is refused.

  Raises:
    ValueError: any other text, or a number that is not finite.
  """
  if isinstance(text, int | float):
    value = float(text)
  else:
    match = _EXPRESSION.fullmatch(text.strip())
    known = {} if eps is None else {"eps": float(eps)}
    if not match or (match[1] == "eps" and not known):
      words = "8/255 or 0.1" if eps is None else "2/255, 0.1 or eps/4"
      raise ValueError(f"expected a number such as {words}, got {text!r}")
    value = known["eps"] if match[1] == "eps" else float(match[1])
    if match[2] == "*":
      value *= float(match[3])
    elif match[2] == "/":
      if not float(match[3]):
        raise ValueError(f"division by zero in {text!r}")
      value /= float(match[3])
  if not math.isfinite(value):
    raise ValueError(f"expected a finite number, got {text!r}")
  return value
