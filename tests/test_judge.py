"""The judge can't be fooled: not by the function, nor by what was kept."""

import dataclasses
import gc
import itertools
import json
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from roli_jax import attacks, evaluate
from roli_jax.attacks import fab
from roli_jax.evaluate import classifier
from roli_jax.files import journal
from roli_jax.threat import ThreatModel
from tests.covering import covering, mostly_slow

BALL = ThreatModel("linf", eps=0.05)
PGD = attacks.build("pgd", BALL, num_steps=3)

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.2, 0.8, size=(24, 4, 4, 1)).astype(np.float32)
W = jnp.asarray(RNG.normal(size=(16, 10)), jnp.float32)
OTHER = jnp.asarray(RNG.normal(size=(16, 10)), jnp.float32)


def net(w, x):
  return (x.reshape(x.shape[0], -1) - 0.5) @ w


def labels_of(logits_fn, images=IMAGES):
  return np.asarray(logits_fn(images).argmax(1))


def said(result, name):
  (check,) = (check for check in result.checks if check.name == name)
  return check


# What a function reads outside its arguments.


class Held:
  """A network that holds its weights, and can't be hashed."""

  __hash__ = None

  def __init__(self, w):
    self.w = w

  def __eq__(self, other):
    raise ValueError("arrays are compared value by value")

  def __call__(self, x):
    return net(self.w, x)

  def logits(self, x):
    return net(self.w, x)


def _flag(holder):
  return lambda x: net(W if holder.w is W else OTHER, x)


READS = {
  "a closure": lambda holder: lambda x: net(holder.w, x),
  "an object": lambda holder: holder,
  "a bound method": lambda holder: holder.logits,
  "a flag": _flag,
  "an inner jit": lambda holder: jax.jit(lambda x: net(holder.w, x)),
  "a checkpoint": lambda holder: jax.checkpoint(lambda x: net(holder.w, x)),
}


@pytest.mark.parametrize(
  "kind", mostly_slow(READS, "a closure", "an inner jit", "a bound method")
)
def test_a_function_is_seen_as_it_is_now(kind):
  holder = Held(W)
  logits_fn = READS[kind](holder)
  labels = labels_of(logits_fn)
  assert evaluate.run(logits_fn, IMAGES, labels, PGD).clean.all()
  holder.w = OTHER
  result = evaluate.run(logits_fn, IMAGES, labels, PGD)
  truth = np.asarray(net(OTHER, IMAGES).argmax(1)) == labels
  np.testing.assert_array_equal(result.clean, truth)
  assert 0 < result.clean.sum() < 24


@jax.custom_vjp
def _identity(x, slope):
  return x


_identity.defvjp(
  lambda x, slope: (x, slope), lambda slope, g: (g * slope, None)
)

OUTSIDE = {
  "an array": lambda s, w, x: net(w, x) * s,
  "a number": lambda s, w, x: net(w, x) * float(s),
  "within jit": lambda s, w, x: jax.jit(lambda y: y * s)(net(w, x)),
  "within a loop": lambda s, w, x: jax.lax.map(lambda y: y * s, net(w, x)),
  "a derivative": lambda s, w, x: net(w, _identity(x, s)),
}


@pytest.mark.parametrize(
  "kind", mostly_slow(OUTSIDE, "an array", "within jit", "a derivative")
)
def test_with_params_what_is_read_outside_is_seen_too(kind):
  scale = {"now": jnp.float32(1)}

  def logits_fn(w, x):
    return OUTSIDE[kind](scale["now"], w, x)

  labels = labels_of(lambda x: net(W, x))
  before = evaluate.run(logits_fn, IMAGES, labels, PGD, params=W)
  compiled = count_compilations()
  evaluate.run(logits_fn, IMAGES, labels, PGD, params=W)
  assert not compiled
  scale["now"] = -scale["now"]
  after = evaluate.run(logits_fn, IMAGES, labels, PGD, params=W)
  fresh = evaluate.run(lambda x: logits_fn(W, x), IMAGES, labels, PGD)
  for name in ("clean", "robust", "adv"):
    np.testing.assert_array_equal(getattr(after, name), getattr(fresh, name))
  assert (before.robust != after.robust).any()


