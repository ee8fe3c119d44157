"""Labels, halves and comparisons of trees."""

import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import trees
from roli_jax.types import Params


def tree():
  return Params(
    backbone={"block0": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}},
    peft={},
    head={"kernel": jnp.ones((3, 4))},
  )


def test_paths_join_the_keys():
  assert list(trees.paths(tree())) == [
    "backbone/block0/bias",
    "backbone/block0/kernel",
    "head/kernel",
  ]


def test_the_first_rule_wins():
  rules = ((".*bias", 1), ("backbone/.*", 2), (".*", 3))
  labels = trees.paths(trees.label(tree(), rules))
  assert list(labels.values()) == [1, 2, 3]


def test_a_leaf_without_a_rule_is_named():
  with pytest.raises(ValueError, match="head/kernel"):
    trees.label(tree(), (("backbone/.*", 1),))


def test_a_pattern_must_match_all_of_the_path():
  with pytest.raises(ValueError, match="bias"):
    trees.label(tree(), (("backbone/block0/b", 1), (".*kernel", 2)))


def test_halves_merge_to_the_whole():
  keep = trees.label(tree(), (("head/.*", True), (".*", False)))
  kept, rest = trees.split(tree(), keep)
  assert trees.size(kept) == 12 and trees.size(rest) == 9
  merged = trees.paths(trees.merge(kept, rest))
  for name, leaf in trees.paths(tree()).items():
    np.testing.assert_array_equal(merged[name], leaf)


def test_nested_dicts_come_back_from_their_paths():
  nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
  assert trees.unpaths(trees.paths(nested)) == nested


def test_both_sides_of_a_mismatch_are_listed():
  got = {"a": jnp.ones(2), "b": jnp.ones(3), "d": jnp.ones(1)}
  expected = {"a": jnp.ones(2), "b": jnp.ones(4), "c": jnp.ones(1)}
  with pytest.raises(ValueError) as error:
    trees.check_same(got, expected, "x.safetensors")
  text = str(error.value)
  assert "missing: c" in text and "unexpected: d" in text
  assert "b (3,) (expected (4,))" in text and text.startswith("x.safetensors")


def test_equal_shapes_pass():
  trees.check_same({"a": jnp.ones(2)}, {"a": np.zeros(2)}, "same")
