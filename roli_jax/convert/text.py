"""The text tower in a CLIP's file."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from roli_jax import models, specs, trees
from roli_jax.convert import bundle as bundles
from roli_jax.convert import naming, networks, state_dict
from roli_jax.convert.name_maps import TEXT
from roli_jax.types import PyTree


def to_text(
  source: Mapping[str, Any],
  num_heads: int | None = None,
  act: str = "gelu",
  what: str = "the state dict",
) -> tuple[models.Text, PyTree]:
  """Returns the text tower in a state dict of a CLIP; see `convert.text_tower`.

  Raises:
    ValueError: there is none; tensors that are missing, left over, of another
      shape, of a dtype that no weights have or not finite; a width that does
      not determine the number of heads.
  """
  specs.lookup(models.text.ACTS, act, "act")
  found = networks.find(source, what)
  file = next((x for x in found if TEXT in x.layouts), found[0])
  sized = ("token_embedding.weight", "positional_embedding", "text_projection")
  shapes = [np.shape(file.tensors.get(key, 0)) for key in sized]
  if any(len(shape) != 2 for shape in shapes):
    keys = ", ".join(list(file.tensors)[:4])
    raise ValueError(
      f"{what} ({keys}, ...) holds no text tower of open_clip: expected"
      f" {', '.join(sized)} of two axes, got shapes {shapes}"
    )
  (vocab, width), (context, _), (_, embed) = shapes
  if num_heads is None and width % 64:
    raise ValueError(
      f"{what} is of width {width}, which is no multiple of 64, the width of a"
      " head in CLIP: say num_heads"
    )
  num_heads = num_heads or width // 64
  if width % num_heads:
    raise ValueError(f"{num_heads} heads do not divide a width of {width}")
  block = re.compile(r"transformer\.resblocks\.(\d+)\.")
  depth = len({m[1] for m in map(block.match, file.tensors) if m})
  module = models.Text(
    vocab, width, depth, num_heads, context, embed, models.text.ACTS[act]
  )
  expected = _shapes(module)
  names = TEXT.keys(expected)
  needed = TEXT.needed(file.tensors)
  bundles.check_arrays(needed, what)
  trees.check_shapes(
    {key: tensor.shape for key, tensor in needed.items()},
    naming.foreign_shapes(TEXT, names, expected),
    what,
  )
  return module, state_dict.tree(TEXT, names, expected, needed)


def _shapes(module: models.Text) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each parameter, by path."""
  ids = np.zeros((1, 1), np.int32)
  like = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
  return {k: tuple(v.shape) for k, v in trees.paths(like).items()}
