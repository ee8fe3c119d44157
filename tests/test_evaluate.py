"""Evaluation: who judges, who is counted, and what it depends on."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import attacks, convert, data, evaluate, keys, step
from roli_jax.evaluate import classifier, inputs
from roli_jax.files import journal
from roli_jax.threat import ThreatModel
from tests.covering import mostly_slow

PGD = attacks.build("pgd", ThreatModel("linf", eps=0.1), num_steps=5)


@dataclasses.dataclass(frozen=True)
class Moved(attacks.Attack):
  """An attack that adds a constant, whatever the threat model says."""

  threat: ThreatModel
  by: float
  name = "moved"
  passes = (3, 2)

  def scaled(self, ratio):
    return self

  def __call__(self, logits_fn, images, labels, keys):
    return images + self.by


jax.tree_util.register_dataclass(Moved, ["threat", "by"], [])


def same(a, b):
  for name in ("clean", "robust", "broken_by", "distance", "margin", "adv"):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)


def test_a_result_says_what_became_of_each_image(toy):
  logits_fn, images, labels = toy
  wrong = labels.copy()
  wrong[:3] = (wrong[:3] + 1) % 5
  result = evaluate.run(logits_fn, images, wrong, PGD)
  assert result.clean.tolist() == [False] * 3 + [True] * 37
  assert 0 < result.robust.sum() < 37
  assert set(result.broken_by) == {"", "clean", "pgd"}
  assert (result.broken_by[result.robust] == "").all()
  assert (result.distance[:3] == 0).all()
  assert np.isinf(result.distance[result.robust]).all()
  broken = result.broken_by == "pgd"
  assert (result.distance[broken] <= 0.1 + 1e-6).all()
  assert (result.margin[broken] < 0).all()
  assert (result.margin[result.robust] > 0).all()
  kept = ~broken
  np.testing.assert_array_equal(result.adv[kept], images[kept])
  assert (logits_fn(result.adv[broken]).argmax(-1) != wrong[broken]).all()


def test_a_summary_adds_up(toy):
  result = evaluate.run(*toy, PGD)
  said = result.summary()
  assert said["n"] == 40 and said["clean"]["value"] == 1
  assert (
    said["robust"]["low"] < said["robust"]["value"] < said["robust"]["high"]
  )
  assert sum(said["broken_by"].values()) == 40
  assert said["passes"] == {"forward": 40 + 40 * 7, "backward": 40 * 5}
  assert said["checks"]["ball_and_box"]["verdict"] == "pass"


@pytest.mark.parametrize("by, why", [(0.3, "the ball"), (-2.0, "the box")])
def test_what_is_outside_never_counts_and_is_reported(toy, by, why):
  logits_fn, images, labels = toy
  result = evaluate.run(
    logits_fn, images, labels, Moved(ThreatModel("linf", eps=0.1), by)
  )
  assert result.robust.all(), why
  said = result.summary()["checks"]["ball_and_box"]
  assert said["verdict"] == "fail" and said["images"] == list(range(40))
  np.testing.assert_array_equal(result.adv, images)


def test_one_rounding_of_a_pixel_is_no_way_out(toy):
  """clip(x + eps) in float32 exceeds eps by up to half a unit of rounding."""
  logits_fn, images, labels = toy
  for eps in (0.01, 4 / 255, 8 / 255):
    fgsm = attacks.build("fgsm", ThreatModel("linf", eps=eps))
    assert not evaluate.run(logits_fn, images, labels, fgsm).invalid.any()


def test_each_image_is_judged_alone(toy):
  logits_fn, images, labels = toy
  whole = evaluate.run(logits_fn, images, labels, PGD)
  rows = np.array([31, 4, 17, 8, 25, 2, 11, 39, 0, 30])
  part = evaluate.run(
    logits_fn, images[rows], labels[rows], PGD, indices=rows, batch_size=8
  )
  np.testing.assert_array_equal(whole.robust[rows], part.robust)
  np.testing.assert_array_equal(whole.adv[rows], part.adv)


@pytest.fixture(scope="module")
def shipped():
  bundle = convert.load(convert.find("glyph_vit", "robust"))
  letters = data.build("letters", "val")
  few = letters.take(np.arange(150))
  return step.make_predict(bundle.model), (bundle.params, bundle.stats), few


def attack_shipped(shipped, rows=slice(None), **settings):
  predict, variables, letters = shipped
  return evaluate.run(
    predict,
    letters.pixels()[rows],
    letters.labels[rows],
    PGD,
    params=variables,
    indices=letters.indices[rows],
    **settings,
  )


@pytest.mark.parametrize(
  "spreads",
  mostly_slow(
    (
      "few 2-16",
      "small 1-8 1-40 2-16 8-64",
      "shipped 1-8 1-150 2-8 2-64 2-150 8-8 8-64 8-150",
    ),
    "few 2-16",
  ),
)
def test_devices_batches_and_order_change_no_bit(spreads, root):
  """On one CPU kind, by programs compiled as a user's."""
  count = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-m", "tests.bits", *spreads.split()],
    cwd=root, env={**os.environ, "XLA_FLAGS": count},
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr


