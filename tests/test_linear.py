"""Linear functions, whose distances have a closed form, the box included."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import attacks, evaluate, projections
from roli_jax.threat import ThreatModel
from tests.covering import mostly_slow

ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
NUM = 12


def logits_fn(params, images):
  w, b = params
  return (images - 0.5) @ w + b.reshape(1, -1)


def problem(num_classes, spread, seed=0, num_values=30):
  """Weights and biases, images `spread` around grey, and labels.

  Classes but the first ten are far below: the nearest is among those.
  """
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(num_values, num_classes)).astype(np.float32)
  b = np.where(np.arange(num_classes) < 10, 0, -50).astype(np.float32)
  images = rng.uniform(0.5 - spread, 0.5 + spread, (NUM, num_values))
  images = images.astype(np.float32)
  labels = logits_fn((w, b), images).argmax(1)
  return (w, b), images, labels


def distances(params, images, labels, norm):
  """To the nearest boundary of another class, within the box."""
  w, _ = params
  best = np.full(NUM, np.inf)
  for k in range(min(10, w.shape[1])):
    normal = (w[:, [k]] - w[:, labels]).T.astype(np.float64)
    level = 0.5 * normal.sum(1, keepdims=True)
    way = np.asarray(
      projections.onto_hyperplane(
        norm, jnp.asarray(images), jnp.asarray(normal, jnp.float32),
        jnp.asarray(level, jnp.float32), 0.0, 1.0,
      ),
      np.float64,
    )  # fmt: skip
    there = (normal * (images + way - 0.5)).sum(1)
    far = np.linalg.norm(way, ORDER[norm], axis=1)
    reached = (labels != k) & (there > -1e-4)
    best = np.where(reached, np.minimum(best, far), best)
  assert np.isfinite(best).all()
  return best.astype(np.float32)


def broken(problem, attack):
  params, images, labels = problem
  result = evaluate.run(logits_fn, images, labels, attack, params=params,
                        batch_size=NUM)  # fmt: skip
  assert not result.invalid.any()
  return ~result.robust, result


def ensemble(norm, eps):
  return attacks.AutoAttack(ThreatModel(norm, eps), num_queries=20)


@pytest.mark.parametrize(
  "num_classes, norm",
  mostly_slow(
    itertools.product((2, 3, 4, 10), ("linf", "l2")), (2, "l2"), (10, "linf")
  ),
)
def test_what_is_near_enough_breaks_and_nothing_else(num_classes, norm):
  """Grey images: the box is far away."""
  given = problem(num_classes, 0.05)
  far = distances(*given, norm)
  assert not broken(given, ensemble(norm, 0.999 * far))[0].any()
  assert broken(given, ensemble(norm, 1.001 * far))[0].all()


def test_linf_breaks_at_the_box_too():
  given = problem(4, 0.5)
  far = distances(*given, "linf")
  assert not broken(given, ensemble("linf", 0.999 * far))[0].any()
  assert broken(given, ensemble("linf", 1.001 * far))[0].all()


@pytest.mark.slow
def test_of_a_thousand_classes_the_nearest_is_found():
  given = problem(1000, 0.05)
  far = distances(*given, "linf")
  attack = attacks.build("apgd_t", ThreatModel("linf", 1.001 * far))
  assert broken(given, attack)[0].all()
  attack = attacks.build("apgd_t", ThreatModel("linf", 0.999 * far))
  assert not broken(given, attack)[0].any()


@pytest.mark.parametrize(
  "norm, spread",
  [
    ("l2", 0.5),
    pytest.param("l1", 0.5, marks=pytest.mark.slow),
    pytest.param("l1", 0.05, marks=pytest.mark.slow),
  ],
)
def test_where_steps_are_not_exact_nothing_breaks_too_early(norm, spread):
  """APGD in L2 at the box and in L1: most fall at 1.05 times the distance."""
  given = problem(4, spread)
  far = distances(*given, norm)
  assert not broken(given, ensemble(norm, 0.999 * far))[0].any()
  assert broken(given, ensemble(norm, 1.05 * far))[0].mean() > 0.9


@pytest.mark.parametrize("norm", ORDER)
@pytest.mark.parametrize("name", ["fab_t", "fab"])
def test_fab_finds_the_distance_within_a_hundredth(norm, name):
  given = problem(4, 0.5)
  far = distances(*given, norm)
  attack = attacks.build(name, ThreatModel(norm, 1.0))
  found = broken(given, attack)[1].min_distance
  assert (found >= 0.9999 * far).all()
  np.testing.assert_allclose(found, far, rtol=0.01)


def test_each_image_has_its_own_least_radius_in_the_curve():
  given = problem(4, 0.5)
  far = distances(*given, "linf")
  attack = attacks.Curve(ThreatModel("linf", float(far.max())), num_rounds=3)
  found = broken(given, attack)[1].min_distance
  assert (found >= 0.9999 * far).all()
  np.testing.assert_allclose(found, far, rtol=0.01)
