"""Convolutions of users: the same gradients, by a faster kernel."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import keys
from roli_jax.evaluate import classifier, convolutions

KERNEL = np.random.default_rng(0).standard_normal((3, 2, 4, 4))
KERNEL = KERNEL.astype(np.float32)


def convolve(x, padding="SAME", strides=(2, 3), dilation=None):
  return jax.lax.conv_general_dilated(
    x, KERNEL, strides, padding, rhs_dilation=dilation,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip


def grown(x):
  return jnp.pad(convolve(x), ((0, 0), (2, 2), (2, 3), (0, 0)))


# What a user's function may have around it.
FUNCTIONS = {
  "no stride": functools.partial(convolve, strides=(1, 1)),
  "dilated": functools.partial(convolve, strides=(1, 1), dilation=(2, 3)),
  "no padding": functools.partial(convolve, padding="VALID"),
  "much padding": functools.partial(convolve, padding=[(3, 0), (1, 5)]),
  "less than none": functools.partial(convolve, padding=[(-1, 0), (0, -2)]),
  "channels first": lambda x: jax.lax.conv(
    x.transpose(0, 3, 1, 2), KERNEL.transpose(3, 2, 0, 1), (1, 1), "SAME"
  ),
  "a jit": jax.jit(convolve),
  "a loop": lambda x: jax.lax.scan(
    lambda x, _: (grown(x), None), x, None, length=2
  )[0],
  "branches": lambda x: jax.lax.cond(
    x.sum() > 0, lambda: convolve(x), lambda: -convolve(x)
  ),
  "a checkpoint": jax.checkpoint(lambda x: jax.nn.relu(convolve(x))),
  "images one by one": jax.vmap(lambda x: convolve(x[None])[0]),
  "its own gradient": jax.grad(lambda x: jnp.square(convolve(x)).sum()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_the_function(name):
  fn = FUNCTIONS[name]
  rng = np.random.default_rng(1)
  x = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
  assert convolutions.has_any(jax.make_jaxpr(fn)(x).jaxpr)

  def both(fn, x):
    value, pull = jax.vjp(fn, x)
    return value, pull(jnp.cos(value))

  (value, slope), (plain, expected) = (
    jax.jit(functools.partial(both, fn))(x)
    for fn in (convolutions.made_fast(fn), fn)
  )
  np.testing.assert_array_equal(value, plain)
  np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(expected).max() > 0.1


def orders(numbers):
  """The orders of axes in the convolutions of a loop that climbs."""
  first, kernel = ((8, 8, 8, 4), (3, 2, 4, 4))
  if numbers[0] == "NCHW":
    first, kernel = ((8, 4, 8, 8), (4, 4, 3, 2))

  def logits_fn(kernel, x):
    y = jax.lax.conv_general_dilated(
      x, kernel, (2, 2), "SAME", dimension_numbers=numbers
    )
    return y.reshape(len(x), -1)

  fn = classifier.make(logits_fn, jnp.ones(kernel), first[1:], 8).programs.fn
  of_images = jax.random.split(keys.root(0), 8)

  def climb(x, kernel):
    slope = jax.grad(lambda x: fn(kernel, x, of_images).std())
    return jax.lax.fori_loop(0, 2, lambda _, x: x + slope(x), x)

  args = jnp.ones(first), jnp.ones(kernel)
  text = jax.jit(climb).lower(*args).compile().as_text()
  return set(re.findall(r" convolution\(.*dim_labels=([^,]+)", text))


@pytest.mark.parametrize("axes", ["NHWC HWIO NHWC", "NCHW OIHW NCHW"])
def test_all_convolutions_of_an_evaluation_are_of_the_fast_order(
  axes, monkeypatch
):
  assert orders(tuple(axes.split())) == {"b01f_01io->b01f"}
  monkeypatch.setattr(convolutions, "has_any", lambda jaxpr: False)
  assert orders(tuple(axes.split())) - {"b01f_01io->b01f"}
