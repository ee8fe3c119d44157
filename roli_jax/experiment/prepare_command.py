"""`--mode=prepare`: fetches what a config's run lacks, before it is run."""

from collections.abc import Iterator, Mapping
from typing import Any

from roli_jax import convert, data
from roli_jax.convert import origins, registry


def run(config: Mapping[str, Any]) -> Iterator[str]:
  """Fetches the data and weights that have a name, and looks for others.

  Args:
    config: any nested mapping with the sections `data` and `backbone` of
      `configs/glyphs_roli.py`.

  Yields:
    What it is about to do, or has found, a line each.

  Raises:
    ValueError: data that can't be fetched, or weights that are not there; the
      message says how to get them.
  """
  for section in ("data", "backbone"):
    if section not in config:
      raise ValueError(
        f"this config has no {section}: there is nothing to fetch"
      )
  weights = [] if "pretrain" in config else _weights(config)
  # A name that is none is told before anything is fetched.
  named = {x: registry.named(x) for x in weights if registry.is_name(x)}
  yield from data.prepare(config["data"])
  for name in weights:
    if name in named:
      yield from origins.fetch(named[name])
      continue
    model = config["backbone"]["name"]
    yield f"{model}'s weights are there: {convert.find(model, name)}"


def _weights(config: Mapping[str, Any]) -> list[str]:
  """Returns the names or paths of a config's weights, each once."""
  told = config["backbone"]["weights"]
  cells = config.get("cells", ({},))
  return list(dict.fromkeys(cell.get("weights", told) for cell in cells))
