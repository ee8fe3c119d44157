"""What every attack promises."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roli_jax import attacks, keys, losses
from roli_jax.threat import ThreatModel
from tests.covering import covering, mostly_slow

NORMS = {"linf": 0.1, "l2": 0.6, "l1": 2.0}
ATTACKS = {
  "fgsm": {},
  "pgd": {"num_steps": 5},
  "pgd restarts": {"num_steps": 3, "num_restarts": 3},
  "pgd last": {"num_steps": 5, "keep": "last"},
  "pgd margin": {"num_steps": 5, "loss": "margin"},
  "pgd from the image": {"num_steps": 5, "random_start": False},
  "apgd_ce": {"num_steps": 10},
  "apgd_dlr": {"num_steps": 10, "stop": False},
  "apgd_t": {"num_steps": 10, "num_targets": 2},
  "fab_t": {"num_steps": 5, "num_targets": 2},
  "square": {"num_queries": 40},
}
# These raise a loss of their own, or look for the nearest image.
CLIMBERS = [name for name in ATTACKS if name not in ("fab_t", "square")]


def build(name, norm, eps=None):
  threat = ThreatModel(norm, eps=NORMS[norm] if eps is None else eps)
  return attacks.build(name.split()[0], threat, **ATTACKS[name])


@pytest.fixture(params=NORMS)
def norm(request):
  return request.param


PAIRS = covering(itertools.product(ATTACKS, NORMS))


@pytest.fixture
def attack(name, norm):
  return build(name, norm)


of_pairs = pytest.mark.parametrize("name, norm", PAIRS)


@functools.partial(jax.jit, static_argnums=0)
def _run(logits_fn, attack, images, labels, image_keys):
  return attack(logits_fn, images, labels, image_keys)


def run(attack, toy, rows=slice(None)):
  """One program for all of a kind: any rows, but always so many."""
  logits_fn, images, labels = toy
  image_keys = keys.per_image(keys.root(0), np.arange(len(images))[rows])
  adv = _run(logits_fn, attack, images[rows], labels[rows], image_keys)
  return np.asarray(adv)


@of_pairs
def test_it_stays_in_the_ball_and_the_box(attack, toy):
  adv = run(attack, toy)
  far, in_ball, in_box = attack.threat.measure(adv, toy[1])
  assert in_ball.all() and in_box.all()
  assert far.max() > 0.5 * NORMS[attack.threat.norm]


@of_pairs
def test_it_raises_its_surrogate(attack, name, toy):
  logits_fn, images, labels = toy
  if name not in CLIMBERS:
    return
  climb = losses.SURROGATES[attack.loss].climb
  before = climb(logits_fn(images), labels)
  after = climb(logits_fn(run(attack, toy)), labels)
  assert (after > before).mean() > 0.9


@of_pairs
def test_an_image_is_attacked_alone(attack, toy):
  whole = run(attack, toy)
  rows = np.r_[8:24, 8:24, 8:16]
  np.testing.assert_array_equal(whole[rows], run(attack, toy, rows))
  backwards = run(attack, toy, slice(None, None, -1))
  np.testing.assert_array_equal(whole, backwards[::-1])


@of_pairs
def test_eps_zero_is_the_identity(attack, toy):
  np.testing.assert_array_equal(run(attack.scaled(0.0), toy), toy[1])


@of_pairs
def test_another_eps_or_step_compiles_nothing(attack, toy):
  run(attack, toy)
  compiled = _run._cache_size()
  run(attack.scaled(0.5), toy)
  assert _run._cache_size() == compiled


def _flat(images):
  return jnp.zeros((images.shape[0], 5))


@pytest.mark.parametrize(
  "name, norm", [("pgd", "l2"), ("apgd_ce", "l1"), ("apgd_t", "linf"),
                 ("fab_t", "l2"), ("fab_t", "l1")]
)  # fmt: skip
def test_a_flat_loss_ends_in_the_ball_without_nan(name, norm, toy):
  attack = build(name, norm)
  adv = run(attack, (_flat, *toy[1:]))
  _, in_ball, in_box = attack.threat.measure(adv, toy[1])
  assert in_ball.all() and in_box.all()


@pytest.mark.parametrize(
  "name, norm", [("pgd", "l1"), ("pgd margin", "l2"), ("apgd_dlr", "linf"),
                 ("apgd_dlr", "l2"), ("fab_t", "l1")]
)  # fmt: skip
def test_huge_logits_give_finite_images(name, norm, toy):
  logits_fn, images, labels = toy
  huge = (lambda x: 1e4 * logits_fn(x), images, labels)
  adv = run(build(name, norm), huge)
  assert np.isfinite(adv).all()


def test_each_image_can_have_its_own_eps(norm, toy):
  _, images, _ = toy
  eps = np.linspace(0, NORMS[norm], len(images), dtype=np.float32)
  adv = run(build("pgd", norm, eps), toy)
  far, in_ball, in_box = ThreatModel(norm, eps).measure(adv, images)
  assert in_ball.all() and in_box.all()
  assert far[0] == 0 and (far[5:] > 0.5 * eps[5:]).all()


@pytest.mark.parametrize("norm", mostly_slow(NORMS, "linf"))
def test_more_work_breaks_no_fewer(norm, toy):
  logits_fn, _, labels = toy

  def broken(attack):
    return (~losses.correct(logits_fn(run(attack, toy)), labels)).sum()

  threat = ThreatModel(norm, NORMS[norm] / 3)
  weak = attacks.build("pgd", threat, num_steps=1, keep="last")
  pgd = attacks.build("pgd", threat, num_steps=20)
  more = attacks.build("pgd", threat, num_steps=20, num_restarts=5)
  assert 0 < broken(weak) <= broken(pgd) <= broken(more)
  apgd = attacks.build("apgd_ce", threat, num_steps=20)
  towards = attacks.build("apgd_t", threat, num_steps=20)
  assert broken(pgd) <= broken(apgd) + 1
  assert max(broken(apgd), broken(more)) <= broken(towards) + 1


def test_fgsm_is_one_signed_step_of_eps(toy):
  logits_fn, images, labels = toy

  def loss(x):
    return losses.cross_entropy(logits_fn(x), labels).sum()

  expected = np.clip(images + 0.1 * np.sign(jax.grad(loss)(images)), 0, 1)
  adv = run(build("fgsm", "linf"), toy)
  np.testing.assert_allclose(adv, expected, atol=1e-7)


def _reference_pgd(toy, keep, num_steps=6, eps=0.1):
  """PGD as in the RoLI reference, in a Python loop, from the clean image."""
  logits_fn, images, labels = toy

  def each(x):
    return losses.cross_entropy(logits_fn(x), labels)

  x, seen = jnp.asarray(images), []
  for _ in range(num_steps + 1):
    seen.append((np.asarray(x), np.asarray(each(x))))
    grads = jax.grad(lambda x: each(x).sum())(x)
    x = jnp.clip(x + eps / 4 * jnp.sign(grads), images - eps, images + eps)
    x = jnp.clip(x, 0, 1)
  points, values = (np.stack(s) for s in zip(*seen, strict=True))
  if keep == "last":
    return points[-1]
  if keep == "batch":
    return points[values.mean(1).argmax()]
  return points[values.argmax(0), np.arange(len(images))]


@pytest.mark.parametrize("keep", ["sample", "batch", "last"])
def test_pgd_keeps_what_a_plain_loop_keeps(keep, toy):
  threat = ThreatModel("linf", eps=0.1)
  attack = attacks.Pgd(threat, num_steps=6, random_start=False, keep=keep)
  np.testing.assert_allclose(
    run(attack, toy), _reference_pgd(toy, keep), atol=1e-6
  )


def test_large_logits_do_not_stop_it(toy):
  """At 1,000 times the logits, CE and its gradient are 0 in float32."""
  logits_fn, images, labels = toy
  threat = ThreatModel("linf", eps=0.05)
  attack = attacks.Pgd(threat, num_steps=5)

  def broken(scale):
    scaled = (lambda x: scale * logits_fn(x), images, labels)
    return (~losses.correct(logits_fn(run(attack, scaled)), labels)).sum()

  assert broken(1000.0) >= broken(1.0) - 1 >= 5


def test_no_steps_return_the_random_start(toy):
  threat = ThreatModel("linf", eps=0.1)
  start = run(attacks.Pgd(threat, num_steps=0), toy)
  assert 0.05 < np.abs(start - toy[1]).max() <= 0.1 + 1e-7


def test_trades_starts_within_a_few_thousandths(toy):
  logits_fn, images, _ = toy
  attack = attacks.Pgd(ThreatModel("linf", 0.1), num_steps=0, loss="kl")
  start = run(attack, (logits_fn, images, np.asarray(logits_fn(images))))
  assert 0 < np.abs(start - images).max() < 6e-3


def test_passes_are_counted():
  threat = ThreatModel("linf", eps=0.1)
  assert attacks.Pgd(threat, num_steps=7).passes == (8, 7)
  assert attacks.Pgd(threat, num_steps=7, keep="last").passes == (7, 7)
  assert attacks.Pgd(threat, num_steps=7, num_restarts=3).passes == (24, 21)


@pytest.mark.parametrize(
  "name, fields, message",
  [
    ("pdg", {}, "did you mean 'pgd'"),
    ("pgd", {"steps": 3}, "num_steps"),
    ("pgd", {"num_steps": -1}, "num_steps"),
    ("pgd", {"num_restarts": 0}, "num_restarts"),
    ("pgd", {"keep": "best"}, "keep"),
    ("pgd", {"loss": "mse"}, "margin"),
    ("pgd", {"step_size": 2.0}, "step_size"),
    ("pgd", {"step_size": -0.1}, "step_size"),
    ("pgd", {"step_size": "half"}, "eps/4"),
    ("fgsm", {"num_steps": 3}, "fgsm"),
    ("apgd_ce", {"num_steps": 0}, "num_steps"),
    ("apgd_ce", {"loss": "mse"}, "dlr"),
    ("apgd_t", {"num_targets": -1}, "num_targets"),
    ("apgd_t", {"num_restarts": 0}, "num_restarts"),
    ("fab_t", {"num_steps": 0}, "num_steps"),
    ("square", {"num_queries": -1}, "num_queries"),
    ("autoatack", {}, "did you mean 'autoattack'"),
  ],
)
def test_what_can_not_be_meant_is_refused(name, fields, message):
  with pytest.raises(ValueError, match=message):
    attacks.build(name, ThreatModel("linf", eps=0.1), **fields)


FEW = {
  "pgd": {"num_steps": 2},
  "apgd_ce": {"num_steps": 4},
  "apgd_t": {"num_steps": 4, "num_targets": 2},
  "fab_t": {"num_steps": 3, "num_targets": 2},
  "square": {"num_queries": 4},
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _found(name, norm, eps, images, w, key):
  attack = attacks.build(name, ThreatModel(norm, eps), **FEW[name])
  return attack(
    lambda x: x.reshape(8, 6) @ w,
    images,
    jnp.zeros(8, jnp.int32),
    keys.per_image(key, np.arange(8)),
  )


@pytest.mark.parametrize("name, norm", covering(itertools.product(FEW, NORMS)))
@given(
  eps=st.floats(0, 1, width=32),
  scale=st.sampled_from((0.0, 1e-4, 1.0, 1e4)),
  seed=st.integers(0, 2**31 - 1),
)
def test_any_radius_and_key_stay_inside(name, norm, eps, scale, seed):
  rng = np.random.default_rng(seed)
  images = rng.choice([0.0, 1.0, 0.5, rng.uniform()], (8, 3, 2)).astype("f4")
  w = jnp.asarray(scale * rng.normal(size=(6, 3)), jnp.float32)
  adv = _found(name, norm, jnp.float32(eps), images, w, keys.root(seed))
  adv, threat = np.asarray(adv), ThreatModel(norm, eps=eps)
  assert np.isfinite(adv).all()
  _, in_ball, in_box = threat.measure(adv, images)
  assert in_ball.all() and in_box.all()
