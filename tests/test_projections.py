"""Projections: against references, and against what makes a point nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roli_jax import projections
from tests import tiny


@pytest.fixture(scope="module")
def trace():
  return tiny.load("trace")


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_ways_to_a_hyperplane_are_the_references(norm, trace):
  with jax.enable_x64(True):
    got = projections.onto_hyperplane(
      norm.lower(),
      jnp.asarray(trace["proj_t"]),
      jnp.asarray(trace["proj_w"]),
      jnp.asarray(trace["proj_b"]).reshape(-1, 1),
      0.0,
      1.0,
    )
  # Where the plane is out of reach the reference has 0 x inf for w = 0.
  expected = trace[f"proj_{norm}"]
  assert np.isfinite(got).all()
  expected = np.where(np.isnan(expected), 0, expected)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("radius", ["0.3", "3.0", "300.0"])
def test_offsets_of_an_l1_ball_are_the_references(radius, trace):
  y, t = trace["ball_y"], trace["proj_t"]
  with jax.enable_x64(True):
    got = projections.onto_l1_ball(
      jnp.asarray(y),
      jnp.asarray(np.where(y > 0, 1 - t, t)),
      jnp.full((len(y), 1), float(radius)),
    )
  expected = trace[f"ball_{radius}"]
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def _problem(seed):
  rng = np.random.default_rng(seed)
  d = int(rng.integers(1, 12))
  point = rng.choice([0.0, 1.0, 0.25, rng.uniform()], (4, d))
  normal = rng.choice([0.0, 1.0, -1.0, rng.normal(), 1e-5], (4, d))
  level = (normal * point).sum(1, keepdims=True) + rng.normal(size=(4, 1))
  return point, normal, level


@given(
  seed=st.integers(0, 2**31 - 1), norm=st.sampled_from(("linf", "l2", "l1"))
)
def test_the_plane_is_reached_or_the_corner(seed, norm):
  """Ties, faces of the box, normals of 0, planes out of reach."""
  point, normal, level = _problem(seed)
  with jax.enable_x64(True):
    way = np.asarray(
      projections.onto_hyperplane(
        norm, jnp.asarray(point), jnp.asarray(normal), jnp.asarray(level),
        0.0, 1.0,
      )
    )  # fmt: skip
  there = point + way
  assert (there >= -1e-12).all() and (there <= 1 + 1e-12).all()
  gap = ((normal * point).sum(1, keepdims=True) - level)[:, 0]
  sign = np.where(gap < 0, -1, 1)[:, None]
  room = np.where(-np.sign(normal) * sign > 0, 1 - point, point)
  reach = (np.abs(normal) * room).sum(1)
  left = (normal * there).sum(1) - level[:, 0]
  reached = reach >= np.abs(gap)
  np.testing.assert_allclose(left[reached], 0, atol=1e-9)
  corner = np.where(normal != 0, room, 0)
  np.testing.assert_allclose(np.abs(way[~reached]), corner[~reached], atol=1e-9)


@given(
  seed=st.integers(0, 2**31 - 1), norm=st.sampled_from(("linf", "l2", "l1"))
)
def test_no_other_point_of_the_plane_is_nearer(seed, norm):
  point, normal, level = _problem(seed)
  with jax.enable_x64(True):
    way = np.asarray(
      projections.onto_hyperplane(
        norm, jnp.asarray(point), jnp.asarray(normal), jnp.asarray(level),
        0.0, 1.0,
      )
    )  # fmt: skip
  rng = np.random.default_rng(seed)
  others = np.clip(
    point + way + 0.1 * rng.normal(size=(200, *point.shape)), 0, 1
  )
  gap = (normal * point).sum(1) - level[:, 0]
  beyond = ((normal * others).sum(-1) - level[:, 0]) * np.sign(gap) <= 0
  order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
  far = np.linalg.norm(others - point, order, axis=-1)
  ours = np.linalg.norm(way, order, axis=-1)
  reached = np.abs((normal * (point + way)).sum(1) - level[:, 0]) < 1e-9
  assert (far >= ours - 1e-9)[beyond & reached].all()


@given(seed=st.integers(0, 2**31 - 1))
def test_an_order_statistic_is_that_of_a_sort(seed):
  rng = np.random.default_rng(seed)
  values = np.abs(rng.choice([0.0, 1.0, rng.normal(), 1e-30, 1e30], (5, 9)))
  values = values.astype(np.float32)
  at = rng.integers(0, 9, (5, 1))
  got = projections.order_statistic(jnp.asarray(values), jnp.asarray(at))
  expected = np.take_along_axis(np.sort(values, 1), at, 1)
  np.testing.assert_array_equal(got, expected)
