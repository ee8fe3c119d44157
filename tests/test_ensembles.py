"""Ensembles of two models: the weight between them, and attacks through it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roli_jax import attacks, ensembles, evaluate, keys, trees
from roli_jax.threat import ThreatModel

# The specification's example: zero-shot says the first class, fine-tuned the
# second.
ZS, FT = np.log([[0.8, 0.2]]), np.log([[0.3, 0.7]])
HELD = {
  "zs_held": np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
  "ft_held": np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]]),
  "held_labels": np.array([0, 1, 1]),
}
COLD = {"t_zs": 1.0, "t_ft": 1.0}


def state(bank, **fields):
  """A state of that bank."""
  defaults = {"a": 1.5, "b": 0.6, "alpha": None, "k": 1, "squared": True}
  bank = jnp.asarray(bank, jnp.float32)
  return ensembles.VrfState(bank=bank, **COLD, **{**defaults, **fields})


def at(squared):
  """Unit features at that squared distance from (1, 0)."""
  cosine = 1 - squared / 2
  return jnp.array([[cosine, np.sqrt(1 - cosine**2)]])


def fit(zs, ft, **given):
  """Fits to images whose label is 0, from what each model says of them.

  The features of each of the first five point along an axis of their own.
  """
  n = len(zs)
  say = 4 * np.eye(2, dtype=np.float32)
  feats = 3 * np.eye(n, min(n, 5), dtype=np.float32)
  labels = np.zeros(n, np.int32)
  given = {**COLD, **given}
  return ensembles.vrf_fit(say[zs], say[ft], labels, feats, **given)


@pytest.mark.parametrize(
  "squared, expected",
  [(0.9, (0.43447, 0.56553)), (2.1, (0.66553, 0.33447))],
)
def test_near_the_bank_the_fine_tuned_model_decides(squared, expected):
  got = ensembles.vrf_predict(state([[1, 0]]), ZS, FT, at(squared))
  np.testing.assert_allclose(jnp.exp(got)[0], expected, atol=5e-6)


def test_the_class_switches_at_a_weight_of_three_fifths():
  edge = 1.5 - 0.6 * np.log(1.5)
  assert edge == pytest.approx(1.2567209351)
  said = [
    int(ensembles.vrf_predict(state([[1, 0]]), ZS, FT, at(d)).argmax())
    for d in (edge - 1e-4, edge + 1e-4)
  ]
  assert said == [1, 0]


def test_a_and_b_of_the_call_replace_those_of_the_state():
  far = state([[1, 0]], a=9.0, b=3.0)
  got = ensembles.vrf_predict(far, ZS, FT, at(0.9), a=1.5, b=0.6)
  same = ensembles.vrf_predict(state([[1, 0]]), ZS, FT, at(0.9))
  other = ensembles.vrf_predict(far, ZS, FT, at(0.9))
  np.testing.assert_array_equal(got, same)
  assert float(jnp.abs(got - other).max()) > 0.01
  with pytest.raises(ValueError, match="b must be finite and > 0, got 0"):
    ensembles.vrf_predict(far, ZS, FT, at(0.9), b=0)


def test_each_model_is_read_at_its_temperature():
  hot = dataclasses.replace(state([[1, 0]]), t_zs=2.0, t_ft=0.5)
  got = ensembles.vrf_predict(hot, ZS, FT, at(1.5))
  zs = np.array([0.8, 0.2]) ** (1 / 2)
  ft = np.array([0.3, 0.7]) ** (1 / 0.5)
  expected = (zs / zs.sum() + ft / ft.sum()) / 2
  np.testing.assert_allclose(jnp.exp(got)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("squared, expected", [(True, 2), (False, np.sqrt(2))])
def test_distances_are_squared_or_not(squared, expected):
  one = state([[1, 0]], squared=squared)
  query = jnp.array([[0.0, 7.0]])  # its length does not matter
  got = ensembles.vrf_distance(one, query)
  np.testing.assert_allclose(got, [expected], rtol=1e-6)


@pytest.mark.parametrize("squared", [True, False])
def test_the_distance_is_that_to_the_kth_nearest_member(squared):
  rng = np.random.default_rng(0)
  bank, query = (rng.normal(size=(n, 4)) for n in (9, 5))
  bank /= np.linalg.norm(bank, axis=1, keepdims=True)
  unit = query / np.linalg.norm(query, axis=1, keepdims=True)
  power = 2 if squared else 1
  away = np.linalg.norm(unit[:, None] - bank[None], axis=2) ** power
  for k in (1, 3, 9):
    measured = state(bank, k=k, squared=squared)
    got = ensembles.vrf_distance(measured, jnp.asarray(query, jnp.float32))
    np.testing.assert_allclose(got, np.sort(away)[:, k - 1], rtol=1e-4)


def test_the_bank_holds_what_only_the_fine_tuned_model_gets_right():
  fitted = fit(zs=[1, 0, 1, 1, 0], ft=[0, 0, 1, 0, 1])
  np.testing.assert_allclose(fitted.bank, np.eye(5)[[0, 3]])
  assert fitted.k == 2 and fitted.alpha is None  # 1000 * 2 / 5, and clipped


@pytest.mark.parametrize(
  "choice, k",
  [
    ({}, 300),  # 1000 * 300 / 1000
    ({"rule": "paper"}, 1),  # 0.3, at least 1
    ({"rule": "paper", "share": 0.05}, 15),
    ({"rule": "paper", "share": 2.0}, 300),
    ({"k": 7}, 7),
  ],
)
def test_k_is_by_the_rule_or_as_given(choice, k):
  assert fit([1] * 300 + [0] * 700, [0] * 1000, **choice).k == k


def test_the_codes_k_counts_among_all_images():
  assert fit([1] * 2 + [0] * 1198, [0] * 1200).k == 2  # 1.67
  assert fit([1] + [0] * 2499, [0] * 2500).k == 1  # 0.4, at least 1


def test_a_bank_of_one_member_serves():
  fitted = fit(zs=[1, 0, 0], ft=[0, 0, 0])
  assert fitted.k == 1
  got = ensembles.vrf_predict(fitted, ZS, FT, jnp.array([[1.0, 0, 0]]))
  w = 0.92414182
  expected = [w * 0.3 + (1 - w) * 0.8, w * 0.7 + (1 - w) * 0.2]
  np.testing.assert_allclose(jnp.exp(got)[0], expected, rtol=1e-5)


def test_a_bank_without_members_is_an_error_unless_alpha_is_given():
  with pytest.raises(ValueError, match="a bank without members: of 3 images"):
    fit(zs=[0, 0, 1], ft=[0, 0, 1])
  with pytest.raises(ValueError, match="of fewer than k = 3 members"):
    fit(zs=[1, 1, 0], ft=[0, 0, 0], k=3)


@pytest.mark.parametrize("zs, choice", [([0, 0, 0], {}), ([1, 1, 0], {"k": 3})])
def test_with_alpha_a_bank_too_small_weighs_all_images_alike(zs, choice):
  fitted = fit(zs, [0, 0, 0], alpha=0.25, t_zs=2.0, **choice)
  assert fitted.k == 0
  feats = jnp.array([[1.0, 0, 0], [0, 0, 0]])
  two = [np.repeat(x, 2, 0) for x in (ZS, FT)]
  got = ensembles.vrf_predict(fitted, *two, feats)
  np.testing.assert_array_equal(got, ensembles.ose(*two, 0.25, 2.0, 1.0))


def test_where_the_bank_serves_alpha_is_not_used():
  fitted = fit([1, 0], [0, 0], alpha=0.25)
  assert fitted.k == 1 and fitted.alpha is None


def test_temperatures_come_from_held_images():
  fitted = fit([1, 0], [0, 0], t_zs=None, t_ft=None, **HELD)
  for name in ("zs", "ft"):
    expected = ensembles.temperature(HELD[f"{name}_held"], HELD["held_labels"])
    assert getattr(fitted, f"t_{name}") == expected
  assert fitted.t_zs < fitted.t_ft  # which is the more certain of the two


@pytest.mark.parametrize("missing", HELD)
def test_without_held_images_temperatures_are_asked_for(missing):
  held = {k: v for k, v in HELD.items() if k != missing}
  with pytest.raises(ValueError, match="held-out images"):
    fit([1, 0], [0, 0], t_zs=None, t_ft=None, **held)


@pytest.mark.parametrize(
  "wrong, said",
  [
    ({"rule": "knn"}, "unknown rule 'knn'; there are"),
    ({"k": 0}, "k must be >= 1, got 0"),
    ({"b": -0.6}, "b must be finite and > 0"),
    ({"t_ft": 0.0}, "t_ft must be finite and > 0"),
  ],
)
def test_fits_that_cannot_be_meant_are_errors(wrong, said):
  with pytest.raises(ValueError, match=said):
    fit([1, 0], [0, 0], **wrong)


@pytest.mark.parametrize(
  "shapes",
  [
    [(3, 2), (3, 5), (3,), (3, 4)],
    [(3, 2), (3, 2), (4,), (3, 4)],
    [(3, 2), (3, 2), (3,), (2, 4)],
    [(0, 2), (0, 2), (0,), (0, 4)],
  ],
)
def test_arrays_of_other_images_are_an_error(shapes):
  with pytest.raises(ValueError, match="of the same images"):
    ensembles._check_fit(*map(np.ones, shapes))


def test_at_its_temperature_a_model_is_as_sure_as_it_is_right():
  # Always 3 to 1 at temperature 2, and right in three of four cases.
  logits = np.array([[4.0, 2.0], [0, 2], [2, 0], [7, 9]]) * np.log(3)
  assert ensembles.temperature(logits, np.array([0, 1, 0, 0])) == pytest.approx(
    2, rel=1e-8
  )


def test_the_temperature_undoes_a_scale():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(4000, 5)) * 2
  gumbel = rng.gumbel(size=logits.shape)
  labels = (logits + gumbel).argmax(1)  # drawn from softmax(logits)
  calibrated = ensembles.temperature(logits, labels)
  assert calibrated == pytest.approx(1, abs=0.1)
  scaled = ensembles.temperature(3 * logits, labels)
  assert scaled == pytest.approx(3 * calibrated, rel=1e-6)
  said = np.exp(logits / calibrated)
  confidence = (said / said.sum(1, keepdims=True)).max(1).mean()
  accuracy = (logits.argmax(1) == labels).mean()
  assert confidence == pytest.approx(accuracy, abs=1e-8)


def test_temperatures_stay_between_a_tenth_and_ten():
  logits = np.array([[3.0, 1.0], [0.0, 0.5]])
  assert ensembles.temperature(logits, np.array([0, 1])) == 0.1
  assert ensembles.temperature(logits, np.array([1, 0])) == 10


def test_a_temperature_needs_images_and_finite_logits():
  with pytest.raises(ValueError, match="labelled images, got 0"):
    ensembles.temperature(np.zeros((0, 2)), np.zeros(0, int))
  with pytest.raises(ValueError, match="finite"):
    ensembles.temperature(np.array([[np.inf, 0]]), np.array([0]))


def test_the_ends_of_ose_are_its_models():
  for alpha, t_first, t_second, end in ((0, 2, 1, ZS / 2), (1, 1, 3, FT / 3)):
    got = ensembles.ose(ZS, FT, alpha, t_first, t_second)
    np.testing.assert_allclose(got, jax.nn.log_softmax(end), rtol=1e-6)


def test_ose_is_the_mean_of_probabilities():
  got = jnp.exp(ensembles.ose(ZS, FT, 0.25))
  np.testing.assert_allclose(got[0], [0.675, 0.325], rtol=1e-6)


def test_alpha_is_data():
  traced = []

  @jax.jit
  def mixed(alpha):
    traced.append(alpha)
    return ensembles.ose(ZS, FT, alpha)

  for alpha in (0.0, 0.25, 1.0):
    np.testing.assert_allclose(mixed(alpha), ensembles.ose(ZS, FT, alpha))
  assert len(traced) == 1


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_probabilities_sum_to_one(scale):
  rng = np.random.default_rng(0)
  zs, ft = (jnp.asarray(rng.normal(size=(6, 5)) * scale) for _ in range(2))
  feats = jnp.asarray(rng.normal(size=(6, 2)))
  for said in (
    ensembles.ose(zs, ft, 0.3),
    ensembles.ose(zs, ft, 0.0),
    ensembles.vrf_predict(state([[1, 0]]), zs, ft, feats),
    ensembles.vrf_predict(state([[1, 0]], b=1e-3), zs, ft, feats),
  ):
    assert jnp.isfinite(said).all()
    np.testing.assert_allclose(jnp.exp(said).sum(1), np.ones(6), rtol=1e-5)


def test_logits_of_other_classes_are_an_error():
  with pytest.raises(ValueError, match=r"got \(1, 2\) and \(1, 3\)"):
    ensembles._mixed(jnp.ones((1, 2)), jnp.ones((1, 3)), 0.0, 0.0)


@pytest.mark.parametrize("squared", [True, False])
def test_gradients_are_finite(squared):
  """At a member, opposite one, without features, between two members."""
  bank = state([[1, 0], [0.6, 0.8], [-1, 0]], squared=squared)
  feats = [[1, 0], [0, 0], [-2, 0], [1, 1e-30], [1e-30, 0], [2, 1], [0, -1]]

  def loss(feats, zs, ft):
    return ensembles.vrf_predict(bank, zs, ft, feats)[:, 0].sum()

  two = [jnp.repeat(jnp.asarray(x), 7, 0) for x in (ZS, FT)]
  grads = jax.jit(jax.grad(loss, (0, 1, 2)))(jnp.asarray(feats, float), *two)
  assert all(jnp.isfinite(g).all() and jnp.any(g) for g in grads)
  np.testing.assert_array_equal(grads[0][0], [0, 0])  # at a member


@pytest.mark.parametrize("squared", [True, False])
def test_the_gradient_leads_away_from_the_bank(squared):
  one = state([[1, 0]], squared=squared)
  zs, ft, x = jnp.asarray(ZS), jnp.asarray(FT), jnp.array([[0.8, 0.3]])

  def loss(feats):  # rises with the zero-shot model's weight
    return ensembles.vrf_predict(one, zs, ft, feats)[0, 0]

  h = 1e-2
  slope = (loss(x + jnp.array([[0, h]])) - loss(x - jnp.array([[0, h]]))) / (
    2 * h
  )
  grad = jax.grad(loss)(x)[0]
  assert grad[1] > 0.01 and grad[0] < 0
  np.testing.assert_allclose(grad[1], slope, rtol=2e-3)


def test_gradients_are_finite_at_the_ends_of_ose():
  zs, ft = jnp.asarray(ZS), jnp.asarray(FT)
  for alpha in (0.0, 1.0):
    grads = jax.grad(
      lambda zs, ft, alpha=alpha: ensembles.ose(zs, ft, alpha)[0, 0], (0, 1)
    )(zs, ft)
    assert [bool(jnp.any(g)) for g in grads] == [alpha == 0, alpha == 1]
    assert all(jnp.isfinite(g).all() for g in grads)


def test_the_ends_of_wse_are_its_models():
  rng = np.random.default_rng(0)
  first, second = (
    {"head": {"kernel": rng.normal(size=(3, 2)).astype(np.float32)},
     "stats": jnp.asarray(rng.normal(size=2), jnp.bfloat16)}
    for _ in range(2)
  )  # fmt: skip
  for alpha, end in ((0, first), (1, second), (jnp.float32(1), second)):
    got = ensembles.wse(first, second, alpha)
    jax.tree.map(np.testing.assert_array_equal, got, end)
    assert got["stats"].dtype == jnp.bfloat16
  got = ensembles.wse(first, second, 0.25)["head"]["kernel"]
  expected = 0.75 * first["head"]["kernel"] + 0.25 * second["head"]["kernel"]
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_wse_mixes_trees_of_the_same_leaves_only():
  one, longer = {"w": jnp.ones(2)}, {"w": jnp.ones(3)}
  with pytest.raises(ValueError, match=r"the second model: .*w \(3,\)"):
    ensembles.wse(one, longer, 0.5)
  with pytest.raises(ValueError, match="missing: w; unexpected: v"):
    ensembles.wse(one, {"v": jnp.ones(2)}, 0.5)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_a_share(alpha):
  for fails in (
    lambda: ensembles.wse({}, {}, alpha),
    lambda: ensembles.ose(ZS, FT, alpha),
    lambda: fit([0], [0], alpha=alpha),
  ):
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
      fails()


# Toy models of images [n, 1, 1, d], linear in the pixels' distance from 1/2.


def linear(weights, images):
  return (images.reshape(len(images), -1) - 0.5) @ weights


def with_features(variables, images):
  """Features and logits, by weights of their own."""
  of_feats, of_logits = variables
  return linear(of_feats, images), linear(of_logits, images)


def second_alone(variables, images):
  return with_features(variables, images)[1]


THROUGH = ensembles.vrf(linear, with_features)
PGD = attacks.build(
  "pgd", ThreatModel("linf", eps=0.1), num_steps=10, random_start=False
)


def against(axis, size=3):
  """Two logits that differ by that pixel."""
  return jnp.zeros((size, 2)).at[axis].set(jnp.array([10.0, -10.0]))


def broken(params, attacked, of_attacked, images, labels, attack=PGD):
  """Whom of an ensemble an attack on a function breaks."""

  @jax.jit
  def found(images, labels):
    image_keys = keys.per_image(keys.root(0), jnp.arange(len(images)))
    logits_fn = functools.partial(attacked, of_attacked)
    adv = attack(logits_fn, images, labels, image_keys)
    return THROUGH(params, adv).argmax(-1) != labels

  assert (THROUGH(params, images).argmax(-1) == labels).all()
  return np.asarray(found(images, labels))


def pixels(*values):
  """One image of these pixels, given as distances from 1/2."""
  return 0.5 + jnp.array(values).reshape(1, 1, 1, -1)


LABEL = jnp.zeros(1, jnp.int32)


def test_attacks_on_the_fine_tuned_model_alone_flatter_the_ensemble():
  """It rests on a strong pixel, and the zero-shot model on a weak one."""
  images = pixels(0.15, 0.03, 0)
  second = (jnp.eye(3), against(axis=0))
  most_zs = state([[0, 0, 1]], a=0.5)
  params = (against(axis=1), second, most_zs)
  assert not broken(params, second_alone, second, images, LABEL)
  assert broken(params, THROUGH, params, images, LABEL)


def test_the_bank_itself_is_attacked():
  """Features leave the bank, and with them the trust in who is right."""
  images = pixels(0.25, 0.05, 0.01)
  second = (jnp.diag(jnp.array([0.0, 1, 1])), against(axis=0))
  always_wrong = -2 * against(axis=0)
  params = (always_wrong, second, state([[0, 1, 0]], a=0.5, b=0.1))
  assert not broken(params, second_alone, second, images, LABEL)
  assert not broken(params, linear, always_wrong, images, LABEL)
  assert broken(params, THROUGH, params, images, LABEL)


@pytest.fixture(scope="module")
def random_models():
  """Two linear models of 6 pixels, and images that the ensemble gets right."""
  rng = np.random.default_rng(2)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  first, second = draw(6, 3), (draw(6, 4), draw(6, 3))
  images = rng.uniform(0.2, 0.8, (64, 1, 1, 6)).astype(np.float32)
  feats, ft = with_features(second, images)
  labels = np.asarray(ft.argmax(-1), np.int32)
  fitted = ensembles.vrf_fit(
    linear(first, images), ft, labels, feats, k=3, a=0.8, b=0.3, **COLD
  )
  params = (first, second, fitted)
  right = np.asarray(THROUGH(params, images).argmax(-1) == labels)
  return params, images[right], labels[right]


def test_an_attack_on_the_whole_breaks_most(random_models):
  params, *given = random_models
  long = dataclasses.replace(
    PGD, num_steps=40, num_restarts=3, random_start=True
  )
  first = broken(params, linear, params[0], *given, long)
  second = broken(params, second_alone, params[1], *given, long)
  whole = broken(params, THROUGH, params, *given, long)
  assert 0 < first.sum() < second.sum() < whole.sum() - 3 < 60 - 3


def test_an_evaluation_takes_the_ensemble(random_models):
  params, *given = random_models
  result = evaluate.run(THROUGH, *given, PGD, params=params)
  assert result.clean.all()
  np.testing.assert_array_equal(
    ~result.robust, broken(params, THROUGH, params, *given)
  )
  verdicts = {c.name: c.verdict for c in result.checks}
  assert set(verdicts.values()) <= {"pass", "info"}


def test_a_builder_gives_the_same_function_for_the_same_models():
  assert ensembles.vrf(linear, with_features) == THROUGH
  one = ensembles.output_space(linear, second_alone)
  assert one == ensembles.output_space(linear, second_alone)
  assert one != ensembles.output_space(linear, linear)


def test_other_weights_compile_nothing(random_models):
  (first, second, fitted), images, labels = random_models
  images, labels = images[:8], labels[:8]
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: "backend_compile" in name and compiled.append(name)
  )
  mixed = ensembles.output_space(linear, second_alone)
  by_bank = ensembles.vrf(linear, with_features)
  warm = dataclasses.replace(fitted, a=jnp.float32(0.7))
  for fn, rest, others in (
    (mixed, 0.5, (0.0, 0.25, 1.0)),
    (by_bank, fitted, (dataclasses.replace(fitted, a=0.7, b=0.2, t_ft=2.0),)),
    (by_bank, warm, (dataclasses.replace(warm, a=jnp.float32(0.2)),)),
  ):
    evaluate.run(fn, images, labels, PGD, params=(first, second, rest))
    compiled.clear()
    for other in others:
      evaluate.run(fn, images, labels, PGD, params=(first, second, other))
    assert not compiled


def test_an_output_space_ensemble_takes_temperatures(random_models):
  (first, second, _), images, _ = random_models
  fn = ensembles.output_space(linear, second_alone)
  zs, ft = linear(first, images), second_alone(second, images)
  np.testing.assert_array_equal(
    fn((first, second, 0.3, 2.0, 0.5), images),
    ensembles.ose(zs, ft, 0.3, 2.0, 0.5),
  )


def test_a_state_is_a_tree(random_models):
  (*_, fitted), _, _ = random_models
  names = trees.paths(fitted)
  assert set(names) == {"bank", "t_zs", "t_ft", "a", "b"}
  shapes = jax.tree.map(jnp.shape, fitted)
  assert shapes.k == fitted.k == 3 and shapes.squared
