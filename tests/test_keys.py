"""Keys by name, step and image."""

import jax
import numpy as np

from roli_jax import keys


def draw(key):
  return np.asarray(jax.random.uniform(key, (4,)))


def test_streams_differ_by_name_and_step_and_come_again():
  root = keys.root(0)
  a = draw(keys.stream(root, "attack", 1))
  assert (a == draw(keys.stream(keys.root(0), "attack", 1))).all()
  for other in (
    keys.stream(root, "attack", 2),
    keys.stream(root, "dropout", 1),
    keys.stream(keys.root(1), "attack", 1),
  ):
    assert (a != draw(other)).all()


def test_an_image_keeps_its_key_in_any_batch():
  root = keys.root(0)
  whole = keys.per_image(root, np.arange(10, dtype=np.uint32))
  part = keys.per_image(root, np.array([7, 3], np.uint32))
  data = jax.random.key_data
  np.testing.assert_array_equal(data(whole)[np.array([7, 3])], data(part))


def test_the_generator_is_the_one_that_vmap_leaves_alone():
  assert str(keys.root(0).dtype) == "key<fry>"