def test_three_images_are_padded_not_changed(toy):
  logits_fn, images, labels = toy
  whole = evaluate.run(*toy, PGD)
  few = evaluate.run(logits_fn, images[:3], labels[:3], PGD)
  np.testing.assert_array_equal(whole.adv[:3], few.adv)


def count_compilations():
  """A list that grows by one with each program that is compiled."""
  compiled: list[str] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: "backend_compile" in name and compiled.append(name)
  )
  return compiled


@pytest.mark.slow
def test_new_params_and_radii_compile_nothing(shipped):
  predict, (params, stats), _ = shipped
  attack_shipped(shipped)
  other = jax.tree.map(lambda x: 0.9 * np.asarray(x), params)
  compiled = count_compilations()
  attack_shipped((predict, (other, stats), shipped[2]))
  near = attacks.build("pgd", ThreatModel("linf", eps=0.02), num_steps=3)
  evaluate.run(
    predict, shipped[2].pixels(), shipped[2].labels, near, params=(other, stats)
  )
  assert not compiled


def test_seeds_differ_and_come_again(toy):
  start = attacks.build("pgd", ThreatModel("linf", 1.0), num_steps=0)
  a, b, again = (evaluate.run(*toy, start, seed=s) for s in (0, 1, 0))
  same(a, again)
  assert (a.adv != b.adv).any()


def test_each_image_can_have_its_own_radius(toy):
  eps = np.repeat(np.float32([0.0, 1.0]), 20)
  attack = attacks.build("pgd", ThreatModel("linf", eps), num_steps=10)
  result = evaluate.run(*toy, attack)
  assert result.robust[:20].all() and not result.robust[20:].any()


def test_clean_accuracy_alone_needs_no_attack(toy):
  result = evaluate.run(*toy, None)
  assert result.clean.all() and (result.robust == result.clean).all()


def test_without_checks_it_finds_the_same(toy):
  """Validations have none, and compile nothing for them."""
  logits_fn, images, labels = toy
  on = classifier.make(logits_fn, None, images.shape[1:], 64)
  whole, bare = (
    evaluate.run_on(on, images, labels, PGD, checked=checked)
    for checked in (True, False)
  )
  same(whole, bare)
  lacks = {c.name for c in whole.checks} - {c.name for c in bare.checks}
  assert {"gradients finite", "clean accuracy"} <= lacks


def test_the_judge_is_precise_whatever_the_model_asks_for(toy):
  """The judge's products are float32, not what an accelerator likes best."""
  _, images, labels = toy

  def logits_fn(x):
    return x.reshape(x.shape[0], -1) @ jnp.ones((36, 5))

  on = classifier.make(logits_fn, None, images.shape[1:], 64)
  rows = np.arange(40).repeat(2)[:64]
  examples = classifier.Examples(
    images[rows], labels[rows], rows.astype(np.uint32)
  )
  in_eights = on.programs.compiled(
    classifier._in_eights, static_argnums=(0, 1, 2)
  )
  text = in_eights.lower(
    on.mesh, classifier._judge, 1, ((), keys.root(0)), (examples,),
    np.ones(64, bool),
  ).as_text()  # fmt: skip
  assert "HIGHEST" in text


@pytest.mark.parametrize(
  "change, message",
  [
    ({"images": lambda x: (255 * x).astype(np.uint8)}, "255"),
    ({"images": lambda x: x * 2 - 1}, "normalise"),
    ({"images": lambda x: x * np.nan}, "0, 1"),
    ({"images": lambda x: x[:0]}, "n, h, w, c"),
    ({"labels": lambda y: y[:-1]}, "40 integers"),
    ({"labels": lambda y: y.astype(np.float32)}, "integers"),
    ({"labels": lambda y: y + 3}, "width of the logits"),
    ({"labels": lambda y: y - 1}, "width of the logits"),
  ],
)
def test_inputs_that_can_not_be_meant_are_refused(toy, change, message):
  logits_fn, images, labels = toy
  given = {"images": images, "labels": labels}
  for name, fn in change.items():
    given[name] = fn(given[name])
  with pytest.raises(ValueError, match=message):
    evaluate.run(logits_fn, given["images"], given["labels"], PGD)