def count_compilations():
  compiled: list[str] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: "backend_compile" in name and compiled.append(name)
  )
  return compiled


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(16, 10, rngs=rngs)
    self.dropout = nnx.Dropout(0.9, rngs=rngs)

  def __call__(self, x):
    return self.linear(self.dropout(x.reshape(x.shape[0], -1) - 0.5))


def test_an_nnx_module_is_seen_after_training_and_after_eval():
  module = NnxNet(nnx.Rngs(0))
  module.eval()
  labels = labels_of(module)
  assert evaluate.run(module, IMAGES, labels, PGD).clean.all()
  kernel = module.linear.kernel
  kernel[...] = -kernel[...]
  expected = labels_of(module) == labels
  result = evaluate.run(module, IMAGES, labels, PGD)
  np.testing.assert_array_equal(result.clean, expected)


@pytest.mark.parametrize("params", [None, W])
def test_nothing_is_kept_alive(params):
  class Big:
    w = W + 1

  big = Big()
  if params is None:
    logits_fn = lambda x, big=big: net(big.w, x)  # noqa: E731
  else:
    logits_fn = lambda w, x, big=big: net(big.w, x) + net(w, x)  # noqa: E731
  evaluate.run(logits_fn, IMAGES, np.zeros(24, int), PGD, params=params)
  gone = weakref.ref(big)
  del big, logits_fn
  gc.collect()
  assert gone() is None


def test_a_bound_method_is_known_again():
  module = Linen()
  variables = module.init(jax.random.key(0), IMAGES)
  labels = np.asarray(module.apply(variables, IMAGES).argmax(1))
  evaluate.run(module.apply, IMAGES, labels, PGD, params=variables)
  compiled = count_compilations()
  evaluate.run(module.apply, IMAGES, labels, PGD, params=variables)
  assert not compiled


def test_another_function_at_each_trace_is_told():
  rng = np.random.default_rng(0)

  def logits_fn(x):
    return net(W, x) + rng.normal(size=(1, 10)).astype(np.float32)

  result = evaluate.run(logits_fn, IMAGES, np.zeros(24, int), None)
  assert said(result, "deterministic").verdict == "fail"


@dataclasses.dataclass(frozen=True)
class Frozen:
  """Hashes its arrays, as equinox's modules do."""

  w: object

  def __call__(self, *args):
    *params, x = args
    return net(self.w, x) + sum(net(p, x) for p in params)


@dataclasses.dataclass
class Slotted:
  """Can be neither hashed nor referred to weakly."""

  __slots__ = ("w",)
  w: object

  def __call__(self, *args):
    return Frozen(self.w)(*args)


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(x.reshape(x.shape[0], -1))


def _bound():
  module = Linen()
  return module.bind(module.init(jax.random.key(0), IMAGES))


CALLABLES = {
  "frozen": lambda: Frozen(W),
  "slotted": lambda: Slotted(W),
  "linen": _bound,
  "jitted": lambda: jax.jit(Frozen(W).__call__),
  "partial": lambda: jax.tree_util.Partial(net, W),
}


@pytest.mark.parametrize("kind", CALLABLES)
def test_any_callable_is_a_function(kind):
  logits_fn = CALLABLES[kind]()
  labels = labels_of(logits_fn)
  assert evaluate.run(logits_fn, IMAGES, labels, None).clean.all()


@pytest.mark.parametrize("kind", ["frozen", "slotted"])
def test_any_callable_takes_params(kind):
  logits_fn = CALLABLES[kind]()
  labels = labels_of(lambda x: logits_fn(OTHER, x))
  for _ in range(2):
    result = evaluate.run(logits_fn, IMAGES, labels, None, params=OTHER)
    assert result.clean.all()


