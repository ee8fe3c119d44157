"""AutoAttack against the official one, and against what must be so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import attacks, evaluate, keys, losses
from roli_jax.threat import ThreatModel
from tests import tiny
from tests.covering import mostly_slow

EPS = {"linf": 0.01, "l2": 0.15, "l1": 1.0}
PARTS = {
  "apgd_ce": "apgd-ce",
  "apgd_t": "apgd-t",
  "fab_t": "fab-t",
  "square": "square",
}


@pytest.fixture(scope="module")
def official():
  return tiny.load("official")


def run(name, norm, rows=slice(None), **settings):
  arrays = tiny.load("tiny")
  attack = attacks.build(name, ThreatModel(norm, EPS[norm]), **settings)
  return evaluate.run(
    tiny.logits_fn, arrays["x"][rows], arrays["y"][rows], attack,
    params=tiny.weights(), indices=np.arange(64)[rows],
  )  # fmt: skip


@pytest.mark.passes
@pytest.mark.parametrize("norm", EPS)
def test_flags_and_passes_are_the_official_ones(norm, official, devices):
  """One image more and two less are chance; fewer passes are no wonder."""
  devices(2)
  result = run("autoattack", norm)
  theirs = official[f"{norm}/square"]
  ours = result.robust
  assert (ours & ~theirs).sum() <= 1 and (theirs & ~ours).sum() <= 2
  left = np.ones(64, bool)
  for part, name in PARTS.items():
    left &= result.broken_by != part
    assert abs(left.sum() - official[f"{norm}/{name}"].sum()) <= 2, part
  passes = sum(official[f"{norm}/passes/{name}"] for name in PARTS.values())
  total = result.work.values()
  forward = sum(work.forward + work.padding_forward for work in total)
  backward = sum(work.backward + work.padding_backward for work in total)
  assert forward + backward < 1.1 * passes.sum()
  outside = {c.name: c.verdict for c in result.checks}
  assert outside["ball_and_box"] == "pass"


@pytest.mark.passes
@pytest.mark.parametrize("norm", EPS)
def test_fab_alone_breaks_what_the_official_one_does(norm, official):
  result = run("fab_t", norm)
  differ = result.robust != official[f"{norm}/alone/fab-t"]
  assert differ.sum() <= 1
  assert (result.min_distance[result.broken_by == "fab_t"] <= EPS[norm]).all()
  assert (result.min_distance[result.robust] > EPS[norm]).all()


@pytest.mark.passes
def test_fast_agrees_with_standard_at_a_third_of_the_passes(official):
  result = run("autoattack_fast", "linf")
  assert (result.robust != official["linf/square"]).sum() <= 1
  passes = sum(official[f"linf/passes/{name}"] for name in PARTS.values())
  assert sum(result.passes.values()) < passes.sum() / 3
  assert result.summary()["broken_by"][""] == result.robust.sum()


@pytest.mark.passes
def test_a_curve_is_what_separate_runs_find():
  norm, rows = "linf", slice(0, 24)
  curve = run("curve", norm, rows, num_rounds=5)
  last = curve.clean
  for ratio in (0.5, 1.0, 1.5):
    eps = EPS[norm] * ratio
    attack = attacks.AutoAttack(ThreatModel(norm, eps), num_queries=50)
    arrays = tiny.load("tiny")
    alone = evaluate.run(
      tiny.logits_fn, arrays["x"][rows], arrays["y"][rows], attack,
      params=tiny.weights(),
    )  # fmt: skip
    along = curve.robust_at(eps)
    assert not (along & ~last).any()
    last = along
    assert (along != alone.robust).sum() <= 1
  np.testing.assert_array_equal(curve.robust, curve.robust_at(EPS[norm]))


@functools.partial(jax.jit, static_argnums=0)
def _inside(attack, images, labels, image_keys):
  logits_fn = functools.partial(tiny.logits_fn, tiny.weights())
  return attack(logits_fn, images, labels, image_keys)


@pytest.mark.parametrize(
  "name, norm",
  [
    ("apgd_ce", "l1"),
    pytest.param("apgd_t", "linf", marks=pytest.mark.slow),
    pytest.param("fab_t", "l2", marks=pytest.mark.slow),
  ],
)
def test_inside_anothers_jit_it_breaks_the_same_images(name, norm):
  rows = slice(0, 24)
  alone = run(name, norm, rows, num_steps=20)
  arrays = tiny.load("tiny")
  images, labels = arrays["x"][rows], arrays["y"][rows]
  attack = attacks.build(name, ThreatModel(norm, EPS[norm]), num_steps=20)
  key = keys.stream(keys.root(0), attack.name)
  adv = _inside(attack, images, labels, keys.per_image(key, np.arange(24)))
  logits = tiny.logits_fn(tiny.weights(), adv)
  broken = np.asarray(~losses.correct(logits, labels))
  assert (broken != ~alone.robust).sum() <= 1
  _, in_ball, in_box = attack.threat.measure(np.asarray(adv), images)
  assert in_ball.all() and in_box.all()


def test_a_whole_ensemble_runs_inside_a_jit():
  arrays = tiny.load("tiny")
  images, labels = arrays["x"][:8], arrays["y"][:8]
  attack = attacks.AutoAttack(
    ThreatModel("linf", EPS["linf"]), num_steps=10, num_queries=20
  )
  image_keys = keys.per_image(keys.root(0), np.arange(8))
  adv = np.asarray(_inside(attack, images, labels, image_keys))
  logits = tiny.logits_fn(tiny.weights(), adv)
  broken = np.asarray(logits.argmax(-1)) != labels
  assert broken.any() and not broken.all()
  np.testing.assert_array_equal(adv[~broken], images[~broken])


def test_memory_does_not_grow_with_the_steps():
  arrays = tiny.load("tiny")
  images, labels = arrays["x"][:8], arrays["y"][:8]
  image_keys = keys.per_image(keys.root(0), np.arange(8))
  sizes = set()
  for num_steps in (10, 1000):
    attack = attacks.build(
      "apgd_ce", ThreatModel("l2", 0.1), num_steps=num_steps
    )
    compiled = _inside.lower(attack, images, labels, image_keys).compile()
    sizes.add(compiled.memory_analysis().temp_size_in_bytes)
  assert len(sizes) == 1


def test_names_say_what_is_not_standard():
  threat = ThreatModel("linf", 0.1)
  names = [
    attacks.build("autoattack", threat).name,
    attacks.build("autoattack", threat, num_steps=10).name,
    attacks.build("autoattack_fast", threat).name,
    attacks.build("autoattack_plus", threat).name,
  ]
  assert names == [
    "autoattack", "autoattack_custom", "autoattack_fast", "autoattack_plus",
  ]  # fmt: skip


@pytest.mark.parametrize(
  "norm, version, expected",
  [
    ("linf", "standard", "apgd_ce 1 1, apgd_t 9 1, fab_t 9 1, square 1 1"),
    ("l1", "standard", "apgd_ce 1 5, apgd_t 5 1, fab_t 9 1, square 1 1"),
    (
      "l2", "plus",
      "apgd_ce 1 5, apgd_dlr 1 5, fab 1 5, square 1 1, apgd_t 9 1, fab_t 9 1",
    ),
    ("linf", "rand", "apgd_ce 1 1, apgd_dlr 1 1"),
  ],
)  # fmt: skip
def test_ensembles_are_composed_as_published(norm, version, expected):
  """Attacks in their order, with the targets and restarts of each."""
  ensemble = attacks.AutoAttack(ThreatModel(norm, 0.1), version=version)
  said = ", ".join(
    f"{p.name} {max(1, p.num_targets)} {p.num_restarts}" for p in ensemble.parts
  )
  assert said == expected


def _noisy(images, key):
  w = jax.random.normal(jax.random.key(3), (4, 3))
  noise = 0.05 * jax.random.normal(key, images.shape)
  return (images + noise).reshape(images.shape[0], 4) @ w


def test_a_randomised_function_is_attacked_in_expectation():
  """The gradient of one draw, or the mean of twenty; twenty others judge."""
  images = (
    np.random.default_rng(0).uniform(0.3, 0.7, (16, 2, 2, 1)).astype("f4")
  )
  w = jax.random.normal(jax.random.key(3), (4, 3))
  labels = np.asarray((images.reshape(16, 4) @ w).argmax(-1))
  attack = attacks.AutoAttack(
    ThreatModel("linf", 0.3), version="rand", num_steps=10
  )
  result = evaluate.run(_noisy, images, labels, attack, stochastic=True)
  assert result.clean.mean() > 0.7 and result.robust.mean() < 0.5
  again = evaluate.run(
    _noisy, images[::-1], labels[::-1], attack, stochastic=True,
    indices=np.arange(16)[::-1], batch_size=8,
  )  # fmt: skip
  np.testing.assert_array_equal(result.robust, again.robust[::-1])
  np.testing.assert_allclose(result.adv, again.adv[::-1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [2, 3])
def test_few_classes_have_substitutes_that_are_said(num_classes):
  rng = np.random.default_rng(0)
  images = rng.uniform(size=(16, 5)).astype(np.float32)
  w = jnp.asarray(rng.normal(size=(5, num_classes)), jnp.float32)

  def logits_fn(x):
    return x @ w

  labels = np.asarray(logits_fn(images).argmax(-1))
  attack = attacks.AutoAttack(
    ThreatModel("l2", 0.2), num_steps=10, num_queries=10
  )
  result = evaluate.run(logits_fn, images, labels, attack)
  notes = " ".join(result.notes)
  assert f"{num_classes - 1} targets" in notes
  assert ("margin" in notes) == (num_classes < 4)
  assert result.summary()["notes"] == result.notes


@pytest.mark.parametrize(
  "shape, norm",
  mostly_slow(
    [
      ((3,), "linf"), ((4, 6), "l2"), ((5, 7, 3), "l1"), ((2, 2, 1), "l2"),
      ((1, 9, 2), "l1"), ((2, 3, 1), "linf"),
    ],
    ((3,), "linf"), ((4, 6), "l2"), ((1, 9, 2), "l1"),
  ),
)  # fmt: skip
def test_images_of_any_shape_are_attacked(shape, norm):
  rng = np.random.default_rng(0)
  images = rng.uniform(0.2, 0.8, (8, *shape)).astype(np.float32)
  w = jnp.asarray(rng.normal(size=(int(np.prod(shape)), 4)), jnp.float32)

  def logits_fn(x):
    return x.reshape(x.shape[0], -1) @ w

  labels = np.asarray(logits_fn(images).argmax(-1))
  eps = {"linf": 0.2, "l2": 0.2 * len(w) ** 0.5, "l1": 0.2 * len(w)}[norm]
  square = attacks.Square(ThreatModel(norm, eps), num_queries=60)
  result = evaluate.run(logits_fn, images, labels, square)
  assert not result.invalid.any()
  assert not result.robust.all()
