"""Targeted attacks: labels are targets, and success is reaching them."""

import numpy as np
import pytest

from roli_jax import attacks, evaluate
from roli_jax.threat import ThreatModel

# The budget of each, small: the network is.
BUDGETS = {
  "fgsm": {},
  "pgd": {"num_steps": 10},
  "apgd_ce": {"num_steps": 10},
  "apgd_dlr": {"num_steps": 10},
  "fab": {"num_steps": 10},
  "square": {"num_queries": 60},
}
BALL = ThreatModel("linf", eps=0.1)


def build(name, threat=BALL, targeted=True):
  return attacks.build(name, threat, targeted=targeted, **BUDGETS[name])


def second(logits):
  """The class that comes second, of each image."""
  return np.asarray(logits).argsort(-1)[:, -2].astype(np.int32)


@pytest.mark.parametrize("name", BUDGETS)
def test_it_reaches_targets_within_the_ball(toy, name):
  logits_fn, images, _ = toy
  targets = second(logits_fn(images))
  result = evaluate.run(logits_fn, images, targets, build(name))
  reached = np.asarray(logits_fn(result.adv)).argmax(-1) == targets
  np.testing.assert_array_equal(reached, ~result.robust)
  assert result.clean.all() and not result.invalid.any()
  assert np.abs(result.adv - images).max() <= BALL.eps + 1e-6
  assert reached.mean() > (0.2 if name in ("fgsm", "square") else 0.4)


# Not APGD on cross-entropy: towards targets its history of values begins at 0,
# as in the official code.
@pytest.mark.parametrize("name", ["pgd", "apgd_dlr", "fab", "square"])
def test_of_two_classes_to_reach_one_is_to_leave_the_other(toy, name):
  logits_fn, images, _ = toy
  two = lambda x: logits_fn(x)[:, :2]  # noqa: E731
  labels = np.asarray(two(images)).argmax(-1).astype(np.int32)
  leave, reach = (
    evaluate.run(two, images, given, build(name, targeted=targeted))
    for given, targeted in ((labels, False), (1 - labels, True))
  )
  assert not leave.robust.all()
  np.testing.assert_array_equal(leave.robust, reach.robust)
  if name != "fab":  # whose paths part where roundings differ
    np.testing.assert_allclose(leave.adv, reach.adv, atol=1e-6)
    np.testing.assert_allclose(leave.margin, reach.margin, atol=1e-5)


def test_rates_are_of_targets_reached_before_and_after(toy):
  logits_fn, images, labels = toy
  targets = second(logits_fn(images))
  targets[:10] = labels[:10]  # is there already
  near = ThreatModel("linf", eps=0.03)
  result = evaluate.run(logits_fn, images, targets, build("pgd", near))
  assert not result.clean[:10].any() and result.clean[10:].all()
  assert (result.broken_by[:10] == "clean").all()
  summary = result.summary()
  assert summary["reached"]["clean"]["value"] == 10 / 40
  after = summary["reached"]["attacked"]
  assert 10 / 40 < after["value"] == (~result.robust).mean() < 1
  assert after["low"] < after["value"] < after["high"]
  names = [check.name for check in result.checks]
  assert "clean accuracy" not in names
  plain = evaluate.run(logits_fn, images, labels, build("pgd", targeted=False))
  assert "reached" not in plain.summary()


def test_progress_is_no_untargeted_attacks(toy, tmp_path):
  logits_fn, images, labels = toy
  attack = build("apgd_ce")
  first = evaluate.run(logits_fn, images, labels, attack, save=tmp_path)
  again = evaluate.run(logits_fn, images, labels, attack, save=tmp_path)
  np.testing.assert_array_equal(first.robust, again.robust)
  other = build("apgd_ce", targeted=False)
  assert repr(other) == repr(attack)  # as before there were targeted ones
  with pytest.raises(ValueError, match="its targeted is True, not False"):
    evaluate.run(logits_fn, images, labels, other, save=tmp_path)


@pytest.mark.parametrize(
  "name, fields, message",
  [
    ("apgd_t", {}, "chooses its own"),
    ("fab_t", {}, "chooses its own"),
    ("pgd", {"loss": "kl"}, "aims at no class"),
    ("autoattack", {}, "targeted"),
    ("curve", {}, "targeted"),
  ],
)
def test_what_aims_otherwise_is_refused(name, fields, message):
  with pytest.raises(ValueError, match=message):
    attacks.build(name, BALL, targeted=True, **fields)
