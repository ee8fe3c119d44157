"""Trees of arrays by the paths of their leaves: label, split, merge, compare.

A leaf's path joins the keys on the way to it, `backbone/block3/attn/q/kernel`.
Paths are API: rules, converters and checkpoints rest on them.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

T = TypeVar("T")
Rules = Sequence[tuple[str, T]]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def tree_class(cls: type[T]) -> type[T]:
  """Makes a frozen, keyword-only dataclass that is a pytree of its fields."""
  cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
  return jax.tree_util.register_dataclass(cls)


# Metadata of a dataclass field that is part of the tree's structure, not data.
STATIC = {"static": True}


def path(keys: Sequence[Any]) -> str:
  """Returns the name of a leaf, from the keys that JAX gives for it."""
  return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def paths(tree: Any) -> dict[str, Any]:
  """Returns every leaf by its path, in the order of `jax.tree.leaves`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path(keys): leaf for keys, leaf in leaves}


def unpaths(leaves: dict[str, Any]) -> dict[str, Any]:
  """Returns the nested dict whose `paths` are these."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def label(tree: Any, rules: Rules[T]) -> Any:
  """Labels each leaf by the first rule whose pattern matches all of its path.

  Examples:
    >>> rules = (("head/.*", "head"), (".*", "frozen"))
    >>> label({"head": {"bias": 0}, "backbone": {"bias": 0}}, rules)
    {'backbone': {'bias': 'frozen'}, 'head': {'bias': 'head'}}

  Args:
    tree: any tree; the result has its structure, and labels as leaves.
    rules: pairs of a regular expression and a value; the first match wins.

  Raises:
    ValueError: if no rule covers a leaf. Nothing is labelled by default.
  """
  patterns = [(re.compile(pattern), value) for pattern, value in rules]

  def first_match(keys: Sequence[Any], _: Any) -> T:
    name = path(keys)
    for pattern, value in patterns:
      if pattern.fullmatch(name):
        return value
    raise ValueError(
      f"no rule covers {name!r}; the rules are {[r[0] for r in rules]}"
    )

  return jax.tree_util.tree_map_with_path(first_match, tree)


def split(tree: T, keep: Any) -> tuple[T, T]:
  """Splits a tree in two of its structure; absent leaves are None.

  None is no leaf in JAX: gradients, norms, optimizers and sizes of either half
  see the leaves that are there, and nothing else.

  Args:
    tree: any tree without None.
    keep: a tree of bools of the same structure.

  Returns:
    The leaves where `keep` is true, and the others.
  """
  kept = jax.tree.map(lambda x, k: x if k else None, tree, keep)
  rest = jax.tree.map(lambda x, k: None if k else x, tree, keep)
  return kept, rest


def merge(kept: T, rest: T) -> T:
  """Returns the tree that `split` gave these halves of."""
  return jax.tree.map(
    lambda x, y: y if x is None else x, kept, rest, is_leaf=_is_none
  )


def _is_none(x: Any) -> bool:
  return x is None


def size(tree: Any) -> int:
  """Returns how many numbers the tree holds."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def check_same(got: Any, expected: Any, what: str) -> None:
  """Raises a ValueError that lists both sides unless names and shapes agree.

  Args:
    got: a tree of arrays, or of anything with a shape.
    expected: a tree with the names and shapes that `got` must have.
    what: a name for `got` in the message.
  """
  mine = {k: tuple(v.shape) for k, v in paths(got).items()}
  yours = {k: tuple(v.shape) for k, v in paths(expected).items()}
  check_shapes(mine, yours, what)


def check_shapes(
  got: dict[str, tuple[int, ...]],
  expected: dict[str, tuple[int, ...]],
  what: str,
) -> None:
  """Raises as `check_same` does; takes shapes by path."""
  if got == expected:
    return
  sides = {
    "missing": sorted(expected.keys() - got.keys()),
    "unexpected": sorted(got.keys() - expected.keys()),
    "of another shape": [
      f"{k} {got[k]} (expected {expected[k]})"
      for k in sorted(got.keys() & expected.keys())
      if got[k] != expected[k]
    ],
  }
  raise ValueError(
    f"{what}: "
    + "; ".join(f"{k}: {_shorten(v)}" for k, v in sides.items() if v)
  )


def _shorten(names: Sequence[str], limit: int = 5) -> str:
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more


def map_named(fn: Callable[[str, Any], T], tree: Any) -> Any:
  """`jax.tree.map` whose function also sees the leaf's path, first."""
  return jax.tree_util.tree_map_with_path(lambda k, x: fn(path(k), x), tree)
