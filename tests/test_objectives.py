"""What criteria lower, which leaves they reach, and what they remember."""

import dataclasses
import functools

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
  trees,
)
from roli_jax.clip import mixup
from roli_jax.experiment import stages
from roli_jax.experiment.build import build_criterion
from roli_jax.experiment.program import build_program
from roli_jax.experiment.run import build_run
from roli_jax.files import checkpoint
from roli_jax.models import heads
from roli_jax.optim import schedules
from roli_jax.threat import ThreatModel
from tests.covering import mostly_slow


def small(backbone, head=None):
  return models.Model(
    name="tiny",
    backbone=backbone,
    head=head or heads.linear(4, "small"),
    num_classes=4,
    image_size=8,
    mean=(0.5,),
    std=(0.5,),
  )


VIT = small(models.Vit(patch=4, width=8, depth=1, num_heads=2, hidden=16))
DEEP = models.with_options(small(VIT.backbone.clone(depth=2)), remat=True)
RESNET = small(models.ResNet((1,), False, inner=8, small=True, width=8))
CLIP = small(VIT.backbone, heads.cosine(4, 6))
MODELS = {"vit": VIT, "deep": DEEP, "resnet": RESNET, "clip": CLIP}


@functools.cache
def seeing(model, **options):
  """`(params, stats, images) -> (logits, stats)`, compiled."""
  return jax.jit(functools.partial(model, **options))


def logits(model, params, stats, images):
  return seeing(model)(params, stats, images)[0]


@functools.cache
def variables(name, method=peft.full):
  """The model with the method in it, and arrays far from their starts."""
  model = method().apply_to(MODELS[name])
  params, stats = model.shapes()
  rng = np.random.default_rng(0)

  def fill(path, x):
    noise = rng.standard_normal(x.shape).astype(np.float32)
    if path.endswith(("scale", "var")):
      return 1 + noise / 10
    return noise / 3

  params, stats = trees.map_named(fill, (params, stats))
  return model, jax.tree.map(jnp.asarray, params), stats


def batch(size=8):
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (size, 8, 8, 1), dtype=np.uint8),
    "label": rng.integers(0, 4, size).astype(np.int32),
    "index": np.arange(size, dtype=np.uint32),
  }


def views(size=8):
  given = batch(size)
  clean = given["image"] / np.float32(255)
  stripes = np.float32(0.1) * (-1) ** np.arange(8).reshape(1, 8, 1, 1)
  return objectives.Batch(
    clean=clean,
    adv=np.clip(clean + stripes.astype(np.float32), 0, 1),
    labels=given["label"],
    indices=given["index"],
    key=keys.root(1),
    dropout=keys.root(2),
  )


def outcome(criterion, name, size=8):
  """`(params, stats) -> LossOutput`, and what it starts from."""
  model, params, stats = variables(name)
  forward = objectives.Forward(model, True, keys.root(2))
  memory = criterion.init_memory(params, stats)

  def of(params, stats=stats):
    return criterion(forward, params, stats, memory, views(size))

  return of, params


def reached(grads):
  """The trees in which some leaf has a gradient, and not by rounding."""
  return {
    name
    for name in ("backbone", "peft", "head")
    if any(
      np.abs(x).max() > 1e-4 for x in jax.tree.leaves(getattr(grads, name))
    )
  }


def check_equal(got, expected, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, **{"rtol": 1e-4, "atol": 1e-6, **tolerance}
    ),
    got,
    expected,
  )


# AutoLoRa.


@functools.cache
def autolora(beta):
  """`accuracy -> (gradients, outcome)` of the criterion in its second epoch."""
  criterion = objectives.AutoLora(beta, epoch_steps=100)
  model, params, stats = variables("vit", peft.autolora)
  forward = objectives.Forward(model, True, keys.root(2))

  def of(params, accuracy):
    memory = criterion.init_memory(params, stats)
    memory |= {"steps": memory["steps"] + 150, "accuracy": accuracy}
    out = criterion(forward, params, stats, memory, views())
    return out.values.mean(), out

  return functools.partial(jax.jit(jax.grad(of, has_aux=True)), params)


