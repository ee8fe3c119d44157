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
  if "pretrain" not in config:  # which makes its weights
    yield from _weights(config)
  yield from data.prepare(config["data"])


def _weights(config: Mapping[str, Any]) -> Iterator[str]:
  """Likewise of weights alone, which have to be of the right name."""
  backbone = config["backbone"]
  cells = config.get("cells", ({},))
  names = [cell.get("weights", backbone["weights"]) for cell in cells]
  for weights in dict.fromkeys(names):
    if registry.is_name(weights):
      yield from origins.fetch(registry.named(weights))
      continue
    file = convert.find(backbone["name"], weights)
    yield f"{backbone['name']}'s weights are there: {file}"
