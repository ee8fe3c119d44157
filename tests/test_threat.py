"""The ball and the box, against brute force and by properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from roli_jax import keys
from roli_jax.threat import NORMS, ThreatModel

RADII = {"linf": 0.2, "l2": 0.7, "l1": 1.5}
PIXELS = hnp.arrays(np.float32, (4, 3, 2), elements=st.floats(0, 1, width=32))
OFFSETS = hnp.arrays(np.float32, (4, 3, 2), elements=st.floats(-3, 3, width=32))


@pytest.fixture(params=NORMS)
def threat(request):
  return ThreatModel(request.param, eps=RADII[request.param])


def inside(threat, images, origin):
  far = threat.distance(images.astype(np.float64), origin.astype(np.float64))
  assert (far <= threat.eps * (1 + 1e-5)).all()
  assert images.min() >= 0 and images.max() <= 1


@given(origin=PIXELS, offset=OFFSETS, norm=st.sampled_from(NORMS))
def test_a_projection_is_inside_and_projects_to_itself(origin, offset, norm):
  threat = ThreatModel(norm, eps=RADII[norm])
  once = np.asarray(threat.project(origin + offset, origin))
  inside(threat, once, origin)
  np.testing.assert_allclose(threat.project(once, origin), once, atol=2e-6)


@given(origin=PIXELS, offset=OFFSETS)
def test_a_point_inside_stays_where_it_is(origin, offset):
  small = np.clip(origin + 0.01 * offset, 0, 1)
  for norm in NORMS:
    threat = ThreatModel(norm, eps=RADII[norm])
    np.testing.assert_allclose(threat.project(small, origin), small, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_no_point_of_a_fine_grid_is_nearer(norm):
  """Two pixels: all of the ball and the box is searched."""
  axis = np.linspace(0, 1, 401)
  grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2, 1)
  rng = np.random.default_rng(0)
  for _ in range(20):
    origin = rng.choice([0.0, 1.0, rng.uniform()], (1, 2, 1))
    target = origin + rng.normal(size=(1, 2, 1))
    threat = ThreatModel(norm, eps=0.35)
    near = np.asarray(threat.project(target.astype("f4"), origin.astype("f4")))
    allowed = grid[threat.distance(grid, origin.repeat(len(grid), 0)) <= 0.35]
    best = np.linalg.norm((allowed - target)[..., 0], axis=1).min()
    assert np.linalg.norm((near - target)[0, :, 0]) <= best + 1e-3


def test_samples_fill_the_ball(threat):
  origin = np.full((4000, 2, 1), 0.5, np.float32)
  threat = ThreatModel(threat.norm, eps=0.4)
  drawn = threat.sample(keys.per_image(keys.root(0), np.arange(4000)), origin)
  far = np.asarray(threat.distance(drawn, jnp.asarray(origin)))
  assert far.max() <= 0.4 * (1 + 1e-5)
  # Uniform in two dimensions: a quarter lies within half of the radius.
  assert abs((far < 0.2).mean() - 0.25) < 0.03
  assert np.abs(np.asarray(drawn).mean(0) - 0.5).max() < 0.02


def test_samples_stay_in_the_box(threat):
  origin = np.zeros((64, 3, 2), np.float32)
  image_keys = keys.per_image(keys.root(0), np.arange(64))
  inside(threat, np.asarray(threat.sample(image_keys, origin)), origin)


@given(grads=OFFSETS, norm=st.sampled_from(NORMS))
def test_the_steepest_direction_has_unit_length(grads, norm):
  threat = ThreatModel(norm, eps=1.0)
  images = np.full_like(grads, 0.5)
  ahead = np.asarray(threat.steepest(grads, images))
  length = threat.distance(ahead.astype("f8"), np.zeros_like(ahead, "f8"))
  flat = np.abs(grads).reshape(4, -1).max(1) < 1e-6
  np.testing.assert_allclose(length[~flat], 1.0, rtol=1e-4)
  assert (ahead * grads >= 0).all()


def test_l1_does_not_push_against_the_box():
  images = np.array([[[1.0], [0.5]]], np.float32)
  grads = np.array([[[5.0], [1.0]]], np.float32)
  ahead = ThreatModel("l1", eps=1.0).steepest(grads, images)
  np.testing.assert_array_equal(ahead, [[[0.0], [1.0]]])


def test_a_zero_gradient_moves_nothing(threat):
  still = jnp.zeros((2, 3, 2))
  np.testing.assert_array_equal(threat.steepest(still, still + 0.5), still)


def test_a_threat_model_is_data_but_for_its_norm():
  a, b = ThreatModel("l2", 0.5), ThreatModel("l2", 1.0)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert jax.tree.structure(a) != jax.tree.structure(ThreatModel("l1", 0.5))


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf"), 8.0])
def test_radii_that_can_not_be_meant_are_refused(eps):
  with pytest.raises(ValueError, match="eps"):
    ThreatModel("linf", eps=eps)


def test_eight_is_taken_for_what_it_was_meant():
  with pytest.raises(ValueError, match=r"8\.0/255"):
    ThreatModel("linf", eps=8.0)
  with pytest.raises(ValueError, match="linf"):
    ThreatModel("max", eps=0.1)