def test_clean_images_teach_the_branch_and_the_head_alone():
  grads, _ = autolora(beta=1.0)(0.0)
  assert reached(grads) == {"peft", "head"}


def test_adversarial_images_teach_the_backbone_and_the_head_alone():
  grads, _ = autolora(beta=0.0)(1.0)
  assert reached(grads) == {"backbone", "head"}


def test_the_divergence_teaches_the_branch_the_backbone_and_the_head():
  both, without = (autolora(beta)(1.0)[0] for beta in (1.0, 0.0))
  apart = jax.tree.map(lambda x, y: x - y, both, without)
  assert reached(apart) == {"backbone", "peft", "head"}


def test_autolora_is_its_three_terms_by_the_accuracy():
  model, params, stats = variables("vit", peft.autolora)
  see = views()
  with_branch, _ = seeing(model)(params, stats, see.clean, key=keys.root(2))
  alone = logits(VIT, dataclasses.replace(params, peft={}), stats, see.adv)
  expected = (
    0.75 * losses.cross_entropy(with_branch, see.labels)
    + 0.25 * losses.cross_entropy(alone, see.labels)
    + 0.25 * losses.kl(alone, with_branch)
  )
  _, out = autolora(beta=1.0)(0.25)
  check_equal(out.values, expected)
  check_equal(out.logits, alone)
  assert np.abs(losses.kl(alone, with_branch)).min() > 1e-2


def test_the_accuracy_is_that_of_the_epoch_before_and_so_far_in_the_first():
  criterion = objectives.AutoLora(epoch_steps=2)
  _, params, stats = variables("vit", peft.autolora)
  memory, seen = criterion.init_memory(params, stats), []
  labels = np.arange(4, dtype=np.int32)
  for correct in (1, 3, 4, 2, 0):
    logits = 1.0 * jax.nn.one_hot((labels + (labels >= correct)) % 4, 4)
    memory = criterion.counted(memory, logits, labels)
    seen.append(float(memory["accuracy"]))
  assert seen == [0.25, 0.5, 0.5, 0.75, 0.75]
  assert (int(memory["seen"]), int(memory["steps"])) == (4, 5)


@pytest.mark.parametrize("name", ["deep", "resnet"])
def test_evaluation_does_not_see_the_branch_and_training_does(name):
  model, params, stats = variables(name, peft.autolora)
  without = dataclasses.replace(params, peft={})
  expected = logits(MODELS[name], without, stats, views().clean)
  for scan in (False, True):
    see = seeing(models.with_options(model, scan=scan))
    got, _ = see(params, stats, views().clean)
    check_equal(got, expected, atol=1e-5)
    got, _ = see(params, stats, views().clean, key=keys.root(0))
    assert np.abs(got - expected).max() > 1e-2


def test_a_branch_of_zeros_is_none_in_training():
  model, params, stats = variables("vit", peft.autolora)
  zeros = jax.tree.map(jnp.zeros_like, params.peft)
  absent = dataclasses.replace(params, peft=zeros)
  got, _ = seeing(model)(absent, stats, views().clean, key=keys.root(0))
  check_equal(got, logits(model, params, stats, views().clean))


# TWINS.


def test_twins_keeps_the_frozen_statistics_and_moves_the_others():
  criterion = objectives.Twins()
  of, params = outcome(criterion, "resnet")
  model, _, stats = variables("resnet")
  run = jax.jit(of)
  out = run(params)
  check_equal(out.memory["frozen"], stats, rtol=0, atol=0)
  moving = models.with_options(model, updates_stats=True)
  train = seeing(moving, train=True)
  adaptive, moved = train(params, stats, views().adv[1::2])
  frozen = logits(model, params, stats, views().adv[::2])
  check_equal(out.stats, moved)
  check_equal(out.logits[1::2], adaptive)
  check_equal(out.logits[::2], frozen)
  for name, leaf in trees.paths(moved).items():
    assert np.abs(leaf - trees.paths(stats)[name]).max() > 1e-3
  again = run(params, moved)  # as in the second step
  check_equal(again.memory["frozen"], stats, rtol=0, atol=0)
  check_equal(again.logits[::2], frozen)


