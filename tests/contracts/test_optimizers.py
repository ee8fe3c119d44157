"""What every optimizer promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from roli_jax import optim, trees
from roli_jax.optim import schedules

LABELS = {"head": {"kernel": "head", "bias": "head"}, "backbone": {"w": None}}


def params():
  return {
    "head": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])},
    "backbone": {"w": None},
  }


@pytest.fixture(params=optim.OPTIMIZERS)
def name(request):
  return request.param


@pytest.fixture(params=optim.ANCHORS)
def near(request):
  return {"name": request.param}


def build(lr=0.1, num_steps=200, decay="constant", **spec):
  shape = schedules.warmup(num_steps, 0.0, decay)
  tx = optim.build(spec, LABELS, shape)
  return tx, optim.at_rate(tx.init(params()), lr)


def test_it_finds_the_bottom_of_a_parabola(name, near):
  if near["name"] == "l2sp":
    near["lam"] = 1e-4  # it moves the bottom
  if near["name"] == "ftp":
    near["mu"] = 0.1  # from a radius of 1e-8
  tx, opt_state = build(
    lr=0.2,
    decay="cosine",  # at a rate of its own Muon goes by steps of one length
    name=name,
    anchor=near,
    head="anchor_at_probe",
  )
  now = params()

  @jax.jit
  def go(now, opt_state):
    updates, opt_state = tx.update(now, opt_state, now)  # the gradient
    return optax.apply_updates(now, updates), opt_state

  for _ in range(200):
    now, opt_state = go(now, opt_state)
  assert max(abs(x).max() for x in jax.tree.leaves(now)) < 1e-2
  assert go._cache_size() == 1


def test_dtypes_in_are_dtypes_out(name, near):
  tx, _ = build(name=name, anchor=near, head="anchor_at_probe")
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
  before = tx.init(half)
  updates, after = tx.update(half, before, half)
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
  kinds = [[x.dtype for x in jax.tree.leaves(s)] for s in (before, after)]
  assert kinds[0] == kinds[1]
  wide = jnp.dtype("float32")
  anchors = [
    leaf for path, leaf in trees.paths(after).items() if "/anchor/" in path
  ]
  assert len(anchors) == 2 * (near["name"] != "none")
  assert {x.dtype for x in anchors} <= {wide}


def test_shardings_stay(near):
  mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
  split = NamedSharding(mesh, PartitionSpec(None, "data"))
  tx, _ = build(name="adamw", anchor=near, head="anchor_at_probe")
  now = params()
  now["head"]["kernel"] = jax.device_put(jnp.ones((3, 4)), split)

  @jax.jit
  def go(now, opt_state):
    updates, opt_state = tx.update(now, opt_state, now)
    return optax.apply_updates(now, updates), opt_state

  opt_state = jax.jit(tx.init)(now)
  for _ in range(2):
    now, opt_state = jax.block_until_ready(go(now, opt_state))
  large = [x for x in jax.tree.leaves((now, opt_state)) if x.shape == (3, 4)]
  assert len(large) >= 3
  assert all(x.sharding.is_equivalent_to(split, 2) for x in large)


@pytest.mark.parametrize(
  "neutral",
  [
    {"name": "l2sp", "lam": 0.0},
    {"name": "spd", "lam": 0.0},
    {"name": "digrap", "mu": 0.0},
  ],
)
def test_at_its_neutral_setting_it_is_the_plain_optimizer(name, neutral):
  rng = np.random.default_rng(0)
  results = []
  gradients = [
    jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params())
    for _ in range(4)
  ]
  for spec in ({}, {"anchor": neutral, "head": "anchor_at_probe"}):
    tx, opt_state = build(name=name, weight_decay=0.1, **spec)
    now = params()
    for grads in gradients:
      updates, opt_state = tx.update(grads, opt_state, now)
      now = optax.apply_updates(now, updates)
    results.append(now)
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_the_head_is_held_only_where_the_config_says(near):
  for head, held in (("exclude", 0), ("anchor_at_probe", 2)):
    _, opt_state = build(name="adamw", anchor=near, head=head)
    paths = [path for path in trees.paths(opt_state) if "/anchor/" in path]
    assert len(paths) == held * (near["name"] != "none")


def test_what_a_method_adds_is_held_to_zero():
  shape = schedules.warmup(10, 0.0, "constant")
  spec = {"name": "adamw", "anchor": {"name": "spd"}}
  tx = optim.build(spec, {"a": "peft", "w": "backbone"}, shape)
  opt_state = tx.init({"a": jnp.ones(3), "w": jnp.ones(3)})
  anchors = {
    path: leaf
    for path, leaf in trees.paths(opt_state).items()
    if "/anchor/" in path
  }
  means = {path[-1]: float(leaf.mean()) for path, leaf in anchors.items()}
  assert means == {"a": 0.0, "w": 1.0}


def test_biases_are_not_decayed(name):
  tx, opt_state = build(name=name, weight_decay=0.5)
  still = jax.tree.map(jnp.zeros_like, params())
  updates, _ = tx.update(still, opt_state, params())
  assert not updates["head"]["bias"].any()
  np.testing.assert_allclose(
    updates["head"]["kernel"], -0.1 * 0.5 * params()["head"]["kernel"]
  )


def test_clipping_bounds_the_norm_over_all_trained_leaves():
  tx, opt_state = build(name="sgd", clip_norm=1.0, momentum=0.0)
  updates, _ = tx.update(params(), opt_state, params())
  np.testing.assert_allclose(optax.tree.norm(updates), 0.1, rtol=1e-6)


def test_groups_can_have_rates_of_their_own():
  tx, opt_state = build(name="sgd", momentum=0.0, multipliers=(("head", 3.0),))
  updates, _ = tx.update(params(), opt_state, params())
  np.testing.assert_allclose(
    updates["head"]["kernel"], -0.3 * params()["head"]["kernel"], rtol=1e-6
  )


def test_adamw_is_the_one_of_optax():
  tx, opt_state = build(name="adamw", weight_decay=0.0)
  plain = optax.adam(0.1)
  grads = params()
  got, _ = tx.update(grads, opt_state, params())
  expected, _ = plain.update(grads, plain.init(params()), params())
  jax.tree.map(np.testing.assert_allclose, got, expected)


@pytest.mark.parametrize(
  "spec, message",
  [
    ({"name": "adam"}, "adamw"),
    ({"name": "sgd", "weight_decay": -1.0}, "weight_decay"),
    ({"name": "sgd", "clip_norm": -1.0}, "clip_norm"),
    ({"name": "sgd", "multipliers": (("haed", 1.0),)}, "head"),
    ({"name": "sgd", "anchor": {"name": "fpt"}}, "did you mean 'ftp'"),
    ({"name": "sgd", "anchor": {"name": "spd", "lam": -0.1}}, "lam"),
    ({"name": "sgd", "anchor": {"name": "l2sp", "lam": -0.1}}, "lam"),
    ({"name": "sgd", "anchor": {"name": "ftp", "k": 1.5}}, "k must be within"),
    ({"name": "sgd", "anchor": {"name": "digrap", "mu": -1.0}}, "mu"),
    ({"name": "sgd", "head": "free"}, "optim.head"),
  ],
)
def test_what_can_not_be_meant_is_refused(spec, message):
  with pytest.raises(ValueError, match=message):
    build(**spec)


def at(schedule, *steps):
  return [round(float(schedule(jnp.asarray(step))), 4) for step in steps]


def test_warmup_starts_above_zero_and_peaks_once():
  cosine = schedules.warmup(20, 0.25, "cosine")
  assert at(cosine, 0, 2, 4, 5) == [0.2, 0.6, 1.0, 1.0]
  assert at(cosine, 19)[0] < 0.02 and at(cosine, 20) == [0.0]
  assert at(schedules.warmup(20, 0.0, "cosine"), 0) == [1.0]


def test_decays_reach_where_they_should():
  assert at(schedules.warmup(10, 0.0, "linear"), 0, 5, 10) == [1.0, 0.5, 0.0]
  assert at(schedules.warmup(10, 0.2, "constant"), 0, 1, 9) == [0.5, 1.0, 1.0]


def test_ramps_rise_between_two_points():
  assert at(schedules.ramp(100, 0.2, 0.6), 0, 20, 40, 60, 99) == [
    0.0, 0.0, 0.5, 1.0, 1.0,
  ]  # fmt: skip
  assert at(schedules.ramp(100), 0, 99) == [1.0, 1.0]
  assert at(schedules.ramp(100, 0.5, 0.5), 49, 51) == [0.0, 1.0]


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: schedules.warmup(10, 1.1, "cosine"), "warmup"),
    (lambda: schedules.warmup(10, 0.0, "cosin"), "cosine"),
    (lambda: schedules.ramp(10, 0.5, 0.2), "begin"),
  ],
)
def test_schedules_that_can_not_be_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
