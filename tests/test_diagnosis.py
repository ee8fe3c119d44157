"""Checks: silent on a healthy function, loud on one broken on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import evaluate
from roli_jax.attacks import AutoAttack
from roli_jax.evaluate import checks, classifier, diagnosis, trials
from roli_jax.threat import ThreatModel
from tests.covering import mostly_slow

THREAT = ThreatModel("linf", eps=0.05)


@pytest.fixture(scope="module")
def healthy():
  """Blobs around four corners, which a smooth network tells apart."""
  rng = np.random.default_rng(0)
  centres = rng.uniform(0.2, 0.8, (4, 16)).astype(np.float32)
  labels = np.arange(32) % 4
  images = centres[labels] + 0.08 * rng.normal(size=(32, 16))
  images = np.clip(images, 0, 1).astype(np.float32).reshape(32, 4, 4, 1)

  def logits_fn(x):
    flat = x.reshape(x.shape[0], 1, 16)
    return -8 * jnp.square(flat - centres.reshape(1, 4, 16)).sum(-1)

  return logits_fn, images, labels


@jax.custom_jvp
def _killed(x):
  return x


@_killed.defjvp
def _no_tangent(primals, tangents):
  return primals[0], jnp.zeros_like(tangents[0])


def _drawn(shape):
  return np.random.default_rng().normal(size=shape).astype(np.float32)


def _randomised(logits_fn, x):
  noise = jax.pure_callback(
    lambda x: _drawn(x.shape),
    jax.ShapeDtypeStruct(x.shape, x.dtype),
    jax.lax.stop_gradient(x),
  )
  return logits_fn(x + 0.02 * noise)


def _straight_through(logits_fn, x):
  return logits_fn(x + jax.lax.stop_gradient(jnp.round(4 * x) / 4 - x))


BROKEN = {
  "gradient killer": (
    lambda f, x: _killed(f(x)),
    "gradients", "gradient_is_right", "large_eps", "unbounded", "distances",
  ),
  "quantised": (lambda f, x: f(jnp.round(4 * x) / 4), "gradients"),
  "straight through": (_straight_through, "gradient_is_right"),
  "softmax": (lambda f, x: jax.nn.softmax(f(x)), "logits"),
  "temperature 1e3": (lambda f, x: f(x) / 1e3, "scale"),
  "temperature 1e-3": (lambda f, x: f(x) * 1e3, "scale"),
  "constant": (lambda f, x: 0 * f(x) + jnp.eye(4)[:1], "gradients"),
  "another batch": (
    lambda f, x: f(x) - jnp.roll(f(x), 1, 0), "batch",
  ),
}  # fmt: skip


def verdicts(found):
  return {c.name: c.verdict for c in found if c.verdict in ("warn", "fail")}


def test_a_healthy_function_passes(healthy):
  found = diagnosis.run(*healthy, THREAT)
  assert verdicts(found) == {}
  assert len(found) >= 20
  assert len({check.name for check in found}) == len(found)
  assert all(check.said for check in found)


@pytest.mark.slow
def test_it_passes_in_another_norm_too(healthy):
  assert verdicts(diagnosis.run(*healthy, ThreatModel("l1", 0.4))) == {}


@pytest.mark.parametrize("name", mostly_slow(BROKEN, "gradient killer"))
def test_what_is_broken_on_purpose_is_found(name, healthy):
  logits_fn, images, labels = healthy
  change, *expected = BROKEN[name]
  found = diagnosis.run(lambda x: change(logits_fn, x), images, labels, THREAT)
  assert verdicts(found).keys() >= set(expected)
  concerned = {c.name: c.images for c in found}[expected[0]]
  assert len(concerned) > 0 and set(concerned) <= set(range(32))


def test_an_undeclared_draw_is_found_before_the_attack(healthy):
  logits_fn, images, labels = healthy
  result = evaluate.run(
    lambda x: _randomised(logits_fn, x), images, labels, None
  )
  assert verdicts(result.checks)["deterministic"] == "fail"


def _result(**changes):
  given = {
    "clean": np.ones(100, bool),
    "broken_by": np.full(100, "", object),
    "indices": np.arange(100) + 7,
    "invalid": np.zeros(100, bool),
    "strange": np.zeros(100, bool),
  }
  for name, rows, value in changes.get("sets", ()):
    given[name][rows] = value
  return {c.name: c for c in checks.of_result(**given)}


def test_what_left_the_ball_is_named():
  found = _result(sets=[("invalid", [3, 5], True)])["ball_and_box"]
  assert found.verdict == "fail" and found.images == (10, 12)
  assert _result()["ball_and_box"].verdict == "pass"


def test_squares_that_gradients_missed_are_named():
  sets = [("broken_by", [1], "apgd_ce"), ("broken_by", [4], "square")]
  found = _result(sets=sets)["white_box"]
  assert found.verdict == "warn" and found.images == (11,)
  alone = _result(sets=[("broken_by", [4], "square")])["white_box"]
  assert alone.verdict == "pass"  # nothing but Square was asked


def _tried(**flags):
  """Trials whose attacks break the images that are given by their name."""
  rows = np.arange(100)
  images = np.zeros((100, 2, 2, 1), np.float32)
  clean, none = np.ones(100, bool), np.zeros(100)

  class Tried(trials.Trials):
    def attacked(self, name, ratio=1.0, **fields):
      key = "_".join([name, *(f"{v}" for v in fields.values())])
      broken = flags.get(f"{key}@{ratio:g}", flags.get(name, ()))
      return evaluate.Result(
        clean=clean, robust=~np.isin(rows, broken), broken_by=none.astype(str),
        distance=none, min_distance=none, margin=none, adv=images,
        invalid=~clean, work={}, notes=[], checks=[], seconds=0.0,
      )  # fmt: skip

  function = classifier.make(lambda x: x.reshape(len(x), 4), None, (2, 2, 1), 8)
  return Tried(function, classifier.Examples(images, rows % 4, rows), THREAT)


@pytest.mark.parametrize(
  "question, flags",
  [
    ("_one_step", {"fgsm": (1, 2, 3), "apgd_ce": (1,)}),
    ("_more_steps", {"apgd_ce_100@1": (1, 2, 3), "apgd_ce": (1,)}),
    ("_more_restarts", {"apgd_ce_50_5@1": (4, 5), "apgd_ce": ()}),
    ("_monotone", {"apgd_ce_50@0.5": (4, 5), "apgd_ce": (6,)}),
    ("_black_box", {"square": (4, 5), "apgd_ce": (6,)}),
    ("_other_losses", {"apgd_dlr": tuple(range(9)), "apgd_ce": (1,)}),
    ("_silent_success", {"pgd_20_sample@1": (1, 2), "pgd": (1,)}),
  ],
)
def test_each_comparison_of_attacks_names_its_images(question, flags):
  asked = getattr(diagnosis, question)
  found = asked(_tried(**flags))
  assert found.verdict != "pass" and len(found.images) > 0
  assert asked(_tried()).verdict == "pass"


def test_every_evaluation_comes_with_the_quick_checks(healthy):
  attack = AutoAttack(THREAT, num_steps=5, num_queries=5)
  said = evaluate.run(*healthy, attack).summary()["checks"]
  assert said.keys() >= {
    "clean accuracy", "batch", "logits", "scale", "deterministic",
    "ball_and_box", "white_box",
  }  # fmt: skip
  assert {check["verdict"] for check in said.values()} == {"pass"}