def test_what_is_no_attack_is_refused(toy):
  class Unregistered(Moved):
    pass

  ball = ThreatModel("linf", 0.1)
  for attack, message in (
    ("pgd", r"attacks\.build"),
    (lambda *_: None, r"attacks\.Attack"),
    (Unregistered(ball, 0.0), "register_dataclass"),
  ):
    with pytest.raises(ValueError, match=message):
      # (`evaluate.run` hands it on; in tests its types are checked before.)
      inputs.check_inputs(*toy[1:], np.arange(40), attack)


def test_an_attack_of_ones_own_may_require_any_field(toy):
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Still(attacks.Attack):
    threat: ThreatModel
    num_steps: int
    loss: str
    passes = (0, 0)
    name = "still"

    def __call__(self, logits_fn, images, labels, keys):
      return images

  attack = Still(ThreatModel("linf", 0.1), 5, "")
  assert (attack.num_steps, attack.num_restarts, attack.loss) == (5, 1, "")
  assert attack.scaled(2.0).threat.eps == 0.2 and attack.parts == (attack,)
  with pytest.raises(ValueError, match="still can't train"):
    attack.for_training("")
  with pytest.raises(TypeError, match="missing 1 required"):
    Still(attack.threat, 5)


def test_functions_that_give_no_logits_are_refused(toy):
  _, images, labels = toy
  with pytest.raises(ValueError, match="logits"):
    evaluate.run(lambda x: x.sum((1, 2, 3)), images, labels, PGD)
  with pytest.raises(ValueError, match="eps"):
    attack = attacks.build("pgd", ThreatModel("linf", np.ones(3, "f4")))
    evaluate.run(*toy, attack)


def test_keys_come_from_seed_attack_and_image_alone(toy):
  """The start that evaluation draws is the one that the contract names."""
  _, images, labels = toy
  start = attacks.build("pgd", ThreatModel("linf", 1.0), num_steps=0)
  result = evaluate.run(*toy, start, seed=5)
  key = keys.stream(keys.root(5), "pgd")
  own = jax.vmap(jax.random.fold_in, (0, None))(
    keys.per_image(key, np.arange(40)), 0
  )
  expected = np.asarray(start.threat.sample(own, images))
  broken = result.broken_by == "pgd"
  assert broken.any()
  np.testing.assert_array_equal(result.adv[broken], expected[broken])
  assert labels.shape == (40,)


AUTO = attacks.AutoAttack(
  ThreatModel("linf", eps=0.06), num_steps=15, num_queries=60
)
FIELDS = ("clean", "robust", "broken_by", "distance", "min_distance", "adv")


def same_outcome(a, b):
  for name in FIELDS:
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)


@pytest.fixture(scope="module")
def whole(toy):
  return evaluate.run(*toy, AUTO)


def test_each_attack_sees_what_the_last_one_left(toy, whole):
  assert set(whole.broken_by) >= {"", "apgd_ce"}
  alone = evaluate.run(*toy, AUTO.parts[0])
  np.testing.assert_array_equal(
    alone.broken_by == "apgd_ce", whole.broken_by == "apgd_ce"
  )
  forward = {name: work.forward for name, work in whole.work.items()}
  assert forward["apgd_t"] <= alone.robust.sum() * 4 * 16 + 40
  broken = ~whole.robust & whole.clean
  assert (whole.margin[broken] < 0).all()
  assert (whole.margin[whole.robust] > 0).all()
  assert (toy[0](whole.adv[broken]).argmax(-1) != toy[2][broken]).all()
  assert whole.passes["forward"] == sum(forward.values())


def test_stopping_early_changes_no_flag(toy):
  threat = ThreatModel("linf", eps=0.06)
  early = attacks.build("apgd_t", threat, num_steps=15)
  late = attacks.build("apgd_t", threat, num_steps=15, stop=False)
  stops, goes_on = (evaluate.run(*toy, attack) for attack in (early, late))
  np.testing.assert_array_equal(stops.robust, goes_on.robust)
  assert sum(stops.passes.values()) < sum(goes_on.passes.values())