def test_twins_adds_the_means_over_its_halves():
  of, params = outcome(objectives.Twins(lam=0.4), "resnet")
  out = jax.jit(of)(params)
  each = losses.cross_entropy(out.logits, views().labels)
  expected = 0.4 * each[::2].mean() + each[1::2].mean()
  np.testing.assert_allclose(out.values.mean(), expected, rtol=1e-6)


def test_without_the_frozen_half_twins_is_adversarial_training_of_the_other():
  model, _, stats = variables("resnet")
  moving = models.with_options(model, updates_stats=True)

  def loss(params):
    said, _ = moving(params, stats, views().adv[1::2], train=True)
    return losses.cross_entropy(said, views().labels[1::2]).mean()

  of, params = outcome(objectives.Twins(lam=0.0), "resnet")
  got = jax.jit(jax.grad(lambda p: of(p).values.mean()))(params)
  check_equal(got, jax.jit(jax.grad(loss))(params), atol=1e-5)


# Function space.


def on_two_classes(distance, t=1.0):
  penalty = objectives.FunctionSpace(distance=distance, temperature=t)
  q, q0 = jnp.log(jnp.array([[[0.25, 0.75]], [[0.5, 0.5]]]))
  apart = jax.value_and_grad(lambda z: penalty.apart(z, q0).sum())
  value, grads = jax.jit(apart)(q)
  return float(value), np.asarray(grads[0])


@pytest.mark.parametrize("distance", objectives.function_space.DISTANCES)
def test_a_distance_is_zero_and_flat_from_a_thing_to_itself(distance):
  z = jnp.array([[1.0, -2.0, 0.5]])
  apart = objectives.FunctionSpace(distance=distance, temperature=2).apart
  value, grads = jax.value_and_grad(lambda x: apart(x, z).sum())(z)
  assert abs(value) < 1e-6 and np.abs(grads).max() < 1e-6
  assert apart(z + 3.0, z).max() < 1e-6 < apart(z * 2, z).min()


def test_distances_on_two_classes_are_the_hand_computed_values():
  value, grads = on_two_classes("kl")
  assert value == pytest.approx(0.1438410362, rel=1e-6)
  np.testing.assert_allclose(grads, [-0.25, 0.25], atol=1e-6)
  # KL(q || q0) = ln(2) / 2 - H(q) + ln(2) / 2 = 0.1308120.
  value, _ = on_two_classes("symmetric_kl")
  assert value == pytest.approx((0.1438410 + 0.1308120) / 2, rel=1e-5)
  # Centred logits are -+ ln(3) / 2.
  value, grads = on_two_classes("l2")
  assert value == pytest.approx(np.log(3) ** 2 / 2, rel=1e-5)
  np.testing.assert_allclose(grads, [-np.log(3), np.log(3)], rtol=1e-5)


def test_temperature_keeps_the_gradients_size():
  """Near uniform, T^2 KL is half the variance of the centred logits."""
  value, grads = on_two_classes("kl", t=100.0)
  assert value == pytest.approx(np.log(3) ** 2 / 8, rel=2e-2)
  np.testing.assert_allclose(grads, [-np.log(3) / 4, np.log(3) / 4], rtol=2e-2)
  assert on_two_classes("l2", 7.0)[0] == pytest.approx(on_two_classes("l2")[0])


def penalty_of(penalty, name="vit"):
  """`(params, stats) -> its values`, as if the stage began at `params`."""
  model, params, stats = variables(name)
  forward = objectives.Forward(model, True, keys.root(2))
  memory = penalty.init_memory(params, stats)

  def of(params, stats=stats):
    return penalty(forward, params, stats, memory, views())

  return of, params


def shaken(params):
  return jax.tree.map(lambda x: x + 0.1 * jnp.sin(50 * x), params)