@pytest.mark.parametrize(
  "logits_fn, params, message",
  [
    (Linen(), None, "`apply`"),
    (lambda x: np.asarray(x).reshape(8, -1) @ np.ones((16, 3)), None,
     "evaluate.foreign"),
    (lambda x: net(W, x) if x.sum() > 0 else 0, None, "can't be traced"),
    (lambda x: (net(W, x), {}), None, "got tuple"),
    (lambda x: x @ W, None, "can't be traced"),
    (lambda x: net(W, x) > 0, None, "floats"),
    (lambda p, x: net(p["w"], x), {"w": W, "act": jax.nn.relu}, "'act'"),
  ],
)  # fmt: skip
def test_what_is_no_function_of_images_is_told_what_to_write(
  logits_fn, params, message
):
  with pytest.raises(ValueError, match=message):
    evaluate.run(logits_fn, IMAGES, np.zeros(24, int), None, params=params)


def test_images_of_low_precision_are_widened():
  labels = labels_of(lambda x: net(W, x))
  for dtype in (jnp.bfloat16, jnp.float16, np.float64):
    images = IMAGES.astype(dtype)
    result = evaluate.run(lambda x: net(W, x), images, labels, PGD)
    assert result.adv.dtype == np.float32 and result.clean.mean() > 0.9


def test_labels_of_eight_bits_name_any_class():
  w = jnp.asarray(RNG.normal(size=(16, 300)), jnp.float32)
  order = np.argsort(-np.asarray(net(w, IMAGES)).sum(0))
  w = w[:, order]  # most images are of the first classes
  labels = labels_of(lambda x: net(w, x))
  few = labels < 128
  a, b = (
    evaluate.run(net, IMAGES[few], labels[few].astype(dtype), PGD, params=w)
    for dtype in (np.int32, np.uint8)
  )
  assert few.sum() > 3 and (b.margin[b.robust] > 0).all()
  np.testing.assert_array_equal(a.adv, b.adv)


@pytest.mark.parametrize(
  "attack, message",
  [
    (attacks.Pgd(BALL, loss="kl"), "kl"),
    (attacks.Pgd(BALL, step_size=np.full(24, 0.01, "f4")), "step_size"),
    (attacks.Pgd(ThreatModel("linf", jnp.float32(-0.05))), "eps"),
  ],
)
def test_attacks_that_can_not_be_judged_are_refused(attack, message):
  with pytest.raises(ValueError, match=message):
    evaluate.run(net, IMAGES, np.zeros(24, int), attack, params=W)


@pytest.mark.parametrize("low, high", [(-0.1, 1.1), (0.2, 0.8)])
def test_a_box_that_float32_rounds_is_kept(low, high):
  labels = labels_of(lambda x: net(W, x))
  ball = ThreatModel("linf", eps=0.4, low=low, high=high)
  attack = attacks.build("pgd", ball, num_steps=5)
  result = evaluate.run(net, np.clip(IMAGES, 0.21, 0.79), labels, attack,
                        params=W)  # fmt: skip
  assert not result.invalid.any() and not result.robust.any()


# Progress on disk.


def fitted():
  """Other weights that are right on the same images."""
  labels = jnp.asarray(labels_of(lambda x: net(W, x)))

  def loss(w):
    log_p = jax.nn.log_softmax(net(w, IMAGES))
    return -jnp.take_along_axis(log_p, labels.reshape(-1, 1), 1).mean()

  def step(_, w):
    return w - 2.0 * jax.grad(loss)(w)

  w = jax.jit(lambda w: jax.lax.fori_loop(0, 10_000, step, w))(OTHER)
  assert (net(w, IMAGES).argmax(1) == labels).all()
  return w


