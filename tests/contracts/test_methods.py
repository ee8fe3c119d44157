"""What every method of fine-tuning promises, on a small ViT."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from roli_jax import (
  attacks,
  keys,
  losses,
  models,
  optim,
  peft,
  state,
  step,
  trees,
)
from roli_jax.models import heads
from roli_jax.optim import schedules
from roli_jax.threat import ThreatModel


@pytest.fixture(scope="module")
def model():
  backbone = models.Vit(patch=4, width=8, depth=2, num_heads=2, hidden=16)
  return models.Model(
    name="tiny",
    backbone=backbone,
    head=heads.linear(10),
    num_classes=10,
    image_size=8,
    mean=(0.5,),
    std=(0.5,),
  )


@pytest.fixture(params=peft.METHODS)
def method(request):
  return peft.METHODS[request.param]()


def batch(size=8):
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 17, (size, 8, 8, 1), dtype=np.uint8),
    "label": np.arange(size, dtype=np.int32) % 10,
    "index": np.arange(size, dtype=np.uint32),
  }


def begin(model, method, objective=None, spec=None, lr=1e-2):
  model = method.enter(model)
  params, stats = model.init(keys.root(0))
  tx = optim.build(
    spec or {"name": "adamw", "weight_decay": 0.1, "clip_norm": 1.0},
    method.labels(params),
    schedules.warmup(10, 0.0, "constant"),
  )
  attack = attacks.Pgd(ThreatModel("linf", 0.1), num_steps=2)
  train_step = step.make_train_step(
    model,
    method,
    objective or losses.At(),
    attack,
    schedules.ramp(10),
    tx,
    white=16,
  )
  now = state.create(params, stats, method.trains(params), tx)
  now = dataclasses.replace(now, opt_state=optim.at_rate(now.opt_state, lr))
  return train_step, now


def test_exactly_the_labelled_leaves_move(model, method):
  train_step, now = begin(model, method)
  after, _ = jax.jit(train_step)(now, batch(), keys.root(0))
  trains = trees.paths(method.trains(now.params))
  before, after = trees.paths(now.params), trees.paths(after.params)
  for name, old in before.items():
    moved = bool((old != after[name]).any())
    # A softmax doesn't see what is added to all its logits.
    assert moved == trains[name] or name.endswith("attn/k/bias"), name


def test_optimizer_state_counts_trained_leaves_only(model, method):
  _, now = begin(model, method)
  trained, _ = trees.split(now.params, method.trains(now.params))
  arrays = [x for x in jax.tree.leaves(now.opt_state) if x.ndim]
  assert sum(x.size for x in arrays) == 2 * trees.size(trained)


def test_no_gradient_exists_for_frozen_leaves(model, method):
  seen = []

  def spy(updates, opt_state, params):
    seen.append(updates)
    return updates, opt_state

  params, stats = model.init(keys.root(0))
  trained, _ = trees.split(params, method.trains(params))
  tx = optax.GradientTransformation(lambda params: (), spy)
  attack = attacks.Pgd(ThreatModel("linf", 0.1), num_steps=1)
  train_step = step.make_train_step(
    model, method, losses.At(), attack, schedules.ramp(10), tx
  )
  now = state.create(params, stats, method.trains(params), tx)
  jax.eval_shape(train_step, now, batch(), keys.root(0))
  assert trees.paths(seen[0]).keys() == trees.paths(trained).keys()
  assert trees.size(seen[0]) == trees.size(trained)


def test_the_pretrained_tree_is_the_same_under_every_method(model, method):
  theirs = dataclasses.replace(
    model, backbone=model.backbone.clone(seams=method.seams)
  )
  expected = trees.paths(model.init(keys.root(0))[0].backbone)
  got = trees.paths(theirs.init(keys.root(0))[0].backbone)
  assert got.keys() == expected.keys()


def test_every_leaf_has_a_group(model, method):
  params, _ = model.init(keys.root(0))
  groups = set(trees.paths(method.labels(params)).values())
  assert "head" in groups and groups <= set(peft.GROUPS)


def test_a_step_traces_once(model, method):
  train_step, now = begin(model, method)
  jitted = jax.jit(train_step)
  for k in range(3):
    now, _ = jitted(now, batch(), keys.root(k))
  assert jitted._cache_size() == 1


def test_another_rate_compiles_nothing(model):
  train_step, now = begin(model, peft.linear())
  jitted = jax.jit(train_step)
  jitted(now, batch(), keys.root(0))
  faster = dataclasses.replace(now, opt_state=optim.at_rate(now.opt_state, 1.0))
  jitted(faster, batch(), keys.root(0))
  assert jitted._cache_size() == 1


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_every_objective_trains(model, name):
  objective = losses.OBJECTIVES[name]()
  train_step, now = begin(model, peft.full(), objective, lr=3e-2)
  jitted = jax.jit(train_step)
  values = []
  for _ in range(12):
    now, counts = jitted(now, batch(16), keys.root(0))
    values.append(float(counts.loss / counts.seen))
  assert np.mean(values[-3:]) < 0.8 * np.mean(values[:3])
  assert int(counts.seen) == 16


def test_half_at_attacks_every_other_image(model):
  shapes = []

  @dataclasses.dataclass(frozen=True)
  class Shaped(attacks.Fgsm):
    def scaled(self, ratio):
      return self

    def __call__(self, logits_fn, images, labels, keys):
      shapes.append(images.shape)
      return jax.numpy.ones_like(images)

  params, stats = model.init(keys.root(0))
  tx = optim.build(
    {"name": "sgd"}, peft.linear().labels(params), schedules.ramp(1)
  )
  train_step = step.make_train_step(
    model, peft.linear(), losses.HalfAt(), Shaped(ThreatModel("linf", 0.1)),
    schedules.ramp(1), tx, white=16,
  )  # fmt: skip
  now = state.create(params, stats, peft.linear().trains(params), tx)
  _, counts = train_step(now, batch(8), keys.root(0))
  assert shapes == [(4, 8, 8, 1)]
  mixed = batch(8)["image"].astype(np.float32) / 16
  mixed[::2] = 1
  logits = model.logits(params, stats, mixed)
  expected = losses.cross_entropy(logits, batch(8)["label"]).sum()
  np.testing.assert_allclose(counts.loss, expected, rtol=1e-5)


def test_the_radius_follows_its_schedule(model):
  seen = []

  @dataclasses.dataclass(frozen=True)
  class Spy(attacks.Fgsm):
    def scaled(self, ratio):
      seen.append(float(ratio))
      return self

  params, stats = model.init(keys.root(0))
  tx = optim.build(
    {"name": "sgd"}, peft.linear().labels(params), schedules.ramp(1)
  )
  train_step = step.make_train_step(
    model, peft.linear(), losses.At(), Spy(ThreatModel("linf", 0.1)),
    schedules.ramp(8, begin=0.25, end=0.75), tx, white=16,
  )  # fmt: skip
  now = state.create(params, stats, peft.linear().trains(params), tx)
  for _ in range(8):
    now, _ = train_step(now, batch(), keys.root(0))
  assert seen == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