def test_at_the_stages_start_there_is_nothing_to_keep():
  penalty = objectives.FunctionSpace("noise", lam_cons=0.0)
  of, params = penalty_of(penalty)

  def total(params):
    values, _ = of(params)
    return values.sum(), values

  run = jax.jit(jax.grad(total, has_aux=True))
  grads, values = run(params)
  assert np.abs(values).max() < 1e-6
  assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) < 1e-5
  _, values = run(shaken(params))
  assert values.min() > 1e-5


def test_the_reference_is_the_model_at_the_start_with_its_statistics():
  penalty = objectives.FunctionSpace(lam_fun=2.0, lam_cons=3.0)
  of, params = penalty_of(penalty, "resnet")
  model, _, stats = variables("resnet")
  later, moved = shaken(params), shaken(stats)
  values, memory = jax.jit(of)(later, moved)
  now = logits(model, later, moved, views().adv)
  said = logits(model, later, moved, views().clean)
  before = logits(model, params, stats, views().adv)
  expected = 2 * losses.kl(now, before) + 3 * losses.kl(now, said)
  check_equal(values, expected)
  check_equal(memory["reference"], (params, stats), rtol=0, atol=0)


def test_consistency_moves_what_is_said_of_the_shifted_images_alone():
  penalty = objectives.FunctionSpace("mixup", lam_fun=0.0)
  of, params = penalty_of(penalty)
  model, _, stats = variables("vit")
  said = logits(model, params, stats, views().clean)

  def loss(params):
    now = model.logits(params, stats, penalty.shifted(views()))
    return losses.kl(now, said).sum()

  got = jax.jit(jax.grad(lambda p: of(p)[0].sum()))(params)
  check_equal(got, jax.jit(jax.grad(loss))(params), atol=1e-5)
  assert penalty.init_memory(params, stats) == {}


def test_noise_is_an_images_own_and_stays_in_the_range_of_pixels():
  penalty = objectives.FunctionSpace("noise", std=0.2)
  shift = jax.jit(penalty.shifted)
  whole = shift(views())
  assert whole.min() >= 0 and whole.max() <= 1
  inside = (whole > 0) & (whole < 1) & (views().clean > 0.4)
  inside &= views().clean < 0.6
  assert (whole - views().clean)[inside].std() == pytest.approx(0.2, abs=0.03)
  turned = dataclasses.replace(
    views(), clean=views().clean[::-1], indices=views().indices[::-1]
  )
  check_equal(shift(turned), whole[::-1])


def test_mixtures_lie_between_an_image_and_the_reversed_batchs():
  clean = views().clean
  mixed = jax.jit(objectives.FunctionSpace("mixup").shifted)(views())
  other = clean[::-1]
  ratios = ((mixed - other) * (clean - other)).sum((1, 2, 3))
  ratios /= ((clean - other) ** 2).sum((1, 2, 3))
  assert ratios.min() >= 0 and ratios.max() <= 1
  assert len(np.unique(ratios.round(4))) == 8
  each = ratios.reshape(-1, 1, 1, 1)
  check_equal(mixed, each * clean + (1 - each) * other)


def test_a_penalty_adds_to_any_criterion_and_moves_no_statistics():
  penalty = objectives.FunctionSpace("noise")
  base = objectives.Twins()
  both = objectives.Penalised(base, penalty)
  of, params = outcome(both, "resnet")
  alone, _ = outcome(base, "resnet")
  with_it, without = jax.jit(of)(params), jax.jit(alone)(params)
  check_equal(with_it.stats, without.stats)
  check_equal(with_it.logits, without.logits)
  added, _ = jax.jit(penalty_of(penalty, "resnet")[0])(params)
  check_equal(with_it.values, without.values + added)
  assert both.needs_clean and not base.needs_clean
  assert (both.surrogate, both.adversarial) == ("ce", 1.0)


# m2-Mix.


