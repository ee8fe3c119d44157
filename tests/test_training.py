"""What surrounds a step: the inner attack of a stage, AWP, schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import glyphs_roli
from roli_jax import (
  attacks,
  keys,
  losses,
  models,
  objectives,
  peft,
  state,
  step,
)
from roli_jax.experiment.build import build_training_attack
from roli_jax.experiment.run import build_run
from roli_jax.models import heads
from roli_jax.optim import schedules
from roli_jax.threat import ThreatModel

BALL = ThreatModel("linf", eps=0.1)
TINY = models.Model(
  name="tiny",
  backbone=models.Vit(patch=4, width=8, depth=1, num_heads=2, hidden=8),
  head=heads.linear(3, "small"),
  num_classes=3,
  image_size=8,
  mean=(0.5,),
  std=(0.5,),
)


def inner(lowered="at", **own):
  config = glyphs_roli.get_config("init=ranli").to_dict()
  config["adapt"]["attack"] |= own
  criterion = objectives.build({"name": lowered})
  return build_training_attack(build_run(config), "adapt", criterion)


def test_a_stage_trains_against_the_configs_attack_unless_it_has_its_own():
  assert inner() == attacks.build("pgd", BALL, num_steps=7, step_size="eps/4")
  assert inner(num_steps=3).num_steps == 3
  assert inner(name="fgsm") == attacks.Fgsm(BALL)
  quick = inner(name="fgsm", random_start=True)
  assert quick.random_start and quick.name == "fgsm_rs"
  climbs = inner(name="apgd_ce", num_steps=10, random_start=False)
  assert isinstance(climbs, attacks.ApgdMaxLoss)
  assert (climbs.num_steps, climbs.random_start) == (10, False)


def test_trades_is_attacked_by_kl_unless_the_stage_says_otherwise():
  assert inner("trades").loss == "kl"
  assert inner("trades", loss="ce").loss == "ce"
  guides = inner("trades", name="apgd_ce", num_steps=10)
  assert guides.loss == "ce"  # it starts at a random image, where KL is 0
  assert inner("trades", name="fgsm", random_start=True).loss == "kl"


def test_training_by_aimed_or_restarted_searches_is_refused():
  with pytest.raises(ValueError, match="no targets"):
    inner(name="apgd_t")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_apgd_in_training_finds_each_images_highest_loss(norm, toy):
  logits_fn, images, labels = toy
  labels = np.where(
    np.arange(40) < 8, (labels + 1) % 5, labels
  )  # misclassified
  radius = {"linf": 0.05, "l2": 0.5, "l1": 2.0}[norm]
  ball = ThreatModel(norm, eps=radius)
  image_keys = keys.per_image(keys.root(0), np.arange(40))

  def found(attack):
    adv = attack(logits_fn, jnp.asarray(images), labels, image_keys)
    _, inside, in_box = ball.measure(np.asarray(adv), images)
    assert inside.all() and in_box.all()
    return np.asarray(losses.cross_entropy(logits_fn(adv), labels))

  clean = np.asarray(losses.cross_entropy(logits_fn(images), labels))
  for start in (True, False):
    apgd = attacks.build("apgd_ce", ball, num_steps=10, random_start=start)
    climbed = found(apgd.for_training(""))
    assert (climbed > clean).mean() > 0.95
    assert climbed.mean() >= found(apgd).mean()
    assert climbed[:8].mean() > clean[:8].mean() + 0.1


def test_fgsm_for_training_starts_at_random_and_steps_further(toy):
  logits_fn, images, labels = toy
  attack = attacks.build("fgsm", BALL, random_start=True)
  image_keys = keys.per_image(keys.root(0), np.arange(40))
  adv = np.asarray(attack(logits_fn, jnp.asarray(images), labels, image_keys))
  moved = np.abs(adv - images)
  assert moved.max() <= 0.1 + 1e-6
  inner_pixels = (images > 0.1) & (images < 0.9)
  at_edge = np.isclose(moved, 0.1, atol=1e-6)[inner_pixels].mean()
  # A uniform start and a step of 1.25 eps: 1 - .75 / 2 end at an edge.
  assert 0.5 < at_edge < 0.8


def one_step(objective, awp, seed=0, tx=None):
  tx = tx or optax.sgd(0.1)
  attack = attacks.build("pgd", BALL, num_steps=2)
  train_step = step.make_train_step(
    TINY, peft.full(), objective, attack, schedules.ramp(10), tx,
    awp=awp, num_steps=10,
  )  # fmt: skip
  params, stats = TINY.init(keys.root(0))
  now = state.create(params, stats, peft.full().trains(params), tx)
  rng = np.random.default_rng(seed)
  batch = {
    "image": rng.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8),
    "label": rng.integers(0, 3, 16).astype(np.int32),
    "index": np.arange(16, dtype=np.uint32),
  }
  return jax.jit(train_step), now, batch


def test_awp_takes_the_gradient_where_the_loss_is_higher():
  weights = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.ones(2)}
  grads = {"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]]), "bias": jnp.ones(2)}
  awp = step.WeightAttack(gamma=0.1)
  moved = awp.moved(weights, grads, 1.0)
  np.testing.assert_allclose(moved["kernel"], [[3.0, 0.5], [0.0, 4.0]])
  np.testing.assert_array_equal(moved["bias"], weights["bias"])
  still = awp.moved(weights, grads, 0.0)
  np.testing.assert_array_equal(still["kernel"], weights["kernel"])
  none = awp.moved(weights, jax.tree.map(jnp.zeros_like, grads), 1.0)
  np.testing.assert_array_equal(none["kernel"], weights["kernel"])


def test_awp_is_the_gradient_at_the_moved_weights():
  awp = step.WeightAttack(gamma=0.05)
  train_step, now, batch = one_step(losses.Clean(), awp)
  after, _ = train_step(now, batch, keys.root(0))

  def loss(params):
    images = batch["image"] / np.float32(255)
    logits = TINY.logits(params, {}, images)
    return losses.cross_entropy(logits, batch["label"]).mean()

  moved = awp.moved(now.params, jax.grad(loss)(now.params), 1.0)
  expected = jax.tree.map(
    lambda w, g: w - 0.1 * g, now.params, jax.grad(loss)(moved)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    after.params, expected,
  )  # fmt: skip


@pytest.mark.slow
def test_awp_waits_until_it_begins():
  steps = {
    begin: one_step(losses.At(), step.WeightAttack(0.05, begin))
    for begin in (0.0, 0.5)
  }
  plain = one_step(losses.At(), step.WeightAttack())
  results = {}
  for name, (train_step, now, batch) in {**steps, "none": plain}.items():
    for begun in (0, 5):
      at = dataclasses.replace(now, step=jnp.asarray(begun, jnp.int32))
      after, _ = train_step(at, batch, keys.root(0))
      results[name, begun] = np.asarray(after.params.head["kernel"])
  # Another program, which rounds otherwise.
  np.testing.assert_allclose(results[0.5, 0], results["none", 0], atol=1e-7)
  assert not np.allclose(results[0.5, 5], results["none", 5], atol=1e-6)
  np.testing.assert_allclose(results[0.5, 5], results[0.0, 5], atol=1e-7)


@pytest.mark.parametrize(
  "fields", [{"gamma": -0.1}, {"gamma": 0.1, "begin": 2}]
)
def test_a_perturbation_that_can_not_be_is_refused(fields):
  with pytest.raises(ValueError, match="awp"):
    step.WeightAttack(**fields)


def test_epsilon_scheduling_follows_the_published_points():
  ramp = schedules.ramp(50, 12 / 50, 37 / 50)
  values = [float(ramp(jnp.asarray(t))) for t in (11.0, 12.0, 24.5, 37.0)]
  np.testing.assert_allclose(values, [0, 0, 0.5, 1], atol=1e-6)