@pytest.mark.parametrize("with_params", [True, False])
def test_progress_of_another_model_is_refused(with_params, tmp_path):
  labels = labels_of(lambda x: net(W, x))

  def run(w):
    if with_params:
      return evaluate.run(net, IMAGES, labels, PGD, params=w, save=tmp_path)
    return evaluate.run(lambda x: net(w, x), IMAGES, labels, PGD, save=tmp_path)

  run(W)
  with pytest.raises(ValueError, match="progress of another evaluation"):
    run(fitted())
  assert run(W).robust.sum() < 24


@jax.custom_vjp
def _quantised(x):
  return jnp.round(x * 255) / 255


_quantised.defvjp(lambda x: (_quantised(x), None), lambda _, g: (g,))

# Pairs with the same clean logits, or nearly: of the first attacks see little.
ALIKE = {
  "a derivative was mended": (
    lambda x: net(W, jnp.round(x * 255) / 255),
    lambda x: net(W, _quantised(x)),
  ),
  "a large offset": (
    lambda x: net(W, x) + 1e4,
    lambda x: 2 * net(W, x) + 1e4,
  ),
  "a class far below": (
    lambda x: net(W, x).at[:, 9].set(-1e9),
    lambda x: (2 * net(W, x)).at[:, 9].set(-1e9),
  ),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_models_that_look_alike_are_told_apart(kind, tmp_path):
  first, second = ALIKE[kind]
  labels = labels_of(first)
  evaluate.run(first, IMAGES, labels, PGD, save=tmp_path)
  with pytest.raises(ValueError, match="progress of another evaluation"):
    evaluate.run(second, IMAGES, labels, PGD, save=tmp_path)


def test_progress_without_its_clean_logits_counts_for_what_holds(tmp_path):
  labels = labels_of(lambda x: net(W, x))
  weak = attacks.build("pgd", BALL, num_steps=0)
  evaluate.run(lambda x: net(W, x), IMAGES, labels, weak, save=tmp_path)
  (tmp_path / "clean-000000.npz").unlink()
  resumed = evaluate.run(lambda x: 3 * net(W, x), IMAGES, labels, weak,
                         save=tmp_path)  # fmt: skip
  fresh = evaluate.run(lambda x: 3 * net(W, x), IMAGES, labels, weak)
  np.testing.assert_array_equal(resumed.robust, fresh.robust)


@pytest.mark.parametrize("name", ["about.json", "pgd-000000.npz"])
def test_damaged_progress_is_named(name, tmp_path):
  labels = labels_of(lambda x: net(W, x))
  evaluate.run(net, IMAGES, labels, PGD, params=W, save=tmp_path)
  (tmp_path / name).write_bytes(b"{")
  with pytest.raises(ValueError, match=f"{name} is damaged"):
    evaluate.run(net, IMAGES, labels, PGD, params=W, save=tmp_path)


def test_rounding_of_another_processor_is_the_same_model(tmp_path):
  labels = labels_of(lambda x: net(W, x))
  first = evaluate.run(lambda x: net(W, x), IMAGES, labels, PGD, save=tmp_path)
  again = evaluate.run(
    lambda x: net(W * (1 + 1e-5), x), IMAGES, labels, PGD, save=tmp_path
  )
  np.testing.assert_array_equal(first.robust, again.robust)


def test_radii_are_told_apart_however_many(tmp_path):
  """A long array's repr leaves its middle out."""
  images = np.tile(IMAGES, (50, 1, 1, 1))
  labels = labels_of(lambda x: net(W, x), images)
  eps = np.full(len(images), 0.05, np.float32)
  for value, refused in ((0.05, False), (0.01, True)):
    eps[600] = value
    attack = attacks.build("fgsm", ThreatModel("linf", eps.copy()))
    if refused:
      with pytest.raises(ValueError, match="radii"):
        evaluate.run(net, images, labels, attack, params=W, save=tmp_path)
    else:
      evaluate.run(net, images, labels, attack, params=W, save=tmp_path)


def _make_older(path):
  """Progress as it was kept before it knew of the model."""
  file = path / "about.json"
  about = json.loads(file.read_text())
  for name in ("params", "radii"):
    del about[name]
  about["clean predictions"] = journal.digest(np.ones(24, bool))
  file.write_text(json.dumps(about))
  for kept in path.glob("clean-*.npz"):
    kept.unlink()


@pytest.mark.parametrize("name", ["pgd", "apgd_ce", "fab_t"])
def test_older_progress_counts_for_what_holds_now(name, tmp_path):
  attack = attacks.build(name, BALL, num_steps=10)
  labels = labels_of(lambda x: net(W, x))
  evaluate.run(net, IMAGES, labels, attack, params=W, save=tmp_path)
  _make_older(tmp_path)
  other = fitted()
  resumed = evaluate.run(
    net, IMAGES, labels, attack, params=other, save=tmp_path
  )
  fresh = evaluate.run(net, IMAGES, labels, attack, params=other)
  broken = ~resumed.robust
  assert (net(other, resumed.adv).argmax(1) != labels)[broken].all()
  assert not (resumed.robust & ~fresh.robust).any()


def test_a_restored_image_that_is_none_any_more_does_not_count(tmp_path):
  labels = labels_of(lambda x: net(W, x))
  whole = evaluate.run(net, IMAGES, labels, PGD, params=W, save=tmp_path)
  (file,) = tmp_path.glob("pgd-*.npz")
  entry = dict(np.load(file))
  entry["adv"] = np.zeros_like(entry["adv"])
  np.savez(file, **entry)
  again = evaluate.run(net, IMAGES, labels, PGD, params=W, save=tmp_path)
  np.testing.assert_array_equal(whole.robust, again.robust)
  np.testing.assert_array_equal(whole.adv, again.adv)


def thin(logits, labels):
  """Whose two logits differ by less than so much of their size."""
  return ~np.asarray(fab._is_sure(jnp.asarray(logits), jnp.asarray(labels)))


def test_what_the_judge_denies_costs_no_image_that_fab_broke(monkeypatch):
  """Its nearest image lies where the judge may round to the other side."""
  monkeypatch.setattr(fab, "ROUNDING", 0.04)
  labels = labels_of(lambda x: net(W, x))
  last = attacks.build("fab", BALL, num_steps=10)
  nearest = evaluate.run(lambda x: net(W, x), IMAGES, labels, last)
  judge, denied = classifier.Classifier.judge, []

  def strict(self, examples):
    right, margin, logits = judge(self, examples)
    doubtful = thin(logits, examples.labels) & ~right
    denied.append(doubtful.sum())
    return right | doubtful, margin, logits

  monkeypatch.setattr(classifier.Classifier, "judge", strict)
  stops = dataclasses.replace(last, stop=True)
  found, first = (
    evaluate.run(lambda x: net(W, x), IMAGES, labels, attack)
    for attack in (last, stops)
  )
  assert sum(denied) and not nearest.robust.all()
  assert not (found.robust & ~first.robust).any()
  assert (found.min_distance >= nearest.min_distance).all()
  assert (found.min_distance > nearest.min_distance).any()
  said = np.asarray(net(W, found.adv))
  assert not (thin(said, labels) & ~found.robust).any()


# Logits and gradients that are not finite, by every attack.

EVERY = {
  "fgsm": {},
  "pgd": {"num_steps": 5},
  "apgd_ce": {"num_steps": 5},
  "apgd_dlr": {"num_steps": 5},
  "apgd_t": {"num_steps": 5},
  "fab": {"num_steps": 5},
  "fab_t": {"num_steps": 5},
  "square": {"num_queries": 20},
}


def build(name):
  return attacks.build(name, ThreatModel("linf", eps=0.04), **EVERY[name])


# One class alone can't be broken; DLR wants three, or four.
MASKED = [(name, 3) for name in EVERY]
MASKED += [(name, k) for k in (1, 2) for name in ("pgd", "apgd_t", "fab")]


@pytest.mark.parametrize("name, kept", covering(MASKED))
def test_a_masked_class_is_a_class_that_is_not_there(name, kept):
  """-inf is the lowest logit: the other classes decide."""
  labels = np.asarray(net(W, IMAGES)[:, :kept].argmax(1))

  def masked(x):
    return jnp.where(jnp.arange(10).reshape(1, -1) < kept, net(W, x), -jnp.inf)

  result = evaluate.run(masked, IMAGES, labels, build(name))
  assert result.clean.all() and np.isfinite(result.adv).all()
  assert said(result, "clean accuracy").said.startswith("100.0%")
  assert not {c.name for c in result.checks if c.verdict == "fail"}
  assert said(result, "finite logits").verdict == "pass"
  if kept == 1:
    assert result.robust.all()
    return
  cut = evaluate.run(lambda x: net(W, x)[:, :kept], IMAGES, labels, build(name))
  np.testing.assert_array_equal(result.robust, cut.robust)


@pytest.mark.parametrize("value, seen", [(np.nan, "NaN"), (np.inf, r"\+inf")])
def test_clean_logits_that_rank_nothing_are_an_error(value, seen):
  def logits_fn(x):
    return net(W, x).at[:, 3].set(jnp.where(x[:, 0, 0, 0] > 0.5, value, 0))

  with pytest.raises(ValueError, match=seen):
    evaluate.run(logits_fn, IMAGES, np.zeros(24, int), PGD)
  with pytest.raises(ValueError, match="-inf for every class"):
    evaluate.run(lambda x: net(W, x) - jnp.inf, IMAGES, np.zeros(24, int), PGD)


def test_float16_that_overflows_says_so():
  def logits_fn(x):
    return (6e4 * net(W, x)).astype(jnp.float16)

  with pytest.raises(ValueError, match=r"\+inf.*overflow"):
    evaluate.run(logits_fn, IMAGES, np.zeros(24, int), PGD)


def test_a_break_by_logits_that_are_no_numbers_warns():
  def logits_fn(x):
    odd = (jnp.abs(x - IMAGES.mean()) > 0.32).any((1, 2, 3))
    return jnp.where(odd.reshape(-1, 1), jnp.nan, net(W, x))

  images = np.clip(IMAGES, 0.3, 0.7)
  labels = labels_of(lambda x: net(W, x), images)
  attack = attacks.build("pgd", ThreatModel("linf", eps=0.2), num_steps=3,
                         keep="last")  # fmt: skip
  result = evaluate.run(logits_fn, images, labels, attack)
  check = said(result, "finite logits")
  assert check.verdict == "warn"
  assert set(check.images) <= set(np.flatnonzero(~result.robust))


def _bad(x):
  """A gradient of 0 / 0 where the first row is 0, and the same logits."""
  return net(W, x) + 1e-6 * jnp.linalg.norm(x[:, 0, :, 0], axis=1).reshape(
    -1, 1
  )


@pytest.mark.parametrize("name", mostly_slow(EVERY, "pgd", "apgd_t", "fab"))
def test_a_gradient_that_is_not_finite_stops_no_attack(name):
  images = IMAGES.copy()
  images[:20, 0] = 0
  labels = labels_of(lambda x: net(W, x), images)
  good = evaluate.run(lambda x: net(W, x), images, labels, build(name))
  bad = evaluate.run(_bad, images, labels, build(name))
  assert said(good, "gradients finite").verdict == "pass"
  check = said(bad, "gradients finite")
  assert check.verdict == "warn" and check.images == tuple(range(20))
  assert good.robust.mean() <= bad.robust.mean() < 0.6


@jax.custom_vjp
def _steeper(x, by):
  return x


_steeper.defvjp(lambda x, by: (x, by), lambda by, g: (g * by, None))


@pytest.mark.parametrize("name", mostly_slow(("pgd", "apgd_ce"), "apgd_ce"))
def test_gradients_of_any_size_are_climbed_in_l2(name):
  labels = labels_of(lambda x: net(W, x))
  attack = attacks.build(name, ThreatModel("l2", eps=0.15), num_steps=5)
  one, small, large = (
    evaluate.run(
      lambda x, by=by: net(W, _steeper(x, by)), IMAGES, labels, attack
    ).robust
    for by in (1.0, 2.0**-80, 2.0**80)
  )
  assert not one.all()
  np.testing.assert_array_equal(one, small)
  np.testing.assert_array_equal(one, large)


def test_pgd_keeps_a_point_of_logits_that_are_no_numbers():
  points = jnp.asarray(IMAGES)

  def logits_fn(x):
    near = jnp.abs(x[:, None] - points[None]).max((2, 3, 4)).min(1) < 0.02
    return jnp.where(near.reshape(-1, 1), net(W, x), jnp.nan)

  labels = labels_of(lambda x: net(W, x))
  result = evaluate.run(logits_fn, IMAGES, labels, PGD)
  assert not result.robust.any()
  assert said(result, "finite logits").verdict == "warn"


def test_gradients_that_are_zero_are_told():
  labels = labels_of(lambda x: net(W, x))
  result = evaluate.run(
    lambda x: net(W, jax.lax.stop_gradient(x)), IMAGES, labels, PGD
  )
  check = said(result, "gradients finite")
  assert check.verdict == "warn" and len(check.images) == 24
  assert "24 gradients that are all 0" in check.said


def on_host(x):
  """A network in NumPy."""
  w = np.asarray(W)
  return jax.pure_callback(
    lambda x: (np.asarray(x).reshape(len(x), -1) - 0.5) @ w,
    jax.ShapeDtypeStruct((x.shape[0], 10), jnp.float32),
    x,
  )


def test_without_a_derivative_square_and_clean_accuracy_remain():
  labels = labels_of(lambda x: net(W, x))
  clean = evaluate.run(on_host, IMAGES, labels, None)
  assert clean.clean.all()
  assert said(clean, "gradients finite").verdict == "info"
  square = evaluate.run(on_host, IMAGES, labels, build("square"))
  same = evaluate.run(lambda x: net(W, x), IMAGES, labels, build("square"))
  np.testing.assert_array_equal(square.robust, same.robust)
  with pytest.raises(ValueError, match="custom_vjp"):
    evaluate.run(on_host, IMAGES, labels, PGD)


def test_the_ten_lines_of_the_docs_attack_a_network_on_the_host(root):
  text = (root / "docs" / "evaluation.md").read_text()
  code, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  names = {}
  exec(code, names)
  images = np.random.default_rng(1).uniform(size=(16, 8, 8, 1)).astype("f4")
  labels = np.asarray(names["forward"](images).argmax(1))
  attack = attacks.build("apgd_ce", ThreatModel("linf", 0.02), num_steps=5)
  host = evaluate.run(names["logits_fn"], images, labels, attack)
  w = jnp.asarray(names["w"])
  traced = evaluate.run(
    lambda x: x.reshape(x.shape[0], -1) @ w, images, labels, attack
  )
  assert 0 < traced.robust.sum() < 16
  np.testing.assert_array_equal(host.robust, traced.robust)


# Batches.


class BatchNorm(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x))
    return nn.Dense(10)(nn.relu(x).reshape(x.shape[0], -1))


@pytest.mark.parametrize(
  "n, train",
  covering(itertools.product((1, 5, 8, 24, 64, 128), (True, False))),
)
def test_batch_norm_in_training_mode_is_found(n, train):
  rng = np.random.default_rng(n)
  images = rng.uniform(size=(n, 4, 4, 1)) * rng.uniform(
    0.1, 1, size=(n, 1, 1, 1)
  )
  images = images.astype(np.float32)
  module = BatchNorm()
  variables = module.init(jax.random.key(0), images, train=False)

  def logits_fn(x):
    return module.apply(variables, x, train=train, mutable=["batch_stats"])[0]

  result = evaluate.run(logits_fn, images, np.zeros(n, int), None)
  assert said(result, "batch").verdict == ("fail" if train else "pass")
