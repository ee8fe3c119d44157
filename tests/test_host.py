"""Functions on the host are attacked as those are that JAX traces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import attacks, evaluate
from roli_jax.threat import ThreatModel

RNG = np.random.default_rng(0)
W1 = RNG.normal(size=(36, 32)).astype(np.float32) / 2
W2 = RNG.normal(size=(32, 5)).astype(np.float32)
IMAGES = RNG.uniform(size=(24, 6, 6, 1)).astype(np.float32)
BALL = ThreatModel("linf", eps=0.05)


def net(xp, x):
  return xp.tanh((x.reshape(len(x), -1) - 0.5) @ W1) @ W2


def forward(x):
  x += 0  # what it is given is its own
  return net(np, x)


def backward(x, g):
  hidden = np.tanh((x.reshape(len(x), -1) - 0.5) @ W1)
  return ((g @ W2.T * (1 - hidden**2)) @ W1.T).reshape(x.shape)


def traced(x):
  return net(jnp, x)


LABELS = forward(IMAGES).argmax(1)


def test_its_derivative_is_that_of_the_traced_function():
  host = evaluate.foreign(forward, backward)
  for fn in (
    lambda f: f(IMAGES),
    jax.jit(lambda f: f(IMAGES), static_argnums=0),
  ):
    np.testing.assert_allclose(fn(host), fn(traced), atol=1e-5)
  ours, theirs = (
    jax.grad(lambda x, f=f: (f(x) ** 2).sum())(IMAGES) for f in (host, traced)
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "name, fields",
  [
    ("pgd", {"targeted": True}),
    ("apgd_ce", {"num_steps": 10}),
    pytest.param(
      "autoattack", {"num_steps": 10, "num_queries": 50},
      marks=pytest.mark.slow,
    ),
  ],
)  # fmt: skip
def test_attacks_leave_the_same_images_standing(name, fields):
  attack = attacks.build(name, BALL, **fields)
  labels = (LABELS + 1) % 5 if "targeted" in fields else LABELS
  host, ours = (
    evaluate.run(fn, IMAGES, labels, attack, batch_size=24)
    for fn in (evaluate.foreign(forward, backward), traced)
  )
  assert 0 < ours.robust.sum() < 24
  np.testing.assert_array_equal(host.robust, ours.robust)
  np.testing.assert_array_equal(host.broken_by, ours.broken_by)


def test_each_image_of_a_randomised_function_is_seen_alone():
  host = evaluate.foreign(forward, backward)
  seen = jax.vmap(lambda x: host(x[None])[0])(IMAGES)
  np.testing.assert_allclose(seen, forward(IMAGES.copy()), atol=1e-5)


def test_passes_of_low_precision_come_in_float32():
  host = evaluate.foreign(forward, backward)
  x = IMAGES.astype(jnp.bfloat16)
  assert host(x).dtype == np.float32
  assert jax.grad(lambda x: host(x).sum())(x).dtype == jnp.bfloat16


def test_without_a_derivative_square_remains():
  host = evaluate.foreign(forward)
  square = attacks.build("square", BALL, num_queries=5)
  assert evaluate.run(host, IMAGES, LABELS, square).clean.all()
  with pytest.raises(ValueError, match="vjp of evaluate"):
    evaluate.run(host, IMAGES, LABELS, attacks.build("pgd", BALL))


@pytest.mark.parametrize(
  "fn", [lambda x: net(np, x)[0], lambda x: net(np, x)[:1], lambda x: {}]
)
def test_what_is_no_logits_is_told(fn):
  with pytest.raises(ValueError, match=r"expected logits \[8, classes\]"):
    evaluate.run(evaluate.foreign(fn), IMAGES, LABELS, None)
