"""Trajectories of official AutoAttack, from its own noise, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import attacks
from roli_jax.attacks import apgd, square
from roli_jax.threat import ThreatModel
from tests import tiny
from tests.covering import covering, mostly_slow

EPS = {"Linf": 0.01, "L2": 0.15, "L1": 1.0}


@pytest.fixture(scope="module")
def trace():
  arrays = tiny.load("trace")
  arrays["x"] = tiny.load("tiny")["x"][arrays["pick"]].astype(np.float64)
  return arrays


@functools.partial(jax.jit, static_argnums=0)
def _follow(attack_of, threat, weights, x, y, targets, noise):
  return attacks.trajectory(
    attack_of(threat), functools.partial(tiny.logits_fn, weights), x, y,
    targets=targets, noise=noise,
  )  # fmt: skip


def follow(attack_of, norm, trace, noise):
  """Where an attack ends, from given noise."""
  threat = ThreatModel(norm.lower(), EPS[norm])
  images = (trace["x"], trace["y"], trace["tgt"])
  return _follow(attack_of, threat, tiny.weights(np.float64), *images, noise)


def same(state, expected, value):
  found = np.asarray(state.found)
  np.testing.assert_array_equal(found, ~expected["robust"])
  np.testing.assert_allclose(value, expected["loss_best"], rtol=0, atol=1e-8)
  np.testing.assert_allclose(state.best, expected["x_best"], rtol=0, atol=1e-8)
  np.testing.assert_allclose(
    np.asarray(state.adv)[found], expected["adv"][found], rtol=0, atol=1e-8
  )


def run_of(trace, name):
  return {
    key: trace[f"{name}/{key}"]
    for key in ("x_best", "loss_best", "robust", "adv")
  }


@pytest.mark.parametrize(
  "norm, loss",
  covering(itertools.product(("Linf", "L2"), ("ce", "dlr", "dlr_t"))),
)
def test_apgd_takes_every_step_of_the_official_one(norm, loss, trace):
  attack_of = functools.partial(
    attacks.Apgd,
    stop=False,
    loss=loss.removesuffix("_t"),
    num_targets=int(loss == "dlr_t"),
  )
  with jax.enable_x64(True):
    state = follow(attack_of, norm, trace, trace[f"noise_{norm}"])
    value = state.best_value
    value = jax.nn.softplus(value) if loss == "ce" else value
    same(state, run_of(trace, f"apgd_{norm}_{loss}"), value)


def test_a_stage_of_apgd_in_l1_takes_every_step_too(trace):
  attack_of = functools.partial(
    attacks.Apgd, stop=False, num_steps=40, radii=(1.0,)
  )
  with jax.enable_x64(True):
    noise = trace["l1_init"] - trace["x"]
    state = follow(attack_of, "L1", trace, noise)
    same(state, run_of(trace, "apgd_L1_ce"), jax.nn.softplus(state.best_value))


@pytest.mark.parametrize("norm", mostly_slow(EPS, "L1"))
def test_fab_takes_every_step_of_the_official_one(norm, trace):
  attack_of = functools.partial(attacks.Fab, num_targets=1)
  with jax.enable_x64(True):
    state = follow(attack_of, norm, trace, None)
  expected = trace[f"fab_{norm}/dist"]
  assert (expected < 1e9).all() and np.asarray(state.found).all()
  np.testing.assert_allclose(state.distance, expected, rtol=0, atol=1e-8)
  np.testing.assert_allclose(
    state.adv, trace[f"fab_{norm}/adv"], rtol=0, atol=1e-8
  )


def test_the_network_is_the_one_of_the_references():
  arrays = tiny.load("tiny")
  got = tiny.logits_fn(tiny.weights(), arrays["x"])
  np.testing.assert_allclose(got, arrays["logits"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
  "num_steps, expected",
  [
    (100, (22, 41, 57, 70, 80, 87, 93, 99)),
    (50, (11, 21, 30, 38, 45)),
    (20, (4, 7, *range(9, 21))),
    (10, tuple(range(2, 11))),
  ],
)
def test_check_points_are_where_the_official_ones_are(num_steps, expected):
  assert tuple(np.flatnonzero(apgd._windows(num_steps))) == expected


@pytest.mark.parametrize(
  "norm, size, expected",
  [
    ("linf", 32, (29, 20, 14, 10, 7, 5, 4, 3)),
    ("linf", 224, (200, 142, 100, 71, 50, 35, 25, 18)),
    ("l2", 32, (29, 21, 15, 11, 7, 5, 5, 3)),
    ("l1", 224, (201, 143, 101, 71, 51, 35, 25, 19)),
  ],
)
def test_squares_shrink_as_the_official_ones_do(norm, size, expected):
  queries = jnp.array([0, 11, 51, 201, 501, 1001, 2001, 4001])
  shape, odd = (size, size, 1), norm != "linf"
  sides = [int(square._side(query, shape, odd)) for query in queries]
  assert tuple(sides) == expected