def test_m2_mix_pairs_images_with_their_classes_of_the_start():
  penalty = objectives.M2Mix(0.5, images="adv", epoch_steps=2)
  _, params, stats = variables("clip")
  forward = objectives.Forward(CLIP, True, keys.root(2))
  memory = penalty.init_memory(params, stats)
  later, labels = shaken(params), views().labels

  def total(params, memory):
    values, memory = penalty(forward, params, stats, memory, views())
    return values.mean(), (values, memory)

  run = jax.jit(jax.grad(total, has_aux=True))
  features = jax.jit(CLIP.features)(later, stats, views().adv)
  loss = jax.jit(mixup.m2_mix_loss)(
    heads.unit(features @ later.head["projection"]["kernel"]),
    heads.unit(params.head["kernel"].T)[labels],
    keys.stream(keys.root(1), "m2_mix"),
    same=labels[:, None] == labels[None],
  )
  for share in (1, 1, 1 / 2, 1 / 2, 1 / 3):
    grads, (values, memory) = run(later, memory)
    np.testing.assert_allclose(values, [0.5 * share * loss] * 8, rtol=1e-5)
  assert "backbone" in reached(grads)
  moved = {k for k, g in trees.paths(grads.head).items() if np.abs(g).max() > 0}
  assert moved == {"projection/kernel"}  # and no text


# All of them, in training and in configs.