@pytest.mark.slow
def test_other_params_radii_and_targets_compile_nothing(shipped):
  predict, (params, stats), letters = shipped
  few = (letters.pixels()[:16], letters.labels[:16])
  attack = attacks.build("apgd_t", ThreatModel("linf", 0.1), num_steps=4)
  evaluate.run(predict, *few, attack, params=(params, stats))
  compiled = count_compilations()
  evaluate.run(predict, *few, dataclasses.replace(attack, num_steps=5),
               params=(params, stats))  # fmt: skip
  assert compiled  # another number of steps is another program
  other = jax.tree.map(lambda x: 0.9 * np.asarray(x), params)
  compiled.clear()
  more = attacks.build(
    "apgd_t", ThreatModel("linf", 0.02), num_steps=4, num_targets=3,
    num_restarts=2,
  )  # fmt: skip
  again = dataclasses.replace(predict)  # as `make_predict` gives it anew
  evaluate.run(again, *few, more, params=(other, stats))
  assert not compiled


def test_a_point_beyond_eps_is_no_verdict(toy):
  """FAB finds where each image is misclassified, mostly beyond eps."""
  fab = attacks.build("fab_t", ThreatModel("linf", eps=0.03), num_steps=20)
  result = evaluate.run(*toy, fab)
  beyond = result.robust & np.isfinite(result.min_distance)
  assert beyond.any() and not result.robust.all()
  assert (result.margin[result.robust] > 0).all()
  assert (result.margin[~result.robust] < 0).all()
  np.testing.assert_array_equal(result.adv[beyond], toy[1][beyond])


class Killed(Exception):
  pass


@pytest.mark.parametrize("moment", [0, 1, 3])
def test_what_was_interrupted_goes_on_to_the_same_result(
  toy, whole, moment, tmp_path, monkeypatch
):
  count, add = 0, journal.Journal.add

  def dies(self, name, **arrays):
    nonlocal count
    add(self, name, **arrays)
    count += 1
    if count > moment:
      raise Killed

  monkeypatch.setattr(journal.Journal, "add", dies)
  with pytest.raises(Killed):
    evaluate.run(*toy, AUTO, save=tmp_path)
  monkeypatch.setattr(journal.Journal, "add", add)
  again = evaluate.run(*toy, AUTO, save=tmp_path)
  same_outcome(whole, again)
  third = evaluate.run(*toy, AUTO, save=tmp_path)
  same_outcome(whole, third)
  assert third.passes == again.passes


def test_progress_of_another_evaluation_is_refused(toy, tmp_path):
  logits_fn, images, labels = toy
  evaluate.run(*toy, PGD, save=tmp_path)
  for change, what in (
    ({"seed": 1}, "seed"),
    ({"attack": AUTO}, "attack"),
    ({"images": 0.999 * images}, "images"),
    ({"labels": np.roll(labels, 1)}, "labels"),
  ):
    given = {"images": images, "labels": labels, "attack": PGD, **change}
    with pytest.raises(ValueError, match=f"its {what}"):
      evaluate.run(logits_fn, save=tmp_path, **given)


def test_bfloat16_attacks_are_judged_in_float32(toy):
  _, images, labels = toy
  rng = np.random.default_rng(0)
  w = [rng.normal(size=size).astype("f4") / 2 for size in ((36, 32), (32, 5))]

  def logits_fn(w, x):
    return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ w[0]) @ w[1]

  labels = np.asarray(logits_fn(w, images).argmax(-1))
  attack = attacks.build("apgd_ce", ThreatModel("linf", 0.05), num_steps=20)
  full, low = (
    evaluate.run(logits_fn, images, labels, attack, params=w, dtype=dtype)
    for dtype in (None, "bfloat16")
  )
  assert full.clean.all() and low.clean.all()
  assert 0 < low.robust.sum() < 40
  assert (full.robust == low.robust).mean() > 0.9
  broken = low.broken_by == "apgd_ce"
  assert (logits_fn(w, low.adv[broken]).argmax(-1) != labels[broken]).all()
  with pytest.raises(ValueError, match="bfloat16"):
    evaluate.run(logits_fn, images, labels, attack, params=w, dtype="int8")


def test_logits_that_are_no_numbers_are_an_error(toy):
  logits_fn, images, labels = toy

  def nan(x):
    return jnp.where(x[:, :1, 0, 0] > 0.5, jnp.nan, 1.0) * logits_fn(x)

  with pytest.raises(ValueError, match="NaN"):
    evaluate.run(nan, images, labels, PGD)


def test_a_single_logit_is_no_classifier(toy):
  _, images, labels = toy
  with pytest.raises(ValueError, match="2 classes"):
    evaluate.run(lambda x: x.sum((1, 2)), images, 0 * labels, PGD)


def test_a_negative_or_unknown_radius_is_refused():
  for eps in (-0.1, np.nan, np.inf, 8.0):
    with pytest.raises(ValueError, match="eps"):
      ThreatModel("linf", eps=eps)