AT = objectives.of(losses.At())
EACH = {
  "autolora": (objectives.AutoLora(epoch_steps=3), "vit", peft.autolora),
  "twins": (objectives.Twins(), "resnet", peft.full),
  "function_space": (
    objectives.Penalised(AT, objectives.FunctionSpace("noise")),
    "resnet", peft.full,
  ),
  "m2_mix": (
    objectives.Penalised(AT, objectives.M2Mix(0.05, epoch_steps=3)),
    "clip", peft.full,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(EACH, *list(EACH)[:2]))
def test_each_trains_in_one_program(name):
  criterion, net, method = EACH[name]
  model, params, stats = variables(net, method)
  tx = optax.adam(1e-2)
  train_step = step.make_train_step(
    model, method(), criterion,
    attacks.Pgd(ThreatModel("linf", 0.05), num_steps=1), schedules.ramp(10), tx,
  )  # fmt: skip
  now = state.create(
    params, stats, method().trains(params), tx, criterion.init_memory
  )
  jitted, began = jax.jit(train_step), now.memory

  def clean_loss(now):
    said = logits(model, now.params, now.stats, views().clean)
    return float(losses.cross_entropy(said, views().labels).mean())

  before = clean_loss(now)
  for _ in range(10):
    now, counts = jitted(now, batch(), keys.root(0))
  assert np.isfinite(counts.loss) and int(counts.seen) == 8
  assert clean_loss(now) < 0.8 * before
  assert jitted._cache_size() == 1
  trees.check_same(now.memory, began, name)


def test_what_they_remember_comes_back_from_a_checkpoint(tmp_path):
  memories = {}
  for name, (criterion, net, method) in EACH.items():
    _, params, stats = variables(net, method)
    memories[name] = jax.tree.map(
      jnp.asarray, criterion.init_memory(params, stats)
    )
  with checkpoint.manager(tmp_path) as checkpoints:
    checkpoint.save(
      checkpoints, 1, model=memories, rest=memories, meta={}, score=0.0
    )
  like = jax.tree.map(jnp.zeros_like, memories)
  with checkpoint.manager(tmp_path, reading=True) as checkpoints:
    found = checkpoint.restore(checkpoints, 1, rest=like)["rest"]
  trees.check_same(found, memories, "memory")
  check_equal(found, memories, rtol=0, atol=0)


def config(cell="method=full,init=roli", **adapt):
  made = glyphs_roli.get_config(cell).to_dict()
  for name, fields in adapt.items():
    made["adapt"][name] |= fields
  return made


def program(given):
  made = build_run(given)
  return build_program(made, stages.expand(given)[-1])


def test_a_config_names_a_criterion_and_a_penalty():
  plain = program(config()).criterion
  assert plain == objectives.of(losses.At())
  made = program(
    config(
      penalty={"name": "function_space", "lam_fun": 0.5, "simulator": "noise"}
    )
  ).criterion
  added = objectives.FunctionSpace("noise", lam_fun=0.5)
  assert made == objectives.Penalised(plain, added)
  made = program(
    config("method=autolora,init=roli", loss={"name": "autolora"})
  ).criterion
  assert made == objectives.AutoLora(6.0, epoch_steps=4)  # of 200 images by 64
  (_, stage) = stages.expand(config())
  without = config()
  del without["adapt"]["penalty"]  # of a run before there were any
  assert build_criterion(build_run(without), "adapt", stage.loss) == plain


@pytest.mark.parametrize(
  "said, cell, adapt",
  [
    ("the head of robust-full-ranli.* is random", "method=full,init=ranli",
     {"penalty": {"name": "function_space"}}),
    ("zero-shot one", "method=full,init=roli", {"penalty": {"name": "m2_mix"}}),
    ("no running statistics; take a ResNet", "method=full,init=roli",
     {"loss": {"name": "twins"}}),
    ("go together", "method=full,init=roli", {"loss": {"name": "autolora"}}),
    ("go together", "method=autolora,init=roli", {}),
    ("loss 'at' takes no 'beta'", "method=full,init=roli",
     {"loss": {"beta": 6.0}}),
    ("penalty 'none' takes no 'lam_fun'", "method=full,init=roli",
     {"penalty": {"lam_fun": 1.0}}),
    ("anchor 'none' takes no 'lam'", "method=full,init=roli",
     {"optim": {"anchor": {"name": "none", "lam": 0.5}}}),
    ("unknown penalty 'm3'", "method=full,init=roli",
     {"penalty": {"name": "m3"}}),
    ("attacks none", "method=full,init=roli",
     {"loss": {"name": "clean"}, "penalty": {"name": "function_space"}}),
  ],
)  # fmt: skip
def test_what_can_not_be_is_refused_before_anything_is_computed(
  said, cell, adapt
):
  with pytest.raises(ValueError, match=said):
    program(config(cell, **adapt))


@pytest.mark.parametrize(
  "make, said",
  [
    (lambda: objectives.AutoLora(-1), "beta must be >= 0"),
    (lambda: objectives.AutoLora(epoch_steps=0), "at least 1 step"),
    (lambda: objectives.Twins(-0.1), "lam must be >= 0"),
    (lambda: objectives.FunctionSpace("rain"), "simulator 'rain'"),
    (lambda: objectives.FunctionSpace(distance="l1"), "distance 'l1'"),
    (lambda: objectives.FunctionSpace(lam_fun=-1), "lam_fun must be >= 0"),
    (lambda: objectives.FunctionSpace(lam_cons=-1), "lam_cons must be >= 0"),
    (lambda: objectives.FunctionSpace(std=-1), "std must be >= 0"),
    (
      lambda: objectives.FunctionSpace(temperature=0),
      "temperature must be > 0",
    ),
    (lambda: objectives.M2Mix(-1), "weight must be >= 0"),
    (lambda: objectives.M2Mix(beta=0), "beta must be > 0"),
    (lambda: objectives.M2Mix(tau=0), "tau must be > 0"),
    (lambda: objectives.M2Mix(reduction="max"), "reduction 'max'"),
    (lambda: objectives.M2Mix(images="dirty"), "images 'dirty'"),
    (lambda: objectives.M2Mix(epoch_steps=0), "at least 1 step"),
    (lambda: peft.autolora(rank=0), "autolora.rank must be >= 1"),
    (lambda: peft.autolora(alpha=0), "autolora.alpha must be > 0"),
  ],
)
def test_values_out_of_range_are_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()


def test_twins_wants_pairs_and_autolora_a_branch():
  of, params = outcome(objectives.Twins(), "resnet", size=7)
  with pytest.raises(ValueError, match="even number of images, got 7"):
    of(params)
  with pytest.raises(ValueError, match="method=autolora"):
    objectives.AutoLora().init_memory(params, {})
